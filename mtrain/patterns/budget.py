"""How many columns and slashes a head may keep, given how its probe rows spread their attention over them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from mtrain.errors import MtrainError
from sparse_kernels.bits import upload


class Budget(Protocol):
    """Chooses columns and slashes of some heads from their scores."""

    def choose_columns(self, scores: Tensor, heads: Sequence[int]) -> Tensor:
        """bool like ``scores`` [n, S]: the chosen columns. ``heads[i]`` is the head that row i belongs to."""

    def choose_slashes(self, scores: Tensor, heads: Sequence[int]) -> Tensor:
        """bool like ``scores`` [n, S]: the chosen token distances."""

    def check(self, heads: int) -> None:
        """MtrainError unless the budget fits so many scored heads; every rank checks all of them, so that all stop together."""

    def most_columns(self) -> int | None:
        """An upper bound of the columns chosen per head; None when only the sequence bounds them."""


@dataclass(frozen=True)
class Coverage:
    """The smallest set whose mass is at least ``p`` of the whole, for columns and for slashes alike.

    Args:
        p: 0 < p <= 1.
        floor: keep at least so many (forced sinks and locals come on top).
        cap: keep at most so many, even when the mass then stays below p; None: no limit. On a GPU a cap also bounds the
            memory of the index, whose size must be known without asking the device.
    """

    p: float
    floor: int = 1
    cap: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise MtrainError(f"coverage p must be above 0 and at most 1, got {self.p}")
        if self.floor < 0:
            raise MtrainError(f"coverage floor must be at least 0, got {self.floor}")
        if self.cap is not None and self.cap < max(1, self.floor):
            raise MtrainError(f"coverage cap must be at least 1 and at least the floor ({self.floor}), got {self.cap}")

    def check(self, heads: int) -> None:
        """See `Budget`."""

    def choose_columns(self, scores: Tensor, heads: Sequence[int]) -> Tensor:
        """See `Budget`."""
        return smallest_cover(scores, self.p, self.floor, self.cap)

    def choose_slashes(self, scores: Tensor, heads: Sequence[int]) -> Tensor:
        """See `Budget`."""
        return smallest_cover(scores, self.p, self.floor, self.cap)

    def most_columns(self) -> int | None:
        """See `Budget`."""
        return self.cap


@dataclass(frozen=True)
class TopK:
    """Fixed counts: the same for all heads, or one per head (per key-value head where heads share a pattern)."""

    columns: int | tuple[int, ...]
    slashes: int | tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _counts("columns", self.columns))
        object.__setattr__(self, "slashes", _counts("slashes", self.slashes))

    def check(self, heads: int) -> None:
        """See `Budget`."""
        for name, counts in (("columns", self.columns), ("slashes", self.slashes)):
            if isinstance(counts, tuple) and len(counts) != heads:
                raise MtrainError(
                    f"top-k {name} names {len(counts)} heads, but {heads} are scored; give one count per head"
                )

    def choose_columns(self, scores: Tensor, heads: Sequence[int]) -> Tensor:
        """See `Budget`."""
        return largest(scores, _per_row(self.columns, heads))

    def choose_slashes(self, scores: Tensor, heads: Sequence[int]) -> Tensor:
        """See `Budget`."""
        return largest(scores, _per_row(self.slashes, heads))

    def most_columns(self) -> int | None:
        """See `Budget`."""
        return self.columns if isinstance(self.columns, int) else max(self.columns)


def smallest_cover(scores: Tensor, p: float, floor: int = 0, cap: int | None = None) -> Tensor:
    """bool like ``scores``: per row the smallest set whose sum is at least ``p`` times the row's sum.

    Args:
        scores: int64 [..., n], >= 0, with row sums below 2**53. Integers, because only their sums are exact in any
            order: the answer then never depends on how the work was shared or on which device it ran.

    Equal scores: lower index first. No host synchronisation, static shapes.
    """
    # For integers, sum >= p * total and sum >= ceil(p * total) say the same.
    return cover_to(scores, (scores.sum(-1, keepdim=True).double() * p).ceil().long(), floor, cap)


def cover_to(scores: Tensor, target: Tensor, floor: int = 0, cap: int | None = None) -> Tensor:
    """`smallest_cover` with the sum to reach, int64 [..., 1] >= 0, in place of a share; 0 needs nothing."""
    if _has_kernels(scores.device):
        limits = (torch.full_like(target, n) for n in (floor, scores.shape[-1] if cap is None else cap))
        return _choose(scores, target, *limits)
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    rank = torch.arange(scores.shape[-1], device=scores.device)
    keep = (before < target) | (rank < floor)
    if cap is not None:
        keep = keep & (rank < cap)
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def largest(scores: Tensor, counts: Tensor) -> Tensor:
    """bool like ``scores`` [n, S]: the ``counts`` [n] largest of each row. Equal scores: lower index first."""
    counts = upload(counts, scores.device)[:, None]
    if _has_kernels(scores.device):
        return _choose(scores, torch.zeros_like(counts), counts, counts)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[-1], device=scores.device)
    keep = rank < counts
    return torch.zeros_like(keep).scatter_(-1, order, keep)


@cache
def _has_kernels(device: torch.device) -> bool:
    """Is a threshold found by kernels, rather than by sorting? On a GPU a sort costs more than everything else here."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _choose(scores: Tensor, target: Tensor, floor: Tensor, cap: Tensor) -> Tensor:
    """`sparse_kernels.gpu.select.choose` for any leading dimensions; limits [..., 1]."""
    from sparse_kernels.gpu.select import choose

    rows = scores.reshape(-1, scores.shape[-1])
    return choose(rows, *(x.reshape(-1) for x in (target, floor, cap))).view(scores.shape)


def _counts(name: str, given: int | Sequence[int]) -> int | tuple[int, ...]:
    counts = tuple(given) if isinstance(given, Sequence) else given
    every = counts if isinstance(counts, tuple) else (counts,)
    if not every or any(not isinstance(n, int) or n < 0 for n in every):
        raise MtrainError(f"top-k {name} must be a count >= 0, or one per head; got {given!r}")
    return counts


def _per_row(counts: int | tuple[int, ...], heads: Sequence[int]) -> Tensor:
    if isinstance(counts, int):
        return torch.full((len(heads),), counts)
    return torch.tensor([counts[head] for head in heads], dtype=torch.int64)
