"""A pretended CUDA device: Python code for a GPU runs on the CPU, its kernels in Triton's interpreter.

    with pretended_cuda():
        torch.ones(3, device="cuda").device          # cuda:0
    TRITON_INTERPRET=1 pytest -p tests.pretend_cuda_plugin tests/gpu      # all GPU tests, in small

Being on the device is a mark on a tensor's storage, so views, saved tensors and gradients have it too; what is computed from
tensors on the device is on the device. As on a real one, an operation that mixes devices is refused, asking for a value under
`torch.cuda.set_sync_debug_mode` is reported, memory is counted and ends at ``memory`` bytes.

It shows that lines run and that results are right. It never shows speed: events tell the CPU's time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is replaced: it makes lists of what torch holds
from torch import Tensor

from tests.pretend_tensors import CUDA, NAME, Device, Factories, Operators, members


class Event:
    """CPU time in milliseconds. Reading an event that nobody waited for is an error, as on a device that is still busy."""

    device: Device

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timing, self._at, self._number = enable_timing, 0.0, 0

    def record(self, _stream: Any = None) -> None:
        self.device.recorded += 1
        self._number, self._at = self.device.recorded, time.perf_counter()

    def synchronize(self) -> None:
        self.device.reached = max(self.device.reached, self._number)

    def query(self) -> bool:
        return self._number <= self.device.reached

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing and self._number and end._number):
            raise RuntimeError("Both events must be recorded, with timing enabled, before elapsed time (pretended)")
        if not (self.query() and end.query()):
            raise RuntimeError("CUDA error: device not ready (pretended): nobody waited for these events")
        return (end._at - self._at) * 1e3


class Generator(torch.Generator):
    """A generator that says where it is; the numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, "cpu")
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place


class _On(contextlib.nullcontext):
    """torch.cuda.device, device_of and stream: there is one device and one stream."""

    def __init__(self, given: Any = None) -> None:
        super().__init__(given)
        if isinstance(given, torch.device) and given.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {given} (pretended)")


class _Autocast(torch.autocast):
    """The CPU's, which casts about the same operators."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


def _replaced(device: Device) -> dict[str, Any]:
    """What stands in for members of torch.cuda."""

    def synchronize(_device: Any = None) -> None:
        device.reached = device.recorded

    nowait = {"wait_stream": lambda _, other: None, "wait_event": lambda _, event: None}
    stream_type = type("Stream", (), {"cuda_stream": 0, "device": CUDA, "synchronize": synchronize, **nowait})
    stream = stream_type()

    def reset_peak(_device: Any = None) -> None:
        device.peak = device.live

    def set_sync_debug_mode(mode: str | int) -> None:
        device.sync = {"default": 0, "warn": 1, "error": 2}.get(str(mode), mode)  # type: ignore[assignment]

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return {
        "is_available": lambda: True, "is_initialized": lambda: True, "device_count": lambda: 1, "_lazy_init": nothing,
        "init": nothing, "current_device": lambda: 0, "set_device": nothing, "get_device_name": lambda _=None: NAME,
        "get_device_properties": lambda _=None: device.properties, "get_device_capability": lambda _=None: (9, 0),
        "mem_get_info": lambda _=None: (device.memory - device.live, device.memory), "is_bf16_supported": lambda *_: True,
        "memory_allocated": lambda _=None: device.live, "memory_reserved": lambda _=None: device.live,
        "max_memory_allocated": lambda _=None: device.peak, "max_memory_reserved": lambda _=None: device.peak,
        "reset_peak_memory_stats": reset_peak, "empty_cache": nothing, "synchronize": synchronize, "ipc_collect": nothing,
        "Event": type("Event", (Event,), {"device": device}), "Stream": stream_type,
        "current_stream": lambda _=None: stream, "default_stream": lambda _=None: stream, "stream": _On, "device": _On,
        "device_of": _On, "set_sync_debug_mode": set_sync_debug_mode, "get_sync_debug_mode": lambda: device.sync,
        "manual_seed": nothing, "manual_seed_all": nothing, "is_current_stream_capturing": lambda: False, "_sleep": nothing,
        "get_rng_state": lambda _=None: torch.get_rng_state(), "set_rng_state": nothing,
        "get_rng_state_all": lambda: [torch.get_rng_state()], "set_rng_state_all": nothing,
    }  # fmt: skip


def _nothing_published() -> contextlib.AbstractContextManager[Any]:
    """No figure that was made under pretence goes where measurements are."""
    plain, published = Path.write_text, Path(__file__).resolve().parents[1] / "benchmarks"

    def write_text(path: Path, *args: Any, **kwargs: Any) -> int:
        if published in path.resolve().parents:
            raise PermissionError(f"{path}: nothing measured on a pretended device is published")
        return plain(path, *args, **kwargs)

    return mock.patch.object(Path, "write_text", write_text)


@contextlib.contextmanager
def _interpreter() -> Iterator[None]:
    """Triton's interpreter multiplies the bits of bfloat16 numbers as integers; here they are widened first. And it runs one kernel
    at a time, whatever threads there are."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def wide(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, wide(a), wide(b), *rest)

    launch, one = interpreter.GridExecutor.__call__, threading.RLock()

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        with one:
            launch(self, *args, **kwargs)

    with mock.patch.object(interpreter.InterpreterBuilder, "create_dot", create_dot):
        with mock.patch.object(interpreter.GridExecutor, "__call__", call):
            yield


@contextlib.contextmanager
def pretended_cuda(memory: int = 140 << 30) -> Iterator[Device]:
    """Inside, torch has one CUDA device of ``memory`` bytes; threads started inside have it too. Needs TRITON_INTERPRET=1."""
    device = Device(memory)
    plain_run = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with Operators(device), Factories(device):
            plain_run(thread)

    plain_backward = torch.autograd.graph._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with Factories(device):  # torch.autograd.grad is itself a function of the mode, which is off inside of it
            return plain_backward(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for owner, stand_ins in ((torch.cuda, _replaced(device)), (Tensor, members(device))):
            for name, stand_in in stand_ins.items():
                stack.enter_context(mock.patch.object(owner, name, stand_in))
        for owner, name, stand_in in (
            (torch, "Generator", Generator), (torch, "autocast", _Autocast), (torch.amp, "autocast", _Autocast),
            (torch.amp.autocast_mode, "autocast", _Autocast), (threading.Thread, "run", run),
            (torch.autograd, "_engine_run_backward", backward),
            (torch, "is_autocast_enabled", lambda _=None, plain=torch.is_autocast_enabled: plain("cpu")),
            (torch, "get_autocast_dtype", lambda _=None, plain=torch.get_autocast_dtype: plain("cpu")),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(_nothing_published())
        stack.enter_context(_interpreter())
        stack.enter_context(Operators(device))
        stack.enter_context(Factories(device))
        yield device
