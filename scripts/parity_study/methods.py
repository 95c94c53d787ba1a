"""What is trained: one warm start per seed, and from it the same continuation under every kind of attention."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mtrain.recipe import Recipe, recipe_from_dict
from mtrain.recipe.schema import AttentionRecipe

BASE_LEN, SEQ_LEN = 256, 512
BASE_STEPS, STEPS, WARMUP = 1100, 160, 20
# The continuation's last hard question: pairs in the haystack, questions per row.
PAIRS, QUESTIONS = 32, 8

MODEL = {
    "model_type": "qwen2",
    "vocab_size": 388,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": BASE_LEN,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
}

# Every sparse method may see about a third of the causal pairs at 512 tokens. Slashes are lowered to blocks, and single
# tokens are what matters here, hence the small block.
COMMON: dict[str, Any] = {"block": 8, "sink": 4, "local": 16, "layout": "contiguous"}
TOP_K = {"kind": "topk", "columns": SEQ_LEN // 8, "slashes": 8}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {"pattern": "dense"},
    "vertical_slash": {"pattern": "vertical_slash", "budget": TOP_K},
    "vertical_slash frozen": {
        "pattern": "vertical_slash",
        "budget": TOP_K,
        "refresh": "frozen",
        "dense_warmup_steps": WARMUP,
    },
    "a_shape": {"pattern": "a_shape", "sink": 16, "local": 80},
    "xattention": {"pattern": "xattention", "stride": 2, "threshold": 0.6},
    "moba": {"pattern": "moba", "chunk": 16, "top_k": 6},
    "random columns (control)": {"pattern": "random_columns", "budget": TOP_K},
    "window (control)": {"pattern": "a_shape", "sink": 0, "local": 96},
}
# Block selectors are said to need training under their masks: do they get there with four times as much?
LONGER = {f"{name}, 4x steps": name for name in ("xattention", "moba")}
METHODS |= {longer: METHODS[name] for longer, name in LONGER.items()}
# Evaluated only. Here a block of queries chooses together; in the paper every query chooses for itself.
MASKS = {"moba, each query for itself": {**METHODS["moba"], "block": 1}}
CONTROLS = tuple(name for name in METHODS if "control" in name)


def evaluations(method: str) -> list[str]:
    """Under which attention a trained model is evaluated: dense, and its own. The densely trained one under all of them, for
    what a mask does to a model that never met it; a frozen one also with fresh masks."""
    names = ["dense", method]
    if method == "dense":
        names += masks()
    elif METHODS[method].get("refresh") == "frozen":
        names.append("vertical_slash")
    return list(dict.fromkeys(names))


def masks() -> list[str]:
    """The different attentions that need nothing from a run."""
    trained = [name for name in METHODS if name not in LONGER and METHODS[name].get("refresh") != "frozen"]
    return [*trained, *MASKS]


def attention_of(name: str, recipe: Recipe) -> AttentionRecipe:
    """The attention of that name, checked as part of a run's recipe."""
    return recipe_from_dict({**recipe.to_dict(), "attention": {**COMMON, **(METHODS | MASKS)[name]}}).attention


def retrieval(pairs: int | list[int], questions: int, **where: Any) -> dict[str, Any]:
    """A source of key-value samples in a haystack of symbols."""
    pairs = [pairs, pairs] if isinstance(pairs, int) else pairs
    options = {"pairs": pairs, "questions": [questions, questions], "haystack": "symbols"}
    return {"kind": "retrieval", "options": options, **where}


def induction(**where: Any) -> dict[str, Any]:
    """A source of random segments tiled with a random period, without which recall is not learnt."""
    return {"kind": "induction", "length": 64, "options": {"vocab": "symbols"}, **where}


def base_recipe(runs: Path, seed: int) -> Recipe:
    """The warm start: dense, up to 256 tokens; induction first, then ever longer recall beside it."""
    sources = [
        induction(weight=1, until_step=600),
        induction(weight=1, from_step=600),
        retrieval([4, 8], 8, length=64, from_step=600, until_step=750),
        retrieval([8, 16], 16, length=128, from_step=750, until_step=900),
        retrieval(16, 16, from_step=900),
    ]
    return _recipe(runs / f"seed{seed}" / "base", seed, {"config": MODEL}, sources, METHODS["dense"], BASE_STEPS)


def method_recipe(runs: Path, seed: int, method: str) -> Recipe:
    """The continuation at 512 tokens: the same rows for every method."""
    model = {"path": str(runs / f"seed{seed}" / "base" / "export"), "max_position_embeddings": SEQ_LEN}
    sources = [induction(weight=1), retrieval(PAIRS, QUESTIONS, weight=3)]
    steps = 4 * STEPS if method in LONGER else STEPS
    return _recipe(runs / f"seed{seed}" / slug(method), seed, model, sources, METHODS[method], steps)


def slug(method: str) -> str:
    """A method's name as a folder."""
    return "_".join(re.findall(r"\w+", method))


def _recipe(
    output: Path,
    seed: int,
    model: dict[str, Any],
    sources: list[dict[str, Any]],
    attention: dict[str, Any],
    steps: int,
) -> Recipe:
    extends = "path" in model
    return recipe_from_dict(
        {
            "name": output.name,
            "seed": seed,
            "output": str(output),
            "model": model,
            "tokenizer": "model" if extends else "bytes",
            "data": {"sources": sources},
            "attention": {**COMMON, **attention},
            "train": {
                "steps": steps,
                "seq_len": SEQ_LEN if extends else BASE_LEN,
                "batch_rows": 8,
                "micro_rows": 8,
                "lr": 2e-3 if extends else 3e-3,
                "warmup_steps": WARMUP if extends else 100,
                "schedule": "linear" if extends else "constant",
                "min_lr_ratio": 0.05,
                "weight_decay": 0.1,
            },
            "checkpoint": {"every": 100, "keep": 1},
            "log": {"every": 10, "tensorboard": False, "recall_every": 20 if extends else 0},
        }
    )
