"""A model and a corpus small enough to train in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtrain.recipe import Recipe, recipe_from_dict

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def corpus(directory: Path) -> Path:
    """Documents of very different lengths, with structure that a model can learn."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "corpus.txt"
    words = ("red", "green", "blue", "one", "two", "three")
    documents = [" ".join(words[(i * i + j) % 6] for j in range(2 + 7 * i % 61)) for i in range(60)]
    file.write_text("\n\n".join(documents))
    return file


def tiny_recipe(directory: Path, run: str = "run", **changes: Any) -> Recipe:
    """A run of 6 steps on 2 rows of 100 tokens; Output in ``directory / run``; ``section__key=value`` changes a value."""
    values: dict[str, Any] = {
        "model": {"config": dict(MODEL)},
        "output": str(directory / run),
        "data": {"sources": [{"kind": "text", "path": str(corpus(directory)), "options": {"by": "paragraph"}}]},
        "train": {"steps": 6, "seq_len": 100, "lr": 3e-3, "batch_rows": 2, "micro_rows": 1, "loss_chunk": 32},
        "attention": {
            "block": 8,
            "sink": 2,
            "local": 8,
            "probe": 8,
            "budget": {"kind": "topk", "columns": 6, "slashes": 2},
        },
        "checkpoint": {"every": 2},
        "log": {"every": 1, "tensorboard": False},
        "parallel": {"timeout_s": 30},
    }
    for name, value in changes.items():
        *path, key = name.split("__")
        section = values
        for part in path:
            section = section.setdefault(part, {})
        section[key] = value
    return recipe_from_dict(values)
