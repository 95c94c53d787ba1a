"""XAttention: key blocks chosen by sums along antidiagonals, after Xu et al., "XAttention: Block Sparse Attention with
Antidiagonal Scoring" (arXiv 2503.16428).

With stride s, tokens are taken in groups of s. For query group g and key group h the sum over the antidiagonal of their
s x s square of scores,

    a[g, h] = scale / s * sum_t  q[g s + s - 1 - t] . k[h s + t],

touches every query and every key of the two groups once, and is one dot product of length s * D after both have been
reshaped. A softmax over the key groups that g may see, summed over the groups of a query block and of a key block, says how
much of the query block's attention the key block gets. A query block keeps the fewest key blocks whose share, together with
that of the forced ones, is at least ``threshold``.

Forced are the diagonal block, the blocks of the first ``sink`` tokens of the document (the paper forces the first block: sink
>= 1) and those of the distances 0..``local``; they come first, and their mass counts. A key group is seen by a query group if
it is not later and its last token belongs to the document of the group's first token, so a group that straddles two documents
mixes them in the estimate (never in the attention). Choices are made per query head.

A rank scores its own query blocks against all keys, so the keys of the layer are gathered for as long as that takes: 4 * S *
K * D bytes per batch row, twice while they are put in groups. Scores are held a tile at a time, and choices leave it as
bits. A tile's shape depends on the sequence alone and a query block is a matrix of its own in it, so the choice is bit for
bit that of one process.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.errors import MtrainError
from mtrain.patterns.base import Choice, Site
from mtrain.patterns.blocks import BlockChoice, local_blocks, sink_blocks
from mtrain.patterns.budget import cover_to
from mtrain.patterns.documents import Documents
from mtrain.patterns.fixed_point import exponential_unit, probability_factor
from mtrain.patterns.placement import Placement
from mtrain.recipe.schema import AttentionRecipe
from sparse_kernels import BlockRows, SparsePattern
from sparse_kernels.bits import pack_bits, upload
from sparse_kernels.reference import accumulation_dtype

# Scores held at a time, and query tokens per tile; never derived from the number of ranks.
TILE_SCORES = {"cpu": 1 << 22}
TILE_SCORES_ELSEWHERE = 1 << 26
TILE_TOKENS = 512
# Matrix sides are padded to this many elements: a BLAS may sum in another order when a matrix is not aligned.
ALIGN = 16


class XAttentionPattern:
    """Blocks by antidiagonal sums. A kept choice is the set of (query block, key block) without the forced ones."""

    keeps = BlockChoice

    def __init__(self, recipe: AttentionRecipe) -> None:
        self.recipe = recipe

    def index(self, q: Tensor, k: Tensor, site: Site, kept: Choice | None) -> tuple[SparsePattern, Choice | None]:
        """See `Pattern`."""
        recipe = self.recipe
        if kept is None:
            kept = select_xattention(
                q,
                k,
                site.documents,
                site.placement,
                stride=recipe.stride,
                threshold=recipe.threshold,
                sink=recipe.sink,
                local=recipe.local,
                scale=site.scale,
            )
        assert isinstance(kept, BlockChoice)
        return kept.pattern(site.documents, site.placement, sink=recipe.sink, local=recipe.local), kept


@torch.no_grad()
def select_xattention(
    q: Tensor,
    k: Tensor,
    documents: Documents,
    placement: Placement,
    *,
    stride: int,
    threshold: float,
    sink: int,
    local: int,
    scale: float | None = None,
) -> BlockChoice:
    """The blocks of this rank's query blocks in one layer beyond the forced ones (module docstring).

    Args:
        q, k: this rank's shards [B, n, H, D] and [B, n, K, D] after rotary embedding.
        stride: s, tokens per group; divides the block.
        threshold: share of the estimated attention of a query block, 0 < threshold <= 1.
        scale: default D^-0.5.

    Raises:
        MtrainError: a stride that does not divide the block.
    """
    if stride < 1 or placement.block % stride:
        raise MtrainError(f"xattention: the stride must divide the block of {placement.block} tokens, got {stride}")
    q, k = q.detach(), k.detach()
    # Under a trainer's autocast the scores would silently be bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        tiles = _Tiles(q, k, documents, placement, stride, q.shape[-1] ** -0.5 if scale is None else scale)
        batch, heads, held = q.shape[0], q.shape[2], placement.blocks.numel()
        chosen = torch.empty(batch, heads, held, -(-placement.num_blocks // 8), dtype=torch.uint8, device=q.device)
        for b in range(batch):
            for first in range(0, held, tiles.count):
                rows = placement.blocks[first : first + tiles.count]
                scores = tiles.scores(b, rows, first)
                one = Documents(documents.seq_len, None if documents.start is None else documents.start[b : b + 1])
                forced = local_blocks(one, placement.block, local, rows, q.device)
                forced = forced | sink_blocks(one, placement.block, sink, rows, 1, q.device)[0]
                chosen[b, :, first : first + rows.numel()] = pack_bits(_choose(scores, forced, threshold))
    return BlockChoice(BlockRows.of_packed(chosen, placement.num_blocks, placement.blocks))


def _choose(scores: Tensor, forced: Tensor, threshold: float) -> Tensor:
    """bool [H, n, NB]: the fewest blocks that with the forced ones [n, NB] hold the threshold; scores int64 [H, n, NB]."""
    held = (scores * forced).sum(-1, keepdim=True)
    target = (scores.sum(-1, keepdim=True).double() * threshold).ceil().long() - held
    return cover_to(scores.masked_fill(forced, 0), target.clamp(min=0))


class _Tiles:
    """Fixed-point block scores of runs of query blocks, all of one shape."""

    def __init__(
        self, q: Tensor, k: Tensor, documents: Documents, placement: Placement, stride: int, scale: float
    ) -> None:
        self.documents, self.placement, self.stride = documents, placement, stride
        self.heads, self.kv_heads = q.shape[2], k.shape[2]
        self.per = placement.block // stride  # groups of a block
        dtype = accumulation_dtype(q.dtype)
        self.width = _up(stride * q.shape[3])
        self.groups = _up(-(-placement.seq_len // stride))
        self.rows = _up(self.heads // self.kv_heads * self.per)
        self.keys = self._grouped_keys(placement.whole(k, 1).to(dtype))
        self.queries = self._grouped_queries(q.to(dtype), scale / stride)
        limit = TILE_SCORES.get(q.device.type, TILE_SCORES_ELSEWHERE) // (self.kv_heads * self.rows * self.groups)
        self.count = max(1, min(TILE_TOKENS // placement.block, limit))
        self.unit = exponential_unit(self.groups)

    def scores(self, b: int, rows: Tensor, first: int) -> Tensor:
        """int64 [H, n, NB] of the query blocks ``rows`` (global ids), which are held here from place ``first`` on."""
        queries = self.queries[b, :, first : first + self.count]
        queries = torch.nn.functional.pad(queries, (0, 0, 0, 0, 0, self.count - queries.shape[1])).contiguous()
        logits = torch.stack(
            [torch.bmm(queries[h], self.keys[b, h].expand(self.count, -1, -1)) for h in range(self.kv_heads)]
        )
        shape = (self.kv_heads, self.count, self.heads // self.kv_heads, self.per, self.groups)
        logits = logits[:, :, : shape[2] * self.per].unflatten(2, shape[2:4])
        hidden = self._hidden(b, torch.nn.functional.pad(rows, (0, self.count - rows.numel()), value=-1), logits.device)
        logits.masked_fill_(hidden[:, None], -torch.inf)
        peak = logits.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        weights = logits.sub_(peak).exp_()
        sums = (weights * self.unit).long().sum(-1, keepdim=True)
        weights.mul_(probability_factor(sums, self.groups, self.per).to(weights.dtype))
        size = self.placement.num_blocks
        scores = weights.long().sum(3)  # [K, count, G, groups]
        scores = torch.nn.functional.pad(scores, (0, max(0, size * self.per - self.groups)))[..., : size * self.per]
        return scores.unflatten(3, (size, self.per)).sum(-1).transpose(1, 2).flatten(0, 1)[:, : rows.numel()]

    def _hidden(self, b: int, rows: Tensor, device: torch.device) -> Tensor:
        """bool [count, per, groups]: the query group does not see the key group, or holds no token."""
        size, s = self.placement.seq_len, self.stride
        rows = upload(rows, device)
        first = (
            rows[:, None] * self.per + torch.arange(self.per, device=device)
        ) * s  # first token of each query group
        empty = (rows[:, None] < 0) | (first >= size)
        start = torch.zeros_like(first)
        if self.documents.start is not None:
            start = self.documents.start[b].to(device)[first.clamp(0, size - 1)]
        key = torch.arange(self.groups, device=device) * s
        last = (key + s).clamp(max=size) - 1
        return empty[..., None] | (key > first[..., None]) | (last < start[..., None])

    def _grouped_keys(self, k: Tensor) -> Tensor:
        """[B, K, s * D (padded), groups]."""
        k = torch.nn.functional.pad(k, (0, 0, 0, 0, 0, self.groups * self.stride - k.shape[1]))
        k = k.unflatten(1, (self.groups, self.stride)).permute(0, 3, 2, 4, 1).flatten(2, 3)
        return torch.nn.functional.pad(k, (0, 0, 0, self.width - k.shape[2])).contiguous()

    def _grouped_queries(self, q: Tensor, scale: float) -> Tensor:
        """[B, K, blocks held here, rows, s * D (padded)], scaled; each group backwards."""
        block, blocks = self.placement.block, self.placement.blocks
        q = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, blocks.numel() * block - q.shape[1]))
        position = (blocks[:, None] * block + torch.arange(block)).flatten()
        q = q.masked_fill(upload(position >= self.placement.seq_len, q.device)[:, None, None], 0.0) * scale
        q = q.unflatten(1, (-1, self.per, self.stride)).flip(3)  # [B, blocks, per, s, H, D]
        q = q.unflatten(4, (self.kv_heads, -1)).permute(0, 4, 1, 5, 2, 3, 6)  # [B, K, blocks, G, per, s, D]
        q = q.flatten(5, 6).flatten(3, 4)
        pad = (0, self.width - q.shape[4], 0, self.rows - q.shape[3])
        return torch.nn.functional.pad(q, pad).contiguous()


def _up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN
