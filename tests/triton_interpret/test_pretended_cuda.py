"""The GPU tests and the GPU branches of the scripts, on a pretended device, so that a first run on a real one meets no typo.

This proves that those lines run and that results are right in Triton's interpreter. It proves nothing about speed: times are the
interpreter's, are thrown away, and nothing may be written under benchmarks/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from triton.runtime.errors import OutOfResources

from mtrain.patterns import Coverage
from scripts import bench_kernels, bench_step, ring_trace, tune_kernels
from scripts.kernel_bench import cases as kernel_cases
from scripts.kernel_bench import contestants as kernel_contestants
from scripts.kernel_bench import measure as kernel_measure
from scripts.kernel_bench.cases import Shape
from scripts.ring_trace_parts import cases as ring_cases
from scripts.step_bench import bench, check
from scripts.step_bench import contestants as step_contestants
from scripts.step_bench import measure as step_measure
from tests.gpu import test_estimation, test_flash, test_inference, test_numerics, test_syncs
from tests.pretend_cuda import pretended_cuda
from tests.pretend_cuda_plugin import small_gpu_tests
from tests.pretend_tensors import Device

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
    "scores": lambda: test_estimation.test_kernels_score_as_float64_does(64, torch.bfloat16, 64, 50, 1, 5, False),
    "no waiting, estimated": lambda: test_syncs.test_estimate_index_forward_and_backward(Coverage(0.9, 4, 128), 4),
    "no waiting, blocks": test_syncs.test_patterns_of_single_blocks,
    "no waiting, xattention": lambda: test_syncs.test_choosing_blocks("xattention"),
    "no waiting, moba": lambda: test_syncs.test_choosing_blocks("moba"),
    "the guard": test_syncs.test_the_guard_raises,
    "flash": lambda: test_flash.test_ring_steps_add_up("torch", 64),
    "inference": lambda: test_inference.test_float32_is_that_of_the_cpu(test_inference.SPARSE),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's maximum over a row of padding
@pytest.mark.parametrize("name", PART)
def test_a_gpu_test_passes(name: str, device: Device) -> None:
    PART[name]()


# ------------------------------------------------------------------------------------------------------------------- the scripts


quiet_imports = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler, while it is imported


@quiet_imports
def test_the_benchmark_of_the_kernels(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernel_cases, "Shape", lambda heads, *_: Shape(heads // 16, 1, 64, 64))
    monkeypatch.setattr(kernel_measure, "LARGE", 64)
    arguments = ["--lengths", "64", "--densities", "0.8", "--seconds", "0", "--out", str(tmp_path / "kernels")]
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *arguments])
    assert bench_kernels.main() == 0
    records = json.loads((tmp_path / "kernels.json").read_text())["results"]
    assert {r["name"] for r in records if "not_run" not in r} == {"torch SDPA flash", "ours"}
    assert all(r["host_syncs"] == "none" and r["index_bytes"] > 0 for r in records if r["name"] == "ours")
    text = capsys.readouterr().out
    assert "Ceilings of this device in the same run: copy" in text
    assert "## Bars" in text and "bench_kernels.py --lengths 64" in text and (tmp_path / "kernels.png").exists()


def test_tuning_drops_what_fails_and_goes_on(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One candidate needs too much memory, one is wrong, one fails at full length; the row in force of another kernel fails."""
    target = tune_kernels.Target(90, 64, "bf16", 32)
    held = target.in_force("dkdv")
    tiles = [held, *(replace(held, stages=n) for n in (1, 4, 5)), replace(held, warps=4)]
    fits = [str(target), *(f"dkdv {tune_kernels.text_of(tile)}" for tile in tiles)]
    fits.append(f"forward {tune_kernels.text_of(target.in_force('forward'))}")
    (tmp_path / "fits").write_text("\n".join(fits) + "\n")
    right, table = kernel_contestants.ours, tune_kernels.config.TABLE
    before = {name: dict(rows) for name, rows in table.items()}

    def ours(pattern: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            stages = table["dkdv"][target.key][0].stages
            if stages == 5 or (stages == 1 and q.shape[1] == 64):
                raise OutOfResources(300_000, 232_448, "shared memory")
            if len(table["forward"][target.key]) == 1:
                raise RuntimeError("an illegal instruction")
            return right(pattern)(q, k * 1.05 if stages == 4 else k, v)

        return attend

    monkeypatch.setattr(kernel_contestants, "ours", ours)
    monkeypatch.setattr(kernel_measure, "SHORT", 32)
    sizes = "--head-dim 64 --block 32 --heads 1 --kv-heads 1 --lengths 64 --densities 0.8 --seconds 0".split()
    files = ["--fits", str(tmp_path / "fits"), "--out", str(tmp_path / "tiles.md")]
    assert tune_kernels.main(["--kernels", "forward", "dkdv", *sizes, *files]) == 1
    text = capsys.readouterr().out
    assert "forward is not tuned" in text and "an illegal instruction" in text
    for number, reason in ((5, "does not run: OutOfResources"), (4, "wrong at density"), (1, "OutOfResources")):
        assert f"{tune_kernels.text_of(replace(held, stages=number))}: {reason}" in text
    assert f"| {tune_kernels.text_of(tiles[-1])} |" in text and "ready to paste: `dkdv" in text
    assert (tmp_path / "tiles.md").read_text().endswith(text[-200:]) and table == before


def test_the_ring_goes_on_where_it_was_stopped(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ring_cases.MODELS, "qwen2.5-3b", ring_cases.Model("small", 2, 64, 128, 256, SHAPE))
    monkeypatch.setattr(ring_trace, "SHORT", 64)
    monkeypatch.setattr(ring_trace, "SHORT_RING", ring_trace.RingTopology(1, 2))
    sizes = "--models qwen2.5-3b --lengths 64 --densities 1 0.8 --layouts striped --outer 1 --inner 2 --seconds 0"
    arguments = [*sizes.split(), "--out", str(tmp_path / "trace")]
    trace = ring_cases.trace

    def stopped(case: ring_cases.Case, *given: Any) -> Any:
        if case.density < 1:
            raise KeyboardInterrupt
        return trace(case, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ring_cases, "trace", stopped)
        with pytest.raises(KeyboardInterrupt):
            ring_trace.main(arguments)
    first = json.loads((tmp_path / "trace.json").read_text())["records"]
    assert ring_trace.main([*arguments, "--resume"]) == 0
    records = json.loads((tmp_path / "trace.json").read_text())["records"]
    assert records[:1] == first and [r["density"] for r in records] == [1.0, 0.8]
    assert records[0]["backend"] in ("flash", "triton") and records[1]["backend"] == "triton"
    assert all(min(map(min, r[d]["steps"])) > 0 for r in records for d in ("forward", "backward"))
    assert "## small (H=2, K=1, D=64), 64 tokens, 1 x 2 ranks" in capsys.readouterr().out
    (tmp_path / "trace.json").write_text('{"environment": {"dev')
    with pytest.raises(SystemExit, match="no whole JSON"):
        ring_trace.main([*arguments, "--resume"])


@quiet_imports
def test_a_step_until_memory_ends(
    device: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"num_hidden_layers": 1, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(bench, "TINY", {**bench.TINY, **small, "intermediate_size": 96, "vocab_size": 128})
    monkeypatch.setattr(step_contestants, "ROUNDS", 1)
    monkeypatch.setattr(step_contestants, "NEAR", 10.0)  # any budget will do
    # In so short a sequence even a small budget is half of the pairs, so the comparison has to be sharper.
    monkeypatch.setitem(check.TOLERANCE, "bf16", (1e-3, 1e-2, 0.05))
    measure, left = step_measure.measure, []

    def full(bench: Any, batch: Any, *given: Any) -> Any:
        if batch.tokens.shape[1] == 160:
            device.memory = device.live + 100_000
        records = measure(bench, batch, *given)
        left.append(device.live)
        return records

    monkeypatch.setattr(step_measure, "measure", full)
    sizes = "--tiny --lengths 128 160 --densities 0.6 --budgets topk --seconds 0".split()
    assert bench_step.main([*sizes, "--out", str(tmp_path / "step")]) == 0
    written = json.loads((tmp_path / "step.json").read_text())
    assert [(r["key"], r["length"], bool(r.get("out_of_memory"))) for r in written["results"]] == [
        ("dense", 128, False), ("topk 60%", 128, False), ("dense", 160, True), ("topk 60%", 160, True),
    ]  # fmt: skip
    assert left[1] <= left[0], "what ran out of memory gave everything back"
    # The stepper's own reads; a stopwatch that waited would add to them.
    assert all(without == marked for without, marked in written["check"]["waits"].values())
    for record in written["results"][:2]:
        assert 0.5 < sum(record["share"].values()) <= 1 and 0 < record["peak_mb"] < 8
    assert "| dense | 128 | 160 |" in capsys.readouterr().out
