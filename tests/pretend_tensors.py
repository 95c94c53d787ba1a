"""Tensors of the pretended device: see tests/pretend_cuda.py."""

from __future__ import annotations

import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "pretended CUDA device"
# Operators that take tensors of both devices.
MIXES = {
    aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default,
    aten.index_put.default, aten.set_.source_Tensor, aten.is_same_size.default,
}  # fmt: skip
# What reads a value, or has a result whose shape depends on one.
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.equal.default, aten.is_nonzero.default,
    aten.repeat_interleave.Tensor, aten.bincount.default, aten.masked_scatter.default, aten.histc.default,
}  # fmt: skip


class Device:
    """The state of the device: what it holds, and what is said when somebody waits for it."""

    def __init__(self, memory: int) -> None:
        self.memory, self.live, self.peak, self.sync = memory, 0, 0, 0
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
        self.reached = self.recorded
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


class Operators(TorchDispatchMode):
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
            with self, Factories(self.device):  # modes are off inside of what they call
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = ONLY_CUDA.get(function, function)(*args, **kwargs)
        if there:
            known = {x.untyped_storage()._cdata for x in given}
            self.device.put([
                x for x in tree_leaves(result) if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known
            ])  # fmt: skip
        return result

    def _check(self, function: Any, args: Any, kwargs: Any, given: list[Tensor], there: list[Tensor]) -> None:
        if (
            function in WAITS and kwargs.get("output_size") is None
        ):  # of repeat_interleave: a size that is known is not asked for
            self.device.waited(function)
        elsewhere = [x for x in given if x.dim() and not on_device(x)]
        if function in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            if any(x is not None and (x.dtype == torch.bool or not on_device(x)) for x in args[1]):
                self.device.waited(f"{function} by a boolean mask or by indices from the host")
        if function == aten.copy_.default and elsewhere and True not in args[2:]:  # non_blocking is its third
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


class Factories(TorchFunctionMode):
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


def members(device: Device) -> dict[str, Any]:
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
