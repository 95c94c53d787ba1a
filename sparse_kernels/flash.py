"""The flash backend: dense patterns on CUDA by flash-attn, or by the flash kernels that come with torch.

It computes *full* views only: the plain causal mask (`SparsePattern.dense`) of one document, any placement of ascending blocks.
Such a view falls into one causal square (a shard against itself) and rectangles in which every query sees every key; both
kernels return the lse that joins them, and their backward takes the final out and lse, which is what a ring needs.

A backend is chosen before its views are known, so the seam is in the choice: `Backend.dense_only` keeps "auto" from picking this
one unless the caller says that all its views are full (``resolve_backend(..., dense=True)``); `FlashBackend.refuses` says what is
wrong with a view, and a call with such a view is an error. The triton backend comes first in "auto" even for dense patterns,
because its partial results are float32 where these kernels round each part (every ring step) to the dtype of q: name "flash" to
have it.

cuDNN's attention is not used: its backward has no deterministic mode, and everything here is deterministic.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sparse_kernels.backends import Backend, State
from sparse_kernels.cpu.dense import rectangles
from sparse_kernels.reference import accumulation_dtype, merge_states
from sparse_kernels.view import ShardView

# (query rows, key rows, causal: row i of these queries sees the first i + 1 of these keys)
Call = tuple[slice, slice, bool]
Gradients = tuple[Tensor, Tensor, Tensor]


class Engine(Protocol):
    """A dense kernel. q is [B, m, H, D], k and v [B, n, K, D]; lse is float32 [B, H, m], natural log."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> State:
        """(out [B, m, H, D], lse) of these keys alone."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> Gradients:
        """(dq, dk, dv) for final out and lse; a row with lse = +inf takes no part."""


class FlashBackend(Backend):
    """See the module. ``engine`` replaces the choice of the kernel."""

    name: ClassVar[str] = "flash"
    dense_only: ClassVar[bool] = True

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = engine

    def unusable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Usable on CUDA devices of capability 8.0 or newer in bfloat16 and float16, head_dim a multiple of 8 up to 256."""
        if self._engine is not None:
            return None
        if device.type != "cuda":
            return f"it needs CUDA tensors, not {device.type}"
        if not torch.cuda.is_available():
            return "torch finds no CUDA device here"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        if dtype not in (torch.bfloat16, torch.float16):
            return f"{dtype} is not bfloat16 or float16"
        if head_dim % 8 or head_dim > 256:
            return f"head_dim {head_dim} is not a multiple of 8 up to 256"
        return None

    def refuses(self, view: ShardView) -> str | None:
        """None if the view is full, else what is wrong with it."""
        if not view.pattern.full:
            return "the pattern is sparse; it computes the dense causal pattern only (SparsePattern.dense)"
        if view.doc_start is not None:
            return "there are packed documents"
        if view.k_blocks is None:
            return "the keys are gathered columns"
        if _segments(view) is None:
            return "the local blocks are in no order that it knows (ascending query blocks; whole shards of keys)"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None = None
    ) -> State:
        """See `Backend.forward`. Each part is rounded to the dtype of q before it is added in float32."""
        acc, dead = accumulation_dtype(q.dtype), self._dead(view)
        with torch.no_grad():
            if carry is None:
                out = torch.zeros(q.shape, dtype=acc, device=q.device)
                lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=acc, device=q.device)
            else:
                out, lse = carry[0].to(acc, copy=True), carry[1].to(acc, copy=True)
            engine, touched = self._kernel(), carry is not None
            for rows, keys, causal in _calls(view):
                part = engine.forward(q[:, rows], k[:, keys], v[:, keys], causal, scale)
                # The first call of a view without carry is the only one that meets rows which have seen nothing.
                merged = merge_states(out[:, rows], lse[:, :, rows], *part) if touched else part
                out[:, rows], lse[:, :, rows] = merged
                touched = True
            return out.masked_fill_(dead[None, :, None, None], 0.0), lse.masked_fill_(dead, -torch.inf)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
    ) -> Gradients:
        """See `Backend.backward`. Each part is rounded to the dtype of q before it is added in float32."""
        acc, dead = accumulation_dtype(q.dtype), self._dead(view)
        with torch.no_grad():
            lse = lse.masked_fill((lse == -torch.inf) | dead, torch.inf)
            dout, out = dout.to(q.dtype), out.to(q.dtype)
            engine = self._kernel()
            dq, dk, dv = (torch.zeros(x.shape, dtype=acc, device=q.device) for x in (q, k, v))
            for rows, keys, causal in _calls(view):
                parts = engine.backward(
                    dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, :, rows].contiguous(),
                    causal, scale,
                )  # fmt: skip
                for total, part, index in zip((dq, dk, dv), parts, (rows, keys, keys), strict=True):
                    total[:, index] += part
            return dq, dk, dv

    def _dead(self, view: ShardView) -> Tensor:
        """bool [rows]: padding rows. Raises ValueError for a view that is not full."""
        reason = self.refuses(view)
        if reason is not None:
            raise ValueError(f"attention backend 'flash' cannot compute this: {reason}; use backend='auto'")
        return view.q_positions >= view.pattern.seq_len

    def _kernel(self) -> Engine:
        return self._engine or (FlashAttention() if has_flash_attention() else TorchFlash())


