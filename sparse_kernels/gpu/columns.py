"""dK and dV of single columns: partial sums per (query head, column, split of the queries), then one ordered reduction.

A column is seen by every later query block, so few programs would loop over very many queries; the queries are split into runs
whose number depends on shapes only. Within a head a column occurs once, so adding head after head needs no atomics and always
gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_kernels.gpu.structured import entry_after, first_entry, key_gradient, load_rows, load_state, load_tile


@triton.jit(
    do_not_specialize=[
        "q_blocks",
        "num_columns",
        "num_blocks",
        "num_tiles",
        "first_column",
        "held",
        "splits",
        "seq_len",
    ]
)
def column_kernel(
    q, k, v, dout, lse, delta, part_k, part_v,
    positions, column_rows, counts, tile_ranges, covered, order, ordered_ids, doc_start,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, dout_batch, dout_row, dout_head,
    q_blocks, num_heads, num_columns, num_blocks, num_tiles, first_column, held, splits, seq_len, scale2,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_DOCS: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial dk (not scaled) and dv of one column tile of one query head over one run of the query blocks after it.

    Grid: (column tiles * splits, H, B), for the ``held`` columns from ``first_column`` (a multiple of BN) on. part_k, part_v:
    float32 [splits, B, H, held, D]; tiles beyond a head's count are not written.
    """
    pid, head, batch = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    tile, split = first_column // BN + pid // splits, pid % splits
    bh = batch * num_heads + head
    count = tl.load(counts + bh)
    if tile * BN >= count:
        return
    lane = tile * BN + tl.arange(0, BN)
    column = bh * num_columns + tl.minimum(lane, count - 1)  # lanes beyond the end repeat the last one, masked
    k_rows, position = tl.load(column_rows + column), tl.load(positions + column)
    kv = head // G
    keys = load_rows(k + batch * k_batch + kv * k_head, k_rows, k_row, k_rows, D, DP, False, UPCAST)
    values = load_rows(v + batch * v_batch + kv * v_head, k_rows, v_row, k_rows, D, DP, False, UPCAST)
    home = position // PB
    low = tl.load(tile_ranges + (bh * num_tiles + tile) * 2)
    high = tl.load(tile_ranges + (bh * num_tiles + tile) * 2 + 1)
    run = (high - low + splits - 1) // splits
    low += split * run
    high = tl.minimum(low + run, high)

    total_rows = q_blocks * PB
    q += batch * q_batch + head * q_head
    dout += batch * dout_batch + head * dout_head
    covered += bh * num_blocks
    acc_k = tl.zeros((BN, DP), tl.float32)
    acc_v = tl.zeros((BN, DP), tl.float32)
    inner = tl.arange(0, BM)
    SUB: tl.constexpr = PB // BM
    next_slot = first_entry(order, low * SUB, high * SUB, SUB)
    next_id = first_entry(ordered_ids, low * SUB, high * SUB, SUB)
    for step in range(low * SUB, high * SUB):
        q_slot, next_slot = next_slot, entry_after(order, step, high * SUB, SUB)
        q_id, next_id = next_id, entry_after(ordered_ids, step, high * SUB, SUB)
        first = q_slot.to(tl.int64) * PB + (step % SUB) * BM
        live = inner < seq_len - q_id * PB - (step % SUB) * BM  # rows of padding may hold NaN
        queries = load_tile(q, first, inner, q_row, live, D, DP, TAIL, UPCAST)
        grads = load_tile(dout, first, inner, dout_row, live, D, DP, TAIL, UPCAST)
        offset = q_id - home
        keep = (lane < count) & (offset > 0)
        keep = (keep & (tl.load(covered + tl.maximum(offset, 0)) == 0))[:, None]
        if HAS_DOCS:
            keep = keep & (position[:, None] >= tl.load(doc_start + batch * total_rows + first + inner)[None, :])
        row = bh * total_rows + first
        lse2, row_delta = load_state(lse + row, delta + row, inner, live, TAIL)
        acc_k, acc_v = key_gradient(
            acc_k, acc_v, queries, keys, values, grads, lse2, row_delta, scale2, keep, True, PRECISION)  # fmt: skip
    # Every lane has its own place: those beyond the count lie in the padding of the list.
    base = (split * tl.num_programs(2).to(tl.int64) * num_heads + bh) * held * D
    d = tl.arange(0, DP)
    place = base + (lane - first_column).to(tl.int64)[:, None] * D + d[None, :]
    inside = (lane < count)[:, None] & (d < D)[None, :]
    tl.store(part_k + place, acc_k, mask=inside)
    tl.store(part_v + place, acc_v, mask=inside)


@triton.jit(do_not_specialize=["member", "num_columns", "first_column", "held", "key_rows", "splits"])
def fold_kernel(
    part_k, part_v, dk, dv, column_rows, counts, member, num_heads, num_columns, first_column, held, key_rows, splits, scale,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Add one query head of each group to dk and dv: splits in order, each row by one program.

    Grid: (column tiles, K, B), launched once per ``member`` of the groups, one after the other.
    """
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = batch * num_heads + kv_head * G + member
    count = tl.load(counts + bh)
    lane = tl.program_id(0) * BN + tl.arange(0, BN)
    live = (lane < held) & (first_column + lane < count)
    rows = tl.load(column_rows + bh * num_columns + first_column + lane, mask=live, other=0)
    acc_k = tl.zeros((BN, DP), tl.float32)
    acc_v = tl.zeros((BN, DP), tl.float32)
    for split in range(splits):
        first = (split * tl.num_programs(2).to(tl.int64) * num_heads + bh) * held * D
        acc_k += load_rows(part_k + first, lane, D, live, D, DP, True, False)
        acc_v += load_rows(part_v + first, lane, D, live, D, DP, True, False)
    d = tl.arange(0, DP)
    kv_heads = num_heads // G
    place = (batch * key_rows * kv_heads + kv_head) * D + rows.to(tl.int64)[:, None] * (kv_heads * D) + d[None, :]
    inside = live[:, None] & (d < D)[None, :]
    tl.store(dk + place, tl.load(dk + place, mask=inside, other=0.0) + acc_k * scale, mask=inside)
    tl.store(dv + place, tl.load(dv + place, mask=inside, other=0.0) + acc_v, mask=inside)
