"""The full causal pattern: large unmasked rectangles and one causal triangle instead of lists, nothing gathered."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparse_kernels.cpu.flash import flash_backward, flash_forward, fold
from sparse_kernels.view import ShardView

State = tuple[Tensor, Tensor]
Rectangle = tuple[int, int, int, int]


def applies(view: ShardView) -> bool:
    """Is this view a full causal mask between ascending blocks that are the same or all different?"""
    if not view.pattern.full or view.doc_start is not None or view.k_blocks is None:
        return False
    if not (_ascending(view.q_blocks) and _ascending(view.k_blocks)):
        return False
    return torch.equal(view.q_blocks, view.k_blocks) or not bool(torch.isin(view.q_blocks, view.k_blocks).any())


def _ascending(ids: Tensor) -> bool:
    return bool((ids[1:] > ids[:-1]).all())


def rectangles(visible: list[int], low: int, high: int, start: int) -> Iterator[Rectangle]:
    """(query block, end, key block, end) rectangles in which every query sees every key, each pair exactly once.

    Args:
        visible: for every local query block how many leading key blocks it sees; ascending.
        low, high: query blocks to cover.
        start: key blocks before it are covered already.
    """
    if visible[low] > start:
        yield low, high, start, visible[low]
        start = visible[low]
    if high - low > 1 and visible[high - 1] > start:
        middle = (low + high) // 2
        yield from rectangles(visible, low, middle, start)
        yield from rectangles(visible, middle, high, start)


def _visible(view: ShardView) -> tuple[list[int], int]:
    """Key blocks before each real query block, and the number of real query blocks (padding ids are last)."""
    assert view.k_blocks is not None
    real = int((view.q_blocks < view.pattern.num_blocks).sum())
    return torch.searchsorted(view.k_blocks.contiguous(), view.q_blocks[:real].contiguous()).tolist(), real


def _calls(view: ShardView) -> Iterator[tuple[slice, slice, bool]]:
    """(query rows, key rows, causal) of every flash call of the view."""
    assert view.k_blocks is not None
    block = view.pattern.block
    visible, real = _visible(view)
    if not real:
        return  # nothing but padding: torch's operator divides by the number of rows
    if torch.equal(view.q_blocks, view.k_blocks):
        yield slice(0, real * block), slice(0, real * block), True
    else:
        for low, high, first, last in rectangles(visible, 0, real, 0):
            yield slice(low * block, high * block), slice(first * block, last * block), False


def _heads(x: Tensor, rows: slice, group: int) -> Tensor:
    """[B, heads * group, rows, D], key-value heads repeated for their query heads."""
    x = x[:, rows]
    return (x if group == 1 else x.repeat_interleave(group, 2)).transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None) -> State:
    """`Backend.forward` of a view for which `applies` holds."""
    group = q.shape[2] // k.shape[2]
    dead = view.q_positions >= view.pattern.seq_len
    if carry is None:
        out, lse = q.new_zeros(q.shape), q.new_full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf)
    else:
        out, lse = carry[0].clone(), carry[1].clone()
    heads_out = out.transpose(1, 2)
    for rows, keys, causal in _calls(view):
        part, part_lse = flash_forward(
            _heads(q, rows, 1), _heads(k, keys, group), _heads(v, keys, group), None, causal, scale
        )
        if carry is not None or not causal:  # else these rows have seen nothing yet
            part, part_lse = fold(heads_out[:, :, rows], lse[:, :, rows], part, part_lse)
        heads_out[:, :, rows], lse[:, :, rows] = part, part_lse
    out[:, dead], lse[:, :, dead] = 0.0, -torch.inf
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`Backend.backward` of a view for which `applies` holds."""
    group = q.shape[2] // k.shape[2]
    dead = view.q_positions >= view.pattern.seq_len
    lse = lse.masked_fill((lse == -torch.inf) | dead, torch.inf)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, keys, causal in _calls(view):
        parts = flash_backward(
            _heads(dout, rows, 1), _heads(q, rows, 1), _heads(k, keys, group), _heads(v, keys, group),
            _heads(out, rows, 1), lse[:, :, rows], None, causal, scale,
        )  # fmt: skip
        for total, part, index in zip((dq, dk, dv), parts, (rows, keys, keys), strict=True):
            piece = part.transpose(1, 2)
            heads = total.shape[2]
            total[:, index] += piece if piece.shape[2] == heads else piece.unflatten(2, (heads, group)).sum(3)
    return dq, dk, dv
