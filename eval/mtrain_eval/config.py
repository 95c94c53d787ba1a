"""What an evaluation is asked to do, from the words of a command line or of a program."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrain.errors import EvalError, RecipeError
from mtrain.recipe.parts import attention_from_dict, load_attention, read_size
from mtrain.recipe.schema import AttentionRecipe

DENSE, SPARSE = "dense", "sparse"
MODES = {"dense": (DENSE,), "sparse": (SPARSE,), "both": (DENSE, SPARSE)}
DEFAULT_SUITES = ("ruler", "niah", "infinitebench", "pg19")
LIMIT = 50


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation.

    Attributes:
        model: directory in Hugging Face format, or a hub id.
        suites: names of `mtrain_eval.suites.SUITES`.
        tasks: only these; empty: all tasks of the suites.
        lengths: tokens of prompt and answer together.
        attention: how prompts are read, "dense" and "sparse" in this order; generated tokens always see everything.
        limit: samples per (task, length); fewer where a task has no more.
        seed: of all samples.
        output: the run's directory.
        recipe: file whose attention section "sparse" means; None: that of the model's training.
        data_dir: directory of the public data sets.
        online: may data sets be fetched?
        max_positions: longest text the model may be given; None: its own limit.
        rope: merged over the model's rope_parameters.
        dtype: auto, float32 or bfloat16.
    """

    model: str
    lengths: tuple[int, ...]
    suites: tuple[str, ...] = DEFAULT_SUITES
    tasks: tuple[str, ...] = ()
    attention: tuple[str, ...] = (DENSE,)
    limit: int = LIMIT
    seed: int = 0
    output: Path = Path("runs/eval")
    recipe: str | None = None
    data_dir: Path | None = None
    online: bool = False
    max_positions: int | None = None
    rope: Mapping[str, Any] | None = None
    dtype: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return plain


def split_names(text: str) -> tuple[str, ...]:
    """``a,b, c`` -> (a, b, c)."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def read_lengths(text: str) -> tuple[int, ...]:
    """``1K,4096`` -> (1024, 4096), in order, each once.

    Raises:
        EvalError: not sizes.
    """
    try:
        found = {read_size(word, "--lengths") for word in split_names(text)}
    except RecipeError as error:
        raise EvalError(str(error)) from None
    if not found:
        raise EvalError("--lengths: give at least one, for example --lengths 4K,8K")
    return tuple(sorted(found))


def read_training(model: str) -> dict[str, Any]:
    """What mtrain.json of an export says of its training: step, tokens, recipe. Empty: no export of mtrain.

    Raises:
        EvalError: the file is there and is not what mtrain writes.
    """
    path = Path(model) / "mtrain.json"
    if not path.is_file():
        return {}
    try:
        training = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(training, dict) and isinstance(training.get("recipe", {}), dict)
    except (ValueError, AssertionError):
        raise EvalError(f"{path} is damaged; export the model again, or delete the file and give --recipe") from None
    return training


def attention_recipes(config: EvalConfig) -> dict[str, AttentionRecipe | None]:
    """Per kind of attention its recipe, None for dense.

    Raises:
        EvalError: "sparse" without anything that says which.
    """
    found: dict[str, AttentionRecipe | None] = {}
    for mode in config.attention:
        found[mode] = None if mode == DENSE else _sparse(config)
    return found


def _sparse(config: EvalConfig) -> AttentionRecipe:
    hint = "say which with --recipe FILE (its attention section counts), or evaluate with --attention dense"
    if config.recipe is not None:
        recipe, origin = load_attention(config.recipe), config.recipe
    else:
        origin = f"{config.model}/mtrain.json"
        stored = read_training(config.model).get("recipe", {}).get("attention")
        if stored is None:
            raise EvalError(f"{config.model} does not say which sparse attention it was trained with; {hint}")
        recipe = attention_from_dict(stored, origin)
    if recipe.pattern == DENSE:
        raise EvalError(f"sparse attention is asked for, but the attention of {origin} is dense; {hint}")
    return recipe
