"""The GPU tests and the GPU branches of the scripts, on a pretended device, so that a first run on a real one meets no typo.

This proves that those lines run and that results are right in Triton's interpreter. It proves nothing about speed: times are the
interpreter's, are thrown away, and nothing may be written under benchmarks/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from mtrain.patterns import Coverage
from scripts import bench_kernels, bench_step, ring_trace, tune_kernels
from scripts.kernel_bench import cases as kernel_cases
from scripts.kernel_bench.cases import Shape
from scripts.ring_trace_parts import cases as ring_cases
from scripts.step_bench import bench, check, contestants
from scripts.step_bench import measure as step_measure
from tests.gpu import test_estimation, test_flash, test_inference, test_numerics, test_repeat, test_syncs
from tests.pretend_cuda import Device, on_device, pretended_cuda
from tests.pretend_cuda_plugin import small_gpu_tests
from triton.runtime.errors import OutOfResources

SHAPE = Shape(2, 1, 64, 32)


@pytest.fixture
def device() -> Iterator[Device]:
    with pretended_cuda() as pretended, small_gpu_tests():
        yield pretended
    AcceleratorState._reset_state(True)


# --------------------------------------------------------------------------------------------------------------- the device itself


def test_tensors_know_where_they_are(device: Device) -> None:
    x = torch.randn(3, 4, device="cuda", requires_grad=True)
    assert x.device == torch.device("cuda", 0) and x.is_cuda and not torch.ones(1).is_cuda
    assert (x[1:].T @ x[1:]).is_cuda and not x.detach().cpu().is_cuda
    (x * 2).sum().cpu().backward()
    assert x.grad is not None and x.grad.is_cuda and torch.equal(x.grad.cpu(), torch.full((3, 4), 2.0))
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3, 4)
    with pytest.raises(TypeError, match="numpy"):
        x.detach().numpy()
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())


def test_waiting_is_noticed(device: Device) -> None:
    x, begin, end = torch.ones(3, device="cuda"), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    end.record()
    with pytest.raises(RuntimeError, match="not ready"):
        begin.elapsed_time(end)
    torch.cuda.synchronize()
    assert begin.elapsed_time(end) >= 0
    torch.cuda.set_sync_debug_mode("error")
    x.add_(torch.ones(3).to("cuda", non_blocking=True))
    for wait in (lambda: x.cpu(), lambda: x[x > 0], lambda: float(x[0]), lambda: torch.tensor([1.0], device="cuda")):
        with pytest.raises(RuntimeError, match="synchronizing"):
            wait()


def test_memory_is_counted_and_ends() -> None:
    with pretended_cuda(memory=1 << 20) as device:
        x = torch.zeros(1 << 17, device="cuda")
        assert torch.cuda.max_memory_allocated() == device.live == 1 << 19
        with pytest.raises(torch.OutOfMemoryError):
            [x + 1, x + 2]
        del x
        assert device.live == 0


def test_nothing_is_written_among_the_benchmarks(device: Device) -> None:
    with pytest.raises(PermissionError, match="pretended"):
        (Path(bench_kernels.ROOT) / "benchmarks" / "kernels.md").write_text("no speed")


# ------------------------------------------------------------------------------------------------------------ a part of tests/gpu

PART: dict[str, Callable[[], None]] = {
    "structured kernels": lambda: test_numerics.test_two_rules(4096, 3, 64),
    "general kernels": lambda: test_numerics.test_two_rules(4096, 5, 64),
    "padding": lambda: test_numerics.test_padding_may_hold_nan(3, 0.0),
    "the same bits": lambda: test_repeat.test_two_hundred_runs_give_the_same_bits(64, 0.02),
    "scores": lambda: test_estimation.test_kernels_score_as_float64_does(64, torch.bfloat16, 64, 50, 1, 5, False),
    "no waiting, estimated": lambda: test_syncs.test_estimate_index_forward_and_backward(Coverage(0.9, 4, 128), 4),
    "no waiting, blocks": test_syncs.test_patterns_of_single_blocks,
    "the guard": test_syncs.test_the_guard_raises,
    "flash": lambda: test_flash.test_ring_steps_add_up("torch", 64),
    "inference": lambda: test_inference.test_ring_of_threads(test_inference.SPARSE, torch.bfloat16),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's maximum over a row of padding
@pytest.mark.parametrize("name", PART)
def test_a_gpu_test_passes(name: str, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, answers = test_inference.ids_of, test_inference.answers
    monkeypatch.setattr(test_inference, "ids_of", lambda _: ids(70))
    monkeypatch.setattr(test_inference, "answers", lambda engine, text, *_: answers(engine, text, 12, [69, 5]))
    PART[name]()


# ------------------------------------------------------------------------------------------------------------------- the scripts


def test_the_benchmark_of_the_kernels(device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(kernel_cases, "Shape", lambda heads, *_: Shape(2, 1 + heads % 32 // 16, 64, 32))
    out = str(tmp_path / "kernels")
    arguments = ["--lengths", "64", "--densities", "0.8", "--seconds", "0", "--out", out]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *arguments])
    assert bench_kernels.main() == 0
    records = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert {r["name"] for r in records if "not_run" not in r} == {"torch SDPA flash", "ours"}
    assert all(r["host_syncs"] == "none" and r["index_bytes"] > 0 for r in records if r["name"] == "ours")
    assert "## Bars" in capsys.readouterr().out and (tmp_path / "kernels.png").exists()
