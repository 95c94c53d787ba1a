"""Sparse ring attention: pattern x layout x topology x backend, joined in one loop.

Two schedules give the same numbers. ``ring`` passes key-value shards around (a flat ring, or rings inside nodes nested in a ring
between nodes); ``gather`` collects all keys and values for a few key-value heads at a time. Layout decides who owns which block,
pattern which tiles exist, the backend computes them; none of them knows the others.

The ring with a travelling dK/dV follows ring attention (Liu et al., arXiv 2310.01889) and ring-flash-attention
(https://github.com/zhuzilin/ring-flash-attention); the two-level ring LoongTrain (arXiv 2406.18485); the gather schedule the
context parallelism of Llama 3 (arXiv 2407.21783).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrain.columns import ColumnStore
from mtrain.comm import Pending, Ring
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout
from sparse_kernels import ShardView, SparsePattern, resolve_backend
from sparse_kernels.attention import check_scale
from sparse_kernels.backends import Backend, State
from sparse_kernels.reference import accumulation_dtype

SCHEDULES = ("ring", "gather")
# The gather schedule takes as many key-value heads at a time as keep the gathered K and V within this.
GATHER_BYTES = 1 << 28

Gradients = tuple[Tensor, Tensor, Tensor]


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SparsePattern,
    *,
    ring: Ring,
    layout: RingLayout,
    schedule: str = "ring",
    doc_start: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention under a pattern, with the sequence spread over the ranks of a ring; differentiable in q, k and v.

    Args:
        q: this rank's shard [B, n, H, D], n = layout.local_len, in the layout's order.
        k, v: this rank's shards [B, n, K, D], H a multiple of K.
        pattern: global, the same on every rank; of single blocks each rank may hold those of its own query blocks only.
        ring: the ranks that hold the other shards; every one of them makes this call.
        layout: who owns which block; its block and seq_len are the pattern's.
        schedule: "ring" or "gather".
        doc_start: this rank's shard int64 [B, n] of the document starts (global positions); None: one document.
        scale: of the scores, above 0; default D^-0.5.
        backend: "auto", or a name of `sparse_kernels.backends()`.
        return_lse: also return this rank's lse [B, H, n], natural log, float32 (no gradient flows through it).

    Returns:
        This rank's shard of the output [B, n, H, D] in the dtype of q, or (out, lse). Padding rows are 0 (lse -inf) and get no
        gradient.

    Autocast has no say here: the inputs keep their dtype and the scores are accumulated in float32. Gradients of gradients are
    refused.

    Raises:
        MtrainError: shards that do not fit the layout, the pattern or the ring.
        LaunchError: a peer was lost.
    """
    _check(q, k, v, pattern, ring, layout, schedule, doc_start)
    check_scale(scale)
    call = _Call(
        pattern=pattern.for_queries(layout.blocks(ring.rank)),
        ring=ring,
        layout=layout,
        doc_start=doc_start,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        backend=resolve_backend(backend, q.device, q.dtype, q.shape[-1], dense=pattern.full and doc_start is None),
        # Alone there is nothing to pass around: one call over all keys.
        gather=schedule == "gather" or ring.world_size == 1,
    )
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _RingAttention.apply(q, k, v, call)
    return (out, lse) if return_lse else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: SparsePattern,
    ring: Ring,
    layout: RingLayout,
    schedule: str,
    doc_start: Tensor | None,
) -> None:
    if schedule not in SCHEDULES:
        raise MtrainError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if layout.ranks != ring.world_size:
        raise MtrainError(f"the layout is for {layout.ranks} ranks but the ring has {ring.world_size}")
    if (pattern.seq_len, pattern.block) != (layout.seq_len, layout.block):
        raise MtrainError(
            f"the pattern is for {pattern.seq_len} tokens in blocks of {pattern.block}, the layout for {layout.seq_len} in "
            f"blocks of {layout.block}; build both from the same seq_len and block"
        )
    if not q.dim() == k.dim() == v.dim() == 4:
        raise MtrainError(
            f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions; each must be a shard [B, n, heads, D]"
        )
    batch, length, heads, head_dim = q.shape
    if length != layout.local_len:
        raise MtrainError(f"q holds {length} tokens; layout {layout.kind!r} gives each rank {layout.local_len}")
    if (batch, heads) != (pattern.batch, pattern.heads):
        raise MtrainError(f"q has batch {batch}, heads {heads}; the pattern has {pattern.batch}, {pattern.heads}")
    if k.shape != v.shape or k.shape[:2] != (batch, length) or k.shape[3] != head_dim or heads % k.shape[2]:
        raise MtrainError(
            f"k {tuple(k.shape)} and v {tuple(v.shape)} must both be [{batch}, {length}, num_kv_heads, {head_dim}] with "
            f"num_kv_heads dividing {heads}"
        )
    if doc_start is not None and tuple(doc_start.shape) != (batch, length):
        raise MtrainError(f"doc_start is {tuple(doc_start.shape)}; expected this rank's shard [{batch}, {length}]")


