"""Cyclic shifts of the striped layout: the cheapest way to even out the starts of a sequence.

Striped gives window k (blocks kW .. kW + W - 1) to ranks 0 .. W - 1 in order, so the last rank always holds the longest row of its
window and works most in every step. Shifting the owners of all windows from k on by s keeps every diagonal inside either part on one
step, as striped does; only tiles that cross the seam change their step. One seam roughly halves both imbalances of a short sequence.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtrain.balance.forecast import Floats, Ints
from mtrain.balance.ledger import score

MOST_BLOCKS = 512  # beyond, striped leaves little to shift away, and the dense tile matrix costs more than it gains
TURNS = 32  # shifts tried per seam


def shifted(tiles: Floats, local: Floats, shifts: Ints) -> tuple[Floats, Floats]:
    """`mtrain.balance.ledger.dense_tiles` and local work [n, W] with lanes renamed to the ranks that own them under ``shifts`` int64 [n]."""
    windows, ranks = local.shape
    lane = (np.arange(ranks) - shifts[:, None]) % ranks  # [n, W]: the lane that a rank owns
    window = np.arange(windows)[:, None]
    renamed = tiles[window[:, :, None, None], lane[:, :, None, None], window, lane]
    return renamed, local[window, lane]


def find_shifts(
    tiles: Floats, local: Floats, shard: Ints, rating: Callable[[Floats, Floats], Floats], rounds: int = 3
) -> Ints:
    """Greedily add up to ``rounds`` seams while ``rating(worker, step)`` improves.

    Args:
        tiles, local: `mtrain.balance.ledger.dense_tiles` and local work [n, W] of the striped layout, in units of the mean work of a rank.
        shard: whose keys each rank meets in each step, see `mtrain.balance.work.shard_table`.
        rating: lower is better.

    Returns:
        int64 [n]: how many ranks the owners of each window are shifted by; zeros when nothing is better than striped.
    """
    windows, ranks = local.shape
    shifts = np.zeros(windows, dtype=np.int64)
    turns = np.arange(0, ranks, -(-ranks // TURNS))
    worker, step = score(np.take_along_axis(tiles.sum((0, 2)), shard, 1), local.sum(0))
    best = float(rating(worker, step))
    for _ in range(rounds):
        renamed, alone = (tiles, local) if not shifts.any() else shifted(tiles, local, shifts)
        before = renamed.cumsum(2)  # [n, W, n, W], work on the keys of all windows up to one
        found = None
        for seam in range(1, windows):
            early, across = before[:seam, :, seam - 1].sum(0), before[seam:, :, seam - 1].sum(0)
            late = before[seam:, :, -1].sum(0) - across
            values = rating(*_scores(early, across, late, alone[:seam].sum(0), alone[seam:].sum(0), shard, turns))
            choice = int(values.argmin())
            if values[choice] < best - 1e-9:
                best, found = float(values[choice]), (seam, int(turns[choice]))
        if found is None:
            break
        shifts[found[0] :] = (shifts[found[0] :] + found[1]) % ranks
    return shifts


def _scores(
    early: Floats, across: Floats, late: Floats, alone_early: Floats, alone_late: Floats, shard: Ints, turns: Ints
) -> tuple[Floats, Floats]:
    """(worker, step), each float64 [turns], of shifting the late windows.

    Work [W, W] by (rank, shard): of early queries, of late queries on early keys, of late queries on late keys; and local work [W].
    """
    lane = (np.arange(early.shape[0]) - turns[:, None]) % early.shape[0]  # [turns, W]
    pairs = early + across[lane] + late[lane[:, :, None], lane[:, None]]
    return score(np.take_along_axis(pairs, shard[None], 2), alone_early + alone_late[lane])
