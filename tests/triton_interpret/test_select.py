"""Selection by threshold gives what a sort gives, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtrain.patterns import budget
from mtrain.patterns.budget import largest, smallest_cover
from sparse_kernels.gpu.select import choose

CUTS = [(0.5, 1, None), (0.9, 0, None), (1.0, 3, 5), (0.99, 4, 40), (1e-9, 0, 1), (0.95, 40, 80)]


def rows(size: int) -> Tensor:
    """int64 [6, size]: steep, full of ties, all zero, all equal, one huge, few and far between."""
    g = torch.Generator().manual_seed(size)
    scores = (torch.rand(6, size, generator=g, dtype=torch.float64) ** 8 * 2**52 / size).long()
    scores[1] //= 2**34
    scores[2] = 0
    scores[3] = 7
    scores[4] = 0
    scores[4, size // 2] = 2**52
    scores[5] *= torch.rand(size, generator=g) < 0.1
    return scores


def cover(scores: Tensor, p: float, floor: int, cap: int | None) -> list[set[int]]:
    """The rule of coverage by a plain loop."""
    found = []
    for row in scores.tolist():
        chosen: set[int] = set()
        mass, target = 0, p * float(sum(row))
        for n in sorted(range(len(row)), key=lambda n: (-row[n], n)):
            if (mass >= target and len(chosen) >= floor) or len(chosen) == cap:
                break
            chosen.add(n)
            mass += row[n]
        found.append(chosen)
    return found


@pytest.mark.parametrize("size", [1, 70, 1100])
def test_coverage(size: int) -> None:
    # All cuts of all rows in one call: limits are per row.
    scores = rows(size).repeat(len(CUTS), 1)
    total = scores.sum(1)
    target = torch.cat([(total[:6].double() * p).ceil().long() for p, _, _ in CUTS])
    floor = torch.tensor([floor for _, floor, _ in CUTS]).repeat_interleave(6)
    cap = torch.tensor([size if cap is None else cap for _, _, cap in CUTS]).repeat_interleave(6)
    found = choose(scores, target, floor, cap)
    for part, (p, least, most) in zip(found.split(6), CUTS, strict=True):
        assert torch.equal(part, smallest_cover(rows(size), p, least, most)), (p, least, most)
        assert [set(row.nonzero().flatten().tolist()) for row in part] == cover(rows(size), p, least, most)


def test_largest() -> None:
    scores, counts = rows(90), torch.tensor([0, 1, 3, 90, 45, 11])
    assert torch.equal(choose(scores, torch.zeros(6, dtype=torch.int64), counts, counts), largest(scores, counts))


def test_budgets_choose_by_kernel_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, counts = rows(33), torch.tensor([1, 2, 0, 33, 4, 5])
    wanted = smallest_cover(scores.view(2, 3, 33), 0.8, 2, 9), largest(scores, counts), smallest_cover(scores, 0.7)
    monkeypatch.setattr(budget, "_has_kernels", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    found = smallest_cover(scores.view(2, 3, 33), 0.8, 2, 9), largest(scores, counts), smallest_cover(scores, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
