"""Every rank of a ring in turn on one device: `mtrain.attention.ring_attention` itself, over a `Ring` that answers from memory.

Key-value shards of all ranks are there from the start, so what a neighbour would send is known: whoever holds shard o receives
the shard of o's predecessor next. Gradients on their way cannot be known while ranks run one after the other; a rank receives
zeros, adds its own part as always, and what it sends on is that part alone. Summed by shard over all ranks, these parts are the
gradient. The column rows, an all-reduce in which one rank contributes each row, are put together beforehand.

The clock runs while the loop computes and stands still inside the ring's own operations.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtrain.attention import ring_attention
from mtrain.columns import ColumnStore
from mtrain.comm import Pending, Ring, SingleRing
from mtrain.layout import RingLayout
from mtrain.topology import RingTopology
from sparse_kernels import SparsePattern

BEFORE, COLUMNS, AFTER = "before", "columns", "after"
# A ring step's number, or one of the three above: before the first transfer, the column part, what follows its gradient's sum.
Label = int | str


class Clock:
    """Milliseconds by label; CUDA events on a GPU, so that nothing waits until the times are asked for."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Label, Any, Any]] = []
        self._open: tuple[Label, Any] | None = None

    def go(self, label: Label) -> None:
        """Run on under this label."""
        assert self._open is None, self._open
        self._open = (label, self._now())

    def stop(self) -> None:
        """Stand still."""
        assert self._open is not None
        label, begin = self._open
        self._spans.append((label, begin, self._now()))
        self._open = None

    def read(self) -> dict[Label, float]:
        """Milliseconds by label so far; the clock starts anew."""
        spans, self._spans = self._spans, []
        total: dict[Label, float] = defaultdict(float)
        if self._cuda:
            torch.cuda.synchronize()
        for label, begin, end in spans:
            total[label] += begin.elapsed_time(end) if self._cuda else (end - begin) * 1e3
        return dict(total)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class World:
    """What all ranks hold, and what they have sent.

    Attributes:
        shards: per rank its (k, v), each [B, n, K, D] and contiguous; alive once, whoever they visit.
        rows: the column rows as `ColumnStore.gather` sums them, [2, B, U, K, D]; None without columns.
        gradients: per shard the sum of the (dk, dv) parts sent on so far; None: not collected.
        row_gradients: sum of the ranks' gradients of the column rows.
    """

    layout: RingLayout
    topology: RingTopology
    shards: list[tuple[Tensor, Tensor]]
    rows: Tensor | None = None
    gradients: list[list[Tensor] | None] | None = None
    row_gradients: Tensor | None = None
    owner_of: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, k: Tensor, v: Tensor, pattern: SparsePattern, layout: RingLayout, topology: RingTopology, collect: bool
    ) -> World:
        """From the whole k, v [B, S, K, D]. ``collect``: also sum up the gradients of k and v."""
        ranks = range(topology.world_size)
        shards = [(layout.shard(k, r, 1).contiguous(), layout.shard(v, r, 1).contiguous()) for r in ranks]
        world = cls(layout, topology, shards, gradients=[None] * len(ranks) if collect else None)
        world.owner_of = {keys.data_ptr(): rank for rank, (keys, _) in enumerate(shards)}
        for rank in ranks:
            store = world.store(rank, pattern)
            if store is not None:
                own = torch.stack(store.gather(*shards[rank], SingleRing()))
                world.rows = own if world.rows is None else world.rows.add_(own)
        return world

    def store(self, rank: int, pattern: SparsePattern) -> ColumnStore | None:
        """The column store as this rank builds it."""
        return ColumnStore.build(
            pattern, self.shards[rank][0].shape[2], ReplayRing(rank, self, Clock(torch.device("cpu"))), self.layout
        )

    def key_gradients(self, pattern: SparsePattern) -> tuple[Tensor, Tensor]:
        """dk and dv [B, S, K, D], float32, once every rank has run."""
        assert self.gradients is not None
        parts: list[list[Tensor]] = []
        for rank, held in enumerate(self.gradients):
            assert held is not None, f"nobody sent a gradient of shard {rank}"
            store = self.store(rank, pattern)
            if store is not None:
                assert self.row_gradients is not None
                store.scatter(held[0], held[1], self.row_gradients[0], self.row_gradients[1], SingleRing())
            parts.append(held)
        dk, dv = (self.layout.unshard([part[i] for part in parts], 1) for i in (0, 1))
        return dk, dv


