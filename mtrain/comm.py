"""How ranks of a ring talk: one small interface, three worlds (alone, threads in one process, processes).

The attention loop and the estimators see only `Ring`. Threads make every distributed test an ordinary test; processes use one
process group per ring direction and channel, so that transfers of different rings never queue behind each other.
"""

from __future__ import annotations

import re
import threading
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtrain.errors import LaunchError
from mtrain.topology import RingTopology

AXES = ("inner", "outer")
CHANNELS = ("kv", "dkv")
_REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}
# What gloo, NCCL and torch's store say when a peer is gone or late. Gloo raises a bare RuntimeError, so words must do.
_LOST_PEER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out|transport/tcp|process group", re.IGNORECASE
)
T = TypeVar("T")


class Pending:
    """A transfer under way. ``wait()`` blocks until the received tensors are there and returns them."""

    def __init__(self, finish: Callable[[], list[Tensor]]) -> None:
        self._finish = finish

    def wait(self) -> list[Tensor]:
        """The received tensors."""
        return self._finish()


class Ring(ABC):
    """The ranks that share one sequence.

    Attributes:
        rank: this rank's place in the ring, 0 .. world_size - 1.
        topology: outer x inner arrangement of the ranks.
        traffic: for every operation its number of calls (``"shift"``) and the bytes handed to it here (``"shift_bytes"``).
    """

    rank: int
    topology: RingTopology
    traffic: Counter[str]

    @property
    def world_size(self) -> int:
        """Ranks in the ring."""
        return self.topology.world_size

    def shift(self, tensors: Sequence[Tensor], axis: str, channel: str) -> Pending:
        """Send tensors to the next rank of the "inner" or "outer" ring and receive like-shaped ones from the previous rank.

        Transfers of one axis and channel ("kv" or "dkv") arrive in the order in which they were posted.
        """
        assert axis in AXES and channel in CHANNELS, (axis, channel)
        self._count(f"shift_{axis}_{channel}", tensors)
        return self._shift([t.contiguous() for t in tensors], axis, channel)

    def all_gather(self, x: Tensor) -> list[Tensor]:
        """Every rank's tensor (same shape everywhere), in rank order."""
        return self.start_all_gather(x).wait()

    def start_all_gather(self, x: Tensor) -> Pending:
        """`all_gather` that returns at once."""
        self._count("all_gather", [x])
        return self._all_gather(x.contiguous())

    def all_reduce(self, x: Tensor, op: str = "sum") -> Tensor:
        """A new tensor: the elementwise "sum", "max" or "min" over all ranks, the same on every rank."""
        assert op in _REDUCE, op
        self._count("all_reduce", [x])
        return self._all_reduce(x.contiguous(), op)

    def all_to_all(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send ``parts[r]`` to rank r; returns what every rank sent here, in rank order. All parts have the same shape."""
        assert len(parts) == self.world_size
        self._count("all_to_all", parts)
        return self._all_to_all([p.contiguous() for p in parts])

    def reduce_scatter(self, parts: Sequence[Tensor]) -> Tensor:
        """The sum over ranks of ``parts[this rank]``, added in rank order, so the result never depends on timing."""
        received = self.all_to_all(parts)
        total = received[0].clone()
        for part in received[1:]:
            total += part
        return total

    def broadcast(self, x: Tensor, root: int) -> Tensor:
        """The root's tensor on every rank (x gives shape and dtype elsewhere)."""
        self._count("broadcast", [x])
        return self._broadcast(x.contiguous(), root)

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_reduce(torch.zeros(1))

    def _count(self, name: str, tensors: Sequence[Tensor]) -> None:
        self.traffic[name] += 1
        self.traffic[f"{name}_bytes"] += sum(t.numel() * t.element_size() for t in tensors)

    @abstractmethod
    def _shift(self, tensors: list[Tensor], axis: str, channel: str) -> Pending: ...

    @abstractmethod
    def _all_gather(self, x: Tensor) -> Pending: ...

    @abstractmethod
    def _all_to_all(self, parts: list[Tensor]) -> list[Tensor]: ...

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        gathered = self._all_gather(x).wait()
        total = gathered[0].clone()
        for part in gathered[1:]:
            total = _REDUCE[op](total, part)
        return total

    def _broadcast(self, x: Tensor, root: int) -> Tensor:
        return self._all_gather(x).wait()[root]


class SingleRing(Ring):
    """One rank: the whole sequence is here and nothing is ever sent."""

    def __init__(self) -> None:
        self.rank, self.topology, self.traffic = 0, RingTopology(), Counter()

    def _shift(self, tensors: list[Tensor], axis: str, channel: str) -> Pending:
        return Pending(lambda: list(tensors))

    def _all_gather(self, x: Tensor) -> Pending:
        return Pending(lambda: [x])

    def _all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        return parts


class _Board:
    """Where threads leave messages for each other."""

    def __init__(self, timeout: float) -> None:
        self.messages: dict[Any, list[Tensor]] = {}
        self.changed = threading.Condition()
        self.failure: str | None = None
        self.timeout = timeout

    def put(self, key: Any, tensors: Sequence[Tensor]) -> None:
        # A copy, as a wire would make: the sender may overwrite its buffer at once.
        copies = [t.detach().clone() for t in tensors]
        with self.changed:
            assert key not in self.messages, key
            self.messages[key] = copies
            self.changed.notify_all()

    def take(self, key: Any, rank: int) -> list[Tensor]:
        with self.changed:
            arrived = self.changed.wait_for(lambda: key in self.messages or self.failure, self.timeout)
            if self.failure:
                raise _PeerStoppedError(self.failure)
            if not arrived:
                raise LaunchError(
                    f"rank {rank} waited {self.timeout:g} s for {key}: the ranks do not make the same calls"
                )
            return self.messages.pop(key)

    def fail(self, reason: str) -> None:
        with self.changed:
            self.failure = self.failure or reason
            self.changed.notify_all()


class _PeerStoppedError(RuntimeError):
    """Raised in ranks that wait for a rank that has failed."""


class ThreadRing(Ring):
    """A rank that is a thread of this process; made by `run_ranks`."""

    def __init__(self, rank: int, topology: RingTopology, board: _Board) -> None:
        self.rank, self.topology, self.traffic = rank, topology, Counter()
        self._board = board
        self._calls: Counter[str] = Counter()

    def _ticket(self, name: str) -> tuple[str, int]:
        self._calls[name] += 1
        return name, self._calls[name]

    def _shift(self, tensors: list[Tensor], axis: str, channel: str) -> Pending:
        ticket = self._ticket(f"shift {axis} {channel}")
        target, source = self.topology.next(self.rank, axis), self.topology.previous(self.rank, axis)
        self._board.put((*ticket, f"from {self.rank}", f"to {target}"), tensors)
        return Pending(lambda: self._board.take((*ticket, f"from {source}", f"to {self.rank}"), self.rank))

    def _all_gather(self, x: Tensor) -> Pending:
        parts = self._exchange("all_gather", [x] * self.world_size)
        return Pending(parts)

    def _all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        return self._exchange("all_to_all", parts)()

    def _exchange(self, name: str, parts: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        ticket = self._ticket(name)
        for target, part in enumerate(parts):
            self._board.put((*ticket, f"from {self.rank}", f"to {target}"), [part])

        def finish() -> list[Tensor]:
            keys = [(*ticket, f"from {source}", f"to {self.rank}") for source in range(self.world_size)]
            return [self._board.take(key, self.rank)[0] for key in keys]

        return finish


def run_ranks(fn: Callable[[Ring], T], outer: int = 1, inner: int = 1, timeout: float = 120.0) -> list[T]:
    """Run ``fn(ring)`` as outer * inner ranks, one thread each, in this process.

    Returns:
        The results in rank order.

    Raises:
        The first exception of any rank; the other ranks are stopped as soon as they wait for something.
    """
    topology = RingTopology(outer, inner)
    board = _Board(timeout)
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def work(rank: int) -> None:
        try:
            results[rank] = fn(ThreadRing(rank, topology, board))
        except BaseException as error:
            errors[rank] = error
            board.fail(f"rank {rank} stopped: {error!r}")

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(topology.world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    causes = [errors[rank] for rank in sorted(errors) if not isinstance(errors[rank], _PeerStoppedError)]
    if causes:
        raise causes[0]
    assert not errors, errors
    return [results[rank] for rank in range(topology.world_size)]


class ProcessRing(Ring):
    """A rank that is a process of the default process group; made by `ProcessRing.create`."""

    def __init__(self, rank: int, topology: RingTopology, ranks: Sequence[int], groups: dict[str, Any]) -> None:
        self.rank, self.topology, self.traffic = rank, topology, Counter()
        self._ranks = list(ranks)
        self._groups = groups

    @classmethod
    def create(cls, topology: RingTopology, timeout: timedelta | None = None) -> ProcessRing:
        """The ring of this process. Called by every process of the job at the same time.

        Consecutive ranks form a ring (data parallel index is the slowest): global rank = dp_index * world_size of the ring + rank.
        Each ring direction and channel gets its own process group.

        Raises:
            LaunchError: the job's processes do not divide into rings of this topology.
        """
        processes, me, size = dist.get_world_size(), dist.get_rank(), topology.world_size
        if processes % size:
            raise LaunchError(
                f"{processes} processes cannot form rings of outer {topology.outer} x inner {topology.inner} = {size} ranks; "
                f"launch a multiple of {size} processes or change parallel.outer and parallel.inner"
            )
        groups: dict[str, Any] = {}
        # Every process creates every group, in the same order: torch requires it.
        for first in range(0, processes, size):
            ranks = list(range(first, first + size))
            for name, members in _group_members(topology, ranks):
                group = dist.new_group(members, timeout=timeout)
                if me in members:
                    groups[name] = group
        first = me // size * size
        return cls(me - first, topology, range(first, first + size), groups)

    def _shift(self, tensors: list[Tensor], axis: str, channel: str) -> Pending:
        # One message: K and V (or dK and dV) travel packed.
        packed = torch.cat([t.reshape(-1).view(torch.uint8) for t in tensors])
        received = torch.empty_like(packed)
        group = self._groups[f"{axis} {channel}"]
        target = self._ranks[self.topology.next(self.rank, axis)]
        source = self._ranks[self.topology.previous(self.rank, axis)]
        name = f"{channel} shift on the {axis} ring"
        works = self._guard(
            name,
            source,
            lambda: dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, packed, target, group), dist.P2POp(dist.irecv, received, source, group)]
            ),
        )

        def finish() -> list[Tensor]:
            for work in works:
                self._guard(name, source, work.wait)
            # ``packed`` is named here so that the send buffer lives until the transfer is over.
            return _unpack(received, tensors) if packed.numel() else [torch.empty_like(t) for t in tensors]

        return Pending(finish)

    def _all_gather(self, x: Tensor) -> Pending:
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        work = self._guard(
            "all_gather", None, lambda: dist.all_gather(parts, x, group=self._groups["collective"], async_op=True)
        )

        def finish() -> list[Tensor]:
            self._guard("all_gather", None, work.wait)
            return parts

        return Pending(finish)

    def _all_to_all(self, parts: list[Tensor]) -> list[Tensor]:
        sent = torch.stack(parts)
        received = torch.empty_like(sent)
        group = self._groups["collective"]
        self._guard("all_to_all", None, lambda: dist.all_to_all_single(received, sent, group=group))
        return list(received.unbind(0))

    def _all_reduce(self, x: Tensor, op: str) -> Tensor:
        total = x.clone()
        reduce_op = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[op]
        self._guard("all_reduce", None, lambda: dist.all_reduce(total, reduce_op, group=self._groups["collective"]))
        return total

    def _broadcast(self, x: Tensor, root: int) -> Tensor:
        result = x.clone()
        group = self._groups["collective"]
        self._guard("broadcast", self._ranks[root], lambda: dist.broadcast(result, self._ranks[root], group=group))
        return result

    def _guard(self, what: str, source: int | None, call: Callable[[], T]) -> T:
        """Name the operation and the peer when a transfer fails: torch's own message gives an address, never the rank."""
        try:
            return call()
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            peer = f"process {source}" if source is not None else f"processes {self._ranks}"
            first_line = str(error).strip().splitlines()[0].split(". This is typically")[0]
            raise LaunchError(
                f"process {self._ranks[self.rank]} lost its peer while waiting for {peer} in {what} ({first_line}); "
                "a process has died or hangs: look at its log, then start again from the last checkpoint"
            ) from error


