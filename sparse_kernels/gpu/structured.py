"""Kernels of the fast path: block diagonals and one column list per head, in one pass over all keys of a query tile.

Design, and where the ideas come from: the online softmax of FlashAttention-2 (arXiv 2307.08691); blocks and columns in one pass as
MInference does (https://github.com/microsoft/MInference). Ours: diagonals stay offsets, so that the transpose for dK/dV is
free; the running (out, lse) of earlier ring steps is carried in; dQ is computed by rows and dK/dV by columns, without atomics.

Numerics: scores, softmax and all accumulators are float32; the scale enters after the dot product, folded with log2(e) into one
multiply-add before exp2. Probabilities are rounded to the dtype of the inputs for the second product only.

Loops without a mask are kept apart from loops with one: the compiler pipelines loads only in loops without branches.
Naming: *_id is a global block number, *_slot its local place; `scale2` is scale * log2(e), `lse2` is lse * log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(base, rows, stride, live, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """A tile [rows, DP] of rows anywhere."""
    d = tl.arange(0, DP)
    return load_at(base + rows.to(tl.int64)[:, None] * stride + d[None, :], live, d, D, DP, MASKED, UPCAST)


@triton.jit
def load_tile(
    base, first, inner, stride, live, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """A tile [rows, DP] of rows ``first + inner``: a 64-bit scalar plus 32-bit offsets, which take half the registers.

    4096 numbers per token overflow 32 bits at 524,288 tokens, so ``first`` is 64-bit before it meets the stride.
    """
    d = tl.arange(0, DP)
    return load_at(base + first * stride + inner[:, None] * stride + d[None, :], live, d, D, DP, MASKED, UPCAST)


@triton.jit
def load_at(address, live, d, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of D numbers at `address`, padded with zeros to DP; rows that are not live are zeros too where MASKED."""
    if MASKED:
        tile = tl.load(address, mask=live[:, None] & (d[None, :] < D), other=0.0)
    elif D != DP:
        tile = tl.load(address, mask=d[None, :] < D, other=0.0)
    else:
        tile = tl.load(address)
    if UPCAST:  # the interpreter multiplies the bits of bfloat16 as integers
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def store_tile(base, first, inner, stride, tile, D: tl.constexpr, DP: tl.constexpr):
    """Write the first D of DP numbers of every row; the rows of a query tile always exist."""
    d = tl.arange(0, DP)
    address = base + first * stride + inner[:, None] * stride + d[None, :]
    if D != DP:
        tl.store(address, tile, mask=d[None, :] < D)
    else:
        tl.store(address, tile)


