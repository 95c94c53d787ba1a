"""Attention over any lists of tiles: patterns with single blocks, and the cross-check of the structured kernels.

`forward` and `backward` follow `sparse_kernels.backends.Backend`. They run every `ShardView`: block diagonals, single blocks,
columns inside the shard and gathered columns; patterns without ``blocks`` too, only that those have a faster way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparse_kernels.gpu import general_kernels as kernels
from sparse_kernels.gpu.lists import ViewIndex, index_of
from sparse_kernels.view import ShardView

State = tuple[Tensor, Tensor]
LOG2E = 1.4426950408889634
INTERPRETED = not isinstance(kernels.forward_kernel, triton.JITFunction)


class Tiles(NamedTuple):
    """Tile of one kernel: BLOCK_M query rows by BLOCK_N keys."""

    m: int
    n: int
    warps: int
    stages: int


# The largest tiles of each kernel that compile without register spills for sm_80 and sm_90 at head_dim 64 and 128
# (tests/triton_compile proves it). A tile lies within one block of the pattern, so small blocks shrink it.
_TILES: dict[str, Tiles] = {
    "forward": Tiles(128, 64, 8, 3),
    "dq": Tiles(128, 64, 8, 2),
    "dkdv": Tiles(64, 64, 8, 2),
    "column": Tiles(64, 32, 4, 2),
}
_SMALL_TILES: dict[str, Tiles] = {
    "forward": Tiles(64, 64, 4, 2),
    "dq": Tiles(64, 64, 8, 2),
    "dkdv": Tiles(64, 64, 8, 2),
    "column": Tiles(64, 32, 4, 2),
}


def tiles_of(kernel: str, block: int) -> Tiles:
    """The tile of a kernel ("forward", "dq", "dkdv", "column") for patterns with that block."""
    chosen = (_TILES if block % 128 == 0 else _SMALL_TILES)[kernel]
    unit = block & -block  # the largest power of two in the block
    m, n = min(chosen.m, unit), chosen.n if kernel == "column" else min(chosen.n, unit)
    return Tiles(m, n, chosen.warps if m * n >= 2048 else 4, chosen.stages)


def forward(q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None = None) -> State:
    """See `Backend.forward`; out and lse are float32 and contiguous."""
    call = _Call(q, k, v, view, scale)
    out = torch.empty(call.q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(call.batch, call.heads, call.length, dtype=torch.float32, device=q.device)
    tiles = tiles_of("forward", call.block)
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
        rows = 16 if INTERPRETED else 32
        kernels.delta_kernel[(triton.cdiv(call.length, rows), call.batch * call.heads)](
            out, dout, delta, call.heads, call.length, *dout.stride()[:3], HEAD_DIM=call.head_dim, BLOCK_D=call.block_d, ROWS=rows
        )  # fmt: skip
        tiles = tiles_of("dq", call.block)
        kernels.dq_kernel[call.query_grid(tiles)](
            call.q, call.k, call.v, dout, lse, delta, dq, *call.row_arguments(),
            call.scale2, scale, call.heads, call.group, call.num_q, call.num_blocks, call.room, call.width,
            *call.strides(dout), *call.block_strides(), **call.flags(), **call.launch(tiles),
        )  # fmt: skip
    if call.index.cols is None:
        dk.zero_(), dv.zero_()
    elif dk.numel():
        cols, tiles = call.index.cols, tiles_of("dkdv", call.block)
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
    tiles = tiles_of("column", call.block)
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
    for whole, part in zip((dk, dv), parts, strict=True):
        # Rows are unique within a head, so a head is one gather, one sum and one scatter, without atomics. Columns that are
        # not here (row -1) go to a spare row; nobody reads it.
        total = torch.cat([whole, whole.new_zeros(call.batch, 1, *whole.shape[2:])], 1)
        rows = torch.where(columns.row < 0, whole.shape[1], columns.row).long()
        for g in range(call.group):
            at = rows[:, g :: call.group].transpose(1, 2)[..., None].expand(-1, -1, -1, call.head_dim)
            added = total.gather(1, at) + part[:, g :: call.group].transpose(1, 2)
            total.scatter_(1, at, added)
        whole.copy_(total[:, :-1])


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
        if self.length != self.num_q * self.block or (self.batch, self.heads) != (view.pattern.batch, view.pattern.heads):
            raise ValueError(
                f"q is {tuple(q.shape)} but the view has {self.num_q} query blocks of {self.block} tokens, batch "
                f"{view.pattern.batch} and {view.pattern.heads} heads; pad q to whole blocks"
            )
        if self.block % 16:
            raise ValueError(f"the triton backend needs blocks of a multiple of 16 tokens, got {self.block}")
        self.scale2 = scale * LOG2E
        self.block_d = max(16, triton.next_power_of_2(self.head_dim))
        self.index: ViewIndex = index_of(view, q.device)
        self.room = 0 if self.index.rows is None else self.index.rows.entries.shape[2]
        self.width = 0 if self.index.columns is None else self.index.columns.position.shape[2]

    def query_grid(self, tiles: Tiles) -> tuple[int, int]:
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

    def launch(self, tiles: Tiles) -> dict[str, Any]:
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
