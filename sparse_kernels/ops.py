"""`sparse_attention` as a pair of torch operators, so that compilers, checkpointing policies and tracers see one node.

``torch.ops.sparse_kernels.attention`` and ``attention_backward`` take a pattern as plain tensors and numbers, say what they return
without running (fake implementations, for ``torch.compile`` and meta tensors) and are tied together for autograd. Which backend
runs is looked up inside, when real tensors are there, so a compiled graph does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from sparse_kernels.backends import Backend, resolve_backend
from sparse_kernels.block_rows import BlockRows
from sparse_kernels.errors import PatternError
from sparse_kernels.pattern import SparsePattern, pad_doc_start
from sparse_kernels.reference import accumulation_dtype
from sparse_kernels.view import ShardView

# Written out, because not every torch infers it from annotations.
_PATTERN = "Tensor?[] index, SymInt[] sizes, float scale, str backend"


@torch.library.custom_op(
    "sparse_kernels::attention",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_PATTERN}) -> (Tensor, Tensor, Tensor)",
)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Sequence[Tensor | None],
    sizes: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the whole sequence under a pattern taken apart by `flatten`; differentiable in q, k and v.

    Args:
        q: [B, NB * b, H, D], padded to whole blocks; k, v: [B, NB * b, K, D].
        index: columns, diagonals, bits of the blocks (or None) of the pattern and doc_start [B, S] (or None).
        sizes: seq_len, block and full of the pattern.
        backend: "auto" or a name of `sparse_kernels.backends()`.

    Returns:
        out [B, NB * b, H, D] in the dtype of q, so that its gradient has no wider one; lse [B, H, NB * b] float32 (float64 for
        float64 inputs); and exact, out before it was rounded to q's dtype, because the backward needs the out that lse
        describes: float32 in the shape of out, or [0] where out was not rounded. Only out carries a gradient.
    """
    view, chosen = _prepare(q, index, sizes, backend)
    # The reference backend multiplies matrices, which autocast would do in bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        exact, lse = chosen.forward(q, k, v, view, scale)
    if exact.dtype == q.dtype:
        return exact.contiguous(), lse.contiguous(), exact.new_empty(0)
    exact = exact.contiguous()
    return exact.to(q.dtype), lse.contiguous(), exact


@torch.library.custom_op(
    "sparse_kernels::attention_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_PATTERN}) -> (Tensor, Tensor, Tensor)",
)
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: Sequence[Tensor | None],
    sizes: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in the dtypes of q, k, v, given the gradient of out and the exact out; the rest is as in `attention`."""
    view, chosen = _prepare(q, index, sizes, backend)
    dout = dout.contiguous()
    with torch.autocast(q.device.type, enabled=False):
        grads = chosen.backward(dout, q, k, v, out, lse, view, scale)
    dq, dk, dv = (g.to(x.dtype).contiguous() for g, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def flatten(pattern: SparsePattern, doc_start: Tensor | None) -> tuple[list[Tensor | None], list[int]]:
    """(index, sizes) of `attention`. Nothing is copied: the same pattern and documents find the plan made for them before.

    Raises:
        PatternError: the pattern holds the single blocks of some query blocks only.
    """
    rows = pattern.block_rows
    if rows is not None and not rows.whole:
        raise PatternError(
            "this pattern holds the single blocks of some query blocks only, those of a rank; sparse_attention computes all of them"
        )
    return [pattern.columns, pattern.diagonals, None if rows is None else rows.bits, doc_start], [
        pattern.seq_len,
        pattern.block,
        int(pattern.full),
    ]


def _prepare(
    q: Tensor, index: Sequence[Tensor | None], sizes: Sequence[int], backend: str
) -> tuple[ShardView, Backend]:
    view = _view(index, sizes)
    dense = view.pattern.full and view.doc_start is None
    return view, resolve_backend(backend, q.device, q.dtype, q.shape[-1], dense=dense)


# Views by the tensor of their diagonals, for as long as that lives: backends keep their plan of a view on it, and the backward (or
# the next call with the same pattern) finds it there. A view holds aliases, so that it does not keep its own key alive.
_VIEWS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _view(index: Sequence[Tensor | None], sizes: Sequence[int]) -> ShardView:
    """The view of the whole sequence that the flattened pattern describes."""
    diagonals = index[1]
    if any(x is not None and x.is_inference() for x in index):
        return _new_view(index, sizes)  # they do not count their versions, so a change would go unseen
    stamp = (*sizes, *(-1 if x is None else x._version for x in index))
    known = _VIEWS.get(diagonals)
    if known is not None and known[1] == stamp and _same(known[0], index):
        return known[2]
    view = _new_view([None if x is None else x.detach() for x in index], sizes)
    _VIEWS[diagonals] = [None if x is None else TensorWeakRef(x) for x in index], stamp, view
    return view


def _new_view(index: Sequence[Tensor | None], sizes: Sequence[int]) -> ShardView:
    columns, diagonals, bits, doc_start = index
    seq_len, block, full = sizes
    every = torch.arange(-(-seq_len // block))
    blocks = None if bits is None else BlockRows(len(every), every, bits)
    pattern = SparsePattern(seq_len, block, columns, diagonals, blocks, bool(full))
    padded = pad_doc_start(doc_start, pattern)
    return ShardView(pattern, every, k_blocks=every, inline_columns=True, doc_start=padded)


def _same(kept: Sequence[TensorWeakRef | None], index: Sequence[Tensor | None]) -> bool:
    return all((None if ref is None else ref()) is x for ref, x in zip(kept, index, strict=True))


@attention.register_fake
def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Sequence[Tensor | None],
    sizes: Sequence[int],
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    batch, length, heads, _ = q.shape
    exact = q.new_empty((0,) if dtype == q.dtype else q.shape, dtype=dtype)
    return q.new_empty(q.shape), q.new_empty((batch, heads, length), dtype=dtype), exact


@attention_backward.register_fake
def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, index, *ctx.settings = inputs
    out, lse, exact = output
    ctx.save_for_backward(q, k, v, out if exact.dtype == out.dtype else exact, lse, *index)
    ctx.mark_non_differentiable(lse, exact)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None, _dexact: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *index = ctx.saved_tensors
    # torch takes a list of tensors for a structure that the gradients must repeat, a list with a None in it for one value.
    structure = None if any(x is None for x in index) else [None] * len(index)
    nothing = (structure, None, None, None)
    if dout is None:
        return None, None, None, *nothing
    return *attention_backward(dout, q, k, v, out, lse, index, *ctx.settings), *nothing


def _refuse(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
    # out and lse are constants of the backward, so a second derivative would be wrong without a word.
    raise RuntimeError("trying to differentiate twice through sparse_attention, which has first derivatives only")


attention.register_autograd(_backward, setup_context=_setup_context)
attention_backward.register_autograd(_refuse)
