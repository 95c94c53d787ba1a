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
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything is replaced: it makes lists of what torch holds
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.waiting import READS

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "pretended CUDA device"
# Operators that take tensors of both devices.
MIXES = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default,
    aten.index_put.default, aten.set_.source_Tensor, aten.is_same_size.default,
}  # fmt: skip
WAITS = READS | {aten.bincount.default, aten.masked_scatter.default, aten.histc.default}


class Device:
    """The state of the device: what it holds, and what is said when somebody waits for it."""

    def __init__(self, memory: int) -> None:
        self.memory, self.live, self.peak, self.sync = memory, 0, 0, 0
        self.waits = 0  # how often somebody waited by a read or a blocking copy
        self.recorded = self.reached = 0  # events: how many were recorded, up to which one somebody waited
        self.properties = types.SimpleNamespace(
            name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=memory, L2_cache_size=50 << 20,
            shared_memory_per_block_optin=232448, shared_memory_per_block=49152, warp_size=32,
        )  # fmt: skip

    def put(self, result: Any) -> None:
        """Mark the storages of all tensors of a result."""
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not on_device(x):
                storage, size = x.untyped_storage(), x.untyped_storage().nbytes()
                if self.live + size > self.memory:
                    raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes (pretended).")
                self.live += size
                self.peak = max(self.peak, self.live)
                storage.on_device = True
                weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size

    def waited(self, what: object) -> None:
        """Somebody waited."""
        self.waits, self.reached = self.waits + 1, self.recorded
        if self.sync:
            text = f"called a synchronizing CUDA operation ({what}, pretended)"
            if self.sync == 2:
                raise RuntimeError(text)
            warnings.warn(text, stacklevel=4)


def on_device(x: Tensor) -> bool:
    """Does the storage have the mark?"""
    return x.layout == torch.strided and not x.is_meta and getattr(x.untyped_storage(), "on_device", False)


class _Move(torch.autograd.Function):
    """A copy on the other device; the gradient goes back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: Device, there: bool, dtype: torch.dtype) -> Tensor:
        ctx.device, ctx.was_there, ctx.dtype = device, on_device(x), x.dtype
        result = torch.empty_like(x, dtype=dtype).copy_(x.detach())
        _place(result, device, there)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        return _Move.apply(gradient, ctx.device, ctx.was_there, ctx.dtype), None, None, None


def _place(x: Tensor, device: Device, there: bool) -> None:
    """Of a fresh tensor."""
    if there:
        device.put(x)
    else:
        x.untyped_storage().on_device = False  # its bytes stay counted until it dies


class _Operators(TorchDispatchMode):
    """Below autograd: marks results, refuses mixtures, reports waiting, and answers for operators that only CUDA has."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in given if on_device(x)]
        if there:
            self._check(function, args, kwargs, given, there)
        if function.namespace == "sparse_kernels":  # written in Python: what is inside is looked at too
            with self, _Factories(self.device):  # modes are off inside of what they call
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = ONLY_CUDA.get(function, function)(*args, **kwargs)
        if there:
            known = {x.untyped_storage()._cdata for x in given}
            self.device.put([
                x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known
            ])  # fmt: skip
        return result

    def _check(self, function: Any, args: Any, kwargs: Any, given: list[Tensor], there: list[Tensor]) -> None:
        if function in WAITS:
            self.device.waited(function)
        elsewhere = [x for x in given if x.dim() and not on_device(x)]
        if function in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            if any(
                isinstance(x, Tensor) and (x.dtype == torch.bool or x in elsewhere) for x in args[1] if x is not None
            ):
                self.device.waited(f"{function} by a boolean mask or by indices from the host")
        if (
            elsewhere
            and function == aten.copy_.default
            and not (args[2:] and args[2])
            and not kwargs.get("non_blocking")
        ):
            self.device.waited(function)
        if elsewhere and function not in MIXES:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({function}, "
                f"pretended)"
            )
        if function in (aten.index.Tensor, aten.index_put_.default) and not on_device(args[0]):
            raise RuntimeError(
                f"indices should be either on cpu or on the same device as the indexed tensor (cpu) ({function})"
            )


