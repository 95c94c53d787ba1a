"""Forward and backward of one view: a causal call over the diagonal tiles, then one call per chunk of gathered key lists."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_kernels.cpu.flash import EMPTY_LSE, flash_backward, flash_forward, fold
from sparse_kernels.cpu.lists import Chunk, Geometry, ListPlan
from sparse_kernels.reference import merge_states
from sparse_kernels.view import ShardView

State = tuple[Tensor, Tensor]


def geometry_of(q: Tensor, k: Tensor, view: ShardView) -> Geometry:
    """Sizes of a call, checked against the view."""
    batch, length, heads, head_dim = q.shape
    block, number = view.pattern.block, len(view.q_blocks)
    if length != number * block or (batch, heads) != (view.pattern.batch, view.pattern.heads):
        raise ValueError(
            f"q is {tuple(q.shape)} but the view has {number} query blocks of {block} tokens, batch {view.pattern.batch} and "
            f"{view.pattern.heads} heads; pad q to whole blocks"
        )
    return Geometry(batch, heads, k.shape[2], head_dim, k.shape[1], number, block, q.element_size())


def forward(q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None) -> State:
    """`Backend.forward` for contiguous q, k, v of one accumulation dtype."""
    plan = ListPlan.of(view, geometry_of(q, k, view))
    state = carry
    if plan.causal_diagonal:
        near = _diagonal_forward(q, k, v, plan, scale)
        state = near if carry is None else merge_states(*carry, *near)
    elif carry is not None:
        state = carry[0].clone(), carry[1].clone()
    fresh = state is None
    if state is None:
        state = q.new_zeros(q.shape), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    out, lse = state[0].contiguous(), state[1].contiguous()
    for chunk in plan.chunks():
        _chunk_forward(q, k, v, out, lse, plan, chunk, scale, fresh)
    dead = view.q_positions >= view.pattern.seq_len
    if bool(dead.any()):
        out[:, dead], lse[:, :, dead] = 0.0, -torch.inf
    return out, lse


def _diagonal_forward(q: Tensor, k: Tensor, v: Tensor, plan: ListPlan, scale: float) -> State:
    """Every query block against its own key block."""
    g = plan.geometry
    out, lse = flash_forward(_block_heads(q, g), _block_heads(k, g), _block_heads(v, g), None, True, scale)
    out = out.transpose(1, 2).reshape(q.shape)
    lse = lse.view(g.batch, g.num_q_blocks, g.heads, g.block).transpose(1, 2).reshape(g.batch, g.heads, -1)
    skip = _skipped_rows(plan)
    if skip is not None:
        out = out.masked_fill(skip[:, :, None, None], 0.0)
        lse = lse.masked_fill(skip[:, None], -torch.inf)
    return out, lse


def _skipped_rows(plan: ListPlan) -> Tensor | None:
    """bool [B, nq * b]: rows whose diagonal tile is listed, or that are padding; None when there are none."""
    g, view = plan.geometry, plan.view
    skip = (view.q_positions >= view.pattern.seq_len).expand(g.batch, -1)
    bounded = plan.bounded_diagonal()
    if bounded is not None:
        skip = skip | bounded.repeat_interleave(g.block, 1)
    return skip if bool(skip.any()) else None


def _block_heads(x: Tensor, g: Geometry) -> Tensor:
    """[B, nq * b, heads, D] seen as [B * nq, H, b, D]; key-value heads are repeated for their query heads."""
    if x.shape[2] != g.heads:
        x = x.repeat_interleave(g.heads // g.kv_heads, 2)
    return x.reshape(-1, g.block, g.heads, g.head_dim).transpose(1, 2)


def _take(x: Tensor, rows: Tensor, number: int) -> Tensor:
    """[number, 1, rows per item, D] gathered from x seen as rows of D numbers."""
    head_dim = x.shape[-1]
    return x.view(-1, head_dim).index_select(0, rows).view(number, 1, -1, head_dim)


def _chunk_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: ListPlan, chunk: Chunk, scale: float, fresh: bool
) -> None:
    """Add the keys of one chunk to the running (out, lse), in place. ``fresh``: these items have seen nothing yet."""
    g, number = plan.geometry, len(chunk.items)
    rows, keys = chunk.query_rows, chunk.rows.flatten()
    new, new_lse = flash_forward(
        _take(q, rows, number),
        _take(k, keys, number),
        _take(v, keys, number),
        plan.row_mask(chunk, q.dtype),
        False,
        scale,
    )
    new, new_lse = new.reshape(number, g.block, -1), new_lse.reshape(number, g.block)
    if chunk.bounded:  # only here a row can be without keys
        empty = new_lse < EMPTY_LSE
        new, new_lse = new.masked_fill(empty[..., None], 0.0), new_lse.masked_fill(empty, -torch.inf)
    flat_out, flat_lse = out.view(-1, g.head_dim), lse.view(-1, g.block)
    if not fresh:
        old, old_lse = flat_out.index_select(0, rows).view_as(new), flat_lse.index_select(0, chunk.items)
        new, new_lse = fold(old, old_lse, new, new_lse)
    flat_out.index_copy_(0, rows, new.view(-1, g.head_dim))
    flat_lse.index_copy_(0, chunk.items, new_lse)


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.backward` for contiguous inputs of one accumulation dtype."""
    plan = ListPlan.of(view, geometry_of(q, k, view))
    dead = view.q_positions >= view.pattern.seq_len
    lse = lse.masked_fill((lse == -torch.inf) | dead, torch.inf)  # exp(score - inf) = 0: such rows take no part
    if plan.causal_diagonal:
        dq, dk, dv = _diagonal_backward(dout, q, k, v, out, lse, plan, scale)
    else:
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for chunk in plan.chunks():
        _chunk_backward((dout, q, k, v, out, lse), (dq, dk, dv), plan, chunk, scale)
    return dq, dk, dv