@dataclass(frozen=True, eq=False)
class _Call:
    """What one attention call knows besides its tensors."""

    pattern: SparsePattern
    ring: Ring
    layout: RingLayout
    doc_start: Tensor | None
    scale: float
    backend: Backend
    gather: bool
    # The backward gets the views of the forward, with whatever index a backend has prepared on them.
    views: dict[object, ShardView] = field(default_factory=dict)

    def view_of(self, source: int) -> ShardView:
        """This rank's queries against the shard of rank ``source``."""
        return self._view(source, self.pattern, k_blocks=self.layout.blocks(source))

    def view_of_columns(self, store: ColumnStore) -> ShardView:
        """This rank's queries against the gathered columns."""
        return self._view("columns", self.pattern, column_positions=store.positions)

    def view_of_all(self, heads: slice) -> ShardView:
        """This rank's queries against every shard, in rank order, for some query heads."""
        pattern, keys = self.pattern.select(heads), self.layout.table.flatten()
        return self._view(heads.start, pattern, k_blocks=keys, inline_columns=True)

    def _view(self, name: object, pattern: SparsePattern, **keys: Any) -> ShardView:
        if name not in self.views:
            queries = self.layout.blocks(self.ring.rank)
            self.views[name] = ShardView(pattern, queries, doc_start=self.doc_start, **keys)
        return self.views[name]

    def reachable(self, source: int) -> bool:
        """Could any query of this rank see any key of that shard? Known from the layout alone, without asking the device."""
        first_key, last_query = self.layout.blocks(source).min(), self.layout.blocks(self.ring.rank).max()
        return bool(first_key <= last_query)


