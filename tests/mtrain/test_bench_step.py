"""The benchmark of a whole training step, tiny: it tells what it measured, and nothing when something is wrong."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch

from mtrain.models import loss
from mtrain.patterns.plan import VerticalSlashPattern
from scripts import bench_step
from scripts.step_bench import contestants, measure, report
from scripts.step_bench.bench import TINY, Bench, Contestant, Settings
from scripts.step_bench.laps import PARTS, Laps, device_index_timed
from sparse_kernels import ShardView, SparsePattern, resolve_backend

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SETTINGS = Settings(TINY, DEVICE, "bf16" if CUDA else "fp32", block=32, sink=4, local=32, loss_chunk=128)


def dense_of_another_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = True) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(SETTINGS)


def test_rows_parts_and_files(tmp_path, capsys):
    path = tmp_path / "step"
    command = ["--tiny", "--rounds", "1", "--budgets", "topk", "--densities", "0.5", "--out", str(path)]
    assert bench_step.main([*command, "--lengths", "256"]) == 0
    assert bench_step.main([*command, "--lengths", "320", "--add"]) == 0
    text, written = capsys.readouterr().out, json.loads(path.with_suffix(".json").read_text())
    assert path.with_suffix(".md").read_text() in text
    assert [(r["key"], r["length"]) for r in written["results"]] == [
        ("dense", 256), ("topk 50%", 256), ("dense", 320), ("topk 50%", 320),
    ]  # fmt: skip
    assert [fact["lengths"] for fact in written["facts"]] == [[256], [320]]
    again = bench_step.merged(written, written["facts"][0], written["results"][:2])
    assert [fact["lengths"] for fact in again["facts"]] == [[320], [256]] and len(again["results"]) == 4
    for record in written["results"]:
        assert record["tokens_per_s"] == pytest.approx(record["length"] / record["step_s"])
        assert set(record["share"]) == set(PARTS) and min(record["share"].values()) >= 0
        # Marks are made inside the step: what is outside of them is the way into and out of it.
        assert 0.5 < sum(record["share"].values()) < 1 + 1e-9
        assert all(record["share"][part] > 0 for part in PARTS[1:])
        assert record["peak_mb"] > 1 and record["steps"] == 1 and record["warmed_up"]
    for dense, sparse in zip(written["results"][::2], written["results"][1::2], strict=True):
        assert dense["density"] == 1 and 0.3 < sparse["density"] < 0.7 and sparse["flop"] < dense["flop"]
        assert sparse["share"]["estimation + index"] > dense["share"]["estimation + index"]
        ratio, least, most = sparse["times_dense"]
        assert least <= ratio <= most and ratio == pytest.approx(dense["step_s"] / sparse["step_s"])
    for word in ("Tiny run", report.FLOP_FORMULA, "topk 50%", "## 320 tokens", "memory did not end", *PARTS):
        assert word in text
    # The comparison that a full budget has to pass sees a budget that is not full.
    found = written["check"]
    assert 0 < found["full"][2] <= found["tolerance"][2] < found["control"][2] / 2


@pytest.mark.parametrize("wrong", ["dense mask", "sparse kernel", "no learning"])
def test_wrong_results_show_no_speed(wrong, tmp_path, monkeypatch, capsys):
    def choose(settings, length, known):
        def attend(q, k, v):
            return dense_of_another_kernel(q, k, v, causal=wrong != "dense mask")

        return Contestant("fake", settings.attention(pattern="dense"), attend=attend), []

    monkeypatch.setattr(contestants, "choose_dense", choose)
    if wrong == "sparse kernel":
        kernel = type(resolve_backend(SETTINGS.attention().backend, DEVICE, torch.bfloat16, SETTINGS.head_dim))
        right = kernel.backward
        monkeypatch.setattr(kernel, "backward", lambda *given: tuple(x * 1.5 for x in right(*given)))
    if wrong == "no learning":
        monkeypatch.setattr("scripts.step_bench.check.LEARNING_RATE", -1e-4)
    out = tmp_path / "step"
    assert bench_step.main(["--tiny", "--lengths", "256", "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "WRONG RESULTS" in printed and "tokens/s" not in printed and not list(tmp_path.iterdir())
    assert ("off the dense one" in printed) == (wrong != "no learning")
    assert ("not down" in printed) == (wrong == "no learning")


def test_out_of_memory_ends_one_attention_only(bench):
    def small(q, k, v):
        if q.shape[1] > 128:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return dense_of_another_kernel(q, k, v)

    dense = SETTINGS.attention(pattern="dense")
    makers = {
        "small": lambda _batch: Contestant("small", dense, attend=small),
        "large": lambda _batch: Contestant("large", dense, kind="topk"),
    }
    effort = measure.Effort(rounds=1, seconds=1e-9)  # the warm-ups are the measurement
    results = [record for records in measure.run(bench, [128, 256, 512], makers, effort) for record in records]
    assert [(r["key"], r["length"], bool(r.get("out_of_memory"))) for r in results] == [
        ("small", 128, False), ("large", 128, False), ("small", 256, True), ("large", 256, False), ("large", 512, False),
    ]  # fmt: skip
    assert measure.longest(results) == {"small": (128, 256), "large": (512, None)}
    assert not any(r.get("warmed_up") for r in results) and "times_dense" not in results[-1]
    assert bench.optimizer.param_groups[0]["params"][0].grad is None

    def broken(q, k, v):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        next(measure.run(bench, [128], {"x": lambda _: Contestant("x", dense, attend=broken)}, effort))


class Clock:
    """Time that passes only where a test says so: a busy machine cannot change what is measured."""

    now = 0.0

    @classmethod
    def pass_by(cls, seconds: float) -> None:
        cls.now += seconds


class Slow(torch.autograd.Function):
    """The identity; 20 ms forward, 50 ms backward."""

    @staticmethod
    def forward(ctx, x):
        Clock.pass_by(0.02)
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        Clock.pass_by(0.05)
        return gradient


def test_time_goes_to_the_part_that_spends_it(bench, monkeypatch):
    monkeypatch.setattr(Laps, "_now", lambda laps: Clock.now)
    monkeypatch.setattr(Laps, "elapsed", staticmethod(lambda begin, end: end - begin))
    layers = TINY["num_hidden_layers"]

    def slow(q, k, v):
        return dense_of_another_kernel(q, k, Slow.apply(v))

    def spent(attend=None):
        recipe = SETTINGS.attention(pattern="dense") if attend else SETTINGS.attention()
        parts = bench.step(Contestant("x", recipe, attend=attend), bench.batch(64), 0.0).parts
        return {part: seconds for part, seconds in parts.items() if seconds}

    assert spent() == {}
    # Forward twice, because it is recomputed.
    expected = {"attention forward": 2 * 0.02 * layers, "attention backward": 0.05 * layers}
    assert spent(slow) == pytest.approx(expected)

    def estimate(*given, **keys):
        Clock.pass_by(0.06)
        return right(*given, **keys)

    right = VerticalSlashPattern.index
    with monkeypatch.context() as patch:
        patch.setattr(VerticalSlashPattern, "index", estimate)
        assert spent() == pytest.approx({"estimation + index": 0.06 * layers})  # once: recomputation keeps it
    hook = bench.optimizer.register_step_pre_hook(lambda *_: Clock.pass_by(0.1))
    assert spent() == pytest.approx({"clipping + AdamW": 0.1})
    hook.remove()
    cross = loss.fused_cross_entropy
    monkeypatch.setattr(loss, "fused_cross_entropy", lambda *a, **k: (Slow.apply(cross(*a, **k)[0]), 0))
    assert spent() == pytest.approx({"loss head": 0.07})


def test_budgets_are_found():
    for answer in (lambda x: x, lambda x: x**0.3, lambda x: min(1.0, 30 * x)):
        knob, density = contestants.solve(answer, 0.5, 0.4)
        assert density == pytest.approx(0.4, rel=0.1) and density == answer(knob)
    assert contestants.solve(lambda x: 0.2 + x / 2, 0.5, 0.1)[1] < 0.25  # nothing is as low: the nearest that was seen


def test_laps_add_up_and_nest():
    ticks = iter(range(100))
    laps = Laps(torch.device("cpu"))
    laps._now = lambda: float(next(ticks))  # type: ignore[method-assign]
    laps.mark("attention forward")  # before the start: nothing
    laps.start()
    with laps.part("attention forward"), laps.part("estimation + index"):
        laps.mark("estimation + index")
    laps.mark("clipping + AdamW")
    spent = laps.stop()
    assert spent["attention forward"] == 2 and spent["estimation + index"] == 1 and spent["clipping + AdamW"] == 1
    assert sum(spent.values()) == 6


def test_the_index_of_the_device_is_estimation():
    index = pytest.importorskip("sparse_kernels.gpu.index", exc_type=ImportError).DeviceIndex
    laps, members = Laps(torch.device("cpu")), dict(vars(index))
    view = ShardView(SparsePattern.dense(1, 2, 64, 16), torch.arange(4), k_blocks=torch.arange(4), inline_columns=True)
    spent = []
    for timed in (False, True):
        laps.start()
        with device_index_timed(laps) if timed else contextlib.nullcontext():
            assert index(view, torch.device("cpu")).columns.counts.shape == (1, 2)
        spent.append(laps.stop()["estimation + index"])
    assert spent[0] == 0 < spent[1] and dict(vars(index)) == members


def test_flop_of_a_step():
    config = {**TINY, "num_hidden_layers": 1, "tie_word_embeddings": True}
    small, large = (report.step_flop(config, 64, density) for density in (0.0, 1.0))
    assert large - small == 18 * 64 * 4 * 64 * 65 / 2
    linear = 256 * 256 * 2 + 256 * 128 * 2 + 3 * 256 * 320
    assert small == 64 * (8 * linear - 2 * 256 * 320 + 6 * 512 * 256)


def test_it_says_when_there_is_no_gpu(capsys):
    if CUDA:
        pytest.skip("there is one")
    assert bench_step.main([]) == 2
    assert "--tiny" in capsys.readouterr().err


def test_tiny_runs_stay_out_of_the_benchmarks(capsys):
    for wrong in (["--tiny", "--write"], ["--tiny", "--add"]):
        with pytest.raises(SystemExit):
            bench_step.arguments(wrong)
    capsys.readouterr()
    assert bench_step.arguments(["--write"]).out.parent.name == "benchmarks" and bench_step.arguments([]).out is None
    assert replace(SETTINGS, block=64).attention().block == 64
