"""Launches of the structured kernels: shapes, strides and constants worked out on the host."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from sparse_kernels.backends import State
from sparse_kernels.gpu import backward as kernels_backward
from sparse_kernels.gpu import columns as kernels_columns
from sparse_kernels.gpu import structured as kernels_forward
from sparse_kernels.gpu.config import PARTIAL_BYTES, Tile, generation_of, padded_head_dim, tile_for
from sparse_kernels.gpu.index import DeviceIndex, start
from sparse_kernels.view import ShardView

FOLD_ROWS = 16
LOG2E = 1.4426950408889634
# Programs that the column gradient aims at, so that a short list still fills a device; a constant, so that the order of
# additions is the same on every device.
COLUMN_PROGRAMS = 2048


def check_shapes(q: Tensor, k: Tensor, view: ShardView) -> None:
    """ValueError for tensors that are not those of the view."""
    pattern = view.pattern
    for name, tensor, blocks in (("q", q, view.q_blocks), ("k", k, view.k_blocks)):
        if blocks is not None and tensor.shape[1] != len(blocks) * pattern.block:
            held = f"{name} holds {tensor.shape[1]} tokens, the view {len(blocks)} blocks of {pattern.block}"
            raise ValueError(f"{held}: pad {name} to whole blocks")


@dataclass(frozen=True)
class Call:
    """One view with its tensors' shapes.

    key_rows: rows of k and v. group: G. constants: what every kernel is specialised on.
    """

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    key_rows: int
    index: DeviceIndex
    itemsize: int
    generation: int
    upcast: bool

    @classmethod
    def of(cls, q: Tensor, k: Tensor, view: ShardView) -> Call:
        """The index of the view is built on first use and kept on it."""
        batch, _, heads, head_dim = q.shape
        kind = generation_of(q.device)
        index = DeviceIndex.of(view, q.device)
        upcast = q.device.type == "cpu" and q.dtype == torch.bfloat16
        return cls(batch, heads, k.shape[2], head_dim, k.shape[1], index, q.element_size(), kind, upcast)

    @property
    def group(self) -> int:
        """Query heads per key-value head."""
        return self.heads // self.kv_heads

    def tile(self, kernel: str) -> Tile:
        """The launch shape of a kernel."""
        return tile_for(kernel, self.generation, self.head_dim, self.itemsize, self.index.block)

    def constants(self, tile: Tile) -> dict[str, Any]:
        """Constants that all kernels share, and the launch options."""
        return {
            "G": self.group,
            "D": self.head_dim,
            "DP": padded_head_dim(self.head_dim),
            "PB": self.index.block,
            "BM": tile.m,
            "BN": tile.n,
            "HAS_DOCS": self.index.doc_start is not None,
            "UPCAST": self.upcast,
            # float32 as three tf32 products: about float32's own accuracy, on tensor cores.
            "PRECISION": "tf32x3" if self.itemsize == 4 else "tf32",
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def query_arguments(self) -> dict[str, Any]:
        """What the kernels that run by query tile read from the index."""
        index = self.index
        tiles = index.tiles(by_key=False) if index.num_k else None
        columns = index.columns if index.has_columns else None
        nothing = index.q_ids
        return {
            "entries": nothing if tiles is None else tiles.entries,
            "bounds": nothing if tiles is None else tiles.bounds,
            "positions": nothing if columns is None else columns.positions,
            "column_rows": nothing if columns is None else columns.rows,
            "ranges": nothing if columns is None else columns.ranges,
            "covered": nothing if columns is None else columns.covered,
            "q_ids": index.q_ids,
            "k_ids": index.k_ids if index.num_k else nothing,
            "doc_start": nothing if index.doc_start is None else index.doc_start,
            "q_blocks": index.num_q,
            "num_heads": self.heads,
            "num_entries": 0 if tiles is None else tiles.entries.shape[-1],
            "num_columns": 0 if columns is None else columns.positions.shape[-1],
            "num_blocks": index.pattern.num_blocks,
            "seq_len": index.pattern.seq_len,
            "HAS_TILES": tiles is not None,
            "HAS_COLUMNS": columns is not None,
            "LISTED": tiles is not None and tiles.listed,
        }


def forward(q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None) -> State:
    """(out, lse), float32. See `Backend.forward`."""
    check_shapes(q, k, view)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    if not q.shape[1] or not k.shape[1]:
        return (out.zero_(), lse.fill_(-torch.inf)) if carry is None else (out.copy_(carry[0]), lse.copy_(carry[1]))
    q, k, v = (_rows_last(t, view.pattern.block) for t in (q, k, v))
    call = Call.of(q, k, view)
    carry_out, carry_lse = (out, lse) if carry is None else (t.to(torch.float32).contiguous() for t in carry)
    tile = call.tile("forward")
    grid = (call.group * (q.shape[1] // tile.m), call.kv_heads, call.batch)
    with _device_of(q):
        start(
            kernels_forward.forward_kernel, grid,
            q=q, k=k, v=v, out=out, lse=lse, carry_out=carry_out, carry_lse=carry_lse, scale2=scale * LOG2E,
            HAS_CARRY=carry is not None, SPREAD=tile.spread,
            **call.query_arguments(), **_strides(q=q, k=k, v=v), **call.constants(tile),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv), float32. See `Backend.backward`."""
    check_shapes(q, k, view)
    if not q.shape[1] or not k.shape[1]:
        return tuple(torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (q, k, k))  # type: ignore[return-value]
    dout, q, k, v, out = (_rows_last(t, view.pattern.block) for t in (dout, q, k, v, out))
    # Products of mixed dtypes do not exist; the gradient of a cast output has the dtype of q already.
    dout = dout.to(q.dtype)
    call = Call.of(q, k, view)
    lse = lse.to(torch.float32).contiguous()
    with _device_of(q):
        delta = _delta_once(dout, out, call)
        dq = _query_gradient(q, k, v, dout, lse, delta, call, scale)
        dk, dv = (torch.empty(k.shape, dtype=torch.float32, device=q.device) for _ in range(2))
        if call.index.num_k:
            _block_gradient(q, k, v, dout, lse, delta, dk, dv, call, scale)
        else:
            dk.zero_()
            dv.zero_()
        if call.index.has_columns and call.index.num_real_q:
            _column_gradient(q, k, v, dout, lse, delta, dk, dv, call, scale)
    return dq, dk, dv


