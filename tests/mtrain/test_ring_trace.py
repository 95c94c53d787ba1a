"""The ring that answers from memory computes what a ring computes, and the model of time what can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrain.balance import block_cost, work
from mtrain.layout import RingLayout
from mtrain.topology import RingTopology
from scripts import ring_trace
from scripts.ring_trace_parts import cases, model, replay
from scripts.ring_trace_parts.cases import Case
from sparse_kernels import SparsePattern, reference_attention
from sparse_kernels.cpu import CpuBackend

RINGS = [RingTopology(2, 2), RingTopology(1, 3), RingTopology(3, 1), RingTopology(2, 3)]


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)


def patterns(size: int, block: int) -> dict[str, SparsePattern]:
    columns = torch.tensor(
        [[[0, 3, 40, 41, 300], [5, 63, 64, 200, size], [7, size, size, size, size], [1, 2, 3, 4, 5]]]
    )
    diagonals = torch.tensor([[[0, 2], [0, 1], [0, 9], [0, -1]]])
    return {
        "dense": SparsePattern.dense(1, 4, size, block),
        "columns": SparsePattern(size, block, columns.int(), diagonals.int()),
        "diagonals": SparsePattern(size, block, None, diagonals.int()),
    }


@pytest.mark.parametrize("topology", RINGS, ids=lambda t: f"{t.outer}x{t.inner}")
@pytest.mark.parametrize("name", ["dense", "columns", "diagonals"])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_the_replay_is_the_layer(kind: str, name: str, topology: RingTopology) -> None:
    size, block = 333, 16
    pattern = patterns(size, block)[name]
    q, dout = (torch.randn(1, size, 4, 8, dtype=torch.float64) for _ in range(2))
    k, v = (torch.randn(1, size, 2, 8, dtype=torch.float64) for _ in range(2))
    layout = RingLayout.build(kind, size, topology.world_size, block)
    world = replay.World.of(k, v, pattern, layout, topology, collect=True)
    runs = [replay.run_rank(r, q, dout, world, pattern, "cpu") for r in range(topology.world_size)]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = reference_attention(*leaves, pattern.to_dense())
    wanted = (out, *torch.autograd.grad(out, leaves, dout))
    found = (
        *(layout.unshard([getattr(run, x) for run in runs], 1) for x in ("out", "dq")),
        *world.key_gradients(pattern),
    )
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for run in runs:  # every step has a time of its own, and the column part too
        assert set(range(topology.world_size)) <= set(run.forward) & set(run.backward)
        assert (replay.COLUMNS in run.forward) == (name == "columns") == (replay.AFTER in run.backward)


def test_the_layouts_share_out_the_same_work() -> None:
    topology, case = RingTopology(2, 2), Case("tiny", 2048, 0.1, "zigzag")
    pattern, _ = cases.vertical_slash(case.shape, case.length, case.density)
    for kind in ring_trace.LAYOUTS:
        layout = cases.layout_of(Case("tiny", 2048, 0.1, kind), pattern, topology)
        assert work(pattern, layout, topology).sum() == block_cost(pattern).sum()
        assert layout.owner.bincount().tolist() == [8] * 4


# ------------------------------------------------------------------------------------------------------------ the model of time

# Nodes of two: a byte takes 0.5 s inside and 2.5 s through a card, of which each GPU has its own.
PAIRS = model.Cluster("pairs", inner=2.0, nic=0.4, nics=2, per_node=2)
SECOND = np.ones((4, 4))
START = np.zeros(4)


def last(topology: RingTopology, cluster: model.Cluster, steps: Any = SECOND, gradient: float | None = None) -> float:
    return float(model.loop(START, steps, topology, cluster, 1.0, gradient).max())


def test_links_that_cost_nothing_leave_the_work() -> None:
    for topology in (RingTopology(2, 2), RingTopology(1, 4), RingTopology(4, 1)):
        for gradient in (None, 2.0):
            assert last(topology, PAIRS.free(), gradient=gradient) == 4.0


def test_two_levels_hide_what_a_flat_ring_waits_for() -> None:
    # Posted at 0, the crossing is there at 2.5, half a second after the inner ring; then two more steps.
    assert last(RingTopology(2, 2), PAIRS) == 4.5
    # Flat, every rank has a neighbour behind a card in each of three steps, and works once more after the last.
    assert last(RingTopology(1, 4), PAIRS) == 3 * 2.5 + 1
    # One card for both GPUs of a node: only the hierarchical ring has two transfers on it at a time.
    shared = model.Cluster("shared", 2.0, 0.4, nics=1, per_node=2)
    assert last(RingTopology(2, 2), shared) == 5.0 + 2.0
    assert last(RingTopology(1, 4), shared) == 8.5


def test_gradients_ride_behind() -> None:
    """dK and dV of 2 bytes: 1 s inside a node, 5 s between. The node's sum leaves at 3 and is home at 8; so late, the second leaves
    at 8, when all work has long been done, and is home at 13."""
    assert last(RingTopology(2, 2), PAIRS, gradient=2.0) == 13.0


def test_a_slow_rank_delays_its_neighbours_only_as_far_as_they_need_its_data() -> None:
    steps = np.ones((4, 4))
    steps[0, 0] = 3.0
    ring = RingTopology(1, 4)
    done = model.loop(START, steps, ring, PAIRS.free(), 1.0)
    # Rank 0 enters its second step at 3 instead of 1, so its neighbours their third at 3 instead of 2. Rank 2 needs what they post
    # then for its fourth step, at 3: it loses nothing.
    assert done.tolist() == [6.0, 5.0, 4.0, 5.0]


def test_stated_links() -> None:
    """Hierarchical, all eight GPUs of a node send to the next node at once; flat, only the last one does."""
    hdr, ndr = model.clusters("gpu", "NVIDIA H200")
    assert (hdr.slower, ndr.slower) == (989 / 312, 1.0)
    two, flat, size = RingTopology(4, 8), RingTopology(1, 32), 300e9
    assert set(hdr.seconds(two, "inner", size)) == {1.0} and set(hdr.seconds(two, "outer", size)) == {12.0}
    assert hdr.seconds(flat, "inner", size)[6:9].tolist() == [1.0, 12.0, 1.0]
    assert hdr.all_reduce(32, size) == 2 * 31 / 32 * size / 200e9
    one_card = model.clusters("node", "an unknown device")[0]
    assert one_card.slower == 1.0 and set(one_card.seconds(two, "outer", size)) == {96.0}
    assert one_card.seconds(flat, "inner", size)[6:9].tolist() == [1.0, 12.0, 1.0]


def test_flat_order_is_the_same_work() -> None:
    two, flat = RingTopology(2, 2), RingTopology(1, 4)
    # The time of rank r on shard o is 10 r + o milliseconds.
    table = {"steps": [[10.0 * r + two.owner(r, s, t) for s in range(2) for t in range(2)] for r in range(4)]}
    wanted = [[10.0 * r + flat.owner(r, 0, t) for t in range(4)] for r in range(4)]
    assert np.allclose(model.in_order(table, two, flat) * 1e3, wanted)
    assert np.allclose(model.in_order(table, two, two) * 1e3, table["steps"])


def test_a_layer_is_its_parts() -> None:
    """Forward: 1 ms, an all-reduce of 4 B, 2 ms columns, four steps of 1 ms. Backward: four steps, 3 ms columns, 8 B, 1 ms."""
    cluster = model.Cluster("fast", inner=1e3, nic=1e30, nics=2, per_node=4)
    steps = [[1.0] * 4] * 4
    record = {
        "outer": 1, "inner": 4, "kv_bytes": 0, "gradient_bytes": 0, "row_bytes": 4, "row_gradient_bytes": 8,
        "forward": {"before": [1.0, 0.5, 0.5, 0.5], "columns": [2.0] * 4, "after": [0.0] * 4, "steps": steps},
        "backward": {"before": [0.0] * 4, "columns": [3.0] * 4, "after": [1.0] * 4, "steps": steps},
    }  # fmt: skip
    layer = model.layer_time(record, cluster, flat=False)
    # An all-reduce over four ranks moves 1.5 times its bytes over each link.
    assert layer.forward == pytest.approx((1 + 6 + 2 + 4) * 1e-3)
    assert layer.backward == pytest.approx((4 + 3 + 12 + 1) * 1e-3)
    assert model.training_step(10, layer, 100.0, 50.0, cluster) == pytest.approx(10 * (2 * 13 + 20) * 1e-3 + 2)
    worker, step = model.imbalances(record)
    assert worker == pytest.approx(15 / 14.625) and step == pytest.approx(15 / 14.625)


# --------------------------------------------------------------------------------------------------------------------- the script


def test_the_script_measures_and_can_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--smoke", "--densities", "1", "0.1", "--out", str(tmp_path / "trace")]
    assert ring_trace.main([*common, "--layouts", "zigzag"]) == 0
    first = json.loads((tmp_path / "trace.json").read_text())["records"]
    assert ring_trace.main([*common, "--layouts", "zigzag", "balanced", "--resume"]) == 0
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert [r["layout"] for r in trace["records"]] == ["zigzag"] * 2 + ["balanced"] * 2
    assert trace["records"][:2] == first, "measured again"
    for record in trace["records"]:
        assert np.array(record["backward"]["steps"]).shape == (4, 4) and min(map(min, record["forward"]["steps"])) > 0
    text = capsys.readouterr().out
    assert (
        "tests the script" in text and "FLOP of a (rank, step)" in text and (tmp_path / "trace.md").read_text() in text
    )


@pytest.mark.parametrize("only_at_full_length", [False, True])
def test_a_wrong_result_shows_no_time(
    only_at_full_length: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = CpuBackend.forward

    def wrong(self: CpuBackend, *args: Any, **given: Any) -> Any:
        out, lse = right(self, *args, **given)
        return out * 1.1, lse

    monkeypatch.setattr(CpuBackend, "forward", wrong)
    if only_at_full_length:
        monkeypatch.setattr(cases, "check", lambda *_: [])
    arguments = ["--smoke", "--densities", "0.1", "--layouts", "striped", "--out", str(tmp_path / "trace")]
    assert ring_trace.main(arguments) == 1
    text = capsys.readouterr().out
    assert "WRONG RESULTS" in text and "ms" not in text.split() and not list(tmp_path.iterdir())


def test_a_smoke_run_never_reaches_the_benchmarks() -> None:
    with pytest.raises(SystemExit):
        ring_trace.arguments(["--smoke", "--write"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to measure on")
def test_without_a_gpu_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert ring_trace.main([]) == 2
    assert "--smoke" in capsys.readouterr().err
