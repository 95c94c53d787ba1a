"""The device-side index of a view: which tiles and columns each program reads, built without asking the device anything.

Blocks are diagonals, so neither the rows nor their transpose need a list per block: one sorted list of offsets per head serves
every query block (key slot = query slot - entry) and every key block (query slot = key slot + entry), when the local blocks are
an arithmetic progression (the whole sequence, a contiguous or a striped shard). Any other placement gets lists per block, in
the same order, bounded by min(diagonals, local blocks). Lists and ranges are made for the kernel that reads them and dropped
after it; what a view keeps is well below 1 % of its K and V.

Terms: a slot is the local place of a block, an id its global number. Entries are ordered by block offset, so each block's
entries are one range [low, high): first the diagonal tile, then tiles that need no mask, then tiles in which a document starts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from sparse_kernels.bits import upload
from sparse_kernels.gpu.tiles import tiles_kernel
from sparse_kernels.view import ShardView

BIG = 2**31 - 1  # a position that is in no range
FAR = 1 << 30  # a slot difference that leads nowhere, and to which a slot can be added in 32 bits
TILE_ROWS, TILE_SCAN = 16, 256  # own blocks and offsets that a program of `tiles_kernel` looks at


def start(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> None:
    """Every launch of the structured path goes through here, so that a test can see what would be launched.

    Multiply and add are fused explicitly: newer Triton versions no longer do so by default.
    """
    kernel[grid](**arguments, enable_fp_fusion=True)


def slot_dtype(blocks: int) -> torch.dtype:
    """The type of slots of so many local blocks, and of -1."""
    return torch.int16 if blocks < 1 << 15 else torch.int32


@dataclass(frozen=True, eq=False)
class Tiles:
    """Where programs of one direction (query blocks, or key blocks) find their tiles.

    Attributes:
        entries: int32 [B, H, E] (shared by all blocks of a head) or [B, H, blocks, E] (listed: the slots themselves, int16 up to
            32,767 local blocks; beyond high they hold anything).
        bounds: int32 [B, H, blocks, 4]: low, end of the diagonal tile, end of the tiles without mask, high.
        listed: entries are slots, not offsets.
    """

    entries: Tensor
    bounds: Tensor
    listed: bool


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns that this view holds, compacted per query head.

    Attributes:
        positions: int32 [B, H, C] ascending global positions, padded with BIG.
        rows: int32 [B, H, C] their rows in k and v.
        counts: int32 [B, H].
        ranges: int32 [B, H, nq, 2]: the columns that a query block may use (before it, not before its documents).
        covered: int8 [B, H, NB]: is this block offset a diagonal, so that its columns are computed there?
    """

    positions: Tensor
    rows: Tensor
    counts: Tensor
    ranges: Tensor
    covered: Tensor