def _delta(dout: Tensor, out: Tensor, call: Call) -> Tensor:
    """rowsum(dout * out), float32 [B, H, rows]."""
    rows = dout.shape[1]
    delta = torch.empty(call.batch, call.heads, rows, dtype=torch.float32, device=dout.device)
    start(
        kernels_backward.delta_kernel, (-(-rows // 64), call.heads, call.batch),
        dout=dout, out=out, delta=delta, total_rows=rows, num_heads=call.heads, **_strides(dout=dout, out=out),
        D=call.head_dim, DP=padded_head_dim(call.head_dim), BM=64,
    )  # fmt: skip
    return delta


# For each final out its delta and what else that was made from, for as long as out lives: the steps of one backward.
_DELTAS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _delta_once(dout: Tensor, out: Tensor, call: Call) -> Tensor:
    """The same, once for all steps of a ring, which come one after the other with the same dout and final out."""
    if dout.is_inference() or out.is_inference():
        return _delta(dout, out, call)
    stream = None
    if dout.device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():  # a replay must compute it anew
            return _delta(dout, out, call)
        stream = torch.cuda.current_stream(dout.device)
    versions = (dout._version, out._version, stream)
    known = _DELTAS.get(out)
    if known is not None and known[0]() is dout and known[1] == versions:
        return known[2]
    delta = _delta(dout, out, call)
    _DELTAS[out] = TensorWeakRef(dout), versions, delta
    return delta


def _query_gradient(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, lse: Tensor, delta: Tensor, call: Call, scale: float
) -> Tensor:
    dq = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    tile = call.tile("dq")
    grid = (call.group * (q.shape[1] // tile.m), call.kv_heads, call.batch)
    start(
        kernels_backward.dq_kernel, grid,
        q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, dq=dq, scale=scale, scale2=scale * LOG2E,
        SPREAD=tile.spread,
        **call.query_arguments(), **_strides(q=q, k=k, v=v, dout=dout), **call.constants(tile),
    )  # fmt: skip
    return dq


def _block_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    call: Call,
    scale: float,
) -> None:
    """Writes every row of dk and dv."""
    tile, index = call.tile("dkdv"), call.index
    tiles = index.tiles(by_key=True)
    grid = (k.shape[1] // tile.n, call.kv_heads, call.batch)
    start(
        kernels_backward.dkdv_kernel, grid,
        q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, dk=dk, dv=dv, entries=tiles.entries, bounds=tiles.bounds,
        k_ids=index.k_ids, doc_start=index.q_ids if index.doc_start is None else index.doc_start,
        q_blocks=index.num_q, k_blocks=index.num_k, num_heads=call.heads, num_entries=tiles.entries.shape[-1],
        seq_len=index.pattern.seq_len, tail_slot=index.tail_slot, tail_rows=index.tail_rows, TAIL=index.has_tail,
        scale=scale, scale2=scale * LOG2E, LISTED=tiles.listed,
        **_strides(q=q, k=k, v=v, dout=dout), **call.constants(tile),
    )  # fmt: skip


def _column_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    call: Call,
    scale: float,
) -> None:
    """Adds the columns to dk and dv."""
    tile, index = call.tile("columns"), call.index
    columns = index.columns
    slots = columns.positions.shape[2]
    tile_ranges = index.column_tile_ranges(tile.n)
    run = column_run(call, slots, tile.n)
    for first in range(0, slots, run):
        held = min(run, slots - first)
        tiles = -(-held // tile.n)
        splits = column_splits(call, tiles, held)
        parts = torch.empty(
            2, splits, call.batch, call.heads, held, call.head_dim, dtype=torch.float32, device=q.device
        )
        shared = {
            "part_k": parts[0], "part_v": parts[1], "column_rows": columns.rows, "counts": columns.counts,
            "num_heads": call.heads, "num_columns": slots, "first_column": first, "held": held, "splits": splits,
        }  # fmt: skip
        start(
            kernels_columns.column_kernel, (tiles * splits, call.heads, call.batch),
            q=q, k=k, v=v, dout=dout, lse=lse, delta=delta, positions=columns.positions, tile_ranges=tile_ranges,
            covered=columns.covered, order=index.order, ordered_ids=index.ordered_ids,
            doc_start=index.q_ids if index.doc_start is None else index.doc_start, q_blocks=index.num_q,
            num_blocks=index.pattern.num_blocks, num_tiles=tile_ranges.shape[2], seq_len=index.pattern.seq_len,
            TAIL=index.has_tail, scale2=scale * LOG2E,
            **shared, **_strides(q=q, k=k, v=v, dout=dout), **call.constants(tile),
        )  # fmt: skip
        for member in range(call.group):
            start(
                kernels_columns.fold_kernel, (-(-held // FOLD_ROWS), call.kv_heads, call.batch),
                dk=dk, dv=dv, member=member, key_rows=call.key_rows, scale=scale,
                **shared, G=call.group, D=call.head_dim, DP=padded_head_dim(call.head_dim), BN=FOLD_ROWS,
            )  # fmt: skip
        del parts, shared  # before the next run asks for its own


def partial_bytes(call: Call, slots: int) -> int:
    """Bytes of the partial sums of so many columns for one split of the queries."""
    return 2 * call.batch * call.heads * slots * call.head_dim * 4


def column_run(call: Call, slots: int, width: int) -> int:
    """How many columns are computed at a time: all, or as many whole tiles (at least one) as keep within PARTIAL_BYTES."""
    if partial_bytes(call, slots) <= PARTIAL_BYTES:
        return slots
    return max(1, PARTIAL_BYTES // partial_bytes(call, width)) * width


def column_splits(call: Call, tiles: int, slots: int) -> int:
    """Into how many runs the queries of a column tile are split: enough programs, not too many bytes of partial sums."""
    wanted = -(-COLUMN_PROGRAMS // (tiles * call.heads * call.batch))
    return max(1, min(wanted, call.index.num_real_q, PARTIAL_BYTES // partial_bytes(call, slots)))


def _strides(**tensors: Tensor) -> dict[str, int]:
    """<name>_batch, _row, _head of tensors [B, rows, heads, D]."""
    return {
        f"{name}_{axis}": t.stride(i) for name, t in tensors.items() for i, axis in enumerate(("batch", "row", "head"))
    }


def _rows_last(x: Tensor, block: int) -> Tensor:
    """Kernels need the numbers of a head side by side, and offsets within a block that fit 32 bits; else any strides will do."""
    return x if x.stride(3) == 1 and x.stride(1) * block < 1 << 31 else x.contiguous()


def _device_of(x: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
