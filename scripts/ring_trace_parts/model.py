"""How long a layer takes on a cluster: measured times of the local work, stated speeds of the links, the loop of mtrain.attention.

The model repeats the loop's posts and waits one for one. A transfer begins when both ends have posted it and the sender's link is
free, takes bytes / speed (no latency, no protocol), and its wait ends for a rank when what it sends and what it receives are
through. Computation and transfers do not slow each other down. K, V and the gradients behind them share a link.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mtrain.balance.work import shard_table
from mtrain.topology import RingTopology

Floats = NDArray[np.float64]
Record = dict[str, Any]
# Dense bf16 FLOP/s of the data sheets (A100 80GB SXM, H100 SXM, H200 SXM), to carry measured times to another chip.
PEAK = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


@dataclass(frozen=True)
class Cluster:
    """Nodes of GPUs. Link speeds in bytes/s, one direction; inf: transfers cost nothing.

    Attributes:
        inner: of a GPU inside its node.
        nic: of one network card.
        nics: cards per node, shared evenly by the GPUs that send at the same time.
        per_node: GPUs of a node.
        slower: how many times longer local work takes here than where it was measured.
    """

    name: str
    inner: float
    nic: float
    nics: int
    per_node: int = 8
    slower: float = 1.0

    def seconds(self, topology: RingTopology, axis: str, size: float) -> Floats:
        """[W]: how long each rank's send of ``size`` bytes to its next rank on this axis takes, all ranks sending at once."""
        ranks = np.arange(topology.world_size)
        following = np.array([topology.next(int(r), axis) for r in ranks])
        crossing = ranks // self.per_node != following // self.per_node
        senders = np.bincount(ranks // self.per_node, weights=crossing)[ranks // self.per_node]
        share = self.nic * np.minimum(1.0, self.nics / np.maximum(senders, 1.0))
        return np.where(crossing, size / share, size / self.inner)

    def all_reduce(self, ranks: int, size: float) -> float:
        """Seconds of a bandwidth-optimal all-reduce: 2 (W - 1) / W of the bytes through a GPU's link or a node's cards."""
        nodes = -(-ranks // self.per_node)
        speed = self.inner if nodes == 1 else min(self.inner, self.nic * self.nics)
        return 2 * (ranks - 1) / ranks * size / speed

    def free(self) -> Cluster:
        """The same cluster with links that cost nothing."""
        return replace(self, inner=float("inf"), nic=float("inf"))


def clusters(nics: str, device_name: str, per_node: int = 8) -> list[Cluster]:
    """A100 and H100 nodes with ``nics`` "gpu": a card for every GPU, or "node": one for all of them.

    NVLink 3 is 600 GB/s and NVLink 4 900 GB/s in both directions together (A100 and H100 data sheets); InfiniBand HDR is 200 Gb/s
    and NDR 400 Gb/s per port (NVIDIA ConnectX-6 and ConnectX-7 data sheets).
    """
    count = {"gpu": per_node, "node": 1}[nics]
    measured = next((peak for chip, peak in PEAK.items() if chip in device_name), None)

    def slower(chip: str) -> float:
        return 1.0 if measured is None else measured / PEAK[chip]

    return [
        Cluster(f"A100 + HDR per {nics}", 300e9, 200e9 / 8, count, per_node, slower("A100")),
        Cluster(f"H100 + NDR per {nics}", 450e9, 400e9 / 8, count, per_node, slower("H100")),
    ]


class _Links:
    """The links of all ranks: when each is free again."""

    def __init__(self, topology: RingTopology, cluster: Cluster) -> None:
        self.topology, self.cluster = topology, cluster
        ranks = range(topology.world_size)
        self._next = {axis: np.array([topology.next(r, axis) for r in ranks]) for axis in ("inner", "outer")}
        self._previous = {axis: np.array([topology.previous(r, axis) for r in ranks]) for axis in ("inner", "outer")}
        self._free = {axis: np.zeros(topology.world_size) for axis in ("inner", "outer")}

    def shift(self, posted: Floats, axis: str, size: float) -> Floats:
        """[W] seconds at which the wait of each rank ends for a transfer posted at ``posted`` [W]."""
        begin = np.maximum(np.maximum(posted, posted[self._next[axis]]), self._free[axis])
        end = begin + self.cluster.seconds(self.topology, axis, size)
        self._free[axis] = end
        return np.maximum(end, end[self._previous[axis]])


def loop(
    start: Floats, steps: Floats, topology: RingTopology, cluster: Cluster, kv: float, gradient: float | None = None
) -> Floats:
    """[W] seconds at which each rank leaves the ring loop.

    Args:
        start: [W] seconds at which each enters it.
        steps: [W, outer * inner] seconds of local work.
        kv: bytes of one shard's K and V.
        gradient: bytes of its dK and dV in the backward; None: the forward.
    """
    links, now = _Links(topology, cluster), start
    riding: Floats | None = None
    for s in range(topology.outer):
        crossing = links.shift(now, "outer", kv) if s + 1 < topology.outer else None
        behind: Floats | None = None
        for t in range(topology.inner):
            moving = links.shift(now, "inner", kv) if t + 1 < topology.inner else None
            now = _later(now + steps[:, s * topology.inner + t], behind)
            if gradient is not None and topology.inner > 1:
                behind = links.shift(now, "inner", gradient)
            now = _later(now, moving)
        now = _later(_later(now, behind), riding)
        if gradient is not None and topology.outer > 1:
            riding = links.shift(now, "outer", gradient)
        now = _later(now, crossing)
    return _later(now, riding)


def _later(now: Floats, done: Floats | None) -> Floats:
    return now if done is None else np.maximum(now, done)


@dataclass(frozen=True)
class LayerTime:
    """Seconds of one attention layer, forward and backward, until the last rank is done."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward once each."""
        return self.forward + self.backward

    @property
    def with_recomputation(self) -> float:
        """Under activation checkpointing the forward runs twice."""
        return 2 * self.forward + self.backward


def layer_time(record: Record, cluster: Cluster, *, flat: bool) -> LayerTime:
    """The layer of a trace record. ``flat``: one ring over all ranks instead of the topology that was measured.

    The work of a rank on a shard does not depend on when the shard comes, so the measured times are put in the order of the ring.
    """
    measured = RingTopology(record["outer"], record["inner"])
    ranks = measured.world_size
    topology = RingTopology(1, ranks) if flat else measured
    seconds = {name: in_order(record[name], measured, topology) * cluster.slower for name in ("forward", "backward")}
    sides = {
        (name, part): np.array(record[name][part]) * 1e-3 * cluster.slower
        for name in seconds
        for part in ("before", "columns", "after")
    }
    start = sides["forward", "before"]
    if record["row_bytes"]:
        start = start.max() + cluster.all_reduce(ranks, record["row_bytes"]) + sides["forward", "columns"]
    done = loop(start, seconds["forward"], topology, cluster, record["kv_bytes"])
    forward = float(done.max())
    done = loop(
        sides["backward", "before"],
        seconds["backward"],
        topology,
        cluster,
        record["kv_bytes"],
        record["gradient_bytes"],
    )
    done = done + sides["backward", "columns"]
    if record["row_bytes"]:
        done = done.max() + cluster.all_reduce(ranks, record["row_gradient_bytes"]) + sides["backward", "after"]
    return LayerTime(forward, float(done.max()))


def in_order(table: Record, measured: RingTopology, wanted: RingTopology) -> Floats:
    """[W, W] seconds by step of the wanted topology."""
    steps, source = np.array(table["steps"]) * 1e-3, shard_table(measured).numpy()
    by_shard = np.empty_like(steps)
    np.put_along_axis(by_shard, source, steps, 1)
    return np.take_along_axis(by_shard, shard_table(wanted).numpy(), 1)


def local_seconds(record: Record) -> Floats:
    """[W, W + 1] seconds of local work: forward and backward together, by measured step; last what lies outside the ring."""
    total = sum(np.array(record[name]["steps"]) for name in ("forward", "backward"))
    rest = sum(
        np.array(record[name][part]) for name in ("forward", "backward") for part in ("before", "columns", "after")
    )
    return np.concatenate([total, np.reshape(rest, (-1, 1))], 1) * 1e-3


def imbalances(record: Record) -> tuple[float, float]:
    """(worker, step) imbalance in time, as mtrain.balance.imbalance defines them for work."""
    seconds = local_seconds(record)
    mean = seconds.sum() / len(seconds)
    return float(seconds.sum(1).max() / mean), float(seconds.max(0).sum() / mean)


def training_step(layers: int, layer: LayerTime, linear_flop: float, linear_rate: float, cluster: Cluster) -> float:
    """Seconds of a step: attention of all layers with recomputation, and a rank's matrix products at the rate measured."""
    return layers * layer.with_recomputation + linear_flop / linear_rate * cluster.slower