class _Factories(TorchFunctionMode):
    """Functions that are told a device."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if wanted is None or _device(wanted).type == "meta":
            return function(*args, **kwargs)
        there, generator = _device(wanted).type == "cuda", kwargs.get("generator")
        if generator is not None and (generator.device.type == "cuda") != there:
            raise RuntimeError(f"Expected a '{_device(wanted).type}' device type for generator (pretended)")
        if function in (torch.as_tensor, torch.asarray) and isinstance(args[0], Tensor):
            return args[0].to(wanted, kwargs.get("dtype"))
        result = function(*args, **{**kwargs, "device": CPU})
        _place(result, self.device, there)
        if there and function in (torch.tensor, torch.as_tensor, torch.asarray):
            self.device.waited(f"{function.__name__} from a value of the host")
        return result


def _device(given: Any) -> torch.device:
    return CUDA if isinstance(given, int) else torch.device(given)


def _members(device: Device) -> dict[str, Any]:
    """What stands in for members of torch.Tensor."""
    plain_device, plain_to = Tensor.device.__get__, Tensor.to  # type: ignore[attr-defined]

    def to(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Arguments come in several orders: (tensor or device or dtype or both, non_blocking, copy)."""
        rest = list(args)
        wanted = kwargs.pop("device", None)
        if rest and isinstance(rest[0], Tensor):
            wanted, rest[0] = rest[0].device, rest[0].dtype
        elif rest and (rest[0] is None or isinstance(rest[0], (str, torch.device, int))):
            wanted = rest.pop(0)
        keys = {**dict(zip(("dtype", "non_blocking", "copy"), rest, strict=False)), **kwargs}
        if x.is_meta or (wanted is not None and _device(wanted).type == "meta"):
            return plain_to(x, device=wanted, **keys)
        if wanted is None or (_device(wanted).type == "cuda") == on_device(x):
            return plain_to(x, **{k: v for k, v in keys.items() if v is not None}) if any(keys.values()) else x
        if not keys.get("non_blocking"):
            device.waited(f"a blocking copy to {wanted}")
        moved: Tensor = _Move.apply(x, device, not on_device(x), keys.get("dtype") or x.dtype)
        return moved

    def waits(name: str) -> Any:
        plain = getattr(Tensor, name)

        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if on_device(x):
                device.waited(name)
                if name != "tolist":
                    raise TypeError(
                        "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first. (pretended)"
                    )
            return plain(x, *args, **kwargs)

        return call

    return {
        "device": property(lambda x: CUDA if on_device(x) else plain_device(x)), "is_cuda": property(on_device),
        "is_cpu": property(lambda x: x.device.type == "cpu"), "get_device": lambda x: 0 if on_device(x) else -1, "to": to,
        "cuda": lambda x, _=None, non_blocking=False: to(x, CUDA, non_blocking=non_blocking), "pin_memory": lambda x: x,
        "cpu": lambda x: to(x, CPU), **{name: waits(name) for name in ("numpy", "__array__", "tolist")},
    }  # fmt: skip


def _flash(q: Tensor, k: Tensor, v: Tensor, _p: float = 0.0, causal: bool = False, *_: Any, scale: Any = None) -> Any:
    group, flash = q.shape[1] // k.shape[1], aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q.float(), *(x.float().repeat_interleave(group, 1) for x in (k, v)), 0.0, causal, scale=scale)
    unused = torch.zeros(2, dtype=torch.int64)
    return out.to(q.dtype), lse.contiguous(), None, None, q.shape[2], k.shape[2], unused, unused, None


def _flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, _a: Any, _b: Any, _m: int, _n: int, _p: float,
    causal: bool, _s: Any, _o: Any, *, scale: Any = None,
) -> Any:  # fmt: skip
    heads, dtype, backward = k.shape[1], q.dtype, aten._scaled_dot_product_flash_attention_for_cpu_backward
    k, v = (x.float().repeat_interleave(q.shape[1] // heads, 1) for x in (k, v))
    dq, dk, dv = backward(dout.float(), q.float(), k, v, out.float(), lse, 0.0, causal, scale=scale)
    return dq.to(dtype), *(x.unflatten(1, (heads, -1)).sum(2).to(dtype) for x in (dk, dv))


ONLY_CUDA: dict[Any, Callable[..., Any]] = {
    aten._scaled_dot_product_flash_attention.default: _flash,
    aten._scaled_dot_product_flash_attention_backward.default: _flash_backward,
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
}


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
        with _Operators(device), _Factories(device):
            plain_run(thread)

    plain_backward = torch.autograd.graph._engine_run_backward

    def backward(*args: Any, **kwargs: Any) -> Any:
        with _Factories(device):  # torch.autograd.grad is itself a function of the mode, which is off inside of it
            return plain_backward(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for owner, members in ((torch.cuda, _replaced(device)), (Tensor, _members(device))):
            for name, stand_in in members.items():
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
        stack.enter_context(_Operators(device))
        stack.enter_context(_Factories(device))
        yield device
