"""The launches of an estimate on a small problem, recorded instead of run: what tests and the kernel report compile."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from sparse_kernels.gpu import probe, select
from sparse_kernels.gpu.recorded import Recorded


def score_launches(head_dim: int, dtype: torch.dtype, block: int, sizes: tuple[int, ...] = (64,)) -> list[Recorded]:
    """The two scoring passes, for 8 query and 2 key-value heads that share their scores and windows of these sizes."""
    found: list[Recorded] = []

    def record(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> None:
        found.append(Recorded(kernel, {**arguments, "UPCAST": False}))

    rows = sum(sizes)
    q, k = torch.zeros(1, rows, 8, head_dim, dtype=dtype), torch.zeros(1, 4 * block, 2, head_dim, dtype=dtype)
    bounds = torch.zeros(1, rows, dtype=torch.int32)
    with mock.patch.object(probe, "start", record):
        scorer = probe.ProbeScorer(q, k, bounds, bounds, torch.arange(4, dtype=torch.int32), sizes, block, 1.0)
        scorer.statistics()
        scorer.scores(torch.zeros(1, 8, rows), torch.zeros(1, 8, rows), 4)
    return found


def selection_launches() -> list[Recorded]:
    """The passes of a selection that differ: the first, one between, the last (its step is the constant 1) and the closing one."""
    found: list[Recorded] = []
    limit = torch.zeros(8, dtype=torch.int64)
    with mock.patch.object(select, "start", lambda kernel, grid, **given: found.append(Recorded(kernel, given))):
        select.choose(torch.zeros(8, 131072, dtype=torch.int64), limit, limit, limit)
    return [found[0], found[1], found[-2], found[-1]]