class DeviceIndex:
    """Everything the kernels of one view read besides q, k and v."""

    def __init__(self, view: ShardView, device: torch.device) -> None:
        pattern = view.pattern
        # Parts of the view, not the view: it keeps this index, and a cycle would hold device memory until the garbage
        # collector happens to run.
        self.pattern, self.device, self.block = pattern, device, pattern.block
        self.has_key_blocks, self.column_positions = view.k_blocks is not None, view.column_positions
        self.inline_columns = view.inline_columns
        q_ids = view.q_blocks.cpu()
        k_ids = torch.empty(0, dtype=torch.int64) if view.k_blocks is None else view.k_blocks.cpu()
        self.host_q_ids, self.host_k_ids = q_ids, k_ids
        self.num_q, self.num_k = len(q_ids), len(k_ids)
        # Real query blocks in ascending order; padding of a layout takes no part.
        order = torch.argsort(q_ids)
        self.num_real_q = int((q_ids < pattern.num_blocks).sum())
        # The query block that the end of the sequence cuts, and how many of its rows exist.
        self.tail_rows = pattern.seq_len - (pattern.num_blocks - 1) * pattern.block
        place = (q_ids == pattern.num_blocks - 1).int()
        self.has_tail = self.tail_rows < pattern.block and bool(place.any())
        self.tail_slot = int(place.argmax()) if self.has_tail else -1
        self.q_ids, self.k_ids = self._send(q_ids), self._send(k_ids)
        self.order = self._send(order)
        self.ordered_ids = self._send(q_ids[order])
        self.steps = _common_steps(q_ids, k_ids)
        self.doc_start = None if view.doc_start is None else view.doc_start.to(torch.int32).contiguous()
        self.first_open, self.last_open = self._document_bounds()
        # Offsets of the heads in the form that suits the placement, and slots by block id: small, so they stay.
        self._offsets: Tensor | None = None
        self._slot_of: dict[bool, Tensor] = {}
        self._columns: Columns | None = None

    @classmethod
    def of(cls, view: ShardView, device: torch.device) -> DeviceIndex:
        """The index kept on the view, so that forward, recompute and backward read the same one."""
        index = view.__dict__.get("_triton_index")
        if index is None or index.device != device:
            index = cls(view, device)
            object.__setattr__(view, "_triton_index", index)
        return index

    @property
    def has_columns(self) -> bool:
        """Does this view compute columns? Known from shapes alone."""
        columns = self.pattern.columns
        assert columns is not None
        held = not self.has_key_blocks or self.inline_columns
        return held and columns.shape[2] > 0

    def tiles(self, *, by_key: bool) -> Tiles:
        """Tiles by query block, for out and dq, or by key block, for dk and dv: the transpose, free because offsets are the same
        from both ends. Made at every call and not kept: a ring would hold those of all its steps until the backward."""
        pattern, listed = self.pattern, self.steps is None
        own, other = (self.k_ids, self.q_ids) if by_key else (self.q_ids, self.k_ids)
        offsets = self.offsets
        bounds = torch.empty(pattern.batch, pattern.heads, len(own), 4, dtype=torch.int32, device=self.device)
        entries, slot_of = offsets, own
        if listed:
            width = max(1, min(offsets.shape[2], len(other)))
            shape = (pattern.batch, pattern.heads, len(own), width)
            entries = torch.empty(shape, dtype=slot_dtype(len(other)), device=self.device)
            slot_of = self._slots(by_key)
        if len(own):
            start(
                tiles_kernel, (-(-len(own) // TILE_ROWS), pattern.batch * pattern.heads, 1),
                offsets=offsets, own_ids=own, other_ids=other, slot_of=slot_of, first_open=self.first_open,
                last_open=self.last_open, entries=entries, bounds=bounds, num_own=len(own), num_other=len(other),
                num_offsets=offsets.shape[2], num_blocks=pattern.num_blocks, num_heads=pattern.heads,
                width=entries.shape[-1], PB=self.block, LISTED=listed, BY_KEY=by_key, HAS_DOCS=self.doc_start is not None,
                ROWS=TILE_ROWS, SCAN=min(TILE_SCAN, max(16, triton.next_power_of_2(offsets.shape[2]))),
            )  # fmt: skip
        return Tiles(entries, bounds, listed)

    @property
    def offsets(self) -> Tensor:
        """int32 [B, H, E], what tiles are made from: slot differences of progressions, else block offsets."""
        if self._offsets is None:
            diagonals = self.pattern.diagonals
            assert diagonals is not None
            self._offsets = diagonals.int().contiguous() if self.steps is None else self._affine_entries(*self.steps)
        return self._offsets

    def _slots(self, by_key: bool) -> Tensor:
        """The slots of the other side by id."""
        if by_key not in self._slot_of:
            self._slot_of[by_key] = self._slots_by_id(self.host_q_ids if by_key else self.host_k_ids)
        return self._slot_of[by_key]

    @property
    def columns(self) -> Columns:
        """The columns of the view."""
        if self._columns is None:
            self._columns = self._build_columns()
        return self._columns

    def column_tile_ranges(self, width: int) -> Tensor:
        """int32 [B, H, ceil(C / width), 2]: for tiles of ``width`` columns, the range in ``order`` of query blocks that use any."""
        columns, batch = self.columns, self.pattern.batch
        first = columns.positions[:, :, ::width]
        ids = self.ordered_ids[: self.num_real_q].contiguous()
        low = torch.searchsorted(ids, (first // self.block).contiguous(), right=True, out_int32=True)
        high = torch.full_like(low, self.num_real_q)
        if self.doc_start is not None:
            last = columns.positions.masked_fill(columns.positions == BIG, -1)
            pad = -last.shape[2] % width
            last = torch.nn.functional.pad(last, (0, pad), value=-1).unflatten(2, (-1, width)).amax(3)
            opens = self.first_open[:, self.order[: self.num_real_q]].contiguous()
            high = torch.searchsorted(opens, last.view(batch, -1).contiguous(), right=True, out_int32=True).view_as(low)
        return torch.stack([low, torch.maximum(low, high)], -1)

    def _send(self, host: Tensor) -> Tensor:
        """int32 on the device, without waiting for it."""
        return host.to(torch.int32).to(self.device, non_blocking=True)

    def _document_bounds(self) -> tuple[Tensor, Tensor]:
        """int32 [B or 1, nq] each: the first and the last document start among the real rows of each query block."""
        if self.doc_start is None:
            zero = torch.zeros(1, self.num_q, dtype=torch.int32, device=self.device)
            return zero, zero
        size = self.pattern.seq_len
        row = self.q_ids.long()[:, None] * self.block + torch.arange(self.block, device=self.device)
        start = self.doc_start.view(-1, self.num_q, self.block)
        return start.masked_fill(row >= size, BIG).amin(2), start.masked_fill(row >= size, 0).amax(2)

    def _affine_entries(self, origin: int, step: int) -> Tensor:
        """int32 [B, H, E]: (offset + origin) / step of the diagonals that meet this view's residue, ascending."""
        diagonals = self.pattern.diagonals
        assert diagonals is not None
        shifted = diagonals + origin
        if step == 1:
            return torch.where(diagonals >= 0, shifted, FAR).int().contiguous()
        keep = (diagonals >= 0) & (shifted.remainder(step) == 0)
        return _compact(keep, shifted.div(step, rounding_mode="floor"), FAR)

    def _slots_by_id(self, host_ids: Tensor) -> Tensor:
        """[NB] on the device: the slot of every block id, -1 where it is not here."""
        table = torch.full((self.pattern.num_blocks,), -1, dtype=slot_dtype(len(host_ids)))
        real = host_ids < self.pattern.num_blocks
        table[host_ids[real]] = torch.arange(len(host_ids), dtype=table.dtype)[real]
        return upload(table, self.device)

    def _build_columns(self) -> Columns:
        pattern, block = self.pattern, self.block
        column = pattern.columns
        assert column is not None
        previous = torch.nn.functional.pad(column, (1, 0), value=-1)[..., :-1]
        known = (column < pattern.seq_len) & (previous < column)
        rows, held = self._column_rows(column.long())
        known = known & held
        positions = _compact(known, column, BIG)
        rows = _compact(known, rows, 0)
        start = self.q_ids * block
        ranges = torch.stack(
            [_count(positions, self.first_open, right=False), _count(positions, start, right=False)], -1
        )
        ranges[..., 1] = torch.maximum(ranges[..., 0], ranges[..., 1])
        ranges.masked_fill_((self.q_ids >= pattern.num_blocks)[:, None], 0)
        covered = pattern.offset_table().to(torch.int8).contiguous()
        return Columns(positions, rows, known.sum(-1).int(), ranges.int().contiguous(), covered)

    def _column_rows(self, column: Tensor) -> tuple[Tensor, Tensor]:
        """(rows in k, is it there) of every column [B, H, C]."""
        pattern, block = self.pattern, self.block
        if self.has_key_blocks:
            slot = self._slots_by_id(self.host_k_ids)[(column // block).clamp(max=pattern.num_blocks - 1)].long()
            return slot * block + column % block, slot >= 0
        held = self.column_positions
        assert held is not None
        held = held.repeat_interleave(pattern.heads // held.shape[1], 1).contiguous()
        if held.shape[2] == 0:
            return column, torch.zeros_like(column, dtype=torch.bool)
        rows = torch.searchsorted(held, column.contiguous()).clamp(max=held.shape[2] - 1)
        return rows, held.gather(2, rows) == column


def _common_steps(q_ids: Tensor, k_ids: Tensor) -> tuple[int, int] | None:
    """(first key id - first query id, step) when both are progressions with one step, so that slots differ by a constant."""
    if not len(q_ids) or not len(k_ids):
        return None
    steps = {int(d) for ids in (q_ids, k_ids) for d in ids.diff().unique()}
    if len(steps) > 1 or any(step < 1 for step in steps):
        return None
    return int(k_ids[0] - q_ids[0]), next(iter(steps), 1)


def _count(ordered: Tensor, limits: Tensor, right: bool) -> Tensor:
    """int32 [B, H, n]: how many of each ascending list [B, H, m] are below (right: or equal to) the limits [n] or [B, n]."""
    batch, heads = ordered.shape[:2]
    limits = limits[None] if limits.dim() == 1 else limits
    limits = limits.to(ordered.dtype)[:, None].expand(batch, heads, -1).contiguous()
    return torch.searchsorted(ordered, limits, right=right, out_int32=True)


def _compact(keep: Tensor, values: Tensor, fill: int) -> Tensor:
    """int32 like ``keep``: the kept values of the last dimension moved to its front, in order; the rest is ``fill``."""
    width = keep.shape[-1]
    place = torch.where(keep, keep.cumsum(-1) - 1, width)
    moved = torch.full((*keep.shape[:-1], width + 1), fill, dtype=torch.int32, device=keep.device)
    moved.scatter_(-1, place, values.int().expand(keep.shape))
    return moved[..., :width].contiguous()
