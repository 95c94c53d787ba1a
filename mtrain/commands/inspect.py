"""Print a recipe as it resolves, without starting anything: every value, the mesh, what each rank holds, and warnings.

The part above the line of dashes is itself a recipe.
"""

from __future__ import annotations

import argparse

import yaml

from mtrain.cli import add_recipe_arguments, split_words
from mtrain.recipe import ParallelRecipe, Recipe, load_recipe
from mtrain.recipe.advice import warnings


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print and return 0; an impossible recipe is an error as in `train`."""
    path, overrides = split_words(args.words)
    recipe = load_recipe(path, overrides)
    print(yaml.safe_dump(recipe.to_dict(), sort_keys=False, width=120).rstrip())
    print("# " + "-" * 60)
    for name, value in derived(recipe).items():
        print(f"# {name:<24}{value}")
    for warning in warnings(recipe):
        print(f"# warning: {warning}")
    return 0


def derived(recipe: Recipe) -> dict[str, str]:
    """What follows from the recipe, by name."""
    from mtrain.layout import RingLayout

    parallel, train, attention = recipe.parallel, recipe.train, recipe.attention
    layout = RingLayout.build(attention.layout, train.seq_len, parallel.ring_size, attention.block)
    tokens = train.batch_rows * train.seq_len
    padding = layout.padded_len - train.seq_len
    return {
        "processes": f"{parallel.world_size} = dp {parallel.dp} x outer {parallel.outer} x inner {parallel.inner}",
        "model state per rank": _model_state(parallel),
        "layout": f"{attention.layout}, {layout.num_blocks} blocks of {attention.block} tokens",
        "tokens per rank": f"{layout.local_len:,} of {train.seq_len:,}"
        + (f" (+ {padding} padding)" if padding else ""),
        "micro-batches per step": f"{recipe.accumulation} of {train.micro_rows} row(s) on each of {parallel.dp} dp rank(s)",
        "tokens per step": f"{tokens:,}",
        "tokens of the run": f"{tokens * train.steps:,} in {train.steps:,} steps",
        "data mix at the start": ", ".join(_mix(recipe)),
        "held out": _held_out(recipe),
        "output": recipe.output,
    }


def _model_state(parallel: ParallelRecipe) -> str:
    share = f"1/{parallel.world_size} of" if parallel.engine == "fsdp" else "all"
    return f"{parallel.engine}: {share} weights, gradients and AdamW moments"


def _mix(recipe: Recipe) -> list[str]:
    active = [source for source in recipe.data.sources if source.from_step == 0]
    total = sum(source.weight for source in active)
    return [f"{source.kind} {100 * source.weight / total:.0f} %" for source in active]


def _held_out(recipe: Recipe) -> str:
    rows, log = recipe.data.validation_rows, recipe.log
    if not rows:
        return "nothing"
    often = f"every {log.validate_every} steps and " if log.validate_every else ""
    also = ", with dense attention too" if log.validate_dense and recipe.attention.pattern != "dense" else ""
    return f"{rows} rows, measured {often}at the end{also}"
