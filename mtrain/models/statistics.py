"""What a micro-batch computed: density, tile work, imbalance, recall. For a line of the log, never on the hot path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtrain.balance.work import block_cost, imbalance, tile_density, work
from mtrain.comm import Ring
from mtrain.errors import ModelError
from mtrain.patterns.blocks import with_rows
from mtrain.patterns.reach import reach_by_distance, scattered_rows
from mtrain.patterns.recall import blocks_of
from sparse_kernels import SparsePattern

if TYPE_CHECKING:
    from mtrain.models.context import MicroBatch

# Queries whose pairs are counted by distance.
REACH_ROWS = 64


def statistics(batch: MicroBatch) -> dict[str, Any]:
    """See `RingContext.statistics`."""
    ring, doc_start = batch.context.ring, batch.whole_doc_start()
    patterns = [batch.index[layer] for layer in sorted(batch.index)]
    if not patterns:
        raise ModelError("the newest forward has not reached an attention layer, so there is no pattern to look at")
    density = [mask_density(pattern, doc_start, ring) for pattern in patterns]
    area = torch.stack([work(p, batch.layout, ring.topology, doc_start, ring=ring) for p in patterns]).sum(0)
    worker, step = imbalance(area)
    result: dict[str, Any] = {
        "density": sum(density) / len(density),
        "density_per_layer": density,
        "tile_density": sum(tile_density(pattern, doc_start, ring=ring) for pattern in patterns) / len(patterns),
        "work": area,
        "worker_imbalance": worker,
        "step_imbalance": step,
    }
    if batch.recall:
        per_layer = [float(batch.recall[layer]) for layer in sorted(batch.recall)]
        result["recall_per_layer"] = per_layer
        result["recall"] = sum(per_layer) / len(per_layer)
        rows = scattered_rows(patterns[0].seq_len, REACH_ROWS)
        patterns = [with_rows(pattern, blocks_of(rows, pattern.block), ring) for pattern in patterns]
        reach = torch.stack([reach_by_distance(pattern, rows, doc_start=doc_start) for pattern in patterns]).mean(0)
        result["reach"], result["reach_any_head"] = reach.tolist()
    return result


def mask_density(pattern: SparsePattern, doc_start: Tensor | None = None, ring: Ring | None = None) -> float:
    """Allowed pairs over causal pairs of the same documents, mean over batch rows and heads; exact, in O(S).

    The mean of `SparsePattern.density`, which walks all query blocks. Here rows are counted in closed form. In query
    block m, all rows whose document begins before the block share one document, so they see the same columns; along a
    diagonal a row sees whole tiles but for the one in which its document begins.

    Args:
        pattern: the global pattern.
        doc_start: int64 [B, S]; None: one document.
        ring: needed when the single blocks are those of this rank's queries only; then every rank makes this call.
    """
    if pattern.block_rows is not None:
        pairs = pattern.allowed_pairs(doc_start)
        if not pattern.block_rows.whole:
            assert ring is not None, "these are the single blocks of one rank's queries"
            pairs = ring.all_reduce(pairs)
        return float((pairs / pattern.causal_pairs(doc_start)).float().mean())
    ratios = []
    for row in range(pattern.batch):
        start = torch.zeros(pattern.seq_len, dtype=torch.int64) if doc_start is None else doc_start[row].cpu()
        ratios.append(_allowed(_row_of(pattern, row), start) / float((torch.arange(pattern.seq_len) - start + 1).sum()))
    return sum(ratios) / len(ratios) / pattern.heads


def _row_of(pattern: SparsePattern, row: int, columns: bool = True) -> SparsePattern:
    assert pattern.columns is not None and pattern.diagonals is not None
    kept = pattern.columns[row : row + 1].cpu() if columns else None
    return SparsePattern(pattern.seq_len, pattern.block, columns=kept, diagonals=pattern.diagonals[row : row + 1].cpu())


def _allowed(pattern: SparsePattern, start: Tensor) -> float:
    """Allowed pairs of a pattern with one batch row, summed over heads; start is int64 [S] on the CPU."""
    b, position = pattern.block, torch.arange(pattern.seq_len)
    block = position // b
    heads = pattern.offset_table()[0].sum(0).double()  # [NB] heads that hold each block offset
    reach = block - start // b  # offset of the tile in which the document of the row begins
    whole = (heads.cumsum(0)[(reach - 1).clamp(min=0)] - heads[0]) * b
    edge = heads[reach] * (b - start % b)
    own = heads[0] * (position - torch.maximum(start, block * b) + 1)
    near = own + torch.where(reach > 0, whole + edge, 0.0)
    spans = torch.zeros(pattern.num_blocks, dtype=torch.float64).index_add_(0, block, (start < block * b).double())
    doc = start[None]
    columns = (block_cost(pattern, doc) - block_cost(_row_of(pattern, 0, columns=False), doc)) / b
    return float(near.sum() + (columns * spans).sum())
