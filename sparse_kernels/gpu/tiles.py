"""The kernel that finds the tiles of a view: from each head's diagonals and the placement of blocks to lists and ranges.

The lists of a view take one to some hundred numbers per head and block, more than a view may keep, and cost one small launch:
they are made anew for each kernel that reads them and dropped after it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_own", "num_other", "num_offsets", "num_blocks", "num_heads", "width"])
def tiles_kernel(
    offsets, own_ids, other_ids, slot_of, first_open, last_open, entries, bounds,
    num_own, num_other, num_offsets, num_blocks, num_heads, width,
    PB: tl.constexpr, LISTED: tl.constexpr, BY_KEY: tl.constexpr, HAS_DOCS: tl.constexpr, ROWS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """bounds [B, H, own, 4] (see `sparse_kernels.gpu.index.Tiles`) of ROWS own blocks of one head; LISTED: their slots too.

    ``own`` are the query blocks, or the key blocks where BY_KEY, ``other`` the opposite side. ``offsets`` int32 [B, H, E]
    ascending: LISTED: block offsets, -1 is padding, and ``slot_of`` [NB] tells the slot of an id (-1: not here); else slot
    differences (query - key). Grid: (own / ROWS, B * H).
    """
    own = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    bh = tl.program_id(1).to(tl.int64)
    batch = bh // num_heads
    there = own < num_own
    own_id = tl.load(own_ids + own, mask=there, other=num_blocks)
    real = (own_id < num_blocks)[:, None]
    before = tl.zeros([ROWS], tl.int32)  # entries that lead nearer than any slot here
    diagonals = tl.zeros([ROWS], tl.int32)
    clear = tl.zeros([ROWS], tl.int32)
    used = tl.zeros([ROWS], tl.int32)
    place_of_own = entries + (bh * num_own + own).to(tl.int64)[:, None] * width
    for first in range(0, num_offsets, SCAN):
        at = first + tl.arange(0, SCAN)
        offset = tl.load(offsets + bh * num_offsets + at, mask=at < num_offsets, other=-1 if LISTED else 1 << 30)[
            None, :
        ]
        if LISTED:
            other_id = own_id[:, None] + offset if BY_KEY else own_id[:, None] - offset
            chosen = real & (offset >= 0) & (other_id >= 0) & (other_id < num_blocks)
            slot = tl.load(slot_of + other_id, mask=chosen, other=-1).to(tl.int32)
            chosen = chosen & (slot >= 0)
        else:
            slot = own[:, None] + offset if BY_KEY else own[:, None] - offset
            near = offset < (-own if BY_KEY else own - num_other + 1)[:, None]
            before += tl.sum((real & near).to(tl.int32), 1)
            chosen = real & (slot >= 0) & (slot < num_other)
            other_id = tl.load(other_ids + slot, mask=chosen, other=num_blocks)
            chosen = chosen & (other_id < num_blocks)
        diagonal = chosen & (other_id == own_id[:, None])
        clean = chosen & (other_id != own_id[:, None])
        if HAS_DOCS:
            # Documents in the rows of the query block: where the first begins, and where the last does.
            if BY_KEY:
                opens = batch * num_other + slot
                begin = tl.load(first_open + opens, mask=chosen, other=0)
                final = tl.load(last_open + opens, mask=chosen, other=0)
                key = own_id[:, None] * PB
            else:
                begin = tl.load(first_open + batch * num_own + own, mask=there, other=0)[:, None]
                final = tl.load(last_open + batch * num_own + own, mask=there, other=0)[:, None]
                key = other_id * PB
            chosen = chosen & (key + PB > begin)
            clean = clean & chosen & (key >= final)
        keep = chosen.to(tl.int32)
        if LISTED:
            place = used[:, None] + tl.cumsum(keep, 1) - keep
            tl.store(place_of_own + place, slot.to(entries.dtype.element_ty), mask=chosen & (place < width))
        used += tl.sum(keep, 1)
        diagonals += tl.sum(diagonal.to(tl.int32), 1)
        clear += tl.sum(clean.to(tl.int32), 1)
    home = bounds + (bh * num_own + own) * 4
    tl.store(home, before, mask=there)
    tl.store(home + 1, before + diagonals, mask=there)
    tl.store(home + 2, before + diagonals + clear, mask=there)
    tl.store(home + 3, before + used, mask=there)
