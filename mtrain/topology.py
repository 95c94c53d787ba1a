"""In what order key-value shards visit a rank: a flat ring, or rings inside nodes nested in a ring between nodes."""

from __future__ import annotations

from dataclasses import dataclass

from mtrain.errors import MtrainError


@dataclass(frozen=True)
class RingTopology:
    """``outer`` nodes of ``inner`` ranks each; rank = outer_index * inner + inner_index. A flat ring is outer = 1.

    The two-level ring follows LoongTrain's double ring (arXiv 2406.18485): between nodes each shard crosses once per rank pair
    of the outer ring while a whole inner ring runs.
    """

    outer: int = 1
    inner: int = 1

    def __post_init__(self) -> None:
        if self.outer < 1 or self.inner < 1:
            raise MtrainError(f"a ring needs outer >= 1 and inner >= 1, got outer={self.outer}, inner={self.inner}")

    @property
    def world_size(self) -> int:
        """Ranks in the whole ring."""
        return self.outer * self.inner

    def outer_index(self, rank: int) -> int:
        """Which node the rank belongs to."""
        return rank // self.inner

    def inner_index(self, rank: int) -> int:
        """The rank's place inside its node."""
        return rank % self.inner

    def owner(self, rank: int, s: int, t: int) -> int:
        """The rank whose shard ``rank`` works on in outer step s, inner step t."""
        node = (self.outer_index(rank) - s) % self.outer
        return node * self.inner + (self.inner_index(rank) - t) % self.inner

    def next(self, rank: int, axis: str) -> int:
        """The rank that ``rank`` sends to on the "inner" or "outer" ring."""
        return self._neighbour(rank, axis, 1)

    def previous(self, rank: int, axis: str) -> int:
        """The rank that ``rank`` receives from on the "inner" or "outer" ring."""
        return self._neighbour(rank, axis, -1)

    def _neighbour(self, rank: int, axis: str, step: int) -> int:
        node, place = self.outer_index(rank), self.inner_index(rank)
        if axis == "inner":
            return node * self.inner + (place + step) % self.inner
        assert axis == "outer", axis
        return ((node + step) % self.outer) * self.inner + place
