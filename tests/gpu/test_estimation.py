"""Estimation on the GPU: kernels against the plain path, selection against a sort, and the same bits in every run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtrain.patterns import Coverage, estimate_vertical_slash
from mtrain.patterns import budget as budget_module
from mtrain.patterns import scores as scores_module
from mtrain.patterns.budget import largest, smallest_cover
from mtrain.patterns.documents import Documents, Probes
from mtrain.patterns.placement import Placement
from mtrain.patterns.scores import Scores, probe_scores
from tests.gpu.cases import Case, make_case


def scores_of(case: Case, block: int, probe: int, spread: int, share: bool, widen: torch.dtype | None = None) -> Scores:
    """Fixed-point scores; ``widen``: of inputs cast to this dtype."""
    q, k = (x if widen is None else x.to(widen) for x in (case.q, case.k))
    placement = Placement.of(q.shape[1], block, None, None)
    documents = Documents.gather(case.doc_start, placement)
    probes = Probes.place(documents, 1, probe, spread, q.device)
    return probe_scores(q, k, probes, documents, placement, share=share, scale=q.shape[3] ** -0.5)


@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (128, torch.float16), (96, torch.float32)]
)
@pytest.mark.parametrize(
    ("block", "probe", "spread", "documents", "share"),
    [(128, 64, 0, 0, False), (64, 64, 2, 0, True), (64, 50, 1, 5, False), (16, 100, 0, 3, False)],
)
def test_kernels_score_as_float64_does(
    head_dim: int, dtype: torch.dtype, block: int, probe: int, spread: int, documents: int, share: bool
) -> None:
    case = make_case("cuda", 3, 6000 - 41, head_dim, kv_heads=2, group=4, documents=documents, dtype=dtype)
    found = scores_of(case, block, probe, spread, share)
    # float64 inputs take the plain path.
    wanted = scores_of(case, block, probe, spread, share, torch.float64)
    for a, b in ((found.columns, wanted.columns), (found.slashes, wanted.slashes)):
        total = b.sum(1, keepdim=True).double()
        assert float(((a.double() - b.double()) / total).abs().max()) < 1e-6
        assert float(((a.sum(1, keepdim=True).double() - total) / total).abs().max()) < 1e-6


def test_the_kernels_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case("cuda", 3, 2000, 64)
    monkeypatch.setattr(scores_module, "_Pass", None)
    monkeypatch.setattr(torch.Tensor, "sort", None)
    estimate_vertical_slash(case.q, case.k, budget=Coverage(0.9), block=64)


def steep(size: int) -> Tensor:
    """int64 [16, size]: steep rows, rows full of ties, a row of zeros."""
    generator = torch.Generator().manual_seed(size)
    scores = (torch.rand(16, size, generator=generator, dtype=torch.float64) ** 8 * 2**52 / size).long()
    scores[4:8] //= 2**34
    scores[9] = 0
    return scores.cuda()


@pytest.mark.parametrize("size", [1, 1000, 131072, 500001])
def test_a_threshold_selects_what_a_sort_does(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = steep(size)
    cuts = [(0.5, 1, None), (0.95, 100, 2000), (1.0, 0, 7), (0.9, 0, None)]
    counts = torch.arange(16) * (size // 16)
    found = [smallest_cover(scores, *cut) for cut in cuts] + [largest(scores, counts)]
    monkeypatch.setattr(budget_module, "_has_kernels", lambda device: False)
    wanted = [smallest_cover(scores, *cut) for cut in cuts] + [largest(scores, counts)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_fifty_estimates_give_the_same_bits() -> None:
    case = make_case("cuda", 5, 30000, 128, kv_heads=2, group=4, documents=4)
    runs = [scores_of(case, 128, 64, 2, False) for _ in range(50)]
    assert all(torch.equal(x.columns, runs[0].columns) and torch.equal(x.slashes, runs[0].slashes) for x in runs[1:])