@triton.jit
def attend(acc, total, high, q, k, v, scale2, keep, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax. A row that has seen nothing keeps high = -inf, total = 0."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keep, scores, -float("inf"))
    top = tl.maximum(high, tl.max(scores, 1) * scale2)
    base = top
    if MASKED:
        base = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(scores * scale2 - base[:, None])
    fade = tl.exp2(high - base)
    total = total * fade + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return acc, total, top


@triton.jit
def row_gradient(dq, q, k, v, dout, lse2, delta, scale2, keep, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds dS @ K of one tile to dq (the scale comes at the end)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keep, scores, -float("inf"))
    p = tl.exp2(scores * scale2 - lse2[:, None])
    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def key_gradient(dk, dv, q, k, v, dout, lse2, delta, scale2, keep, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Adds dS^T @ Q and P^T @ dO of one tile, scores held as [keys, queries]."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keep, scores, -float("inf"))
    p = tl.exp2(scores * scale2 - lse2[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def load_lse2(lse, rows):
    """lse in base 2; +inf for rows without keys, so that exp2(score - lse2) is 0 there."""
    value = tl.load(lse + rows) * 1.4426950408889634
    return tl.where(value == -float("inf"), float("inf"), value)


@triton.jit
def load_state(lse, delta, rows, live, TAIL: tl.constexpr):
    """(lse in base 2, delta) of query rows, and with TAIL those of a row without keys where a row is not live."""
    if TAIL:
        value = tl.load(lse + rows, mask=live, other=-float("inf")) * 1.4426950408889634
        lse2 = tl.where(value == -float("inf"), float("inf"), value)
        return lse2, tl.load(delta + rows, mask=live, other=0.0)
    else:
        return load_lse2(lse, rows), tl.load(delta + rows)


@triton.jit
def column_state(positions, covered, lane, end, q_id, PB: tl.constexpr, SPREAD: tl.constexpr):
    """int32 [columns] twice: positions, and 1 where a column lies before the end and not in a tile that the diagonals compute.

    Every number is loaded SPREAD times, once by every thread: loads of fewer numbers than threads count as cheap, and the compiler
    would repeat them in the layout of the scores (sm_90, tile 128 x 64: 32 dependent loads per thread and step instead of 2).
    """
    lane = lane[:, None] + tl.zeros([1, SPREAD], tl.int32)
    position = tl.load(positions + tl.minimum(lane, tl.maximum(end - 1, 0)))
    skip = tl.load(covered + (q_id - position // PB), mask=lane < end, other=1).to(tl.int32)
    return tl.max(position, 1), 1 - tl.max(skip, 1)


@triton.jit
def column_keep(position, wanted, doc, HAS_DOCS: tl.constexpr):
    """bool [rows or 1, columns] from a `column_state`: wanted, and not before the row's document."""
    keep = (wanted != 0)[None, :]
    if HAS_DOCS:
        keep = keep & (position[None, :] >= doc[:, None])
    return keep


@triton.jit
def tile_keep(
    q_id, k_ids, k_slot, k_inner, position, doc, CAUSAL: tl.constexpr, HAS_DOCS: tl.constexpr, PB: tl.constexpr
):
    """bool [queries, keys] of a tile that needs a mask: the diagonal tile, or one in which a document starts."""
    if CAUSAL:
        k_position = q_id * PB + k_inner
        keep = k_position[None, :] <= position[:, None]
        if HAS_DOCS:
            keep = keep & (k_position[None, :] >= doc[:, None])
    else:
        k_position = tl.load(k_ids + k_slot) * PB + k_inner
        keep = k_position[None, :] >= doc[:, None]
    return keep


@triton.jit
def first_entry(entries, begin, end, SUB: tl.constexpr):
    """The entry of step ``begin`` in a list of which each serves SUB steps; anything where there are no steps."""
    return tl.load(entries + begin // SUB, mask=begin < end, other=0)


@triton.jit
def entry_after(entries, step, end, SUB: tl.constexpr):
    """The entry of the next step, or of the last one; to be asked for inside the loop only, where there is one.

    Loops read a step ahead because the compiler counts the load of an address as a stage of its own: tiles whose address was loaded
    in the same step are asked for at its end and awaited at once, instead of num_stages - 1 steps later.
    """
    return tl.load(entries + tl.minimum(step + 1, end - 1) // SUB)


@triton.jit
def attend_tiles(
    acc, total, top, q, k, v, k_row, v_row, entries, begin, end, q_slot, q_id, k_ids, position, doc, seq_len, scale2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_DOCS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr,
    BN: tl.constexpr, LISTED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps [begin, end) of a query tile; one step is one of the PB / BN key tiles of an entry."""
    key = tl.arange(0, BN)
    entry = first_entry(entries, begin, end, PB // BN)
    for step in range(begin, end):
        here, entry = entry, entry_after(entries, step, end, PB // BN)
        k_slot = here if LISTED else q_slot - here
        k_inner = (step % (PB // BN)) * BN + key
        k_first = k_slot.to(tl.int64) * PB
        live = k_inner < seq_len - q_id * PB  # asked for the diagonal tile only, which may hold padding
        keys = load_tile(k, k_first, k_inner, k_row, live, D, DP, CAUSAL, UPCAST)
        values = load_tile(v, k_first, k_inner, v_row, live, D, DP, CAUSAL, UPCAST)
        keep = live
        if MASKED:
            keep = tile_keep(q_id, k_ids, k_slot, k_inner, position, doc, CAUSAL, HAS_DOCS, PB)
        acc, total, top = attend(acc, total, top, q, keys, values, scale2, keep, MASKED, PRECISION)
    return acc, total, top


@triton.jit
def attend_columns(
    acc, total, top, q, k, v, k_row, v_row, positions, column_rows, covered, begin, end, q_id, doc, scale2,
    HAS_DOCS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr, BN: tl.constexpr, SPREAD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns [begin, end) of a head's list for a query tile. What a step needs to know is loaded during the one before it."""
    lane = begin + tl.arange(0, BN)
    last = tl.maximum(end - 1, 0)
    next_rows = tl.load(column_rows + tl.minimum(lane, last))  # lanes beyond the end repeat the last column, masked
    place, wanted = column_state(positions, covered, lane, end, q_id, PB, SPREAD)
    for _ in range(begin, end, BN):
        k_rows = next_rows
        keep = column_keep(place, wanted, doc, HAS_DOCS)
        lane += BN
        next_rows = tl.load(column_rows + tl.minimum(lane, last))
        place, wanted = column_state(positions, covered, lane, end, q_id, PB, SPREAD)
        keys = load_rows(k, k_rows, k_row, k_rows, D, DP, False, UPCAST)
        values = load_rows(v, k_rows, v_row, k_rows, D, DP, False, UPCAST)
        acc, total, top = attend(acc, total, top, q, keys, values, scale2, keep, True, PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize=["q_blocks", "num_entries", "num_columns", "num_blocks", "seq_len"])
def forward_kernel(
    q, k, v, out, lse, carry_out, carry_lse,
    entries, bounds, positions, column_rows, ranges, covered, q_ids, k_ids, doc_start,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    q_blocks, num_heads, num_entries, num_columns, num_blocks, seq_len, scale2,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_TILES: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr,
    LISTED: tl.constexpr, SPREAD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out and lse of one query tile of one head over its diagonals and columns, on top of the carried state.

    Grid: (G * query tiles, K, B). Heads of a group are neighbours, so that they share keys in L2; late blocks, which have the
    most work, start first.
    """
    pid, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = (tl.program_id(1) * G + pid % G).to(tl.int64)
    tile = q_blocks * (PB // BM) - 1 - pid // G
    q_slot, q_sub = tile // (PB // BM), tile % (PB // BM)
    q_id = tl.load(q_ids + q_slot)
    bh = batch * num_heads + head
    index = bh * q_blocks + q_slot
    low, diagonal_end, clean_end, high, first_column, last_column = 0, 0, 0, 0, 0, 0
    if HAS_TILES:
        low, diagonal_end = tl.load(bounds + index * 4), tl.load(bounds + index * 4 + 1)
        clean_end, high = tl.load(bounds + index * 4 + 2), tl.load(bounds + index * 4 + 3)
    if HAS_COLUMNS:
        first_column, last_column = tl.load(ranges + index * 2), tl.load(ranges + index * 2 + 1)

    inner = q_sub * BM + tl.arange(0, BM)
    first = q_slot.to(tl.int64) * PB
    position = q_id * PB + inner
    total_rows = q_blocks * PB
    out += (batch * total_rows * num_heads + head) * D
    lse += bh * total_rows + first
    acc = tl.zeros((BM, DP), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), -float("inf"), tl.float32)
    if HAS_CARRY:
        carried = tl.load(carry_lse + bh * total_rows + first + inner)
        carry_out += (batch * total_rows * num_heads + head) * D
        acc = load_tile(carry_out, first, inner, num_heads * D, inner, D, DP, False, False)
        if (high <= low) & (last_column <= first_column):  # nothing to add: the state passes bit by bit
            store_tile(out, first, inner, num_heads * D, acc, D, DP)
            tl.store(lse + inner, carried)
            return
        top = carried * 1.4426950408889634
        total = tl.where(carried == -float("inf"), 0.0, 1.0)

    queries = load_tile(q + batch * q_batch + head * q_head, first, inner, q_row, inner, D, DP, False, UPCAST)
    k += batch * k_batch + (head // G) * k_head
    v += batch * v_batch + (head // G) * v_head
    doc = position
    if HAS_DOCS:
        doc = tl.load(doc_start + batch * total_rows + first + inner)

    if HAS_TILES:
        SUB: tl.constexpr = PB // BN
        entries += (index if LISTED else bh) * num_entries
        # Of the diagonal tile only the part up to this tile's last row.
        reach = low * SUB + (diagonal_end - low) * ((q_sub * BM + BM + BN - 1) // BN)
        acc, total, top = attend_tiles(
            acc, total, top, queries, k, v, k_row, v_row, entries, low * SUB, reach, q_slot, q_id, k_ids, position, doc,
            seq_len, scale2, True, True, HAS_DOCS, D, DP, PB, BN, LISTED, UPCAST, PRECISION)  # fmt: skip
        acc, total, top = attend_tiles(
            acc, total, top, queries, k, v, k_row, v_row, entries, diagonal_end * SUB, clean_end * SUB, q_slot, q_id, k_ids,
            position, doc, seq_len, scale2, False, False, HAS_DOCS, D, DP, PB, BN, LISTED, UPCAST, PRECISION)  # fmt: skip
        if HAS_DOCS:
            acc, total, top = attend_tiles(
                acc, total, top, queries, k, v, k_row, v_row, entries, clean_end * SUB, high * SUB, q_slot, q_id, k_ids,
                position, doc, seq_len, scale2, False, True, HAS_DOCS, D, DP, PB, BN, LISTED, UPCAST, PRECISION)  # fmt: skip

    if HAS_COLUMNS:
        column = bh * num_columns
        acc, total, top = attend_columns(
            acc, total, top, queries, k, v, k_row, v_row, positions + column, column_rows + column, covered + bh * num_blocks,
            first_column, last_column, q_id, doc, scale2, HAS_DOCS, D, DP, PB, BN, SPREAD, UPCAST, PRECISION)  # fmt: skip

    empty = (total == 0.0) | (position >= seq_len)
    total = tl.where(empty, 1.0, total)
    store_tile(out, first, inner, num_heads * D, tl.where(empty[:, None], 0.0, acc / total[:, None]), D, DP)
    tl.store(lse + inner, tl.where(empty, -float("inf"), (top + tl.log2(total)) * 0.6931471805599453))
