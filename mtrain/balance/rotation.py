"""Rotating the owners of a range of blocks: moves that keep diagonals together.

In the striped layout every diagonal meets all ranks in one step, but the last rank holds the longest row of every window
of W blocks, and documents begin where they like. Taking the owners of a range of k W consecutive blocks s ranks further
leaves every rank its count and every diagonal inside the range, or outside it, on one step; only tiles across the two seams
change theirs, and a seam at the start of a document or at an end of the sequence has none to change. Two or three rotations
halve both imbalances of a short sequence, which exchanges of single blocks cannot do without tearing the local diagonals
apart.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtrain.balance.forecast import Floats, Forecast, Ints
from mtrain.balance.ledger import Ledger, score

MOST_BLOCKS = 512  # beyond, striped leaves little to rotate away, and the dense tile matrix costs more than it gains
# Rotations at most; ranges, and turns of each, that are computed exactly per rotation.
_ROUNDS, _RANGES, _TURNS = 6, 16, 6

Rating = Callable[[Floats, Floats], Floats]


def rotate(striped: Ledger, forecast: Forecast, rating: Rating, budget: float) -> tuple[Ints | None, float]:
    """Greedily rotate ranges while ``rating(worker, step)`` falls and the budget lasts.

    Args:
        striped: the books of the striped layout, untouched.
        forecast: the cost model they were made from.
        rating: lower is better; takes arrays.
        budget: microseconds of estimated work.

    Returns:
        (int64 [W * n] owners, or None when nothing is better than striped; estimated microseconds spent).
    """
    ranks, size = striped.ranks, striped.block_cost.size
    if striped.num_blocks > MOST_BLOCKS or striped.per_rank < 2:
        return None, 0.0
    owner = np.arange(size) % ranks
    spans, tiles = _ranges(forecast, ranks), striped.dense_tiles()
    best, spent = float(rating(*(np.asarray(value) for value in striped.score()))), 0.02 * size * size
    each = _RANGES * (60 + 0.2 * ranks**2 + 1.5e-5 * size**2 * ranks)
    for _ in range(_ROUNDS):
        if spent + each > budget:
            break
        spent += each
        value, found = _best_rotation(striped, tiles, owner, spans, rating)
        if found is None or value >= best - 1e-9:
            break
        best, (begin, end, turn) = value, found
        owner[begin:end] = (owner[begin:end] + turn) % ranks
    return (owner if (owner != np.arange(size) % ranks).any() else None), spent


def _ranges(forecast: Forecast, ranks: int) -> Ints:
    """int64 [c, 2], ranges of whole multiples of W blocks that begin at a window or at a document."""
    size = -(-forecast.num_blocks // ranks) * ranks
    first = forecast.first
    row, block = np.nonzero(first[:, 1:] > first[:, :-1])
    begins = np.unique(np.concatenate([np.arange(0, size, ranks), block + 1, first[row, block + 1]]))
    windows = np.arange(1, size // ranks + 1)
    spans = np.stack(np.broadcast_arrays(begins[:, None], begins[:, None] + ranks * windows), -1).reshape(-1, 2)
    return spans[spans[:, 1] <= size]


def _best_rotation(
    striped: Ledger, tiles: Floats, owner: Ints, spans: Ints, rating: Rating
) -> tuple[float, tuple[int, int, int] | None]:
    """(rating, (begin, end, turn)) of the best rotation among those that even out the totals most."""
    ranks = striped.ranks
    back = (np.arange(ranks) - np.arange(ranks)[:, None]) % ranks  # [turn, rank]: the rank that was there before
    hot = np.eye(ranks)[owner]
    rows, keys = tiles @ hot, tiles.T @ hot
    pairs, local = hot.T @ rows, hot.T @ striped.block_local
    worker = _worker_after(hot, striped.block_cost, spans, back)
    best, found = np.inf, None
    for candidate in np.argsort(worker.min(1), kind="stable")[:_RANGES]:
        turns = np.argsort(worker[candidate], kind="stable")[:_TURNS]
        turns = turns[np.isfinite(worker[candidate, turns])]
        if turns.size == 0:
            break
        begin, end = spans[candidate]
        inside, old = hot[begin:end], back[turns]
        out, in_ = inside.T @ rows[begin:end], keys[begin:end].T @ inside
        both = inside.T @ (tiles[begin:end, begin:end] @ inside)
        alone = inside.T @ striped.block_local[begin:end]
        # With D the change of the one-hot owners, O' T O gains D' T O, O' T D and D' T D.
        after = pairs + out[old] - out + in_[:, old].transpose(1, 0, 2) - in_
        after = after + both[old[:, :, None], old[:, None]] - both[old] - both[:, old].transpose(1, 0, 2) + both
        values = rating(*score(np.take_along_axis(after, striped.shard[None], 2), local + alone[old] - alone))
        choice = int(values.argmin())
        if values[choice] < best:
            best, found = float(values[choice]), (int(begin), int(end), int(turns[choice]))
    return best, found


def _worker_after(hot: Floats, cost: Floats, spans: Ints, back: Ints) -> Floats:
    """float64 [c, W]: worker imbalance after each rotation of each range, infinite where the ranks' counts would change."""
    none = np.zeros((1, hot.shape[1]))
    work = np.concatenate([none, np.cumsum(hot * cost[:, None], axis=0)])
    count = np.concatenate([none, np.cumsum(hot, axis=0)])
    moved, blocks = work[spans[:, 1]] - work[spans[:, 0]], count[spans[:, 1]] - count[spans[:, 0]]
    worker = ((work[-1] - moved)[:, None] + moved[:, back]).max(2)
    worker[(blocks[:, back] != blocks[:, None]).any(2)] = np.inf
    worker[:, 0] = np.inf
    return worker
