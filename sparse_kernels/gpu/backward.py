"""Gradients of the structured path: dQ by query tiles, dK/dV of diagonals by key tiles. Each number is written by one program.

Seven products per tile instead of the five of a fused kernel, but no floating-point atomics and no spilled registers, and the
result is the same bit by bit in every run. Naming and numerics as in `structured`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_kernels.gpu.structured import (
    column_keep,
    column_state,
    entry_after,
    first_entry,
    key_gradient,
    load_lse2,
    load_rows,
    load_state,
    load_tile,
    row_gradient,
    store_tile,
    tile_keep,
)


@triton.jit(do_not_specialize=["total_rows"])
def delta_kernel(
    dout, out, delta, dout_batch, dout_row, dout_head, out_batch, out_row, out_head, total_rows, num_heads,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dout * out), float32 [B, H, rows]. Grid: (row tiles, H, B); rows are whole tiles."""
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    live = rows < total_rows
    a = load_rows(dout + batch * dout_batch + head * dout_head, rows, dout_row, live, D, DP, True, False).to(tl.float32)
    b = load_rows(out + batch * out_batch + head * out_head, rows, out_row, live, D, DP, True, False).to(tl.float32)
    tl.store(delta + (batch * num_heads + head) * total_rows + rows, tl.sum(a * b, 1), mask=live)


