"""Parts of scripts/bench_kernels.py that a smoke run on the CPU skips."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scripts.kernel_bench import measure
from scripts.kernel_bench.cases import Shape, inputs, vertical_slash
from sparse_kernels import SparsePattern, sparse_attention


def test_the_guard_against_host_syncs_runs_estimation_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that passes for a GPU: the guard itself says nothing, everything inside it runs."""
    shape, modes, estimated = Shape(2, 1, 16, 32), [], []
    settings = measure.Settings(shape, 128, [0.6], torch.device("cuda"), True, False, 0.0)
    pattern, _ = vertical_slash(shape, 128, 0.6)
    tensors = inputs(shape, 128, torch.device("cpu"))

    def ours(given: SparsePattern) -> Any:
        estimated.append(given)
        return lambda q, k, v: sparse_attention(q, k, v, given, backend="cpu")

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(measure.contestants, "ours", ours)
    monkeypatch.setattr(measure, "bytes_of", lambda *_: 1)
    monkeypatch.setattr(
        "sparse_kernels.gpu.index.DeviceIndex",
        lambda *_: type("Index", (), {"has_columns": False, "tiles": lambda *_, **__: None})(),
    )
    monkeypatch.setattr(measure, "clock", lambda _, work: (lambda: 1.0, work()))
    cost = measure.index_cost(pattern, tensors, settings)
    assert cost["host_syncs"] == "none" and modes == ["error", "default"]
    assert len(estimated) == 2 and all(isinstance(x, SparsePattern) and x is not pattern for x in estimated)