def _diagonal_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: ListPlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of every query block against its own key block."""
    g = plan.geometry
    skip = _skipped_rows(plan)
    if skip is not None:
        lse = lse.masked_fill(skip[:, None], torch.inf)
    blocks = lse.view(g.batch, g.heads, g.num_q_blocks, g.block).transpose(1, 2).reshape(-1, g.heads, g.block)
    dq, dk, dv = flash_backward(
        _block_heads(dout, g), _block_heads(q, g), _block_heads(k, g), _block_heads(v, g), _block_heads(out, g),
        blocks, None, True, scale,
    )  # fmt: skip
    dq, dk, dv = (t.transpose(1, 2).reshape(q.shape) for t in (dq, dk, dv))
    if g.heads != g.kv_heads:
        dk, dv = (t.view(g.batch, -1, g.kv_heads, g.heads // g.kv_heads, g.head_dim).sum(3) for t in (dk, dv))
    return dq, dk, dv


def _chunk_backward(
    saved: tuple[Tensor, ...], grads: tuple[Tensor, Tensor, Tensor], plan: ListPlan, chunk: Chunk, scale: float
) -> None:
    """Add the gradients of one chunk to (dq, dk, dv), in place. ``saved``: dout, q, k, v, out, lse."""
    dout, q, k, v, out, lse = saved
    g, number = plan.geometry, len(chunk.items)
    rows, keys = chunk.query_rows, chunk.rows.flatten()
    final = lse.view(-1, g.block).index_select(0, chunk.items)[:, None]
    parts = flash_backward(
        _take(dout, rows, number), _take(q, rows, number), _take(k, keys, number), _take(v, keys, number),
        _take(out, rows, number), final, plan.row_mask(chunk, q.dtype), False, scale,
    )  # fmt: skip
    keys = keys.long()  # index_add_ has a fast path for int64 only
    for total, part, index in zip(grads, parts, (rows, keys, keys), strict=True):
        total.view(-1, g.head_dim).index_add_(0, index, part.reshape(-1, g.head_dim))
