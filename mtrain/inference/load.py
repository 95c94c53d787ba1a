"""An engine from a model directory or hub id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from transformers.utils import logging as hf_logging

from mtrain.comm import Ring, SingleRing
from mtrain.data.tokenizer import load_tokenizer
from mtrain.errors import DataError, EvalError
from mtrain.inference.engine import Engine
from mtrain.models.build import load_config, load_model
from mtrain.recipe.schema import AttentionRecipe, ModelRecipe

DTYPES = ("auto", "float32", "bfloat16")


def load_engine(
    path: str,
    attention: AttentionRecipe | None = None,
    ring: Ring | None = None,
    *,
    max_positions: int | None = None,
    rope: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    tokenizer: str | None = None,
    chunk: int | None = None,
) -> Engine:
    """Load a model for inference on this rank.

    Example::

        from mtrain.inference import load_engine

        engine = load_engine("runs/quickstart/sparse/export")
        ids = engine.tokenizer("The grass is")["input_ids"]
        found = engine.generate(ids, max_new_tokens=20)
        print(engine.tokenizer.decode(found.tokens, skip_special_tokens=True))

    Args:
        path: local directory in Hugging Face format, such as the export of a training, or a hub id.
        attention: of the prefill; None: dense.
        ring: the ranks that share each prompt; None: this process alone.
        max_positions: tokens; replaces the model's own limit, for positions it was not trained for.
        rope: merged over the model's rope_parameters, e.g. {"rope_type": "yarn", "factor": 4.0}.
        dtype: of weights and cache. auto: bfloat16 when the config says so, else float32.
        device: None: this process's CUDA device when there is one, else the CPU.
        tokenizer: a name that `mtrain.data.tokenizer.load_tokenizer` knows; None: the model's own.
        chunk: rows whose logits exist at one time; None: 512, on a CPU fewer for a large vocabulary.

    Raises:
        ModelError: a model that is missing, damaged or not supported.
        EvalError: no tokenizer, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise EvalError(f"unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}")
    ring = ring or SingleRing()
    recipe = ModelRecipe(
        path=path,
        rope=dict(rope) if rope else None,
        max_position_embeddings=max_positions,
        dtype=_dtype_of(path) if dtype == "auto" else _known(dtype),
    )
    # First the config: what is wrong with the path is said of the model, not of its tokenizer.
    load_config(recipe)
    try:
        words = load_tokenizer(tokenizer or path)
    except DataError as error:
        raise EvalError(
            f"no tokenizer for {path!r}, and without one there are no prompts: {error}; save the model's tokenizer into its "
            "directory"
        ) from error
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # every rank loads, and a command has bars of its own
    try:
        model = load_model(recipe, world_size=ring.world_size, vocab_size=len(words))
    finally:
        if bars:
            hf_logging.enable_progress_bar()
    place: Any = device
    if place is None:
        place = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else "cpu"
    return Engine(model.to(place), words, attention, ring, chunk=chunk)


def _dtype_of(path: str) -> Literal["float32", "bfloat16"]:
    stored = getattr(load_config(ModelRecipe(path=path)), "dtype", None)
    return "bfloat16" if stored in (torch.bfloat16, "bfloat16") else "float32"


def _known(dtype: str) -> Literal["float32", "bfloat16"]:
    return "bfloat16" if dtype == "bfloat16" else "float32"
