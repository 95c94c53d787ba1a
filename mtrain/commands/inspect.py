"""Print a recipe as it resolves, without starting anything: every value, the mesh, what each rank holds, and warnings.

The part above the line of dashes is itself a recipe.
"""

from __future__ import annotations

import argparse

import yaml

from mtrain.cli import add_recipe_arguments, split_words
from mtrain.recipe import Recipe, load_recipe
from mtrain.recipe.schema import TopKBudget

# Bytes of a head's table of blocks beyond which a warning is due.
BLOCK_TABLE = 4 << 20


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
        "layout": f"{attention.layout}, {layout.num_blocks} blocks of {attention.block} tokens",
        "tokens per rank": f"{layout.local_len:,} of {train.seq_len:,}"
        + (f" (+ {padding} padding)" if padding else ""),
        "micro-batches per step": f"{recipe.accumulation} of {train.micro_rows} row(s) on each of {parallel.dp} dp rank(s)",
        "tokens per step": f"{tokens:,}",
        "tokens of the run": f"{tokens * train.steps:,} in {train.steps:,} steps",
        "data mix at the start": ", ".join(_mix(recipe)),
        "output": recipe.output,
    }


def _mix(recipe: Recipe) -> list[str]:
    active = [source for source in recipe.data.sources if source.from_step == 0]
    total = sum(source.weight for source in active)
    return [f"{source.kind} {100 * source.weight / total:.0f} %" for source in active]


def warnings(recipe: Recipe) -> list[str]:
    """Settings that are allowed but are probably not meant."""
    found = []
    attention, train, ring = recipe.attention, recipe.train, recipe.parallel.ring_size
    blocks = -(-train.seq_len // attention.block)
    if blocks < ring:
        found.append(
            f"{blocks} blocks for {ring} ranks: some ranks hold only padding; lower attention.block or parallel"
        )
    if attention.pattern != "dense" and attention.sink + attention.local >= train.seq_len:
        found.append(
            f"sink {attention.sink} + local {attention.local} cover all {train.seq_len} tokens: attention is dense"
        )
    chunk = attention.chunk or attention.block
    if attention.pattern == "moba" and attention.top_k * chunk >= train.seq_len:
        found.append(
            f"attention.top_k={attention.top_k} of {-(-train.seq_len // chunk)} chunks: moba computes everything at "
            f"{train.seq_len} tokens; lower top_k or chunk"
        )
    budget = attention.budget
    if attention.pattern in ("vertical_slash", "random_columns") and isinstance(budget, TopKBudget):
        for name, count in (("columns", budget.columns), ("slashes", budget.slashes)):
            if count >= train.seq_len:
                found.append(
                    f"attention.budget.{name}={count}: {attention.pattern} computes everything at {train.seq_len} tokens; "
                    f"lower {name}"
                )
    if attention.pattern in ("xattention", "moba") and blocks**2 > BLOCK_TABLE:
        found.append(
            f"{attention.pattern} keeps a table of {blocks} x {blocks} blocks for every head of every layer, "
            f"{blocks**2 / 2**20:,.0f} MiB each: raise attention.block"
        )
    if ring > 1 and attention.layout == "contiguous":
        found.append(
            "contiguous layout: causal attention leaves the first rank nearly idle; striped or balanced spread the work"
        )
    limit = (recipe.model.config or {}).get("max_position_embeddings")
    limit = recipe.model.max_position_embeddings or limit
    if isinstance(limit, int) and limit < train.seq_len:
        found.append(f"max_position_embeddings {limit} is below train.seq_len {train.seq_len}")
    if recipe.model.dtype == "bfloat16":
        found.append(
            "bfloat16 weights: updates smaller than 1/256 of a weight are lost; float32 weights with precision bf16 are safer"
        )
    if recipe.checkpoint.every == 0 and train.steps > 1000:
        found.append(f"checkpoint.every is 0: an interruption loses all of {train.steps} steps")
    return found