class _RingAttention(torch.autograd.Function):
    """Forward and backward of one layer's attention; out and lse stay float32 until the end, and are cast once."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: _Call) -> State:
        rows: tuple[Tensor, ...] = ()
        ctx.store = None
        if call.gather:
            out, lse = _gather_forward(q, k, v, call)
        else:
            ctx.store = ColumnStore.build(call.pattern, k.shape[2], call.ring, call.layout)
            carry = None
            if ctx.store is not None:
                k_rows, v_rows = rows = ctx.store.gather(k, v, call.ring)
                carry = call.backend.forward(q, k_rows, v_rows, call.view_of_columns(ctx.store), call.scale)
            out, lse = _ring_forward(q, k, v, call, carry)
        ctx.call = call
        ctx.save_for_backward(q, k, v, out, lse, *rows)
        ctx.mark_non_differentiable(lse)
        return out.to(q.dtype), lse

    @staticmethod
    @once_differentiable  # out and lse are constants here, so a second derivative would be wrong without a word
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # unpacked once: activation checkpointing allows no second look
        q, k, v = saved[:3]
        with torch.autocast(q.device.type, enabled=False):
            dq, dk, dv = _backward(dout.contiguous(), saved, ctx.store, ctx.call)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def _backward(dout: Tensor, saved: tuple[Tensor, ...], store: ColumnStore | None, call: _Call) -> Gradients:
    """Gradients of the whole layer. ``saved``: q, k, v, out, lse, and with a store the gathered K and V rows."""
    q, k, v, out, lse, *rows = saved
    if call.gather:
        return _gather_backward(dout, q, k, v, out, lse, call)
    dq, dk, dv = _ring_backward(dout, q, k, v, out, lse, call)
    if store is not None:
        k_rows, v_rows = rows
        view = call.view_of_columns(store)
        dq_part, dk_rows, dv_rows = call.backend.backward(dout, q, k_rows, v_rows, out, lse, view, call.scale)
        dq += dq_part
        store.scatter(dk, dv, dk_rows, dv_rows, call.ring)
    return dq, dk, dv


def _ring_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call, carry: State | None) -> State:
    """Every shard visits once. The transfer between nodes is posted before an inner ring begins and awaited after it ends."""
    ring, topology = call.ring, call.ring.topology
    state = carry
    arriving = [k, v]
    for s in range(topology.outer):
        held = arriving
        crossing = ring.shift(held, "outer", "kv") if s + 1 < topology.outer else None
        for t in range(topology.inner):
            moving = ring.shift(held, "inner", "kv") if t + 1 < topology.inner else None
            source = topology.owner(ring.rank, s, t)
            if call.reachable(source):
                state = call.backend.forward(q, held[0], held[1], call.view_of(source), call.scale, state)
            if moving is not None:
                held = moving.wait()
        if crossing is not None:
            arriving = crossing.wait()
    assert state is not None, "a rank always sees its own shard"
    return state


def _ring_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call) -> Gradients:
    """The same journey; each shard's dK and dV ride one hop behind it and come home summed.

    Inside a node a shard's gradient is summed over the inner ring first; only the node's sum crosses to the next node.
    """
    ring, topology = call.ring, call.ring.topology
    acc = accumulation_dtype(q.dtype)
    dq = torch.zeros_like(q, dtype=acc)
    arriving, riding = [k, v], None
    home: list[Tensor] = []
    for s in range(topology.outer):
        held = arriving
        crossing = ring.shift(held, "outer", "kv") if s + 1 < topology.outer else None
        behind: Pending | None = None
        total: list[Tensor] = []
        for t in range(topology.inner):
            moving = ring.shift(held, "inner", "kv") if t + 1 < topology.inner else None
            source = topology.owner(ring.rank, s, t)
            if call.reachable(source):
                view = call.view_of(source)
                dq_part, dk, dv = call.backend.backward(dout, q, held[0], held[1], out, lse, view, call.scale)
                dq += dq_part
                total = [dk, dv]
            else:
                total = [torch.zeros_like(x, dtype=acc) for x in held]
            if behind is not None:
                total = _add(behind.wait(), total)
            if topology.inner > 1:
                behind = ring.shift(total, "inner", "dkv")
            if moving is not None:
                held = moving.wait()
        if behind is not None:
            total = behind.wait()
        # ``total`` is now this node's sum for the shard that this rank held when the outer step began.
        if riding is not None:
            total = _add(riding.wait(), total)
        riding = ring.shift(total, "outer", "dkv") if topology.outer > 1 else None
        home = total
        if crossing is not None:
            arriving = crossing.wait()
    if riding is not None:
        home = riding.wait()
    return dq, home[0], home[1]


def _add(received: list[Tensor], own: list[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(received, own, strict=True)]


def _head_chunks(k: Tensor, heads: int, call: _Call) -> list[tuple[slice, slice]]:
    """(key-value heads, query heads) slices whose gathered K and V stay within GATHER_BYTES."""
    kv_heads = k.shape[2]
    group = heads // kv_heads
    per_head = 2 * k.shape[0] * call.layout.padded_len * k.shape[3] * k.element_size()
    step = kv_heads if call.ring.world_size == 1 else max(1, min(kv_heads, GATHER_BYTES // per_head))
    starts = range(0, kv_heads, step)
    ends = [min(first + step, kv_heads) for first in starts]
    return [(slice(a, b), slice(a * group, b * group)) for a, b in zip(starts, ends, strict=True)]


def _gathered(k: Tensor, v: Tensor, chunks: list[tuple[slice, slice]], call: _Call) -> Any:
    """Yields (kv heads, query heads, K, V) with K, V [B, W * n, heads, D]; the next heads travel while these are used."""

    def post(chunk: tuple[slice, slice]) -> Pending:
        return call.ring.start_all_gather(torch.stack([k[:, :, chunk[0]], v[:, :, chunk[0]]]))

    pending = post(chunks[0])
    for index, (kv_heads, heads) in enumerate(chunks):
        parts = pending.wait()
        if index + 1 < len(chunks):
            pending = post(chunks[index + 1])
        keys, values = torch.cat(parts, 2).unbind(0)
        yield kv_heads, heads, keys, values


def _gather_forward(q: Tensor, k: Tensor, v: Tensor, call: _Call) -> State:
    chunks = _head_chunks(k, q.shape[2], call)
    states = [
        call.backend.forward(q[:, :, heads], keys, values, call.view_of_all(heads), call.scale)
        for _, heads, keys, values in _gathered(k, v, chunks, call)
    ]
    return torch.cat([out for out, _ in states], 2), torch.cat([lse for _, lse in states], 1)


def _gather_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: _Call) -> Gradients:
    ring, backend = call.ring, call.backend
    parts: list[Gradients] = []
    for _, heads, keys, values in _gathered(k, v, _head_chunks(k, q.shape[2], call), call):
        view = call.view_of_all(heads)
        dout_part, q_part, out_part = (t[:, :, heads] for t in (dout, q, out))
        dq, dk, dv = backend.backward(dout_part, q_part, keys, values, out_part, lse[:, heads], view, call.scale)
        both = torch.stack([dk, dv]).chunk(ring.world_size, 2)
        mine = ring.reduce_scatter(both) if ring.world_size > 1 else both[0]
        parts.append((dq, mine[0], mine[1]))
    dq, dk, dv = (torch.cat(pieces, 2) for pieces in zip(*parts, strict=True))
    return dq, dk, dv
