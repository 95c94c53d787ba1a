"""Settings that a recipe may have and that are probably not meant; `mtrain inspect` and `mtrain train` say them."""

from __future__ import annotations

from mtrain.recipe.schema import AttentionRecipe, Recipe, TopKBudget

# Bytes of a head's table of blocks beyond which a warning is due.
BLOCK_TABLE = 4 << 20


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
    blocks = -(-seq_len // attention.block)
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
    if attention.pattern in ("xattention", "moba") and blocks**2 > BLOCK_TABLE:
        found.append(
            f"{attention.pattern} keeps a table of {blocks} x {blocks} blocks for every head of every layer, "
            f"{blocks**2 / 2**20:,.0f} MiB each: raise attention.block"
        )
    return found