def is_lost_peer(error: RuntimeError) -> bool:
    """Is this what the transport says when a peer is gone or late, rather than a mistake (or lack of memory) of our own?"""
    return isinstance(error, dist.DistError) or _LOST_PEER.search(str(error)) is not None


def _group_members(topology: RingTopology, ranks: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Named groups of one ring, as lists of global ranks."""
    named: list[tuple[str, list[int]]] = [("collective", list(ranks))]
    lines: dict[str, list[list[int]]] = defaultdict(list)
    if topology.inner > 1:
        for node in range(topology.outer):
            lines["inner"].append([ranks[node * topology.inner + place] for place in range(topology.inner)])
    if topology.outer > 1:
        for place in range(topology.inner):
            lines["outer"].append([ranks[node * topology.inner + place] for node in range(topology.outer)])
    for axis, members in lines.items():
        for channel in CHANNELS:
            named += [(f"{axis} {channel}", line) for line in members]
    return named


def _unpack(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    result, offset = [], 0
    for tensor in like:
        size = tensor.numel() * tensor.element_size()
        # A copy when the offset is not a multiple of the element size would be an error of view(); sizes here are equal dtypes.
        result.append(buffer[offset : offset + size].view(tensor.dtype).view(tensor.shape))
        offset += size
    return result


def process_group_backends() -> dict[str, str | None]:
    """What processes could talk over on this machine: name -> None if usable, else the reason it is not."""
    if not dist.is_available():
        return dict.fromkeys(("gloo", "nccl"), "this torch was built without torch.distributed")
    no_nccl = None if torch.cuda.is_available() else "no CUDA device"
    return {
        "gloo": None if dist.is_gloo_available() else "this torch was built without gloo",
        "nccl": no_nccl if dist.is_nccl_available() else "this torch was built without NCCL",
    }
