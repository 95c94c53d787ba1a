"""The plain backend: dense masked math on a view. Slow, O(S^2) memory, correct everywhere; other backends are held against it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from sparse_kernels.backends import Backend, State
from sparse_kernels.reference import accumulation_dtype, merge_states, reference_attention
from sparse_kernels.view import ShardView


class ReferenceBackend(Backend):
    """Runs on any device and float dtype by building the mask of the view."""

    name: ClassVar[str] = "reference"

    def unusable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Usable for every floating dtype."""
        return None if dtype.is_floating_point else f"{dtype} is not a floating dtype"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None = None
    ) -> State:
        """See `Backend.forward`."""
        acc = accumulation_dtype(q.dtype)
        state = reference_attention(q.to(acc), k.to(acc), v.to(acc), view.mask(), scale=scale)
        return state if carry is None else merge_states(*carry, *state)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`. dS = P * (dP - rowsum(dout * out)), the usual flash-attention form."""
        acc = accumulation_dtype(q.dtype)
        dout, q, k, v, out = (t.to(acc) for t in (dout, q, k, v, out))
        kv_heads = k.shape[2]
        group = q.shape[2] // kv_heads
        keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        mask = view.mask()
        finite = lse.masked_fill(lse == -torch.inf, 0.0)[..., None]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
        probs = torch.exp((scores - finite).masked_fill(~mask, -torch.inf))
        delta = (dout * out).sum(-1).transpose(1, 2)[..., None]
        dscores = probs * (torch.einsum("bqhd,bkhd->bhqk", dout, values) - delta) * scale
        dq = torch.einsum("bhqk,bkhd->bqhd", dscores, keys)
        dk = torch.einsum("bhqk,bqhd->bkhd", dscores, q)
        dv = torch.einsum("bhqk,bqhd->bkhd", probs, dout)
        shape = (k.shape[0], k.shape[1], kv_heads, group, k.shape[3])
        return dq, dk.reshape(shape).sum(3), dv.reshape(shape).sum(3)
