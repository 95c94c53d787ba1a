"""Who should own which block: local search from the striped layout, on a smooth version of the two imbalances.

Striped is hard to beat step by step, because a diagonal meets every rank in the same step; what it leaves uneven are the
starts of sequence and documents, where rows are cheap. So the search starts there, rotates ranges of blocks (`rotation`), then
exchanges pairs of blocks between ranks. It minimises the sum over steps of the p-norm over ranks, plus a weight times the
p-norm of the ranks' totals (p-norms stand for maxima, which have plateaus). Candidates come from a second-order model of that
objective, evaluated for all pairs of blocks of many pairs of ranks at once; the best few are then computed exactly. Equal
counts with equal area is MagiAttention's dispatch (https://github.com/SandAI-org/MagiAttention); the step objective and the
search are ours.

Pure numpy, no clock, no random numbers: all ranks reach the same answer from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtrain.balance.forecast import Floats, Forecast, Ints, worker_bound
from mtrain.balance.ledger import Ledger, score
from mtrain.balance.rotation import rotate
from mtrain.topology import RingTopology

PROMISE = 1.015  # worker imbalance to reach where it can be had: 1.02 less the surprises of a next step
TARGET = 1.01  # worker imbalance below which only the steps matter; above PROMISE it matters most
# Shares of striped's step imbalance: kept in hand for the surprises of a next step; looked for in extra time.
MARGIN, SPARE = 0.01, 0.05
ENOUGH = 1.002  # a step imbalance not worth improving
_SHORTLIST = 48  # swaps computed exactly per round
_BLOCKS = 32  # blocks of a rank looked at per round
_SMALL = 2**15  # entries of a block-by-rank table up to which extra time is granted
_PAIRS = 2**15  # size of the table of candidate swaps per round, in features
_ATTEMPTS = (  # start, power, weight of the totals
    ("rotated", 8, 4.0),
    ("striped", 8, 4.0),
    ("rotated", 16, 4.0),
    ("striped", 8, 1.0),
    ("rotated", 8, 1.0),
    ("striped", 16, 4.0),
)


@dataclass(frozen=True, eq=False)
class Plan:
    """An assignment and what the cost model says of it.

    Attributes:
        owner: int64 [W * n], the rank of every block, padding blocks included.
        worker, step: imbalances of the plan. striped_worker, striped_step: of the striped layout.
        bound: a worker imbalance no assignment can beat.
    """

    owner: Tensor
    worker: float
    step: float
    striped_worker: float
    striped_step: float
    bound: float


def solve(forecast: Forecast, topology: RingTopology, effort: float = 1.0) -> Plan:
    """Assign blocks to ranks, the same number to each.

    Never worse than striped, neither in worker nor in step imbalance of ``forecast``; when nothing better is found, striped itself.

    Args:
        forecast: the cost model.
        topology: ranks and the order in which they meet.
        effort: 1.0 is about 40 ms of one core whatever the size, up to four times that for small problems (`_SMALL`) while
            the promises are not kept with something to spare; twice the effort searches twice as long.
    """
    bound, ranks = worker_bound(forecast.cost(), topology.world_size), topology.world_size
    start = Ledger(forecast, topology)
    striped = best = start.score()
    table = start.table.copy()

    def done() -> bool:
        return best[0] <= max(PROMISE, bound) and best[1] - 1.0 <= (1.0 - SPARE) * (striped[1] - 1.0)

    for ledger in _descend(start, forecast, topology, effort, done):
        worker, step = ledger.score()
        allowed = worker <= striped[0] + 1e-12 and step <= striped[1] + 1e-12
        if allowed and _rating(worker, step) < _rating(*best) - 1e-12:
            best, table = (worker, step), ledger.table.copy()
        if best[1] <= ENOUGH:
            break
    owner = np.empty(table.size, dtype=np.int64)
    owner[table] = np.arange(ranks)[:, None]
    return Plan(torch.from_numpy(owner), *best, *striped, bound)


def _rating(worker: Floats | float, step: Floats | float, limits: tuple[float, float] = (np.inf, np.inf)) -> Floats:
    """Lower is better: even steps, once no rank is far above the mean and ``limits`` (worker, step) hold."""
    over = 2.0 * np.maximum(worker - TARGET, 0.0) + 23.0 * np.maximum(worker - PROMISE, 0.0)
    excess = np.maximum(worker - limits[0], 0.0) + np.maximum(step - limits[1], 0.0)
    return np.asarray(step + over + 50.0 * excess)


def _descend(
    ledger: Ledger, forecast: Forecast, topology: RingTopology, effort: float, done: Callable[[], bool]
) -> Iterator[Ledger]:
    """Improve the striped ``ledger`` move by move, yielding the books after each; start again while effort is left.

    The effort is counted in estimated microseconds, so that all ranks stop at the same move; ``done`` ends the extra time.
    """
    setup = 500 + 0.03 * ledger.by_shard.size * len(ledger.first)
    pairs, blocks = _window(ledger)
    each = 600 + 0.02 * pairs * blocks * (2 * ledger.ranks + blocks)
    left = effort * 36e3 - setup
    extra = 3 * effort * 36e3 if ledger.by_shard.size <= _SMALL else 0.0
    yield ledger
    worker, step = ledger.score()
    limits, turn = (worker, step - MARGIN * (step - 1.0)), 0
    share = 1.0 if extra else 0.6
    rotated, spent = rotate(ledger, forecast, lambda worker, step: _rating(worker, step, limits), share * left)
    left -= spent
    for start, power, weight in _ATTEMPTS:
        if start == "rotated" and rotated is None:
            continue
        if left <= (0.0 if done() else -extra):
            return
        if turn or start == "rotated":
            ledger = Ledger(forecast, topology, rotated if start == "rotated" else None)
            left -= setup
            yield ledger
        for objective in (_Objective(power, weight), _Objective(16, weight, limits)):
            swaps = 1
            while swaps and left > (0.0 if done() else -extra):
                swaps = 0
                for _ in _round(ledger, objective, turn):
                    swaps += 1
                    yield ledger
                turn += 1
                left -= each + 120 * swaps


def _round(ledger: Ledger, objective: _Objective, turn: int) -> Iterator[None]:
    """One shortlist: apply the swaps that improve the objective, best first, each rank at most once."""
    give, x, take, y = _candidates(ledger, objective, turn)
    value = start = float(objective.value(ledger.steps, ledger.local))
    values = objective.value(*ledger.after(give, x, take, y))
    used: set[int] = set()
    for best in np.argsort(values, kind="stable"):
        if not values[best] < start - 1e-9:
            return
        ranks = {int(give[best]), int(take[best])}
        if ranks & used:
            continue
        one = slice(best, best + 1)
        now = float(objective.value(*ledger.after(give[one], x[one], take[one], y[one]))[0])
        if not now < value - 1e-9:
            continue
        ledger.swap(int(give[best]), int(x[best]), int(take[best]), int(y[best]))
        value, used = now, used | ranks
        yield


@dataclass(frozen=True)
class _Objective:
    """Sum over steps of the p-norm over ranks + weight * p-norm of the totals.

    With ``limits`` (worker, step) it is the rating within these limits, and a trace of the smooth form against plateaus.
    """

    power: int
    weight: float
    limits: tuple[float, float] | None = None

    def value(self, steps: Floats, local: Floats) -> Floats:
        """Of step tables [..., W, T] with local work [..., W]."""
        p, total = self.power, steps.sum(-1) + local
        smooth = _norm(steps, p, -2).sum(-1) + _norm(local, p, -1) + self.weight * _norm(total, p, -1)
        if self.limits is None:
            return np.asarray(smooth)
        return np.asarray(_rating(*score(steps, local), self.limits) + 0.02 * smooth)

    def slopes(self, ledger: Ledger) -> tuple[tuple[Floats, Floats, Floats], tuple[Floats, Floats, Floats]]:
        """First and (diagonal) second derivatives by the work of [rank, shard], local [rank] and total [rank]."""
        steps, steps2 = _slope(ledger.steps, self.power)
        local, local2 = _slope(ledger.local, self.power)
        total, total2 = (self.weight * part for part in _slope(ledger.steps.sum(1) + ledger.local, self.power))
        by_rank, by_rank2 = (np.take_along_axis(part, ledger.step_of, 1) for part in (steps, steps2))
        return (by_rank + total[:, None], local + total, total), (by_rank2, local2, total2)


def _norm(x: Floats, power: int, axis: int) -> Floats:
    """Power mean over an axis; the power is a power of two."""
    exponent = power
    while exponent > 1:
        x, exponent = x * x, exponent // 2
    return np.asarray(x.mean(axis) ** (1.0 / power))


def _slope(x: Floats, power: int) -> tuple[Floats, Floats]:
    norm = np.maximum(_norm(x, power, 0), 1e-12)
    share = np.maximum(x / norm, 1e-3)
    slope = share ** (power - 2) / x.shape[0]
    return slope * share, (power - 1) * slope / norm


def _window(ledger: Ledger) -> tuple[int, int]:
    """(pairs of ranks, blocks of a rank) looked at in one round."""
    ranks, blocks = ledger.ranks, min(ledger.per_rank, _BLOCKS)
    every = ranks * (ranks - 1) // 2
    return min(every, max(ranks // 2, _PAIRS // (blocks * (2 * ranks + blocks)))), blocks


def _rank_pairs(ledger: Ledger, pressure: Floats, turn: int) -> tuple[Ints, Ints]:
    """Pairs of ranks worth a look: all when few, else the more loaded half against the less loaded half, shifted by turns."""
    pairs, _ = _window(ledger)
    if pairs == ledger.ranks * (ledger.ranks - 1) // 2:
        give, take = np.triu_indices(ledger.ranks, 1)
        return give, take
    half = ledger.ranks // 2
    order = np.argsort(-pressure, kind="stable")
    repeat = max(1, pairs // half)
    low = [np.roll(order[::-1][:half], turn * repeat + i) for i in range(repeat)]
    return np.tile(order[:half], repeat), np.concatenate(low)


def _candidates(ledger: Ledger, objective: _Objective, turn: int) -> tuple[Ints, Ints, Ints, Ints]:
    """The most promising swaps (give, x, take, y) by the second-order model, two per pair of ranks, at most a shortlist."""
    (slope, local, _), (curve, local2, total2) = objective.slopes(ledger)
    give, take = _rank_pairs(ledger, slope.mean(1), turn)
    table = ledger.table
    stride = -(-ledger.per_rank // _BLOCKS)
    if stride > 1:
        table = np.sort(table, axis=1)[:, turn % stride :: stride]
    weights = (slope[give] - slope[take], (slope[:, give] - slope[:, take]).T, (local[give] - local[take])[:, None])
    scales = tuple(
        np.sqrt(part)[:, None]
        for part in (
            curve[give] + curve[take],
            (curve[:, give] + curve[:, take]).T,
            np.stack([total2[give] + total2[take], local2[give] + local2[take]], 1),
        )
    )

    def features(blocks: Ints) -> tuple[Floats, Floats, Floats]:  # linear change, features, half their squares
        rows, keys, alone = ledger.by_shard[blocks], ledger.by_reader[blocks], ledger.block_local[blocks]
        linear = (rows @ weights[0][:, :, None])[..., 0] + (keys @ weights[1][:, :, None])[..., 0] + alone * weights[2]
        whole = np.stack([ledger.block_cost[blocks], alone], -1)
        scaled = np.concatenate([rows * scales[0], keys * scales[1], whole * scales[2]], -1)
        return linear, scaled, 0.5 * np.einsum("pnf,pnf->pn", scaled, scaled)

    out, in_ = table[give], table[take]
    linear_x, x, half_x = features(out)
    linear_y, y, half_y = features(in_)
    change = (half_x - linear_x)[:, :, None] + (half_y + linear_y)[:, None] - x @ y.transpose(0, 2, 1)
    change = change.reshape(give.size, -1)
    which = np.argpartition(change, min(2, change.shape[1]) - 1, axis=1)[:, :2]
    pair = np.repeat(np.arange(give.size), which.shape[1])
    which = which.ravel()
    top = np.argsort(change[pair, which], kind="stable")[:_SHORTLIST]
    pair, which = pair[top], which[top]
    width = in_.shape[1]
    return give[pair], out[pair, which // width], take[pair], in_[pair, which % width]
