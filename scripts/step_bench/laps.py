"""Where the time of a step goes: one stopwatch, and marks at the boundaries of the parts.

A mark ends the part before it and begins its own, so the parts add up to the step, whatever they contain. On CUDA a mark is an
event in the stream: making one waits for nothing, and the events are read after the step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

ESTIMATION = "estimation + index"
FORWARD = "attention forward"
BACKWARD = "attention backward"
LOSS = "loss head"
OPTIMIZER = "clipping + AdamW"
REST = "rest"
PARTS = (ESTIMATION, FORWARD, BACKWARD, LOSS, OPTIMIZER, REST)


class Laps:
    """A stopwatch of laps; does nothing until `start` and after `stop`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._part = REST
        self._marks: list[tuple[str, Any]] | None = None

    def start(self) -> None:
        """Forget the past; the time from here on belongs to `REST`."""
        self._marks = []
        self._part = ""
        self.mark(REST)

    def mark(self, part: str) -> None:
        """From here on the time belongs to ``part``."""
        if self._marks is not None and part != self._part:
            self._part = part
            self._marks.append((part, self._now()))

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Inside, the time belongs to ``part``; afterwards again to what it belonged to before."""
        before = self._part
        self.mark(part)
        try:
            yield
        finally:
            self.mark(before)

    def stop(self) -> dict[str, float]:
        """Seconds of every part since `start`. Waits for the device."""
        assert self._marks is not None, "stop without start"
        marks, self._marks = [*self._marks, ("", self._now())], None
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in zip(marks, marks[1:], strict=False):
            spent[part] += self.elapsed(begin, end)
        return spent

    @staticmethod
    def elapsed(begin: Any, end: Any) -> float:
        """Seconds between two marks."""
        return float(begin.elapsed_time(end)) / 1e3 if isinstance(begin, torch.cuda.Event) else float(end - begin)

    def cancel(self) -> None:
        """The step broke off."""
        self._marks = None

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time given to ``part``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return call


class _Enter(torch.autograd.Function):
    """The identity; in the backward pass, where all gradients of the part's inputs are there, the part ends."""

    @staticmethod
    def forward(ctx: Any, laps: Laps, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.laps = laps
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        ctx.laps.mark(REST)
        return (None, *gradients)


class _Leave(torch.autograd.Function):
    """The identity; in the backward pass the part begins here."""

    @staticmethod
    def forward(ctx: Any, laps: Laps, part: str, out: Tensor) -> Tensor:
        ctx.laps, ctx.part = laps, part
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.laps.mark(ctx.part)
        return None, None, gradient


def enter(laps: Laps, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The inputs of a part whose backward is timed; see `leave`."""
    entered: tuple[Tensor, ...] = _Enter.apply(laps, *tensors)
    return entered


def leave(laps: Laps, part: str, out: Tensor) -> Tensor:
    """The output of a part: what runs in the backward pass between here and `enter` belongs to ``part``."""
    left: Tensor = _Leave.apply(laps, part, out)
    return left


@contextmanager
def device_index_timed(laps: Laps) -> Iterator[None]:
    """The triton backend builds its index inside forward and backward; inside this block that is timed as `ESTIMATION`."""
    try:
        from sparse_kernels.gpu.index import DeviceIndex
    except ImportError:  # no triton: nobody builds such an index
        yield
        return
    before = {name: DeviceIndex.__dict__[name] for name in ("__init__", "tiles", "columns", "column_tile_ranges")}
    for name, member in before.items():
        get = member.fget if isinstance(member, property) else None
        timed = laps.timed(ESTIMATION, get or member)  # a plain function, so it binds like the method it replaces
        setattr(DeviceIndex, name, property(timed) if get else timed)
    try:
        yield
    finally:
        for name, member in before.items():
            setattr(DeviceIndex, name, member)
