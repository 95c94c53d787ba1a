"""Settings that a recipe may have and that are probably not meant; `mtrain inspect` and `mtrain train` say them."""

from __future__ import annotations

from mtrain.recipe.schema import AttentionRecipe, Recipe, TopKBudget

# Bytes of a head's chosen blocks, on one rank and in one layer, beyond which a warning is due.
CHOSEN_BLOCKS = 1 << 20


def warnings(recipe: Recipe) -> list[str]:
    """Settings that are allowed but are probably not meant."""
    found = []
    attention, train, ring = recipe.attention, recipe.train, recipe.parallel.ring_size
    blocks = -(-train.seq_len // attention.block)
    if blocks < ring:
        found.append(
            f"{blocks} blocks for {ring} ranks: some ranks hold only padding; lower attention.block or parallel"
        )
    found += _of_pattern(attention, train.seq_len)
    found += _of_chosen_blocks(attention, blocks, ring)
    if attention.pattern in ("xattention", "moba") and attention.refresh != "every_step" and recipe.data.packing:
        found.append(
            f"attention.refresh keeps the blocks that {attention.pattern} chose within the documents of one micro-batch: rows "
            "whose documents begin elsewhere lose most of theirs; estimate at every_step, or set data.packing=false"
        )
    if ring > 1 and attention.layout == "contiguous":
        found.append(
            "contiguous layout: causal attention leaves the first rank nearly idle; striped or balanced spread the work"
        )
    if recipe.parallel.engine == "fsdp" and recipe.parallel.world_size == 1:
        found.append("parallel.engine=fsdp: one process alone holds everything, as with ddp")
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


def _of_pattern(attention: AttentionRecipe, seq_len: int) -> list[str]:
    """Patterns that compute everything, or keep more than they need."""
    found = []
    if attention.pattern != "dense" and attention.sink + attention.local >= seq_len:
        found.append(f"sink {attention.sink} + local {attention.local} cover all {seq_len} tokens: attention is dense")
    chunk = attention.chunk or attention.block
    if attention.pattern == "moba" and attention.top_k * chunk >= seq_len:
        found.append(
            f"attention.top_k={attention.top_k} of {-(-seq_len // chunk)} chunks: moba computes everything at "
            f"{seq_len} tokens; lower top_k or chunk"
        )
    budget = attention.budget
    if attention.pattern in ("vertical_slash", "random_columns") and isinstance(budget, TopKBudget):
        for name, count in (("columns", budget.columns), ("slashes", budget.slashes)):
            if count >= seq_len:
                found.append(
                    f"attention.budget.{name}={count}: {attention.pattern} computes everything at {seq_len} tokens; "
                    f"lower {name}"
                )
    return found


def _of_chosen_blocks(attention: AttentionRecipe, blocks: int, ring: int) -> list[str]:
    """A bit per pair of blocks that is not in the future: of a rank's own query blocks until the backward pass, and of all where
    a choice is kept for later steps."""
    if attention.pattern not in ("xattention", "moba"):
        return []
    whole = blocks * (blocks + 1) / 16
    found = []
    if whole / ring > CHOSEN_BLOCKS:
        found.append(
            f"{attention.pattern} keeps {whole / ring / 2**20:,.1f} MiB of chosen blocks for every head of every layer until the "
            "backward pass: raise attention.block, or spread the sequence over more ranks"
        )
    if attention.refresh != "every_step" and whole > CHOSEN_BLOCKS:
        found.append(
            f"attention.refresh keeps the choices of all {blocks} blocks over steps, {whole / 2**20:,.1f} MiB for every head of "
            "every layer on every rank: raise attention.block, or estimate at every_step"
        )
    return found
