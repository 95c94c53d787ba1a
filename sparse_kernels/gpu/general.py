"""Attention over any lists of tiles: patterns with single blocks, and the cross-check of the structured kernels.

`forward` and `backward` follow `sparse_kernels.backends.Backend`. They run every `ShardView`: block diagonals, single blocks,
columns inside the shard and gathered columns; patterns without ``blocks`` too, only that those have a faster way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sparse_kernels.gpu import general_kernels as kernels
from sparse_kernels.gpu.config import Tile, padded_head_dim, tile_for
from sparse_kernels.gpu.lists import ViewIndex, index_of
from sparse_kernels.view import ShardView

State = tuple[Tensor, Tensor]
LOG2E = 1.4426950408889634
INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)


def forward(q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None = None) -> State:
    """See `Backend.forward`; out and lse are float32 and contiguous."""
    call = _Call(q, k, v, view, scale)
    out = torch.empty(call.q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(call.batch, call.heads, call.length, dtype=torch.float32, device=q.device)
    tiles = call.tile("forward")
    carry_out, carry_lse = (None, None) if carry is None else (t.float().contiguous() for t in carry)
    if out.numel():
        kernels.forward_kernel[call.query_grid(tiles)](
            call.q, call.k, call.v, out, lse, carry_out, carry_lse, *call.row_arguments(),
            call.scale2, call.heads, call.group, view.pattern.seq_len, call.num_q, call.num_blocks, call.room, call.width,
            *call.strides(), *call.block_strides(),
            HAS_CARRY=carry is not None, **call.flags(), **call.launch(tiles),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.backward`; dq, dk, dv are float32 and contiguous."""
    call = _Call(q, k, v, view, scale)
    dout, out, lse = _unit_stride(dout), out.float().contiguous(), lse.float().contiguous()
    dq = torch.empty(call.q.shape, dtype=torch.float32, device=q.device)
    dk, dv = (torch.empty(call.k.shape, dtype=torch.float32, device=q.device) for _ in range(2))
    delta = torch.empty_like(lse)
    if dq.numel():
        rows = 64
        kernels.delta_kernel[(triton.cdiv(call.length, rows), call.batch * call.heads)](
            out, dout, delta, call.heads, call.length, *dout.stride()[:3], HEAD_DIM=call.head_dim, BLOCK_D=call.block_d, ROWS=rows
        )  # fmt: skip
        tiles = call.tile("dq")
        kernels.dq_kernel[call.query_grid(tiles)](
            call.q, call.k, call.v, dout, lse, delta, dq, *call.row_arguments(),
            call.scale2, scale, call.heads, call.group, call.num_q, call.num_blocks, call.room, call.width,
            *call.strides(dout), *call.block_strides(), **call.flags(), **call.launch(tiles),
        )  # fmt: skip
    if call.index.cols is None:
        dk.zero_(), dv.zero_()
    elif dk.numel():
        cols, tiles = call.index.cols, call.tile("dkdv")
        kernels.dkdv_kernel[(call.num_k * (call.block // tiles.n), call.batch * call.kv_heads)](
            call.q, call.k, call.v, dout, lse, delta, dk, dv, call.index.doc_start,
            call.index.q_ids, call.index.k_ids, cols.diagonal, cols.start, cols.count, cols.entries,
            call.scale2, scale, call.heads, call.group, call.num_q, call.num_k, call.room,
            *call.strides(dout), HAS_DOC=call.index.doc_start is not None, **call.launch(tiles),
        )  # fmt: skip
    if call.index.columns is not None:
        _add_columns(dk, dv, dout, lse, delta, call, scale)
    return dq, dk, dv


def _add_columns(dk: Tensor, dv: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, call: _Call, scale: float) -> None:
    """Gradients of the column part: computed per query head, then added to dk and dv one head of a group after the other."""
    columns, index = call.index.columns, call.index
    assert columns is not None
    tiles = call.tile("columns")
    shape = (call.batch, call.heads, call.width, call.head_dim)
    parts = [torch.empty(shape, dtype=torch.float32, device=dk.device) for _ in range(2)]
    kernels.column_kernel[(triton.cdiv(call.width, tiles.n), call.batch * call.heads)](
        call.q, call.k, call.v, dout, lse, delta, *parts, index.doc_start,
        index.q_ids, columns.order, index.offsets, index.blocks if index.blocks is not None else index.offsets,
        columns.position, columns.row, columns.first,
        call.scale2, scale, call.heads, call.group, call.num_q, columns.live, call.num_blocks, call.width,
        *call.strides(dout), *call.block_strides(),
        HAS_BLOCKS=index.blocks is not None, HAS_DOC=index.doc_start is not None, **call.launch(tiles),
    )  # fmt: skip
    rows = 64
    for member in range(call.group):
        kernels.fold_kernel[(triton.cdiv(call.width, rows), call.batch * call.kv_heads)](
            *parts, dk, dv, columns.row, member, call.heads, call.group, call.width, dk.shape[1],
            HEAD_DIM=call.head_dim, BLOCK_D=call.block_d, BLOCK_N=rows,
        )  # fmt: skip


def _unit_stride(x: Tensor) -> Tensor:
    """x with unit stride along head_dim; a copy only when it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Call:
    """Sizes, strides and index of one call, in the order in which the kernels take them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float) -> None:
        if scale <= 0:
            raise ValueError(f"the triton backend needs a positive scale, got {scale}; fold the sign into q")
        self.q, self.k, self.v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        self.batch, self.length, self.heads, self.head_dim = q.shape
        self.kv_heads, self.block = k.shape[2], view.pattern.block
        self.group = self.heads // self.kv_heads
        self.num_q, self.num_k = len(view.q_blocks), 0 if view.k_blocks is None else len(view.k_blocks)
        self.num_blocks = view.pattern.num_blocks
        if self.length != self.num_q * self.block or (self.batch, self.heads) != (
            view.pattern.batch,
            view.pattern.heads,
        ):
            raise ValueError(
                f"q is {tuple(q.shape)} but the view has {self.num_q} query blocks of {self.block} tokens, batch "
                f"{view.pattern.batch} and {view.pattern.heads} heads; pad q to whole blocks"
            )
        if self.block % 16:
            raise ValueError(f"the triton backend needs blocks of a multiple of 16 tokens, got {self.block}")
        self.scale2 = scale * LOG2E
        self.block_d = padded_head_dim(self.head_dim)
        self.index: ViewIndex = index_of(view, q.device)
        self.room = 0 if self.index.rows is None else self.index.rows.entries.shape[2]
        self.width = 0 if self.index.columns is None else self.index.columns.position.shape[2]

    def tile(self, kernel: str) -> Tile:
        """The launch shape of a kernel: "forward", "dq", "dkdv" or "columns"."""
        major = 9 if INTERPRETED else torch.cuda.get_device_capability(self.q.device)[0]
        return tile_for(f"general_{kernel}", major, max(self.head_dim, 64), self.q.element_size(), self.block)

    def query_grid(self, tiles: Tile) -> tuple[int, int]:
        """Programs over query tiles and heads."""
        return self.num_q * (self.block // tiles.m), self.batch * self.heads

    def row_arguments(self) -> tuple[Any, ...]:
        """doc_start .. column_before of the kernels over query rows. What a view has not is never read."""
        index, nothing = self.index, self.index.q_ids
        tiles = (nothing,) * 4 if index.rows is None else (
            index.rows.diagonal, index.rows.start, index.rows.count, index.rows.entries
        )  # fmt: skip
        columns = (nothing,) * 3 if index.columns is None else (
            index.columns.position, index.columns.row, index.columns.before
        )  # fmt: skip
        blocks = index.offsets if index.blocks is None else index.blocks
        return index.doc_start, index.q_ids, index.k_ids, *tiles, index.offsets, blocks, *columns

    def strides(self, dout: Tensor | None = None) -> tuple[int, ...]:
        """Batch, row and head strides of q, k, v and dout."""
        tensors = [self.q, self.k, self.v] + ([] if dout is None else [dout])
        return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])

    def block_strides(self) -> tuple[int, ...]:
        """Strides of the single blocks."""
        return (0, 0, 0, 0) if self.index.blocks is None else self.index.blocks.stride()

    def flags(self) -> dict[str, bool]:
        """Which parts the kernels over query rows have."""
        index = self.index
        return {
            "HAS_TILES": index.rows is not None,
            "HAS_COLUMNS": index.columns is not None,
            "HAS_BLOCKS": index.blocks is not None,
            "HAS_DOC": index.doc_start is not None,
        }

    def launch(self, tiles: Tile) -> dict[str, Any]:
        """Tile shape, precision and launch options."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
            "BLOCK": self.block,
            "BLOCK_M": tiles.m,
            "BLOCK_N": tiles.n,
            # Only float32 inputs look at it: three tf32 products keep about float32 accuracy on the tensor cores.
            "PRECISION": "ieee" if INTERPRETED else "tf32x3",
            "UPCAST": INTERPRETED and self.q.dtype == torch.bfloat16,
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
        }