class TorchFlash:
    """The flash kernels inside torch: aten operators, private but stable since torch 2.2."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> State:
        """See `Engine.forward`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        operator = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = operator(q, k, v, 0.0, causal, False, scale=scale)
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> Gradients:
        """See `Engine.backward`."""
        dout, q, k, v, out = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        # No sequence table means whole rows; the state of the random numbers is not read without dropout.
        unused = torch.empty(2, dtype=torch.int64, device=q.device)
        operator = torch.ops.aten._scaled_dot_product_flash_attention_backward
        with _deterministic():
            dq, dk, dv = operator(
                dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, unused, unused, scale=scale
            )
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class FlashAttention:
    """flash-attn 2.7 or newer (https://github.com/Dao-AILab/flash-attention), Dao et al., arXiv 2205.14135 and 2307.08691."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> State:
        """See `Engine.forward`."""
        from flash_attn.flash_attn_interface import _flash_attn_forward

        out, lse, _, _ = _flash_attn_forward(
            q, k, v, 0.0, scale, causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0,
            alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> Gradients:
        """See `Engine.backward`."""
        from flash_attn.flash_attn_interface import _flash_attn_backward

        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        _flash_attn_backward(
            dout, q, k, v, out, lse, dq, dk, dv, 0.0, scale, causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, deterministic=True,
        )  # fmt: skip
        return dq, dk, dv


@cache
def has_flash_attention() -> bool:
    """Is flash-attn 2.7 or newer importable? It is built against one torch, so a package that is there may still fail to load."""
    if importlib.util.find_spec("flash_attn") is None:
        return False
    try:
        import flash_attn
        import flash_attn.flash_attn_interface
    except (ImportError, OSError):
        return False
    major, minor = (int(part) for part in flash_attn.__version__.split(".")[:2])
    return (2, 7) <= (major, minor) < (3, 0)


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's flash backward adds dQ atomically unless torch's own switch asks for deterministic algorithms."""
    before, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def _segments(view: ShardView) -> list[tuple[int, int]] | None:
    """(first, last + 1) ascending runs of the key blocks, each the query blocks themselves or none of them; None: impossible."""
    queries, keys = view.q_blocks.tolist(), (view.k_blocks.tolist() if view.k_blocks is not None else [])
    if not all(a < b for a, b in zip(queries, queries[1:], strict=False)):
        return None
    cuts = {0, len(keys), *(i for i in range(1, len(keys)) if keys[i] <= keys[i - 1])}
    own = set(queries)
    if own.intersection(keys):
        if queries[0] not in keys:
            return None
        start = keys.index(queries[0])
        end = start + len(queries)
        if keys[start:end] != queries or own.intersection(keys[:start]) or own.intersection(keys[end:]):
            return None
        cuts |= {start, end}
    edges = sorted(cuts)
    return list(zip(edges, edges[1:], strict=False))


def _calls(view: ShardView) -> Iterator[Call]:
    """The kernel calls of a full view; the one with the queries' own blocks, which leaves no row empty, comes first."""
    segments, block = _segments(view), view.pattern.block
    assert segments is not None and view.k_blocks is not None
    real = int((view.q_blocks < view.pattern.num_blocks).sum())  # padding blocks have the highest ids
    queries = view.q_blocks[:real].contiguous()
    if not real:
        return
    others: list[Call] = []
    for low, high in segments:
        keys = view.k_blocks[low:high].contiguous()
        if torch.equal(keys, view.q_blocks):
            yield slice(0, real * block), slice(low * block, (low + real) * block), True
            continue
        visible = torch.searchsorted(keys, queries).tolist()
        for top, bottom, first, last in rectangles(visible, 0, real, 0):
            rows, columns = slice(top * block, bottom * block), slice((low + first) * block, (low + last) * block)
            others.append((rows, columns, False))
    yield from others
