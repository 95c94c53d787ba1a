"""The books of an assignment: work of every rank in every ring step, kept exact while blocks change owners."""

from __future__ import annotations

import numpy as np

from mtrain.balance.forecast import Floats, Forecast, Ints
from mtrain.balance.work import shard_table
from mtrain.topology import RingTopology


class Ledger:
    """Starts striped, or with ``owner`` int64 [W * n], every rank n times; `swap` exchanges two blocks in O(NB) time.

    All work is in units of the mean work of a rank.

    Attributes:
        unit: mean work of a rank, in computed tile area.
        table: int64 [W, n] block ids of each rank; ids >= NB are padding without cost.
        steps: float64 [W, outer * inner], work of each rank in each ring step.
        local: float64 [W], work of each rank outside the ring's steps.
        by_shard: float64 [W * n, W], work of each query block on the keys of each rank.
        by_reader: float64 [W * n, W], work of each rank's query blocks on each key block.
        block_local, block_cost: float64 [W * n], local and whole work of each query block.
        shard: int64 [W, steps], whose keys a rank meets in a step. step_of: int64 [W, W], in which step it meets a rank's keys.
    """

    def __init__(self, forecast: Forecast, topology: RingTopology, owner: Ints | None = None) -> None:
        ranks, blocks = topology.world_size, forecast.num_blocks
        self.ranks, self.num_blocks, self.per_rank = ranks, blocks, -(-blocks // ranks)
        self.first, self.last = forecast.first, forecast.last
        self.shard: Ints = shard_table(topology).numpy()
        self.step_of: Ints = np.argsort(self.shard, axis=1)
        size = self.per_rank * ranks
        self.tiles = forecast.tiles
        if owner is None:
            owner = np.arange(size) % ranks
            self.by_shard, self.by_reader = self._striped(forecast)
        else:
            tiles, hot = self.dense_tiles(), np.eye(ranks)[owner]
            self.by_shard, self.by_reader = tiles @ hot, tiles.T @ hot
        self.block_local: Floats = np.pad(forecast.local, (0, size - blocks))
        self.block_cost: Floats = self.by_shard.sum(1) + self.block_local
        self.unit = float(self.block_cost.sum()) / ranks or 1.0
        for part in (self.by_shard, self.by_reader, self.block_local, self.block_cost):
            part /= self.unit
        self.tiles = self.tiles / self.unit
        self.table: Ints = np.argsort(owner, kind="stable").reshape(ranks, self.per_rank)
        pairs = self.by_shard[self.table].sum(1)
        self.steps: Floats = np.take_along_axis(pairs, self.shard, 1)
        self.local: Floats = self.block_local[self.table].sum(1)

    def _striped(self, forecast: Forecast) -> tuple[Floats, Floats]:
        """`by_shard` and `by_reader` of the striped layout: an offset d always points at the rank d places away."""
        ranks, ids = self.ranks, np.arange(self.num_blocks)
        size = self.per_rank * ranks
        reach = np.zeros((size, ranks))  # reach[x, t]: work of the offsets up to x that are t modulo ranks
        reach[ids, ids % ranks] = forecast.tiles
        np.cumsum(reach, axis=0, out=reach)
        lane = np.arange(ranks)
        away = ((lane[:, None] - lane) % ranks)[ids % ranks]  # from each query's rank to each shard
        back = ((lane - lane[:, None]) % ranks)[ids % ranks]
        by_shard, by_reader = np.zeros((size, ranks)), np.zeros((size, ranks))
        for first, last in zip(self.first, self.last, strict=True):
            by_shard[: ids.size] += np.take(reach, away + ((ids - first) * ranks)[:, None])
            by_reader[: ids.size] += np.take(reach, back + ((last - ids) * ranks)[:, None])
        return by_shard, by_reader

    def dense_tiles(self) -> Floats:
        """float64 [W * n, W * n], work of every query block on every key block; O(NB^2) memory."""
        blocks, size = np.arange(self.num_blocks), self.per_rank * self.ranks
        offset = blocks[:, None] - blocks
        seen = (blocks >= self.first[:, :, None]).sum(0) * (offset >= 0)
        tiles = np.zeros((size, size))
        tiles[: blocks.size, : blocks.size] = seen * self.tiles[offset.clip(0)]
        return tiles

    def tile(self, query: Ints, key: Ints) -> Floats:
        """Work of single tiles, key <= query."""
        real = query < self.num_blocks
        query = np.minimum(query, self.num_blocks - 1)
        key = np.minimum(key, query)
        return np.asarray(np.where(real, self.tiles[query - key] * (self.first[:, query] <= key).sum(0), 0.0))

    def after(self, give: Ints, x: Ints, take: Ints, y: Ints) -> tuple[Floats, Floats]:
        """(steps [k, W, T], local [k, W]) as they would be after each of k swaps: rank give[i] hands x[i] to take[i] for y[i].

        With O the owners as a one-hot matrix and T the tiles, steps hold O' T O; a swap adds (e_x - e_y)(e_take - e_give)' to O.
        """
        k = np.arange(give.size)
        steps, local = np.repeat(self.steps[None], k.size, 0), np.repeat(self.local[None], k.size, 0)
        rows = self.by_shard[x] - self.by_shard[y]
        keys = self.by_reader[x] - self.by_reader[y]
        both = self.tile(x, x) + self.tile(y, y) - self.tile(np.maximum(x, y), np.minimum(x, y))
        for rank, other, sign in ((take, give, 1.0), (give, take, -1.0)):
            steps[k, rank] += sign * np.take_along_axis(rows, self.shard[rank], 1)
            steps[k[:, None], np.arange(self.ranks), self.step_of[:, rank].T] += sign * keys
            steps[k, rank, self.step_of[rank, rank]] += both
            steps[k, rank, self.step_of[rank, other]] -= both
            local[k, rank] += sign * (self.block_local[x] - self.block_local[y])
        return np.maximum(steps, 0.0), local

    def swap(self, give: int, x: int, take: int, y: int) -> None:
        """Exchange block x of rank ``give`` and block y of rank ``take``."""
        steps, local = self.after(*(np.array([value]) for value in (give, x, take, y)))
        self.steps, self.local = steps[0], local[0]
        for block, old, new in ((x, give, take), (y, take, give)):
            if block >= self.num_blocks:
                continue
            for first, last in zip(self.first[:, block], self.last[:, block], strict=True):
                down = self.tiles[: last + 1 - block]
                self.by_shard[block : last + 1, old] -= down
                self.by_shard[block : last + 1, new] += down
                up = self.tiles[: block + 1 - first][::-1]
                self.by_reader[first : block + 1, old] -= up
                self.by_reader[first : block + 1, new] += up
        self.table[give, np.flatnonzero(self.table[give] == x)[0]] = y
        self.table[take, np.flatnonzero(self.table[take] == y)[0]] = x

    def score(self) -> tuple[float, float]:
        """(worker, step) imbalance of the current assignment."""
        worker, step = score(self.steps, self.local)
        return float(worker), float(step)


def score(steps: Floats, local: Floats) -> tuple[Floats, Floats]:
    """(worker, step) imbalance of step tables [..., W, T] with local work [..., W], in units of the mean work of a rank."""
    return (steps.sum(-1) + local).max(-1), steps.max(-2).sum(-1) + local.max(-1)