class ReplayRing(Ring):
    """One rank of the world, alone; every transfer is answered at once. `begin` and `end` go around its computation."""

    def __init__(self, rank: int, world: World, clock: Clock) -> None:
        self.rank, self.topology, self.traffic = rank, world.topology, Counter()
        self._world, self._clock = world, clock
        self._label: Label = BEFORE
        self._step = self._sent = self._awaited = 0
        self._direction = ""

    def begin(self, direction: str, clock: Clock) -> None:
        """The loop is about to run "forward" or "backward"."""
        self._direction, self._label, self._clock = direction, BEFORE, clock
        self._step = self._sent = self._awaited = 0
        self._clock.go(self._label)

    def end(self) -> None:
        """It has run."""
        self._clock.stop()

    def _shift(self, tensors: list[Tensor], axis: str, channel: str) -> Pending:
        self._clock.stop()
        if self._label in (BEFORE, COLUMNS) and channel == "kv":
            self._label = 0
        pending = self._keys(tensors, axis) if channel == "kv" else self._gradient(tensors, axis)
        self._clock.go(self._label)
        return pending

    def _keys(self, tensors: list[Tensor], axis: str) -> Pending:
        previous = self.topology.previous(self._world.owner_of[tensors[0].data_ptr()], axis)

        def finish() -> list[Tensor]:
            self._clock.stop()
            self._step += 1
            self._label = self._step
            self._clock.go(self._label)
            return list(self._world.shards[previous])

        return Pending(finish)

    def _gradient(self, tensors: list[Tensor], axis: str) -> Pending:
        topology = self.topology
        # With rings inside nodes every part goes over those; what then crosses nodes is the zeros received.
        if axis == "inner" or topology.inner == 1:
            self._collect(topology.owner(self.rank, *divmod(self._sent, topology.inner)), tensors)
            self._sent += 1
        shapes = [(t.shape, t.dtype, t.device) for t in tensors]

        def finish() -> list[Tensor]:
            self._clock.stop()
            self._awaited += 1
            if self._awaited == gradient_waits(topology):
                self._label = COLUMNS
            zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
            self._clock.go(self._label)
            return zeros

        return Pending(finish)

    def _collect(self, owner: int, tensors: Sequence[Tensor]) -> None:
        if self._world.gradients is None:
            return
        held = self._world.gradients[owner]
        if held is None:
            self._world.gradients[owner] = [t.clone() for t in tensors]
        else:
            for total, part in zip(held, tensors, strict=True):
                total += part

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        assert op == "sum", op
        self._clock.stop()
        rows = self._world.rows
        assert rows is not None and x.shape == rows.shape, (x.shape, None if rows is None else rows.shape)
        if self._direction == "forward":
            self._label, result = COLUMNS, rows
        else:
            self._label, result = AFTER, torch.zeros_like(x)
            if self._world.gradients is not None:
                held = self._world.row_gradients
                self._world.row_gradients = x.clone() if held is None else held.add_(x)
        self._clock.go(self._label)
        return result

    def _all_gather(self, x: Tensor) -> Pending:
        raise NotImplementedError("the ring schedule gathers nothing")

    def _all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        raise NotImplementedError("the ring schedule exchanges nothing")


def gradient_waits(topology: RingTopology) -> int:
    """How often the backward loop waits for gradients."""
    inside = topology.world_size if topology.inner > 1 else 0
    return inside + (topology.outer if topology.outer > 1 else 0)


@contextmanager
def compilations(device: torch.device) -> Iterator[list[Any]]:
    """A list that grows by one with every kernel that Triton compiles or fetches from its cache meanwhile."""
    found: list[Any] = []
    if device.type != "cuda":
        yield found
        return
    from triton import knobs

    def note(**_: Any) -> None:
        found.append(None)

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        knobs.runtime.jit_post_compile_hook = before


@dataclass(frozen=True)
class RankRun:
    """One rank's forward and backward: milliseconds by label, and the results where asked for."""

    forward: dict[Label, float]
    backward: dict[Label, float]
    out: Tensor
    dq: Tensor


def run_rank(rank: int, q: Tensor, dout: Tensor, world: World, pattern: SparsePattern, backend: str) -> RankRun:
    """One rank's part of the layer.

    Args:
        q, dout: the whole [B, S, H, D]; the shard is taken before the clock starts.
        pattern: global, on the device of q.
        backend: of `sparse_kernels`.
    """
    clocks = Clock(q.device), Clock(q.device)
    ring = ReplayRing(rank, world, clocks[0])
    leaves = [x.detach().requires_grad_() for x in (world.layout.shard(q, rank, 1), *world.shards[rank])]
    mine = world.layout.shard(dout, rank, 1)
    ring.begin("forward", clocks[0])
    out = ring_attention(leaves[0], leaves[1], leaves[2], pattern, ring=ring, layout=world.layout, backend=backend)
    ring.end()
    assert isinstance(out, Tensor)
    ring.begin("backward", clocks[1])
    dq, _, _ = torch.autograd.grad(out, leaves, mine)
    ring.end()
    # Read last: a device that had to wait here would start the backward with an empty queue.
    return RankRun(clocks[0].read(), clocks[1].read(), out.detach(), dq)
