"""Which values make sense: every rule that a type cannot express, section by section, in one place.

A rule names the key it is about; the reader adds file and line, so the same rule serves YAML, overrides and Python.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from mtrain.errors import RecipeError

if TYPE_CHECKING:  # schema imports this module
    from mtrain.recipe import schema

FILE_KINDS = ("text", "jsonl", "parquet")


class FieldError(RecipeError):
    """A value that breaks a rule. `key` is its name inside the section (dotted for rules over several sections)."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key = key
        self.problem = problem


def at_least(section: object, low: float, *keys: str) -> None:
    """Each of the keys is None or >= low."""
    for key in keys:
        value = getattr(section, key)
        if value is not None and not value >= low:
            raise FieldError(key, f"must be at least {low}, got {value}")


def positive(section: object, *keys: str) -> None:
    """Each of the keys is > 0."""
    for key in keys:
        if not getattr(section, key) > 0:
            raise FieldError(key, f"must be greater than 0, got {getattr(section, key)}")


def json_able(key: str, value: Any) -> None:
    """Free-form sections go into checkpoints as JSON."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FieldError(key, f"must hold plain values (numbers, text, true/false, lists, sections): {error}") from None


def one_of(key: str, value: str, valid: tuple[str, ...], also: str = "") -> None:
    """A name out of an open set, such as a registry."""
    if value not in valid:
        near = get_close_matches(value, valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise FieldError(key, f"unknown name {value!r}; {hint}choose one of {', '.join(valid)}{also}")


def check_model(model: schema.ModelRecipe) -> None:
    """A model comes from exactly one place."""
    if (model.path is None) == (model.config is None):
        given = "neither" if model.path is None else "both"
        raise FieldError(
            "path", f"give exactly one of path (hub id or directory) and config (train from scratch), got {given}"
        )
    if model.config is not None and not isinstance(model.config.get("model_type"), str):
        raise FieldError("config", "must name a model_type, for example model_type: qwen2")
    heads, kv_heads = ((model.config or {}).get(key) for key in ("num_attention_heads", "num_key_value_heads"))
    if isinstance(heads, int) and isinstance(kv_heads, int) and (kv_heads < 1 or heads % kv_heads):
        raise FieldError(
            "config.num_attention_heads", f"must be a multiple of num_key_value_heads {kv_heads}, got {heads}"
        )
    if model.config is not None and model.revision is not None:
        raise FieldError("revision", "belongs to a hub id in path; a model from config has none")
    json_able("config", model.config)
    json_able("rope", model.rope)
    at_least(model, 1, "max_position_embeddings")


def check_source(source: schema.SourceRecipe) -> None:
    """A source that reads needs a path; one that makes its own text has none."""
    reads = source.kind in (*FILE_KINDS, "hf")
    if reads and not source.path:
        what = "a hub id or a local directory" if source.kind == "hf" else "a file or a glob"
        raise FieldError("path", f"kind {source.kind} needs {what}")
    if not reads and source.path is not None:
        raise FieldError("path", f"kind {source.kind} makes its own samples and reads no path; remove it")
    if source.kind != "hf" and source.name is not None:
        raise FieldError("name", f"is the configuration of a Hugging Face data set; kind {source.kind} has none")
    positive(source, "weight")
    at_least(source, 0, "from_step")
    at_least(source, 1, "length")
    json_able("options", source.options)
    if source.until_step is not None and source.until_step <= source.from_step:
        raise FieldError("until_step", f"must be after from_step {source.from_step}, got {source.until_step}")


def check_data(data: schema.DataRecipe) -> None:
    """Something to read."""
    if not data.sources:
        raise FieldError("sources", "is empty; name at least one, for example - {kind: python-stdlib}")
    at_least(data, 0, "validation_rows")


def check_coverage(budget: schema.CoverageBudget) -> None:
    """0 < p <= 1, floor <= cap."""
    if not 0 < budget.p <= 1:
        raise FieldError("p", f"is a share of the attention mass, greater than 0 and at most 1; got {budget.p}")
    at_least(budget, 1, "floor")
    if budget.cap is not None and budget.cap < budget.floor:
        raise FieldError("cap", f"must not be below floor {budget.floor}, got {budget.cap}")


def check_topk(budget: schema.TopKBudget) -> None:
    """Counts; block offset 0 is always there, so both may be 0."""
    at_least(budget, 0, "columns", "slashes")


def check_attention(attention: schema.AttentionRecipe) -> None:
    """Sizes of the pattern."""
    at_least(attention, 1, "block", "probe")
    at_least(attention, 0, "sink", "local", "probe_spread")
    at_least(attention, 0, "dense_first_layers", "dense_last_layers", "dense_warmup_steps")
    at_least(attention, 1, "stride", "chunk", "top_k")
    if not 0 < attention.threshold <= 1:
        raise FieldError(
            "threshold", f"is a share of the attention mass, greater than 0 and at most 1; got {attention.threshold}"
        )
    _check_pattern(attention)
    if attention.backend != "auto":
        from sparse_kernels.backends import _FACTORIES  # the registry; naming a backend imports none of them

        one_of("backend", attention.backend, tuple(_FACTORIES), also=", or auto")


def _check_pattern(attention: schema.AttentionRecipe) -> None:
    """What only one pattern asks of the others' keys."""
    pattern, block = attention.pattern, attention.block
    if pattern == "xattention" and block % attention.stride:
        raise FieldError("stride", f"must divide block {block} for xattention, got {attention.stride}")
    if pattern == "moba" and attention.chunk is not None and attention.chunk % block:
        nearest = max(1, round(attention.chunk / block)) * block
        raise FieldError("chunk", f"must be a multiple of block {block} for moba, got {attention.chunk}; try {nearest}")
    if pattern == "random_columns" and attention.budget.kind != "topk":
        raise FieldError(
            "budget", "must be of kind topk for random_columns, for example {kind: topk, columns: 64, slashes: 8}"
        )
    if pattern in ("xattention", "moba") and attention.share is not None:
        raise FieldError("share", f"belongs to vertical_slash; {pattern} chooses blocks for every query head")


