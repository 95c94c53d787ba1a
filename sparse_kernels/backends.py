"""Who computes: the contract of a backend and the registry. A new backend is one file and one line in `_FACTORIES`."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from sparse_kernels.view import ShardView

logger = logging.getLogger(__name__)

State = tuple[Tensor, Tensor]


class Backend(ABC):
    """Computes one `ShardView`. All running values are float32 (float64 for float64 inputs) and deterministic."""

    name: ClassVar[str]
    # True: computes full views only (the dense causal mask of one document); "auto" takes it only where all views are full.
    dense_only: ClassVar[bool] = False

    @abstractmethod
    def unusable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """None if this backend can run such inputs here, else the reason it cannot."""

    @abstractmethod
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None = None
    ) -> State:
        """Attention of the view's queries over the view's keys.

        Args:
            q: [B, nq * b, H, D].
            k, v: [B, nk * b, K, D] (key blocks) or [B, U, K, D] (gathered columns). Rows of padding are finite numbers, whose
                values are free (to the triton backend they may also be NaN).
            view: which pairs to compute. Its tensors other than block ids are on the device of q.
            scale: multiplies the scores after the dot product.
            carry: (out, lse) of keys already seen; the result then covers both.

        Returns:
            out [B, nq * b, H, D] and lse [B, H, nq * b], float32; rows without keys give 0 and -inf.
        """

    @abstractmethod
    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients (dq, dk, dv), float32, of this view's pairs, given the *final* out and lse over all keys of the query.

        ``out`` is as `forward` returns it, float32 and not rounded to the dtype of q; ``dout`` has the dtype of q. Because out
        and lse are final, the gradients of disjoint views add up to the exact gradient.
        """


def _reference() -> Backend:
    from sparse_kernels.reference_backend import ReferenceBackend

    return ReferenceBackend()


def _cpu() -> Backend:
    from sparse_kernels.cpu import CpuBackend

    return CpuBackend()


def _triton() -> Backend:
    from sparse_kernels.gpu import TritonBackend

    return TritonBackend()


def _flash() -> Backend:
    from sparse_kernels.flash import FlashBackend

    return FlashBackend()


# In the order in which "auto" tries them. Factories import their backend only when it is asked for.
_FACTORIES: dict[str, Callable[[], Backend]] = {
    "triton": _triton,
    "flash": _flash,
    "cpu": _cpu,
    "reference": _reference,
}


@cache
def _instance(name: str) -> Backend:
    return _FACTORIES[name]()


def backends(device: torch.device | str, dtype: torch.dtype, head_dim: int) -> dict[str, str | None]:
    """Every backend by name: None if it is usable for such inputs on this machine, else the reason it is not."""
    return {name: _instance(name).unusable(torch.device(device), dtype, head_dim) for name in _FACTORIES}


@cache  # once per kind of input, not once per layer and step
def _warn_of_reference(device: str, dtype: str, head_dim: int) -> None:
    logger.warning(
        "no fast attention backend runs %s with head_dim %d on %s: the reference backend is taken, which is exact but needs O(S^2) "
        "memory and time; `sparse_kernels.backends(...)` says why the others cannot run",
        *(dtype, head_dim, device),
    )


def resolve_backend(
    name: str, device: torch.device | str, dtype: torch.dtype, head_dim: int, *, dense: bool = False
) -> Backend:
    """The backend of that name, or for "auto" the first usable one. A backend that cannot run is an error, never a switch.

    ``dense``: all its views will be full (`SparsePattern.full`, one document), so "auto" may take a backend that computes no
    others.
    """
    device = torch.device(device)
    if name == "auto":
        usable = backends(device, dtype, head_dim)
        for candidate, reason in usable.items():
            if reason is None and not dense and _instance(candidate).dense_only:
                usable[candidate] = "it computes dense patterns only"
            elif reason is None:
                if candidate == "reference":
                    _warn_of_reference(str(device), str(dtype), head_dim)
                return _instance(candidate)
        reasons = "; ".join(f"{candidate}: {reason}" for candidate, reason in usable.items())
        raise ValueError(f"no attention backend can run {dtype} with head_dim {head_dim} on {device} ({reasons})")
    if name not in _FACTORIES:
        raise ValueError(f"unknown attention backend {name!r}; choose auto or one of {', '.join(_FACTORIES)}")
    reason = _instance(name).unusable(device, dtype, head_dim)
    if reason is not None:
        raise ValueError(
            f"attention backend {name!r} cannot run here: {reason}; use backend='auto' to pick one that can"
        )
    return _instance(name)