@triton.jit
def gradient_of_rows(
    dq, q, dout, lse2, delta, k, v, k_row, v_row, entries, begin, end, q_slot, q_id, k_ids, position, doc, seq_len, scale2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_DOCS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr,
    BN: tl.constexpr, LISTED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps [begin, end) of a query tile, as in `attend_tiles`."""
    key = tl.arange(0, BN)
    entry = first_entry(entries, begin, end, PB // BN)
    for step in range(begin, end):
        here, entry = entry, entry_after(entries, step, end, PB // BN)
        k_slot = here if LISTED else q_slot - here
        k_inner = (step % (PB // BN)) * BN + key
        k_first = k_slot.to(tl.int64) * PB
        live = k_inner < seq_len - q_id * PB
        keys = load_tile(k, k_first, k_inner, k_row, live, D, DP, CAUSAL, UPCAST)
        values = load_tile(v, k_first, k_inner, v_row, live, D, DP, CAUSAL, UPCAST)
        keep = live
        if MASKED:
            keep = tile_keep(q_id, k_ids, k_slot, k_inner, position, doc, CAUSAL, HAS_DOCS, PB)
        dq = row_gradient(dq, q, keys, values, dout, lse2, delta, scale2, keep, MASKED, PRECISION)
    return dq


@triton.jit
def gradient_from_columns(
    dq, q, dout, lse2, delta, k, v, k_row, v_row, positions, column_rows, covered, begin, end, q_id, doc, scale2,
    HAS_DOCS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr, BN: tl.constexpr, SPREAD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns [begin, end) of a head's list for a query tile, as in `attend_columns`."""
    lane = begin + tl.arange(0, BN)
    last = tl.maximum(end - 1, 0)
    next_rows = tl.load(column_rows + tl.minimum(lane, last))
    place, wanted = column_state(positions, covered, lane, end, q_id, PB, SPREAD)
    for _ in range(begin, end, BN):
        k_rows = next_rows
        keep = column_keep(place, wanted, doc, HAS_DOCS)
        lane += BN
        next_rows = tl.load(column_rows + tl.minimum(lane, last))
        place, wanted = column_state(positions, covered, lane, end, q_id, PB, SPREAD)
        keys = load_rows(k, k_rows, k_row, k_rows, D, DP, False, UPCAST)
        values = load_rows(v, k_rows, v_row, k_rows, D, DP, False, UPCAST)
        dq = row_gradient(dq, q, keys, values, dout, lse2, delta, scale2, keep, True, PRECISION)
    return dq


@triton.jit(do_not_specialize=["q_blocks", "num_entries", "num_columns", "num_blocks", "seq_len"])
def dq_kernel(
    q, k, v, dout, lse, delta, dq,
    entries, bounds, positions, column_rows, ranges, covered, q_ids, k_ids, doc_start,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    q_blocks, num_heads, num_entries, num_columns, num_blocks, seq_len, scale, scale2,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_TILES: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_DOCS: tl.constexpr,
    LISTED: tl.constexpr, SPREAD: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one query tile of one head. Grid and order as in `forward_kernel`."""
    pid, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    head = (tl.program_id(1) * G + pid % G).to(tl.int64)
    tile = q_blocks * (PB // BM) - 1 - pid // G
    q_slot, q_sub = tile // (PB // BM), tile % (PB // BM)
    q_id = tl.load(q_ids + q_slot)
    bh = batch * num_heads + head
    index = bh * q_blocks + q_slot
    inner = q_sub * BM + tl.arange(0, BM)
    first = q_slot.to(tl.int64) * PB
    position = q_id * PB + inner
    total_rows = q_blocks * PB

    queries = load_tile(q + batch * q_batch + head * q_head, first, inner, q_row, inner, D, DP, False, UPCAST)
    grads = load_tile(dout + batch * dout_batch + head * dout_head, first, inner, dout_row, inner, D, DP, False, UPCAST)
    lse2 = load_lse2(lse + bh * total_rows + first, inner)
    row_delta = tl.load(delta + bh * total_rows + first + inner)
    k += batch * k_batch + (head // G) * k_head
    v += batch * v_batch + (head // G) * v_head
    doc = position
    if HAS_DOCS:
        doc = tl.load(doc_start + batch * total_rows + first + inner)
    acc = tl.zeros((BM, DP), tl.float32)

    if HAS_TILES:
        SUB: tl.constexpr = PB // BN
        low, diagonal_end = tl.load(bounds + index * 4), tl.load(bounds + index * 4 + 1)
        clean_end, high = tl.load(bounds + index * 4 + 2), tl.load(bounds + index * 4 + 3)
        entries += (index if LISTED else bh) * num_entries
        reach = low * SUB + (diagonal_end - low) * ((q_sub * BM + BM + BN - 1) // BN)
        acc = gradient_of_rows(
            acc, queries, grads, lse2, row_delta, k, v, k_row, v_row, entries, low * SUB, reach, q_slot, q_id, k_ids,
            position, doc, seq_len, scale2, True, True, HAS_DOCS, D, DP, PB, BN, LISTED, UPCAST, PRECISION)  # fmt: skip
        acc = gradient_of_rows(
            acc, queries, grads, lse2, row_delta, k, v, k_row, v_row, entries, diagonal_end * SUB, clean_end * SUB, q_slot,
            q_id, k_ids, position, doc, seq_len, scale2,
            False, False, HAS_DOCS, D, DP, PB, BN, LISTED, UPCAST, PRECISION)  # fmt: skip
        if HAS_DOCS:
            acc = gradient_of_rows(
                acc, queries, grads, lse2, row_delta, k, v, k_row, v_row, entries, clean_end * SUB, high * SUB, q_slot, q_id,
                k_ids, position, doc, seq_len, scale2,
                False, True, HAS_DOCS, D, DP, PB, BN, LISTED, UPCAST, PRECISION)  # fmt: skip

    if HAS_COLUMNS:
        first_column, last_column = tl.load(ranges + index * 2), tl.load(ranges + index * 2 + 1)
        column = bh * num_columns
        acc = gradient_from_columns(
            acc, queries, grads, lse2, row_delta, k, v, k_row, v_row, positions + column, column_rows + column,
            covered + bh * num_blocks, first_column, last_column, q_id, doc, scale2,
            HAS_DOCS, D, DP, PB, BN, SPREAD, UPCAST, PRECISION)  # fmt: skip

    acc = tl.where((position < seq_len)[:, None], acc * scale, 0.0)
    store_tile(dq + (batch * total_rows * num_heads + head) * D, first, inner, num_heads * D, acc, D, DP)


@triton.jit
def gradient_of_keys(
    dk, dv, k, v, q, dout, lse, delta, q_row, dout_row, entries, begin, end, first_sub, k_slot, k_position, k_id,
    doc_start, tail_slot, tail_rows, scale2,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, HAS_DOCS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr,
    BM: tl.constexpr, LISTED: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Entries [begin, end) of a key tile against the query tiles of one head, from tile ``first_sub`` of each block on.

    TAIL: of the query block in ``tail_slot`` only the first ``tail_rows`` rows exist. The others may hold anything, so they are
    not read: NaN times a probability of 0 is NaN.
    """
    inner = tl.arange(0, BM)
    subs = PB // BM - first_sub
    entry = tl.load(entries + begin, mask=begin < end, other=0)
    for step in range(begin * subs, end * subs):
        here = entry
        entry = tl.load(entries + tl.minimum((step + 1) // subs, end - 1))
        q_slot = here if LISTED else k_slot + here
        q_inner = (first_sub + step % subs) * BM + inner
        first = q_slot.to(tl.int64) * PB
        live = q_inner < tl.where(q_slot == tail_slot, tail_rows, PB)
        queries = load_tile(q, first, q_inner, q_row, live, D, DP, TAIL, UPCAST)
        grads = load_tile(dout, first, q_inner, dout_row, live, D, DP, TAIL, UPCAST)
        keep = q_inner >= 0
        if MASKED:
            keep = k_position[:, None] >= 0
            if CAUSAL:
                keep = k_position[:, None] <= (k_id * PB + q_inner)[None, :]
            if HAS_DOCS:
                keep = keep & (k_position[:, None] >= tl.load(doc_start + first + q_inner)[None, :])
        lse2, row_delta = load_state(lse + first, delta + first, q_inner, live, TAIL)
        dk, dv = key_gradient(dk, dv, queries, k, v, grads, lse2, row_delta, scale2, keep, MASKED, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["q_blocks", "k_blocks", "num_entries", "seq_len", "tail_slot", "tail_rows"])
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, entries, bounds, k_ids, doc_start,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    q_blocks, k_blocks, num_heads, num_entries, seq_len, tail_slot, tail_rows, scale, scale2,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_DOCS: tl.constexpr, LISTED: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of the diagonals of one key tile, summed over the query heads of its group in order.

    Grid: (key tiles, K, B); early blocks, which the most queries see, start first.
    """
    pid, kv_head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    k_slot, k_sub = pid // (PB // BN), pid % (PB // BN)
    k_id = tl.load(k_ids + k_slot)
    k_inner = k_sub * BN + tl.arange(0, BN)
    k_first = k_slot.to(tl.int64) * PB
    k_position = k_id * PB + k_inner
    live = k_position < seq_len
    keys = load_tile(k + batch * k_batch + kv_head * k_head, k_first, k_inner, k_row, live, D, DP, True, UPCAST)
    values = load_tile(v + batch * v_batch + kv_head * v_head, k_first, k_inner, v_row, live, D, DP, True, UPCAST)
    acc_k = tl.zeros((BN, DP), tl.float32)
    acc_v = tl.zeros((BN, DP), tl.float32)
    total_rows = q_blocks * PB
    doc_start += batch * total_rows
    first_sub = k_sub * BN // BM  # on the diagonal, query tiles above the key tile see nothing
    for g in range(G):
        head = kv_head * G + g
        bh = batch * num_heads + head
        index = bh * k_blocks + k_slot
        low, diagonal_end = tl.load(bounds + index * 4), tl.load(bounds + index * 4 + 1)
        clean_end, high = tl.load(bounds + index * 4 + 2), tl.load(bounds + index * 4 + 3)
        own = entries + (index if LISTED else bh) * num_entries
        own_q = q + batch * q_batch + head * q_head
        own_dout = dout + batch * dout_batch + head * dout_head
        own_lse, own_delta = lse + bh * total_rows, delta + bh * total_rows
        acc_k, acc_v = gradient_of_keys(
            acc_k, acc_v, keys, values, own_q, own_dout, own_lse, own_delta, q_row, dout_row, own, low, diagonal_end,
            first_sub, k_slot, k_position, k_id, doc_start, tail_slot, tail_rows, scale2,
            True, True, HAS_DOCS, D, DP, PB, BM, LISTED, TAIL, UPCAST, PRECISION)  # fmt: skip
        acc_k, acc_v = gradient_of_keys(
            acc_k, acc_v, keys, values, own_q, own_dout, own_lse, own_delta, q_row, dout_row, own, diagonal_end, clean_end,
            0, k_slot, k_position, k_id, doc_start, tail_slot, tail_rows, scale2,
            False, False, HAS_DOCS, D, DP, PB, BM, LISTED, TAIL, UPCAST, PRECISION)  # fmt: skip
        if HAS_DOCS:
            acc_k, acc_v = gradient_of_keys(
                acc_k, acc_v, keys, values, own_q, own_dout, own_lse, own_delta, q_row, dout_row, own, clean_end, high,
                0, k_slot, k_position, k_id, doc_start, tail_slot, tail_rows, scale2,
                False, True, HAS_DOCS, D, DP, PB, BM, LISTED, TAIL, UPCAST, PRECISION)  # fmt: skip
    kv_heads = num_heads // G
    first = (batch * k_blocks * PB * kv_heads + kv_head) * D
    store_tile(dk + first, k_first, k_inner, kv_heads * D, acc_k * scale, D, DP)
    store_tile(dv + first, k_first, k_inner, kv_heads * D, acc_v, D, DP)
