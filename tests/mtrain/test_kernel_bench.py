"""Parts of scripts/bench_kernels.py that a smoke run on the CPU skips."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from scripts.kernel_bench import measure, report
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


def test_bytes_of_an_index_are_those_of_the_device_each_storage_once() -> None:
    device, pattern = torch.device("cpu"), vertical_slash(Shape(2, 1, 16, 32), 128, 0.6)[0]
    index = SimpleNamespace(pattern=pattern, part=pattern.columns[:, :1], host=torch.zeros(5, device="meta"))
    alone = sum(x.untyped_storage().nbytes() for x in (pattern.columns, pattern.diagonals))
    assert measure.bytes_of([pattern, [index]], set(), device) == alone > 0
    assert measure.bytes_of([index], set(), torch.device("cuda", 0)) == 0


def test_a_kernel_that_cannot_run_says_why_whatever_it_raises() -> None:
    class Refused(Exception):
        """Triton's errors are such: no RuntimeErrors."""

    def attend(*_: Any) -> Any:
        raise Refused

    tensors = inputs(Shape(2, 1, 16, 32), 32, torch.device("cpu"))
    assert measure.usable(attend, tensors, True) == "Refused: "


def test_results_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "made" / "x.json"
    report.write_whole(path, '{"a": 1}')
    assert report.read_results(path) == {"a": 1} and [x.name for x in path.parent.iterdir()] == ["x.json"]
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        report.write_whole(path, '{"a": 2')
    assert report.read_results(path) == {"a": 1}
    path.write_text('{"a": 2')
    with pytest.raises(SystemExit, match="no whole JSON"):
        report.read_results(path)
