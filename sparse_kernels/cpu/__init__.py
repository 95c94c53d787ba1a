"""The CPU backend: a real training backend that computes only what the pattern selects."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_kernels.backends import Backend, State
from sparse_kernels.cpu import dense, engine
from sparse_kernels.reference import accumulation_dtype
from sparse_kernels.view import ShardView


class CpuBackend(Backend):
    """Gathers the selected keys of each query block and runs torch's CPU flash operator on batches of equal length.

    float32, bfloat16 and float16 inputs are computed in float32, float64 in float64. Memory is O(S): no mask, no score matrix.
    """

    name: ClassVar[str] = "cpu"

    def unusable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Usable on CPU tensors of float32, float64, bfloat16 and float16."""
        if device.type != "cpu":
            return f"it runs on CPU tensors only, not on {device.type}"
        if dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            return f"{dtype} is not float32, float64, bfloat16 or float16"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None = None
    ) -> State:
        """See `Backend.forward`."""
        with torch.no_grad():
            q, k, v = _prepare(q, k, v)
            if carry is not None:
                carry = carry[0].to(q.dtype), carry[1].to(q.dtype)
            compute = dense.forward if dense.applies(view) else engine.forward
            return compute(q, k, v, view, scale, carry)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        with torch.no_grad():
            q, k, v, dout, out = _prepare(q, k, v, dout, out)
            compute = dense.backward if dense.applies(view) else engine.backward
            return compute(dout, q, k, v, out, lse.to(q.dtype), view, scale)


def _prepare(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """All tensors contiguous in the accumulation dtype of q."""
    dtype = accumulation_dtype(q.dtype)
    return tuple(t.to(dtype).contiguous() for t in (q, *others))
