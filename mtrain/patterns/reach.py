"""Reach: which share of the (query, key) pairs a pattern holds, by their distance. The others get no gradient.

A mask is a constant of the backward pass, so a pair outside the mask of every head of a layer learns nothing about itself in
this layer and step. Density alone does not tell: most of it may lie near the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mtrain.errors import MtrainError
from mtrain.patterns.recall import CHUNK, chosen_pairs
from sparse_kernels import SparsePattern
from sparse_kernels.bits import upload


@torch.no_grad()
def reach_by_distance(
    pattern: SparsePattern, rows: Sequence[int] | None = None, *, doc_start: Tensor | None = None
) -> Tensor:
    """Share of the causal pairs of the same document inside the mask, by distance, float64 [2, buckets].

    Bucket n holds the distances 2^n .. 2^(n+1) - 1 (a token always sees itself: distance 0 is left out). Row 0 is the mean
    over heads; row 1 counts a pair once when any head of the layer holds it. nan in a bucket without pairs. All batch rows
    are pooled. Cost: B * H * len(rows) * S looks at the mask, memory B * H * len(rows) * 4096 bits.

    Args:
        pattern: the global pattern, or one that serves the blocks of the rows (`mtrain.patterns.blocks.with_rows`).
        rows: the queries to look at, for example `scattered_rows`; None: all.
        doc_start: int64 [B, S], whole; None: one document.

    Raises:
        MtrainError: rows outside the sequence.
    """
    size, device = pattern.seq_len, pattern.device
    rows = range(size) if rows is None else rows
    if not rows or min(rows) < 0 or max(rows) >= size:
        raise MtrainError(f"reach needs rows from 0 to {size - 1}, got {list(rows)[:8]}")
    row = upload(torch.tensor(list(rows)), device)
    start = torch.zeros(1, 1, dtype=torch.int64, device=device) if doc_start is None else doc_start.to(device)[:, row]
    powers = 2 ** torch.arange(max(1, (size - 1).bit_length()), device=device)
    counts = torch.zeros(3, powers.numel() + 1, dtype=torch.float64, device=device)  # the last slot takes distance 0
    for first in range(0, size, CHUNK):
        key = torch.arange(first, min(first + CHUNK, size), device=device)
        seen = ((key <= row[:, None]) & (key >= start[..., None])).expand(pattern.batch, -1, -1)
        held = chosen_pairs(pattern, rows, key) & seen[:, None]
        bucket = torch.bucketize(row[:, None] - key, powers, right=True) - 1
        bucket = torch.where(bucket < 0, powers.numel(), bucket).flatten()
        sums = [seen.sum(0), held.sum((0, 1)) / pattern.heads, held.any(1).sum(0)]
        counts.index_add_(1, bucket, torch.stack([x.double().flatten() for x in sums]))
    return (counts[1:, :-1] / counts[0, :-1]).cpu()


def scattered_rows(seq_len: int, count: int) -> list[int]:
    """At most ``count`` different rows spread evenly over the sequence without a common period, which the places in a block
    would show (multiples of the golden section)."""
    golden = (math.sqrt(5) - 1) / 2
    return sorted({int(seq_len * (n * golden % 1)) for n in range(1, min(count, seq_len) + 1)})
