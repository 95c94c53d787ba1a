"""Attention over any lists of tiles: patterns with single blocks, and the cross-check of the structured kernels.

`forward` and `backward` follow `sparse_kernels.backends.Backend`. They run every `ShardView`: block diagonals, single blocks,
columns inside the shard and gathered columns; patterns without ``blocks`` too, only that those have a faster way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sparse_kernels.gpu import check
from sparse_kernels.gpu import general_kernels as kernels
from sparse_kernels.gpu.config import PARTIAL_BYTES, Tile, generation_of, padded_head_dim
from sparse_kernels.gpu.general_tiles import tile_of
from sparse_kernels.gpu.lists import ViewIndex, index_of
from sparse_kernels.view import ShardView

State = tuple[Tensor, Tensor]
LOG2E = 1.4426950408889634
INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)
INTERPRETER_TILE = Tile(64, 64, 4, 1)  # a step costs about the same there whatever its size


def forward(q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None = None) -> State:
    """See `Backend.forward`; out and lse are float32 and contiguous."""
    with torch.cuda.device_of(q):
        call = _Call(q, k, v, view, scale)
        out = torch.empty(call.q.shape, dtype=torch.float32, device=q.device)
        lse = torch.empty(call.batch, call.heads, call.length, dtype=torch.float32, device=q.device)
        tiles = call.tile("forward")
        carry_out, carry_lse = (None, None) if carry is None else (t.float().contiguous() for t in carry)
        if out.numel():
            kernels.forward_kernel[call.query_grid(tiles)](
                call.q, call.k, call.v, out, lse, carry_out, carry_lse, *call.row_arguments(),
                call.scale2, call.heads, call.group, call.seq_len, call.num_q, call.num_blocks, call.room,
                call.width, *call.strides(), *call.bit_strides(),
                HAS_CARRY=carry is not None, SPREAD=tiles.spread, **call.flags(), **call.launch(tiles),
            )  # fmt: skip
        return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `Backend.backward`; dq, dk, dv are float32 and contiguous."""
    with torch.cuda.device_of(q):
        call = _Call(q, k, v, view, scale)
        # Products of mixed dtypes do not exist; the gradient of a cast output has the dtype of q already.
        dout, out, lse = _unit_stride(dout.to(q.dtype)), out.float().contiguous(), lse.float().contiguous()
        delta = torch.empty_like(lse)
        if lse.numel():
            rows = 64
            kernels.delta_kernel[(triton.cdiv(call.length, rows), call.batch * call.heads)](
                out, dout, delta, call.heads, call.length, *dout.stride()[:3],
                HEAD_DIM=call.head_dim, BLOCK_D=call.block_d, ROWS=rows, enable_fp_fusion=True,
            )  # fmt: skip
        gradient = _Gradient(call, dout, lse, delta, scale)
        dq = gradient.of_queries()
        dk, dv = gradient.of_tiles()
        if call.index.columns is not None:
            gradient.add_columns(dk, dv)
        return dq, dk, dv