def check_parallel(parallel: schema.ParallelRecipe) -> None:
    """A mesh has at least one process along each axis."""
    at_least(parallel, 1, "dp", "outer", "inner")
    positive(parallel, "timeout_s")


def check_train(train: schema.TrainRecipe) -> None:
    """The optimizer loop."""
    at_least(train, 1, "steps", "seq_len", "batch_rows", "micro_rows", "loss_chunk")
    positive(train, "lr", "eps")
    at_least(train, 0, "warmup_steps", "weight_decay", "clip")
    if not 0 <= train.min_lr_ratio <= 1:
        raise FieldError("min_lr_ratio", f"is the last learning rate / lr, from 0 to 1; got {train.min_lr_ratio}")
    if not all(0 <= beta < 1 for beta in train.betas):
        raise FieldError("betas", f"must both be at least 0 and below 1, got {list(train.betas)}")


def check_checkpoint(checkpoint: schema.CheckpointRecipe) -> None:
    """Saving and stopping."""
    at_least(checkpoint, 0, "every")
    at_least(checkpoint, 1, "keep", "stop_after")
    if not checkpoint.resume:
        raise FieldError("resume", "must be auto, never or a checkpoint directory")


def check_log(log: schema.LogRecipe) -> None:
    """Intervals."""
    at_least(log, 1, "every")
    at_least(log, 0, "recall_every", "validate_every")


def check_recipe(recipe: schema.Recipe) -> None:
    """Rules over several sections."""
    if not recipe.name or "/" in recipe.name:
        raise FieldError("name", f"must be a word without '/', got {recipe.name!r}")
    at_least(recipe, 0, "seed")
    if not recipe.output:
        raise FieldError("output", "must name a directory")
    if not recipe.tokenizer:
        raise FieldError("tokenizer", "must be bytes, model, a hub id or a directory")
    if recipe.tokenizer == "model" and recipe.model.path is None:
        raise FieldError(
            "tokenizer", "'model' takes the tokenizer at model.path, but the model is made from config; use bytes"
        )
    group = recipe.parallel.dp * recipe.train.micro_rows
    if recipe.train.batch_rows % group:
        nearest = max(group, round(recipe.train.batch_rows / group) * group)
        raise FieldError(
            "train.batch_rows",
            f"must be a multiple of parallel.dp x train.micro_rows = {group}, got {recipe.train.batch_rows}; try {nearest}",
        )
    stop = recipe.checkpoint.stop_after
    if stop is not None and stop > recipe.train.steps:
        raise FieldError("checkpoint.stop_after", f"must not exceed train.steps ({recipe.train.steps}), got {stop}")
    off = {"validate_every": "0", "validate_dense": "false"}
    asked = [key for key in off if getattr(recipe.log, key)]
    if asked and not recipe.data.validation_rows:
        raise FieldError(
            f"log.{asked[0]}",
            "measures the loss on held-out rows, and none are held out; set data.validation_rows too, for example "
            f"data.validation_rows={recipe.train.batch_rows}, or {' '.join(f'log.{key}={off[key]}' for key in asked)}",
        )
    _check_every_step_has_data(recipe)


def _check_every_step_has_data(recipe: schema.Recipe) -> None:
    step = 0
    while step < recipe.train.steps:
        ends = [
            recipe.train.steps if source.until_step is None else source.until_step
            for source in recipe.data.sources
            if source.from_step <= step and (source.until_step is None or source.until_step > step)
        ]
        if not ends:
            raise FieldError(
                "data.sources", f"no source is active in step {step} of {recipe.train.steps}; see from_step, until_step"
            )
        step = max(ends)
