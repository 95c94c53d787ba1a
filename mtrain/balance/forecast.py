"""The cost model of the balancer: how much work each block brings, and on whose shard, in a batch that is about to run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtrain.balance.work import Visible, visible_blocks
from mtrain.errors import MtrainError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Forecast:
    """Work per query block, split into the part the ring meets step by step and the part done locally.

    The block part is made of whole diagonals, so query block m works tiles[d] against key block m - d for every offset d that its
    document leaves visible.

    Attributes:
        tiles: float64 [NB], area per block at each block offset, of one batch row.
        first: int64 [R, NB], per batch row the first key block each query block sees (non-decreasing along a row).
        local: float64 [NB], area per query block outside the ring's steps (columns), summed over batch rows.
    """

    tiles: Floats
    first: Ints
    local: Floats

    @classmethod
    def of(cls, measured: Tensor, seq_len: int, block: int, doc_start: Tensor | None = None) -> Forecast:
        """From `measure` (of one step or averaged over many) and the documents of the coming batch.

        Args:
            measured: float64 [3, NB], see `mtrain.balance.work.measure`.
            seq_len, block: S and b.
            doc_start: int64 [R, S] of the coming batch; None: one document.
        """
        num_blocks = -(-seq_len // block)
        if tuple(measured.shape) != (3, num_blocks):
            raise MtrainError(
                f"a measured cost has shape {tuple(measured.shape)}; expected (3, {num_blocks}) from `measure`"
            )
        if doc_start is not None and (doc_start.dim() != 2 or doc_start.shape[1] != seq_len):
            raise MtrainError(f"doc_start has shape {tuple(doc_start.shape)}; expected [batch rows, {seq_len}]")
        rows = 1 if doc_start is None else doc_start.shape[0]
        first = Visible.of(doc_start, rows, seq_len, block).first
        tiles, rest, columns = measured.detach().cpu().double().numpy()
        return cls(tiles / rows, first.numpy(), (rest + columns) * visible_blocks(first).mean(0).numpy())

    @property
    def num_blocks(self) -> int:
        """NB, real blocks."""
        return self.tiles.shape[0]

    @property
    def last(self) -> Ints:
        """int64 [R, NB], per batch row the last query block that sees each key block."""
        blocks = np.arange(self.num_blocks)
        return np.stack([np.searchsorted(row, blocks, side="right") - 1 for row in self.first])

    def cost(self) -> Floats:
        """float64 [NB], all work of each query block."""
        span = np.arange(self.num_blocks) - self.first
        return np.asarray(np.cumsum(self.tiles)[span].sum(0) + self.local)


def worker_bound(cost: Floats, ranks: int) -> float:
    """A worker imbalance that no assignment with equal block counts can beat, from block costs [NB] (padding added here).

    Any set of k ranks that holds the k cheapest blocks carries at most those plus the k (n - 1) dearest (n blocks per rank), so the
    other ranks share the rest; and a set that holds the k dearest carries at least those plus the k (n - 1) cheapest. With two
    blocks per rank, folding the sorted list (dearest with cheapest) is the optimum itself.
    """
    per_rank = -(-cost.size // ranks)
    size = per_rank * ranks
    ordered = np.sort(np.concatenate([cost, np.zeros(size - cost.size)]))
    total = ordered.sum()
    if total == 0:
        return 1.0
    if per_rank == 2:
        return float((ordered + ordered[::-1]).max() * ranks / total)
    below = np.concatenate([[0.0], np.cumsum(ordered)])
    k = np.arange(1, ranks)
    room = below[k] + total - below[size - k * (per_rank - 1)]
    heavy = total - below[size - k] + below[k * (per_rank - 1)]
    best = np.concatenate([[total / ranks], (total - room) / (ranks - k), heavy / k])
    return float(best.max() * ranks / total)