@dataclass(frozen=True, eq=False)
class _Gradient:
    """The three launches of a backward, and what they share."""

    call: _Call
    dout: Tensor
    lse: Tensor
    delta: Tensor
    scale: float

    def of_queries(self) -> Tensor:
        """dq."""
        call, tiles = self.call, self.call.tile("dq")
        dq = torch.empty(call.q.shape, dtype=torch.float32, device=call.q.device)
        if dq.numel():
            kernels.dq_kernel[call.query_grid(tiles)](
                call.q, call.k, call.v, self.dout, self.lse, self.delta, dq, *call.row_arguments(),
                call.scale2, self.scale, call.heads, call.group, call.seq_len, call.num_q, call.num_blocks, call.room, call.width,
                *call.strides(self.dout), *call.bit_strides(), SPREAD=tiles.spread, **call.flags(), **call.launch(tiles),
            )  # fmt: skip
        return dq

    def of_tiles(self) -> tuple[Tensor, Tensor]:
        """dk and dv of the listed tiles; zeros where there are none."""
        call = self.call
        cols = call.index.tiles(by_column=True)
        if cols is None:
            nothing = torch.zeros(2, *call.k.shape, dtype=torch.float32, device=call.k.device)
            return nothing[0], nothing[1]
        dk, dv = (torch.empty(call.k.shape, dtype=torch.float32, device=call.k.device) for _ in range(2))
        if dk.numel():
            tiles = call.tile("dkdv")
            kernels.dkdv_kernel[(call.num_k * (call.block // tiles.n), call.batch * call.kv_heads)](
                call.q, call.k, call.v, self.dout, self.lse, self.delta, dk, dv, call.index.doc_start,
                call.index.q_ids, call.index.k_ids, cols.diagonal, cols.start, cols.count, cols.entries,
                call.scale2, self.scale, call.heads, call.group, call.seq_len, call.num_q, call.num_k, call.room,
                *call.strides(self.dout), HAS_DOC=call.index.doc_start is not None, TAIL=call.has_tail, **call.launch(tiles),
            )  # fmt: skip
        return dk, dv

    def add_columns(self, dk: Tensor, dv: Tensor) -> None:
        """Columns: computed per query head, then added to dk and dv one head of a group after the other."""
        call = self.call
        tiles = call.tile("columns")
        whole, one = call.width, 2 * call.batch * call.heads * tiles.n * call.head_dim * 4  # bytes of a tile of columns
        run = whole if triton.cdiv(whole, tiles.n) * one <= PARTIAL_BYTES else max(1, PARTIAL_BYTES // one) * tiles.n
        for first in range(0, whole, run):
            self._add_run(dk, dv, first, min(run, whole - first), tiles)

    def _add_run(self, dk: Tensor, dv: Tensor, first: int, held: int, tiles: Tile) -> None:
        """Of each head the ``held`` columns from ``first`` on."""
        call, index, columns = self.call, self.call.index, self.call.index.columns
        assert columns is not None
        shape = (call.batch, call.heads, held, call.head_dim)
        parts = [torch.empty(shape, dtype=torch.float32, device=dk.device) for _ in range(2)]
        kernels.column_kernel[(triton.cdiv(held, tiles.n), call.batch * call.heads)](
            call.q, call.k, call.v, self.dout, self.lse, self.delta, *parts, index.doc_start,
            index.q_ids, columns.order, index.offsets, *call.bit_arguments(), columns.position, columns.row, columns.first,
            call.scale2, self.scale, call.heads, call.group, call.seq_len, call.num_q, columns.live, call.num_blocks, call.width,
            first, held, *call.strides(self.dout), *call.bit_strides(), HAS_BLOCKS=index.bits is not None,
            HAS_DOC=index.doc_start is not None, TAIL=call.has_tail, **call.launch(tiles),
        )  # fmt: skip
        rows = 64
        for member in range(call.group):
            kernels.fold_kernel[(triton.cdiv(held, rows), call.batch * call.kv_heads)](
                *parts, dk, dv, columns.row, member, call.heads, call.group, call.width, first, held, dk.shape[1],
                HEAD_DIM=call.head_dim, BLOCK_D=call.block_d, BLOCK_N=rows, enable_fp_fusion=True,
            )  # fmt: skip


def _unit_stride(x: Tensor) -> Tensor:
    """x with unit stride along head_dim; a copy only when it has another."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _Call:
    """Sizes, strides and index of one call, in the order in which the kernels take them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float) -> None:
        check(view, scale, q.device)
        self.q, self.k, self.v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
        self.batch, self.length, self.heads, self.head_dim = q.shape
        self.kv_heads, self.block = k.shape[2], view.pattern.block
        self.group = self.heads // self.kv_heads
        self.num_q, self.num_k = len(view.q_blocks), 0 if view.k_blocks is None else len(view.k_blocks)
        self.num_blocks, self.seq_len = view.pattern.num_blocks, view.pattern.seq_len
        # Does the end of the sequence cut one of the query blocks?
        self.has_tail = bool(self.seq_len % self.block) and bool((view.q_blocks == self.num_blocks - 1).any())
        if self.length != self.num_q * self.block or (self.batch, self.heads) != (
            view.pattern.batch,
            view.pattern.heads,
        ):
            raise ValueError(
                f"q is {tuple(q.shape)} but the view has {self.num_q} query blocks of {self.block} tokens, batch "
                f"{view.pattern.batch} and {view.pattern.heads} heads; pad q to whole blocks"
            )
        self.scale2 = scale * LOG2E
        self.block_d = padded_head_dim(self.head_dim)
        self.index: ViewIndex = index_of(view, q.device)
        self.room = self.index.room
        self.width = 0 if self.index.columns is None else self.index.columns.position.shape[2]

    def tile(self, kernel: str) -> Tile:
        """The launch shape of a kernel: "forward", "dq", "dkdv" or "columns"."""
        if INTERPRETED:
            return INTERPRETER_TILE.within(self.block)
        return tile_of(kernel, generation_of(self.q.device), self.head_dim, self.q.element_size(), self.block)

    def query_grid(self, tiles: Tile) -> tuple[int, int]:
        """Programs over query tiles and heads."""
        return self.num_q * (self.block // tiles.m), self.batch * self.heads

    def row_arguments(self) -> tuple[Any, ...]:
        """doc_start .. column_before of the kernels over query rows. What a view has not is never read."""
        index, nothing = self.index, self.index.q_ids
        rows = index.tiles(by_column=False)
        tiles = (nothing,) * 4 if rows is None else (rows.diagonal, rows.start, rows.count, rows.entries)
        columns = (nothing,) * 3 if index.columns is None else (
            index.columns.position, index.columns.row, index.columns.before
        )  # fmt: skip
        return index.doc_start, index.q_ids, index.k_ids, *tiles, index.offsets, *self.bit_arguments(), *columns

    def bit_arguments(self) -> tuple[Tensor, Tensor]:
        """The bits of the single blocks, and where the row of each query slot begins in them."""
        bits = self.index.bits
        return (self.index.offsets if bits is None else bits), self.index.bits_row

    def strides(self, dout: Tensor | None = None) -> tuple[int, ...]:
        """Batch, row and head strides of q, k, v and dout."""
        tensors = [self.q, self.k, self.v] + ([] if dout is None else [dout])
        return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])

    def bit_strides(self) -> tuple[int, ...]:
        """Batch and head strides of the bits of the single blocks."""
        return (0, 0) if self.index.bits is None else self.index.bits.stride()[:2]

    def flags(self) -> dict[str, bool]:
        """Which parts the kernels over query rows have."""
        index = self.index
        return {
            "HAS_TILES": index.has_tiles,
            "HAS_COLUMNS": index.columns is not None,
            "HAS_BLOCKS": index.bits is not None,
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
            "enable_fp_fusion": True,  # said aloud, because its default is about to change
        }
