"""Recall: the share of a row's dense attention that its pattern keeps. Exact, from two lse values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtrain.comm import Ring
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout
from mtrain.patterns.blocks import with_rows
from mtrain.patterns.documents import Documents
from mtrain.patterns.placement import Placement
from sparse_kernels import SparsePattern
from sparse_kernels.bits import upload
from sparse_kernels.reference import accumulation_dtype

# Keys scored at a time.
CHUNK = 4096


@torch.no_grad()
def measure_recall(
    q: Tensor,
    k: Tensor,
    pattern: SparsePattern,
    rows: Sequence[int],
    *,
    doc_start: Tensor | None = None,
    ring: Ring | None = None,
    layout: RingLayout | None = None,
    scale: float | None = None,
) -> Tensor:
    """Recall of some rows, exp(lse_sparse - lse_dense), float32 (float64 stays) [B, H, len(rows)].

    Args:
        q, k: [B, S, H, D] and [B, S, K, D]; with ring and layout this rank's shards (every rank calls and gets the same
            answer).
        pattern: the global pattern; its single blocks may be those of this rank's queries only.
        rows: global positions of queries, the same on every rank, for example `spaced_rows`.
        doc_start: int64 [B, S] or this rank's shard.

    With W > 1 ranks: one all-reduce of the rows (B * n * H * D), one all-gather of 2 * B * H * n, and the document
    starts; with single blocks also one all-reduce of the rows' bits, NB / 8 bytes per row and head.

    Raises:
        MtrainError: rows outside the sequence.
    """
    placement = Placement.of(q.shape[1], pattern.block, ring, layout)
    size = placement.seq_len
    if not rows or min(rows) < 0 or max(rows) >= size:
        raise MtrainError(f"recall needs rows from 0 to {size - 1}, got {list(rows)[:8]}")
    documents = Documents.gather(doc_start, placement)
    pattern = with_rows(pattern, blocks_of(rows, pattern.block), placement.ring)
    positions = upload(torch.tensor(list(rows)), q.device)
    queries = placement.rows(q, positions.expand(q.shape[0], -1)).to(accumulation_dtype(q.dtype))
    queries = queries.unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [B, K, G, n, D]
    queries = queries * (q.shape[-1] ** -0.5 if scale is None else scale)
    start = documents.starts_of(positions.expand(q.shape[0], -1))
    with torch.autocast(q.device.type, enabled=False):
        sides = _lse_sides(queries, k, pattern, rows, start, placement)
    if placement.ring.world_size > 1:
        sides = torch.stack(placement.ring.all_gather(sides)).logsumexp(0)
    return (sides[0] - sides[1]).exp()


def spaced_rows(seq_len: int, count: int) -> list[int]:
    """At most ``count`` different rows spread evenly over the sequence, the last row among them."""
    count = min(count, seq_len)
    return [seq_len * (n + 1) // count - 1 for n in range(count)]


def _lse_sides(
    queries: Tensor, k: Tensor, pattern: SparsePattern, rows: Sequence[int], start: Tensor, placement: Placement
) -> Tensor:
    """[2, B, H, n]: lse of the rows over the keys held here, under the pattern and dense."""
    batch, kv_heads, group, count, _ = queries.shape
    sides = queries.new_full((2, batch, kv_heads * group, count), -torch.inf)
    row = upload(torch.tensor(list(rows)), k.device)[:, None]
    inside = torch.arange(placement.block)
    position = (placement.blocks[:, None] * placement.block + inside).flatten()[: k.shape[1]].to(k.device)
    for first in range(0, k.shape[1], CHUNK):
        key = position[first : first + CHUNK]
        part = k[:, first : first + CHUNK].to(queries.dtype).permute(0, 2, 3, 1)[:, :, None]
        logits = (queries @ part).flatten(1, 2)  # [B, H, n, c]
        seen = (key <= row) & (key >= start[:, None, :, None]) & (key < pattern.seq_len)
        for side, mask in enumerate((seen & chosen_pairs(pattern, rows, key), seen)):
            found = logits.masked_fill(~mask, -torch.inf).logsumexp(-1)
            sides[side] = torch.logaddexp(sides[side], found)
    return sides


def blocks_of(rows: Sequence[int], block: int) -> Tensor:
    """int64 [n] on the CPU: the blocks of some rows, each once, ascending."""
    return torch.tensor(sorted({row // block for row in rows}))


def chosen_pairs(pattern: SparsePattern, rows: Sequence[int], key: Tensor) -> Tensor:
    """bool [B, H, n, c]: does the pattern hold the pair, documents aside? Undefined for keys in the future.

    The pattern serves the blocks of the rows; ``key`` [c] are positions on its device, from seq_len on: padding."""
    assert pattern.columns is not None
    size, last = pattern.seq_len, pattern.num_blocks - 1
    near = pattern.block_mask(torch.tensor(list(rows)) // pattern.block, (key // pattern.block).clamp(max=last))
    table = torch.zeros(pattern.batch, pattern.heads, size + 1, dtype=torch.bool, device=key.device)
    table.scatter_(2, pattern.columns.long().clamp(max=size), True)
    return near | table[:, :, key.clamp(max=size)][:, :, None]
