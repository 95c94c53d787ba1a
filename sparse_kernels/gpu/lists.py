"""Lists of tiles, built on the device: for every query block the key blocks it needs (CSR), for every key block its queries (CSC).

Nothing here asks the device for a number. The room for every list is known from the layout alone: the block ids of a view live on
the CPU, and a query block can select at most the key blocks before it. What is really selected is counted on the device.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.bits import upload
from sparse_kernels.pattern import SparsePattern
from sparse_kernels.view import ShardView

# Key blocks looked at in one go while a list is filled.
_SCAN = 1024


@dataclass(frozen=True, eq=False)
class TileLists:
    """Tiles strictly before the diagonal, by rows or by columns. The tile with equal block ids always exists and is in no list.

    ``own`` is the side that has the lists (query slots for CSR, key slots for CSC), ``other`` the side that is listed.

    Attributes:
        diagonal: int32 [own], slot of the other side with the same global block id; -1 when it is not in the view.
        start: int64 [own], where the list of an own slot begins; the same for every head.
        count: int32 [B, H, own], entries in use.
        entries: int16 (int32 beyond 32,768 blocks) [B, H, room], slots of the other side, ascending within a list.
    """

    diagonal: Tensor
    start: Tensor
    count: Tensor
    entries: Tensor


@dataclass(frozen=True, eq=False)
class ColumnLists:
    """Where the columns of every head lie among the keys of a view, and which query blocks look back at them.

    Attributes:
        position: int32 [B, H, C], global position, ascending, padded with seq_len.
        row: int32 [B, H, C], row of k and v that holds the column; -1: not in this view, or padding.
        before: int32 [B, H, nq], how many columns lie before a query block: the only ones that its block part cannot hold.
        first: int32 [B, H, C], number of live query blocks (ascending by id) that a column lies behind or in.
        order: int32 [nq], query slots ascending by block id, padding last.
        live: query slots that are not padding.
    """

    position: Tensor
    row: Tensor
    before: Tensor
    first: Tensor
    order: Tensor
    live: int


@dataclass(frozen=True, eq=False)
class ListFrame:
    """Where the lists of one side of a view lie, known from the layout alone: `TileLists` but for what was chosen."""

    diagonal: Tensor
    start: Tensor
    room: int


@dataclass(frozen=True, eq=False)
class ViewFrame:
    """What is kept of a view between its forward and its backward: nothing that grows with the chosen tiles."""

    q_ids: Tensor  # int32 [nq]
    k_ids: Tensor  # int32 [nk]
    bits_row: Tensor  # int64 [nq], where the row of a query slot begins in the bits of the single blocks
    rows: ListFrame | None  # None: the keys are gathered columns, there are no tiles
    cols: ListFrame | None
    columns: ColumnLists | None


@dataclass(frozen=True, eq=False)
class ViewIndex:
    """All that the general kernels need to know about a view besides q, k and v.

    Attributes:
        offsets: uint8 [B, H, NB]: is the block offset a diagonal?
        bits: uint8 [B, H, bytes] of `BlockRows`, None without single blocks.
        doc_start: int32 [B, nq * b], None without documents.
    """

    frame: ViewFrame
    block: int
    offsets: Tensor
    bits: Tensor | None
    doc_start: Tensor | None

    @property
    def q_ids(self) -> Tensor:
        """int32 [nq]."""
        return self.frame.q_ids

    @property
    def k_ids(self) -> Tensor:
        """int32 [nk]."""
        return self.frame.k_ids

    @property
    def bits_row(self) -> Tensor:
        """int64 [nq]."""
        return self.frame.bits_row

    @property
    def columns(self) -> ColumnLists | None:
        """The columns of the view."""
        return self.frame.columns

    @property
    def has_tiles(self) -> bool:
        """Are there key blocks?"""
        return self.frame.rows is not None

    @property
    def room(self) -> int:
        """Entries of all lists of a head, the same by rows and by columns: every pair that is not in the future."""
        return 0 if self.frame.rows is None else self.frame.rows.room

    def tiles(self, *, by_column: bool) -> TileLists | None:
        """The lists by query blocks, for out and dq, or by key blocks, for dk and dv; None when there are no key blocks.

        Filled at every call and not kept: a ring would hold those of all its steps until the backward, more than its K and V.
        """
        frame = self.frame.cols if by_column else self.frame.rows
        return None if frame is None else _fill(self, frame, by_column)


_FRAMES: weakref.WeakKeyDictionary[ShardView, ViewFrame] = weakref.WeakKeyDictionary()
# The views of a ring share their pattern, and with it this table.
_OFFSETS: weakref.WeakKeyDictionary[SparsePattern, Tensor] = weakref.WeakKeyDictionary()


def index_of(view: ShardView, device: torch.device) -> ViewIndex:
    """The index of a view whose pattern is on that device; its frame is made at the first use and kept as long as the view."""
    frame, pattern = _FRAMES.get(view), view.pattern
    if frame is None or frame.q_ids.device != device:
        frame = _FRAMES[view] = _frame_of(view, device)
    offsets = _OFFSETS.get(pattern)
    if offsets is None:
        offsets = _OFFSETS[pattern] = pattern.offset_table().contiguous().view(torch.uint8)
    bits = None if pattern.block_rows is None else pattern.block_rows.bits
    if bits is not None and bits.stride(2) != 1:
        bits = bits.contiguous()
    doc_start = None if view.doc_start is None else view.doc_start.to(torch.int32).contiguous()
    return ViewIndex(frame, pattern.block, offsets, bits, doc_start)


def _frame_of(view: ShardView, device: torch.device) -> ViewFrame:
    pattern, rows = view.pattern, view.pattern.block_rows
    q_ids = _send(view.q_blocks, device)
    k_blocks = view.q_blocks[:0] if view.k_blocks is None else view.k_blocks
    k_ids = _send(k_blocks, device)
    bits_row = q_ids if rows is None else upload(rows.starts(view.q_blocks), device)
    by_rows = by_columns = None
    if view.k_blocks is not None:
        by_rows = _list_frame(view.q_blocks, k_blocks, pattern.num_blocks, device, by_column=False)
        by_columns = _list_frame(k_blocks, view.q_blocks, pattern.num_blocks, device, by_column=True)
    return ViewFrame(q_ids, k_ids, bits_row, by_rows, by_columns, _column_lists(view, pattern, q_ids))


def _send(table: Tensor, device: torch.device) -> Tensor:
    """A small CPU table as int32 on the device, without waiting for the device."""
    return table.to(torch.int32).to(device, non_blocking=True)


def _slots_of(wanted: Tensor, ids: Tensor) -> Tensor:
    """For each wanted id its slot in ``ids``, or -1. On the CPU; ids need not be sorted."""
    if not len(ids):
        return torch.full_like(wanted, -1)
    ordered, slot = ids.sort()
    at = torch.searchsorted(ordered, wanted).clamp(max=len(ids) - 1)
    return torch.where(ordered[at] == wanted, slot[at], -1)


def _list_frame(own: Tensor, other: Tensor, number: int, device: torch.device, *, by_column: bool) -> ListFrame:
    """The frame of the lists of the ``own`` slots; own and other are block ids on the CPU."""
    ordered = other[other < number].sort().values
    at = torch.searchsorted(ordered, own.clamp(max=number), right=by_column)
    room = len(ordered) - at if by_column else at
    room = torch.where(own < number, room, 0)
    start = upload(room.cumsum(0) - room, device)
    diagonal = torch.where(own < number, _slots_of(own, other), -1)
    return ListFrame(_send(diagonal, device), start, int(room.sum()))  # a CPU tensor


def _fill(index: ViewIndex, frame: ListFrame, by_column: bool) -> TileLists:
    """Count and write the lists that ``frame`` has room for."""
    own_ids, other_ids = (index.k_ids, index.q_ids) if by_column else (index.q_ids, index.k_ids)
    batch, heads, number = index.offsets.shape
    device, bits, num_other = index.offsets.device, index.bits, len(other_ids)
    count = torch.empty(batch, heads, len(own_ids), dtype=torch.int32, device=device)
    slots = torch.int16 if num_other <= 1 << 15 else torch.int32
    entries = torch.empty(batch, heads, frame.room, dtype=slots, device=device)
    doc_low = None
    if index.doc_start is not None:
        doc_low = index.doc_start.view(batch, len(index.q_ids), index.block).amin(2)
    if len(own_ids):
        _fill_kernel[(len(own_ids), batch * heads)](
            index.offsets, index.offsets if bits is None else bits, index.bits_row, doc_low, own_ids, other_ids, frame.start,
            entries, count, len(own_ids), num_other, number, frame.room, heads, *((0, 0) if bits is None else bits.stride()[:2]),
            BLOCK=index.block, HAS_BLOCKS=bits is not None, HAS_DOC=doc_low is not None, BY_COLUMN=by_column,
            SCAN=min(_SCAN, triton.next_power_of_2(max(num_other, 16))), enable_fp_fusion=True,
        )  # fmt: skip
    return TileLists(frame.diagonal, frame.start, count, entries)


@triton.jit(do_not_specialize=["num_own", "num_other", "num_blocks", "room"])
def _fill_kernel(
    offsets, bits, bits_row, doc_low, own_ids, other_ids, start, entries, count,
    num_own, num_other, num_blocks, room, heads, bits_sb, bits_sh,
    BLOCK: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_DOC: tl.constexpr, BY_COLUMN: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """One list per program: the chosen slots are written next to each other by a running prefix sum."""
    own, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    own_id = tl.load(own_ids + own)
    list_base = entries + bh * room + tl.load(start + own)
    used = 0
    for first in range(0, num_other, SCAN):
        slot = first + tl.arange(0, SCAN)
        here = slot < num_other
        other_id = tl.load(other_ids + slot, mask=here, other=0)
        query = other_id if BY_COLUMN else own_id
        key = own_id if BY_COLUMN else other_id
        live = here & (key < query) & (query < num_blocks)
        chosen = tl.load(offsets + bh * num_blocks + (query - key), mask=live, other=0) != 0
        if HAS_BLOCKS:
            if BY_COLUMN:
                row = tl.load(bits_row + slot, mask=live, other=0)
            else:
                row = tl.load(bits_row + own)
            byte = tl.load(bits + b * bits_sb + h * bits_sh + row + key // 8, mask=live, other=0).to(tl.int32)
            chosen = chosen | (((byte >> (key % 8)) & 1) != 0)
        if HAS_DOC:
            # A tile that ends before the first document of its queries begins has nothing to compute.
            if BY_COLUMN:
                low = tl.load(doc_low + b * num_other + slot, mask=here, other=0)
            else:
                low = tl.load(doc_low + b * num_own + own)
            live = live & ((key + 1) * BLOCK > low)
        keep = (chosen & live).to(tl.int32)
        place = used + tl.cumsum(keep, 0) - keep
        tl.store(list_base + place, slot, mask=keep != 0)
        used += tl.sum(keep, 0)
    tl.store(count + bh * num_own + own, used)


def _column_lists(view: ShardView, pattern: SparsePattern, q_ids: Tensor) -> ColumnLists | None:
    """Columns of the view, None when it has none."""
    block, columns = pattern.block, pattern.columns
    assert columns is not None
    gathered = view.column_positions
    if (
        not columns.shape[2]
        or (gathered is None and not view.inline_columns)
        or (gathered is not None and not gathered.shape[2])
    ):
        return None
    columns = columns.to(torch.int32).contiguous()
    if gathered is None:
        row = _inline_rows(view, columns)
    else:
        row = _gathered_rows(gathered, columns, pattern.seq_len)
    row = torch.where(columns >= pattern.seq_len, -1, row)
    number = pattern.num_blocks
    # Padding slots get no columns. Kept in int32: positions fit, and a slot's id times the block might not for padding ids.
    ends = (torch.where(q_ids < number, q_ids, 0) * block).expand(*columns.shape[:2], -1).contiguous()
    before = torch.searchsorted(columns, ends, out_int32=True)
    ordered, order = view.q_blocks.sort()
    first = torch.searchsorted(
        _send(ordered, columns.device), (columns // block).contiguous(), right=True, out_int32=True
    )
    return ColumnLists(columns, row, before, first, _send(order, columns.device), int((ordered < number).sum()))


def _inline_rows(view: ShardView, columns: Tensor) -> Tensor:
    """int32 like ``columns``: the row of k that holds each column when its block is one of the view's key blocks."""
    assert view.k_blocks is not None
    block, number = view.pattern.block, view.pattern.num_blocks
    slot_of = _send(_slots_of(torch.arange(number), view.k_blocks), columns.device)
    slot = slot_of[(columns // block).clamp(max=number - 1).long()]
    return torch.where(slot < 0, -1, slot * block + columns % block)


def _gathered_rows(positions: Tensor, columns: Tensor, seq_len: int) -> Tensor:
    """int32 like ``columns``: the row among the gathered positions [B, K, U] of the head's key-value head."""
    batch, heads, width = columns.shape
    kv_heads, held = positions.shape[1:]
    wanted = columns.view(batch, kv_heads, -1)
    there = positions.to(torch.int32).contiguous()
    at = torch.searchsorted(there, wanted, out_int32=True).clamp(max=held - 1)
    found = there.gather(2, at.long()) == wanted
    return torch.where(found & (wanted < seq_len), at, -1).view(batch, heads, width)
