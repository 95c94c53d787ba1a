"""The scoring and selection kernels compiled for GPUs: no spilled registers, shared memory within budget, tensor cores in use."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_kernels.gpu import probe, select
from sparse_kernels.gpu.recorded import Recorded
from sparse_kernels.gpu.resources import SHARED_LIMIT


def launches(
    head_dim: int, dtype: torch.dtype, block: int, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> list[Recorded]:
    """Both kernels for 8 query and 2 key-value heads, recorded instead of run."""
    found: list[Recorded] = []
    monkeypatch.setattr(
        probe, "start", lambda kernel, grid, **given: found.append(Recorded(kernel, {**given, "UPCAST": False}))
    )
    rows = sum(sizes)
    q, k = torch.zeros(1, rows, 8, head_dim, dtype=dtype), torch.zeros(1, 4 * block, 2, head_dim, dtype=dtype)
    bounds: Any = torch.zeros(1, rows, dtype=torch.int32)
    scorer = probe.ProbeScorer(q, k, bounds, bounds, torch.arange(4, dtype=torch.int32), sizes, block, 1.0)
    scorer.statistics()
    scorer.scores(torch.zeros(1, 8, rows), torch.zeros(1, 8, rows), 4)
    assert [launched.name for launched in found] == ["statistics_kernel", "scores_kernel"]
    return found


def check(capability: int, found: list[Recorded]) -> None:
    for launched in found:
        measured = launched.measure(capability)
        what = f"{launched.name} {launched.tile} on sm_{capability}: {measured}"
        assert measured.spills == 0, what
        assert measured.shared <= SHARED_LIMIT[capability], what
        assert measured.tensor_cores, what


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills(capability: int, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check(capability, launches(head_dim, torch.bfloat16, 128, (64,), monkeypatch))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "block", "sizes"),
    [
        (96, torch.float16, 64, (64,)),
        (256, torch.bfloat16, 128, (64,)),
        (128, torch.float32, 128, (64,)),
        (128, torch.bfloat16, 16, (16, 16, 16, 16)),
    ],
)
def test_no_spills_in_other_shapes(
    capability: int,
    head_dim: int,
    dtype: torch.dtype,
    block: int,
    sizes: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(capability, launches(head_dim, dtype, block, sizes, monkeypatch))


@pytest.mark.parametrize("capability", [80, 90])
def test_selection_spills_nothing(capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Recorded] = []
    monkeypatch.setattr(select, "start", lambda kernel, grid, **given: found.append(Recorded(kernel, given)))
    limit = torch.zeros(8, dtype=torch.int64)
    select.choose(torch.zeros(8, 131072, dtype=torch.int64), limit, limit, limit)
    assert len(found) == select.DIGITS + 1
    # The first pass, one between, the last (its step is the constant 1) and the closing kernel.
    for launched in (found[0], found[1], found[-2], found[-1]):
        measured = launched.measure(capability)
        assert measured.spills == 0 and measured.shared <= SHARED_LIMIT[capability], (launched.name, measured)
