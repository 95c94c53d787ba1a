"""Models: from a hub id, a local directory, or a config with seeded random weights. Nothing is loaded that could run
code."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mtrain.errors import ModelError
from mtrain.models.refuse import refuse, refuse_family
from mtrain.models.rope import CONFIG_ERRORS, check_rope, override_rope
from mtrain.recipe.schema import ModelRecipe

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Accepted by configs besides their own fields: the spelling of rotary parameters before transformers 5.
_OLD_KEYS = {"rope_theta", "rope_scaling", "torch_dtype"}


def load_model(
    recipe: ModelRecipe, *, seed: int = 0, world_size: int = 1, vocab_size: int | None = None
) -> PreTrainedModel:
    """The model of a recipe, on the CPU, ready for `attach`.

    Args:
        recipe: which model, its RoPE override, position limit and dtype.
        seed: of random weights; the same on all ranks gives the same weights on all ranks. The global generator is left
            alone.
        world_size: ranks of the ring, for refusals that depend on it.
        vocab_size: tokens of the tokenizer. Fills a from-scratch config that names no vocab_size; a model with fewer is
            refused.

    Returns:
        A causal language model in training mode with its own copy of the config.

    Raises:
        ModelError: a model that is missing, needs code or pickles to load, lacks weights, or that sparse attention
            would change.
    """
    config = load_config(recipe, vocab_size=vocab_size)
    before = config
    config = override_rope(config, recipe.rope, recipe.max_position_embeddings)
    refuse(config, world_size)
    _check_vocabulary(config, vocab_size)
    dtype = _DTYPES[recipe.dtype]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if recipe.path is None:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        else:
            model = _load_weights(recipe, config, dtype)
    check_rope(model, before if recipe.rope else None)
    model.train()
    return model


def adopt_special_tokens(model: PreTrainedModel, tokenizer: Any, given: Mapping[str, Any]) -> None:
    """A model from scratch begins, ends and pads as its tokenizer does, unless its config says otherwise.

    A family's default ids belong to that family's own tokenizer; with another one, ``generate`` would never stop.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name not in given:
            for config in (model.config, model.generation_config):
                setattr(config, name, getattr(tokenizer, name))


def load_config(recipe: ModelRecipe, *, vocab_size: int | None = None) -> Any:
    """The transformers config a recipe names, before any override. See `load_model`."""
    if recipe.config is not None:
        return _config_from(recipe.config, vocab_size)
    assert recipe.path is not None, "a ModelRecipe has a path or a config"
    _check_directory(recipe.path)
    try:
        config = AutoConfig.from_pretrained(recipe.path, revision=recipe.revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the config of model {recipe.path!r}{_at(recipe)}: {_first_line(error)}"
        ) from error
    refuse_family(config.model_type)
    return copy.deepcopy(config)


def _config_from(given: Mapping[str, Any], vocab_size: int | None) -> Any:
    settings = copy.deepcopy(dict(given))
    model_type = settings.pop("model_type", None)
    refuse_family(model_type)
    known = set(AutoConfig.for_model(model_type).to_dict()) | _OLD_KEYS
    for key in settings:
        # transformers stores a misspelt key without a word.
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"model.config has no key {key!r} for {model_type}{hint}")
    if vocab_size is not None:
        settings.setdefault("vocab_size", vocab_size)
    try:
        return AutoConfig.for_model(model_type, **settings)
    except CONFIG_ERRORS as error:
        raise ModelError(f"{model_type} does not accept model.config: {' '.join(str(error).split())}") from error


def _check_directory(path: str) -> None:
    """A local directory must hold a config and safetensors; a path that cannot be a hub id must exist."""
    directory = Path(path).expanduser()
    if not directory.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise ModelError(
                f"model.path {path!r} does not exist; give a local directory or a hub id such as Qwen/Qwen2.5-3B"
            )
        return
    if not directory.is_dir() or not (directory / "config.json").is_file():
        raise ModelError(f"model.path {path!r} is no model directory: config.json is missing")
    if not any(directory.glob("*.safetensors")):
        pickles = sorted(p.name for p in directory.glob("*.bin"))
        found = (
            f"only {', '.join(pickles[:3])}, pickles, which can run code when they are read"
            if pickles
            else "no weights"
        )
        raise ModelError(
            f"model.path {path!r} holds {found}; mtrain reads safetensors only: save it with safetensors first"
        )


def _load_weights(recipe: ModelRecipe, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    assert recipe.path is not None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            recipe.path,
            config=config,
            revision=recipe.revision,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"cannot load model {recipe.path!r}{_at(recipe)} from safetensors: {_first_line(error)}"
        ) from error
    model, report = loaded
    for problem in ("missing_keys", "mismatched_keys"):
        if report.get(problem):
            names = [str(name) for name in sorted(report[problem], key=str)]
            shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            raise ModelError(
                f"the weights of {recipe.path!r} do not fit its config ({problem.replace('_', ' ')}: {shown}): these "
                "parameters would start at random"
            )
    assert isinstance(model, PreTrainedModel)
    return model


def _check_vocabulary(config: Any, vocab_size: int | None) -> None:
    if vocab_size is not None and config.vocab_size < vocab_size:
        raise ModelError(
            f"the tokenizer has {vocab_size} tokens but the model embeds only {config.vocab_size}: "
            "use the model's own tokenizer (tokenizer: model) or a config with a larger vocab_size"
        )


def _at(recipe: ModelRecipe) -> str:
    return f" at revision {recipe.revision!r}" if recipe.revision else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
