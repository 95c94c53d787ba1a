"""Rings of threads and of processes give the same messages; failures end everybody and name what was awaited."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mtrain.comm import ProcessRing, Ring, SingleRing, run_ranks
from mtrain.errors import LaunchError
from mtrain.topology import RingTopology


def exercise(ring: Ring) -> dict:
    """Every operation once; the answers are known in closed form."""
    rank, world, topology = ring.rank, ring.world_size, ring.topology
    mine = torch.tensor([float(rank), rank + 0.5], dtype=torch.bfloat16)
    got = {}
    for axis, size in (("inner", topology.inner), ("outer", topology.outer)):
        if size > 1:
            first = ring.shift([mine, mine + 1], axis, "kv")
            second = ring.shift([mine.float() * 10], axis, "dkv")
            got[axis] = [x.float().tolist() for x in first.wait()] + [second.wait()[0].tolist()]
    got["gather"] = [x.item() for x in ring.all_gather(torch.tensor(rank))]
    got["sum"] = ring.all_reduce(torch.tensor([rank, 1.0])).tolist()
    got["max"] = ring.all_reduce(torch.tensor([rank]), "max").item()
    got["min"] = ring.all_reduce(torch.tensor([rank]), "min").item()
    got["all_to_all"] = [x.item() for x in ring.all_to_all([torch.tensor(10 * rank + r) for r in range(world)])]
    got["reduce_scatter"] = ring.reduce_scatter([torch.tensor(10 * rank + r) for r in range(world)]).item()
    got["broadcast"] = ring.broadcast(torch.tensor(rank + 7), world - 1).item()
    ring.barrier()
    return got


def check(topology: RingTopology, rank: int, got: dict) -> None:
    world = topology.world_size
    for axis in ("inner", "outer"):
        if axis in got:
            p = topology.previous(rank, axis)
            assert got[axis] == [[p, p + 0.5], [p + 1, p + 1.5], [p * 10, p * 10 + 5]]
    total = world * (world - 1) // 2
    assert got["gather"] == list(range(world))
    assert got["sum"] == [total, world] and got["max"] == world - 1 and got["min"] == 0
    assert got["all_to_all"] == [10 * r + rank for r in range(world)]
    assert got["reduce_scatter"] == 10 * total + world * rank
    assert got["broadcast"] == world + 6


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 1)])
def test_threads(outer, inner):
    for rank, got in enumerate(run_ranks(exercise, outer, inner)):
        check(RingTopology(outer, inner), rank, got)


def test_single_ring_needs_nobody():
    check(RingTopology(), 0, exercise(SingleRing()))


def _process(rank: int, path: str, world: int, outer: int, inner: int, results) -> None:
    store = dist.FileStore(path, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30))
    ring = ProcessRing.create(RingTopology(outer, inner))
    results[rank] = (ring.rank, exercise(ring))
    dist.destroy_process_group()


@pytest.mark.parametrize(("outer", "inner", "world"), [(1, 2, 2), (2, 2, 4), (1, 2, 4), (2, 1, 4)])
def test_processes_with_data_parallel_beside_the_ring(outer, inner, world, tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(
            _process, (str(tmp_path / "store"), world, outer, inner, results), nprocs=world, start_method="fork"
        )
        for process in range(world):
            rank, got = results[process]
            assert rank == process % (outer * inner)
            check(RingTopology(outer, inner), rank, got)


def _lonely(rank: int, path: str, results) -> None:
    store = dist.FileStore(path, 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    ring = ProcessRing.create(RingTopology(1, 2), timedelta(seconds=2))
    if rank == 1:
        time.sleep(3)  # present, but never makes the call
        return
    try:
        ring.shift([torch.zeros(4)], "inner", "kv").wait()
    except LaunchError as error:
        results[0] = str(error)


def test_a_missing_peer_is_named_within_the_timeout(tmp_path):
    with mp.Manager() as manager:
        results = manager.dict()
        started = time.monotonic()
        mp.start_processes(_lonely, (str(tmp_path / "store"), results), nprocs=2, start_method="fork")
        assert time.monotonic() - started < 20
        assert "waiting for process 1 in kv shift on the inner ring" in results[0]


def test_an_error_in_one_thread_ends_all():
    def fail(ring: Ring) -> None:
        if ring.rank == 1:
            raise KeyError("boom")
        ring.all_gather(torch.zeros(1))

    with pytest.raises(KeyError, match="boom"):
        run_ranks(fail, inner=3)


def test_threads_that_make_different_calls_are_told():
    def lopsided(ring: Ring) -> None:
        if ring.rank == 0:
            ring.all_gather(torch.zeros(1))

    with pytest.raises(LaunchError, match="do not make the same calls"):
        run_ranks(lopsided, inner=2, timeout=0.2)


def test_traffic_counts_calls_and_bytes():
    def work(ring: Ring) -> dict:
        ring.shift([torch.zeros(3), torch.zeros(5)], "inner", "kv").wait()
        ring.all_gather(torch.zeros(7, dtype=torch.int64))
        return dict(ring.traffic)

    for traffic in run_ranks(work, inner=2):
        assert traffic == {"shift_inner_kv": 1, "shift_inner_kv_bytes": 32, "all_gather": 1, "all_gather_bytes": 56}
