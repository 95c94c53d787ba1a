"""MoBA: each query attends to the chunks of keys whose mean it likes best, after Lu et al., "MoBA: Mixture of Block Attention
for Long-Context LLMs" (arXiv 2502.13189).

The keys are cut into chunks of ``chunk`` tokens; the gate score of query i for chunk c is q_i . mean(k of c). MoBA gives each
query its ``top_k`` best chunks among those that are not in its future, its own chunk always among them.

Kernels work on blocks of queries, so here the queries of a block choose together: the gate score of a block is the mean of its
queries' (= mean(q of the block) . mean(k of c), so one small matrix product), and the block gets the ``top_k`` chunks with the
best mean. Among all sets of top_k chunks that the queries of a block could share, this one has the largest sum of gate scores,
and a query computes top_k * chunk keys exactly as in MoBA. The union of the queries' own choices would give every query all that
MoBA gives it, but at up to block times the cost: 64 queries with top_k 8 each may ask for 449 chunks, and the top_k of a recipe
would say nothing about its speed. The price is that queries of one block that want different things share one budget;
a smaller block lowers it, and ``block: 1`` is MoBA itself (`benchmarks/parity.md` measures the difference on a small model: 31 %
against 56 % of needles found with blocks of 8 and of 1).

Own chunk, future and document are those of the block's first row; a chunk is seen if its last token belongs to that row's
document or a later one (its mean may reach back into another document, the attention never does). The blocks of the first
``sink`` tokens of the document and the distances 0..``local`` come on top; both may be 0. Choices are made per query head.

Ranks exchange the sums of their blocks, NB * D floats per query and key-value head in all, each decides some heads, and every
query block's bits go to the rank that holds it. A sum is added up as a tree of fixed shape and every product has the shape of
one process, so the choice is bit for bit that of one process. While it decides, a rank holds the scores of one head, 4 * NB *
chunks bytes, and NB * chunks bools for each of its heads and for what a block may see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.errors import MtrainError
from mtrain.patterns.base import Choice, Site
from mtrain.patterns.blocks import BlockChoice, first_visible
from mtrain.patterns.documents import Documents
from mtrain.patterns.placement import Placement
from mtrain.recipe.schema import AttentionRecipe
from sparse_kernels import BlockRows, SparsePattern
from sparse_kernels.bits import pack_bits, unpack_bits, upload
from sparse_kernels.reference import accumulation_dtype

# Scores sorted at a time: with them come their places, 8 bytes each.
SORTED_SCORES = 1 << 24


class MobaPattern:
    """Chunks by their mean key. A kept choice is the set of (query block, key block) without sinks and locals."""

    keeps = BlockChoice

    def __init__(self, recipe: AttentionRecipe) -> None:
        self.recipe = recipe

    def index(self, q: Tensor, k: Tensor, site: Site, kept: Choice | None) -> tuple[SparsePattern, Choice | None]:
        """See `Pattern`."""
        recipe = self.recipe
        if kept is None:
            chunk = site.placement.block if recipe.chunk is None else recipe.chunk
            kept = select_moba(q, k, site.documents, site.placement, chunk=chunk, top_k=recipe.top_k)
        assert isinstance(kept, BlockChoice)
        return kept.pattern(site.documents, site.placement, sink=recipe.sink, local=recipe.local), kept


@torch.no_grad()
def select_moba(
    q: Tensor, k: Tensor, documents: Documents, placement: Placement, *, chunk: int, top_k: int
) -> BlockChoice:
    """The chunks of this rank's query blocks in one layer, as blocks (module docstring). Equal scores: the earlier chunk.

    Args:
        q, k: this rank's shards [B, n, H, D] and [B, n, K, D] after rotary embedding.
        chunk: tokens per chunk, a multiple of the block.
        top_k: chunks per query block, its own included.

    Raises:
        MtrainError: a chunk that is no multiple of the block.
    """
    if chunk < 1 or chunk % placement.block or top_k < 1:
        raise MtrainError(
            f"moba: the chunk must be a multiple of the block of {placement.block} tokens and top_k at least 1, got "
            f"{chunk} and {top_k}"
        )
    batch, heads, kv_heads = q.shape[0], q.shape[2], k.shape[2]
    per, size, b = chunk // placement.block, placement.num_blocks, placement.block
    sums = _block_sums(torch.cat([q.detach(), k.detach()], 2), placement)  # [B, NB, H + K, D]
    queries, keys = sums[:, :, :heads], sums[:, :, heads:]
    keys = _tree_sum(_padded(keys, -size % per).unflatten(1, (-1, per)), 2)
    filled = torch.full((size,), b, device=q.device)
    filled[-1] = placement.seq_len - (size - 1) * b
    queries = queries / filled[:, None, None]
    keys = keys / torch.nn.functional.pad(filled, (0, -size % per)).unflatten(0, (-1, per)).sum(1)[:, None, None]
    hidden, own = _chunks_seen(documents, placement, chunk, batch, q.device)

    ring = placement.ring
    share = -(-batch * heads // ring.world_size)
    mine = range(ring.rank * share, (ring.rank + 1) * share)
    chosen = torch.zeros(share, size, hidden.shape[2], dtype=torch.bool, device=q.device)
    lines = max(1, SORTED_SCORES // hidden.shape[2])
    with torch.autocast(q.device.type, enabled=False):
        for place, unit in enumerate(mine):
            if unit >= batch * heads:
                break
            row, head = divmod(unit, heads)
            gate = queries[row, :, head] @ keys[row, :, head // (heads // kv_heads)].T
            gate.masked_fill_(hidden[row], -torch.inf).masked_fill_(own, torch.inf)
            for part, into in zip(gate.split(lines), chosen[place].split(lines), strict=True):
                into.scatter_(-1, part.sort(dim=-1, descending=True, stable=True).indices[:, :top_k], True)
            chosen[place].masked_fill_(hidden[row], False)
    chosen = _to_their_ranks(chosen, placement)[: batch * heads].unflatten(0, (batch, heads))
    return BlockChoice(BlockRows.of_table(chosen.repeat_interleave(per, 3)[..., :size], placement.blocks))


def _to_their_ranks(chosen: Tensor, placement: Placement) -> Tensor:
    """bool [heads of all ranks, n, chunks] of the n query blocks held here, from each rank's own [its heads, NB, chunks]: one
    all-to-all of bits."""
    layout, size = placement.layout, placement.num_blocks
    if layout is None:
        return chosen
    packed = pack_bits(chosen)
    wanted = [upload(layout.blocks(rank).clamp(max=size - 1), packed.device) for rank in range(layout.ranks)]
    received = placement.ring.all_to_all([packed.index_select(1, rows) for rows in wanted])
    return unpack_bits(torch.cat(received), chosen.shape[-1])


def _chunks_seen(
    documents: Documents, placement: Placement, chunk: int, batch: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """bool [B, NB, chunks]: is the chunk hidden from the query block; bool [NB, chunks]: is it the block's own?"""
    rows = torch.arange(placement.num_blocks)
    start = first_visible(documents, placement.block, rows, batch, device)[..., None]
    first = torch.arange(-(-placement.seq_len // chunk), device=device) * chunk
    own = (upload(rows, device) * placement.block // chunk)[:, None] == first // chunk
    later = first > upload(rows, device)[:, None] * placement.block
    return later | (first + chunk <= start), own


def _block_sums(x: Tensor, placement: Placement) -> Tensor:
    """[B, NB, heads, D]: the sum of each block's real tokens, of the whole sequence, float32 (float64 stays)."""
    block, blocks = placement.block, placement.blocks
    x = _padded(x.to(accumulation_dtype(x.dtype)), blocks.numel() * block - x.shape[1])
    position = (blocks[:, None] * block + torch.arange(block)).flatten()
    x = x.masked_fill(upload(position >= placement.seq_len, x.device)[:, None, None], 0.0)
    sums = _tree_sum(x.unflatten(1, (-1, block)), 2)
    if placement.layout is None:
        return sums
    return torch.cat(placement.ring.all_gather(sums.contiguous()), 1).index_select(1, upload(placement.order, x.device))


def _tree_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over a dimension by halves: additions of whole tensors, whose order no library decides."""
    while (size := x.shape[dim]) > 1:
        half = size // 2
        rest = x.narrow(dim, 2 * half, size - 2 * half)
        x = torch.cat([x.narrow(dim, 0, half) + x.narrow(dim, half, half), rest], dim)
    return x.squeeze(dim)


def _padded(x: Tensor, count: int) -> Tensor:
    """Zeros behind dimension 1 of [B, n, heads, D]."""
    return torch.nn.functional.pad(x, (0, 0, 0, 0, 0, count)) if count else x
