"""Triton kernels over lists of tiles and lists of columns: forward, dq by query rows, dk and dv by key columns.

No program writes where another one writes, so there are no atomics and every run gives the same bits. Numerics: float32
accumulation, the scale is applied to the float32 scores (folded with the running maximum into one multiply-add per exponential),
base 2 inside and natural logarithms outside. The online softmax is that of Milakov & Gimelshein (arXiv 1805.02867) and the tiling
and backward that of FlashAttention-2 (Dao, arXiv 2307.08691); dq and dk/dv in separate programs as in PyTorch's flex_attention
(https://github.com/pytorch/pytorch).

Every row and column index is int64 before it meets a stride: 4096-wide rows overflow int32 at 524,288 tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sparse_kernels.gpu.structured import entry_after, first_entry

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_rows(
    base, rows, stride, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr
):
    """[rows, BLOCK_D] of a matrix with unit stride along head_dim; what is masked or beyond head_dim is 0."""
    d = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    if MASKED and BLOCK_D != HEAD_DIM:
        tile = tl.load(at, mask=live[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(at, mask=live[:, None], other=0.0)
    elif BLOCK_D != HEAD_DIM:
        tile = tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = tl.load(at)
    if UPCAST:
        # The interpreter multiplies the bit patterns of bfloat16.
        tile = tile.to(tl.float32)
    return tile


@triton.jit
def _store_rows(base, rows, stride, live, tile, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of `_load_rows` for float32 results."""
    d = tl.arange(0, BLOCK_D)
    at = base + rows.to(tl.int64)[:, None] * stride + d[None, :]
    tl.store(at, tile, mask=live[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _attend(q, k, v, keep, acc, high, total, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of the online softmax; ``scale2`` is scale * log2(e) and positive."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    top = tl.maximum(high, tl.max(scores, 1) * scale2)
    # A row that has seen nothing yet keeps -inf; its exponents are taken against 0 and give 0, never NaN.
    safe = tl.where(top == float("-inf"), 0.0, top) if MASKED else top
    p = tl.exp2(scores * scale2 - safe[:, None])
    shrink = tl.exp2(high - safe)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _covered(offsets, bits, q_id, key_block, live, HAS_BLOCKS: tl.constexpr):
    """Does the block part of query block ``q_id``, whose row of single blocks is ``bits``, already hold these key blocks?"""
    there = tl.load(offsets + (q_id - key_block), mask=live, other=0) != 0
    if HAS_BLOCKS:
        byte = tl.load(bits + key_block // 8, mask=live, other=0).to(tl.int32)
        there = there | (((byte >> (key_block % 8)) & 1) != 0)
    return there


@triton.jit
def _column_state(
    positions,
    rows,
    offsets,
    bits,
    at,
    number,
    q_id,
    BLOCK: tl.constexpr,
    SPREAD: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
):
    """int32 [columns] twice: positions, and 1 for those of the first ``number`` that are here and in no block of the pattern.

    Loaded SPREAD times, once by every thread, for the reason that `structured.column_state` gives.
    """
    at = at[:, None] + tl.zeros([1, SPREAD], tl.int32)
    place = tl.minimum(at, tl.maximum(number - 1, 0))
    key = tl.load(positions + place)
    live = (at < number) & (tl.load(rows + place) >= 0)
    live = live & ~_covered(offsets, bits, q_id, key // BLOCK, live, HAS_BLOCKS)
    return tl.max(key, 1), tl.max(live.to(tl.int32), 1)


@triton.jit(do_not_specialize=["seq_len", "num_q", "num_blocks", "room", "width"])
def forward_kernel(
    q, k, v, out, lse, carry_out, carry_lse, doc_start,
    q_ids, k_ids, diagonal, start, count, entries, offsets, bits, bits_row, column_position, column_row, column_before,
    scale2, heads, group, seq_len, num_q, num_blocks, room, width,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, bits_sb, bits_sh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_TILES: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_DOC: tl.constexpr,
    HAS_CARRY: tl.constexpr, SPREAD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_M query rows of one head: the diagonal tile, the listed tiles, the columns."""
    SUB_M: tl.constexpr = BLOCK // BLOCK_M
    SUB_N: tl.constexpr = BLOCK // BLOCK_N
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # later rows have more work and go first
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    slot, part = tile // SUB_M, tile % SUB_M
    q_id = tl.load(q_ids + slot)
    inner = part * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = slot * BLOCK + inner
    position = q_id * BLOCK + inner
    alive = position < seq_len
    q_tile = _load_rows(q + b * q_sb + h * q_sh, rows, q_ss, alive, HEAD_DIM, BLOCK_D, False, UPCAST)
    k_base, v_base = k + b * k_sb + (h // group) * k_sh, v + b * v_sb + (h // group) * v_sh
    length = num_q.to(tl.int64) * BLOCK
    low = tl.load(doc_start + b * length + rows) if HAS_DOC else tl.zeros([BLOCK_M], tl.int32)
    out_base = out + b * length * heads * HEAD_DIM + h * HEAD_DIM
    if HAS_CARRY:
        carry_base = carry_out + b * length * heads * HEAD_DIM + h * HEAD_DIM
        acc = _load_rows(carry_base, rows, heads * HEAD_DIM, alive, HEAD_DIM, BLOCK_D, False, False)
        high = tl.load(carry_lse + bh * length + rows) * LOG2E
        total = tl.where(high == float("-inf"), 0.0, 1.0)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        high = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
    n = tl.arange(0, BLOCK_N)
    if HAS_TILES:
        key_slot = tl.load(diagonal + slot)
        near = tl.where(key_slot < 0, 0, ((part + 1) * BLOCK_M + BLOCK_N - 1) // BLOCK_N)
        for sub in range(near):
            at = sub * BLOCK_N + n
            there = at < seq_len - q_id * BLOCK  # rows of padding may hold NaN
            k_tile = _load_rows(k_base, key_slot * BLOCK + at, k_ss, there, HEAD_DIM, BLOCK_D, True, UPCAST)
            v_tile = _load_rows(v_base, key_slot * BLOCK + at, v_ss, there, HEAD_DIM, BLOCK_D, True, UPCAST)
            keep = at[None, :] <= inner[:, None]
            if HAS_DOC:
                keep = keep & ((q_id * BLOCK + at)[None, :] >= low[:, None])
            acc, high, total = _attend(q_tile, k_tile, v_tile, keep, acc, high, total, scale2, True, PRECISION)
        list_base = entries + bh * room + tl.load(start + slot)
        steps = tl.load(count + bh * num_q + slot) * SUB_N
        following = first_entry(list_base, 0, steps, SUB_N).to(tl.int32)
        for step in range(steps):
            far, following = following, entry_after(list_base, step, steps, SUB_N).to(tl.int32)
            at = (step % SUB_N) * BLOCK_N + n
            k_tile = _load_rows(k_base, far * BLOCK + at, k_ss, at, HEAD_DIM, BLOCK_D, False, UPCAST)
            v_tile = _load_rows(v_base, far * BLOCK + at, v_ss, at, HEAD_DIM, BLOCK_D, False, UPCAST)
            keep = at[None, :] >= 0
            if HAS_DOC:
                keep = (tl.load(k_ids + far) * BLOCK + at)[None, :] >= low[:, None]
            acc, high, total = _attend(q_tile, k_tile, v_tile, keep, acc, high, total, scale2, HAS_DOC, PRECISION)
    if HAS_COLUMNS:
        row_bits = bits + b * bits_sb + h * bits_sh + tl.load(bits_row + slot) if HAS_BLOCKS else bits
        number = tl.load(column_before + bh * num_q + slot)
        position_base, row_base = column_position + bh * width, column_row + bh * width
        at, offset_base = n, offsets + bh * num_blocks
        next_row = tl.load(row_base + at, mask=at < number, other=-1)
        next_key, wanted = _column_state(
            position_base, row_base, offset_base, row_bits, at, number, q_id, BLOCK, SPREAD, HAS_BLOCKS
        )
        for _ in range(0, number, BLOCK_N):
            row, keep = next_row, (wanted != 0)[None, :] & (next_key[None, :] >= low[:, None])
            at += BLOCK_N
            next_row = tl.load(row_base + at, mask=at < number, other=-1)
            next_key, wanted = _column_state(
                position_base, row_base, offset_base, row_bits, at, number, q_id, BLOCK, SPREAD, HAS_BLOCKS
            )
            k_tile = _load_rows(k_base, row, k_ss, row >= 0, HEAD_DIM, BLOCK_D, True, UPCAST)
            v_tile = _load_rows(v_base, row, v_ss, row >= 0, HEAD_DIM, BLOCK_D, True, UPCAST)
            acc, high, total = _attend(q_tile, k_tile, v_tile, keep, acc, high, total, scale2, True, PRECISION)
    some = alive & (total > 0.0)
    acc = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)
    sums = tl.where(some, (high + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    _store_rows(out_base, rows, heads * HEAD_DIM, rows >= 0, acc, HEAD_DIM, BLOCK_D)
    tl.store(lse + bh * length + rows, sums)


@triton.jit(do_not_specialize=["length"])
def delta_kernel(
    out, dout, delta, heads, length, do_sb, do_ss, do_sh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """rowsum(dout * out) in float32, [B, H, length]."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < length
    out_base = out + (b * length * heads + h) * HEAD_DIM
    o = _load_rows(out_base, rows, heads * HEAD_DIM, live, HEAD_DIM, BLOCK_D, True, False)
    do = _load_rows(dout + b * do_sb + h * do_sh, rows, do_ss, live, HEAD_DIM, BLOCK_D, True, False).to(tl.float32)
    tl.store(delta + bh * length + rows, tl.sum(o * do, 1), mask=live)


@triton.jit
def _load_lse(lse, rows):
    """lse in base 2. An empty row gets +inf, so that its probabilities come out as exactly 0."""
    value = tl.load(lse + rows)
    return tl.where(value == float("-inf"), float("inf"), value * LOG2E)


@triton.jit
def _load_queries(
    q, dout, lse, delta, rows, q_ss, do_ss, live,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """q, dout, lse in base 2 and delta of query rows. TAIL: rows that are not live are padding, which may hold NaN, and read as
    rows without keys."""
    q_tile = _load_rows(q, rows, q_ss, live, HEAD_DIM, BLOCK_D, TAIL, UPCAST)
    do = _load_rows(dout, rows, do_ss, live, HEAD_DIM, BLOCK_D, TAIL, UPCAST)
    lse2, d = _load_lse(lse, rows), tl.load(delta + rows)
    if TAIL:
        lse2, d = tl.where(live, lse2, float("inf")), tl.where(live, d, 0.0)
    return q_tile, do, lse2, d


@triton.jit
def _row_gradient(q, do, k, v, keep, lse2, delta, dq, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """dq += dS K of one tile (without the scale)."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    p = tl.exp2(scores * scale2 - lse2[:, None])
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["seq_len", "num_q", "num_blocks", "room", "width"])
def dq_kernel(
    q, k, v, dout, lse, delta, dq, doc_start,
    q_ids, k_ids, diagonal, start, count, entries, offsets, bits, bits_row, column_position, column_row, column_before,
    scale2, scale, heads, group, seq_len, num_q, num_blocks, room, width,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_ss, do_sh, bits_sb, bits_sh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_TILES: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_DOC: tl.constexpr,
    SPREAD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M query rows of one head, in the order of `forward_kernel`."""
    SUB_M: tl.constexpr = BLOCK // BLOCK_M
    SUB_N: tl.constexpr = BLOCK // BLOCK_N
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    slot, part = tile // SUB_M, tile % SUB_M
    q_id = tl.load(q_ids + slot)
    inner = part * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = slot * BLOCK + inner
    length = num_q.to(tl.int64) * BLOCK
    q_tile = _load_rows(q + b * q_sb + h * q_sh, rows, q_ss, inner, HEAD_DIM, BLOCK_D, False, UPCAST)
    do = _load_rows(dout + b * do_sb + h * do_sh, rows, do_ss, inner, HEAD_DIM, BLOCK_D, False, UPCAST)
    lse2 = _load_lse(lse, bh * length + rows)
    d = tl.load(delta + bh * length + rows)
    low = tl.load(doc_start + b * length + rows) if HAS_DOC else tl.zeros([BLOCK_M], tl.int32)
    k_base, v_base = k + b * k_sb + (h // group) * k_sh, v + b * v_sb + (h // group) * v_sh
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    n = tl.arange(0, BLOCK_N)
    if HAS_TILES:
        key_slot = tl.load(diagonal + slot)
        near = tl.where(key_slot < 0, 0, ((part + 1) * BLOCK_M + BLOCK_N - 1) // BLOCK_N)
        for sub in range(near):
            at = sub * BLOCK_N + n
            there = at < seq_len - q_id * BLOCK  # rows of padding may hold NaN
            k_tile = _load_rows(k_base, key_slot * BLOCK + at, k_ss, there, HEAD_DIM, BLOCK_D, True, UPCAST)
            v_tile = _load_rows(v_base, key_slot * BLOCK + at, v_ss, there, HEAD_DIM, BLOCK_D, True, UPCAST)
            keep = at[None, :] <= inner[:, None]
            if HAS_DOC:
                keep = keep & ((q_id * BLOCK + at)[None, :] >= low[:, None])
            acc = _row_gradient(q_tile, do, k_tile, v_tile, keep, lse2, d, acc, scale2, True, PRECISION)
        list_base = entries + bh * room + tl.load(start + slot)
        steps = tl.load(count + bh * num_q + slot) * SUB_N
        following = first_entry(list_base, 0, steps, SUB_N).to(tl.int32)
        for step in range(steps):
            far, following = following, entry_after(list_base, step, steps, SUB_N).to(tl.int32)
            at = (step % SUB_N) * BLOCK_N + n
            k_tile = _load_rows(k_base, far * BLOCK + at, k_ss, at, HEAD_DIM, BLOCK_D, False, UPCAST)
            v_tile = _load_rows(v_base, far * BLOCK + at, v_ss, at, HEAD_DIM, BLOCK_D, False, UPCAST)
            keep = at[None, :] >= 0
            if HAS_DOC:
                keep = (tl.load(k_ids + far) * BLOCK + at)[None, :] >= low[:, None]
            acc = _row_gradient(q_tile, do, k_tile, v_tile, keep, lse2, d, acc, scale2, HAS_DOC, PRECISION)
    if HAS_COLUMNS:
        row_bits = bits + b * bits_sb + h * bits_sh + tl.load(bits_row + slot) if HAS_BLOCKS else bits
        number = tl.load(column_before + bh * num_q + slot)
        position_base, row_base = column_position + bh * width, column_row + bh * width
        at, offset_base = n, offsets + bh * num_blocks
        next_row = tl.load(row_base + at, mask=at < number, other=-1)
        next_key, wanted = _column_state(
            position_base, row_base, offset_base, row_bits, at, number, q_id, BLOCK, SPREAD, HAS_BLOCKS
        )
        for _ in range(0, number, BLOCK_N):
            row, keep = next_row, (wanted != 0)[None, :] & (next_key[None, :] >= low[:, None])
            at += BLOCK_N
            next_row = tl.load(row_base + at, mask=at < number, other=-1)
            next_key, wanted = _column_state(
                position_base, row_base, offset_base, row_bits, at, number, q_id, BLOCK, SPREAD, HAS_BLOCKS
            )
            k_tile = _load_rows(k_base, row, k_ss, row >= 0, HEAD_DIM, BLOCK_D, True, UPCAST)
            v_tile = _load_rows(v_base, row, v_ss, row >= 0, HEAD_DIM, BLOCK_D, True, UPCAST)
            acc = _row_gradient(q_tile, do, k_tile, v_tile, keep, lse2, d, acc, scale2, True, PRECISION)
    acc = tl.where((q_id * BLOCK + inner < seq_len)[:, None], acc * scale, 0.0)
    _store_rows(dq + (b * length * heads + h) * HEAD_DIM, rows, heads * HEAD_DIM, rows >= 0, acc, HEAD_DIM, BLOCK_D)


@triton.jit
def _key_gradient(q, do, k, v, keep, lse2, delta, dk, dv, scale2, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """dk += dS^T Q (without the scale) and dv += P^T dO of one tile, keys by queries."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(keep, scores, float("-inf"))
    p = tl.exp2(scores * scale2 - lse2[None, :])
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["seq_len", "num_q", "num_k", "room"])
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, doc_start, q_ids, k_ids, diagonal, start, count, entries,
    scale2, scale, heads, group, seq_len, num_q, num_k, room,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_ss, do_sh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_DOC: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv of BLOCK_N rows of one key-value head: its query heads one after the other, each by its own list."""
    SUB_M: tl.constexpr = BLOCK // BLOCK_M
    SUB_N: tl.constexpr = BLOCK // BLOCK_N
    slot, part = tl.program_id(0) // SUB_N, tl.program_id(0) % SUB_N
    bk = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    b, kv = bk // kv_heads, bk % kv_heads
    inner = part * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = slot * BLOCK + inner
    position = tl.load(k_ids + slot) * BLOCK + inner
    there = position < seq_len
    k_tile = _load_rows(k + b * k_sb + kv * k_sh, rows, k_ss, there, HEAD_DIM, BLOCK_D, True, UPCAST)
    v_tile = _load_rows(v + b * v_sb + kv * v_sh, rows, v_ss, there, HEAD_DIM, BLOCK_D, True, UPCAST)
    length = num_q.to(tl.int64) * BLOCK
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    m = tl.arange(0, BLOCK_M)
    q_slot = tl.load(diagonal + slot)
    begin = part * BLOCK_N // BLOCK_M
    near = tl.where(q_slot < 0, begin, SUB_M)
    left = seq_len - tl.load(q_ids + tl.maximum(q_slot, 0)) * BLOCK
    for g in range(group):
        h = kv * group + g
        bh = b * heads + h
        q_base, do_base = q + b * q_sb + h * q_sh, dout + b * do_sb + h * do_sh
        for sub in range(begin, near):
            at = sub * BLOCK_M + m
            here = q_slot * BLOCK + at
            live = at < left
            q_tile, do, lse2, d = _load_queries(
                q_base, do_base, lse + bh * length, delta + bh * length, here, q_ss, do_ss, live,
                HEAD_DIM, BLOCK_D, TAIL, UPCAST)  # fmt: skip
            keep = inner[:, None] <= at[None, :]
            if HAS_DOC:
                keep = keep & (position[:, None] >= tl.load(doc_start + b * length + here)[None, :])
            dk_tile, dv_tile = _key_gradient(
                q_tile, do, k_tile, v_tile, keep, lse2, d, dk_tile, dv_tile, scale2, True, PRECISION
            )
        list_base = entries + bh * room + tl.load(start + slot)
        steps = tl.load(count + bh * num_k + slot) * SUB_M
        following = first_entry(list_base, 0, steps, SUB_M).to(tl.int32)
        following_id = tl.load(q_ids + following) if TAIL else 0
        for step in range(steps):
            far, far_id = following, following_id
            following = entry_after(list_base, step, steps, SUB_M).to(tl.int32)
            following_id = tl.load(q_ids + following) if TAIL else 0
            at = (step % SUB_M) * BLOCK_M + m
            here = far * BLOCK + at
            live = at >= 0
            if TAIL:
                live = at < seq_len - far_id * BLOCK
            q_tile, do, lse2, d = _load_queries(
                q_base, do_base, lse + bh * length, delta + bh * length, here, q_ss, do_ss, live,
                HEAD_DIM, BLOCK_D, TAIL, UPCAST)  # fmt: skip
            keep = here[None, :] >= 0
            if HAS_DOC:
                keep = position[:, None] >= tl.load(doc_start + b * length + here)[None, :]
            dk_tile, dv_tile = _key_gradient(
                q_tile, do, k_tile, v_tile, keep, lse2, d, dk_tile, dv_tile, scale2, HAS_DOC, PRECISION
            )
    at_head = (b * num_k.to(tl.int64) * BLOCK * kv_heads + kv) * HEAD_DIM
    _store_rows(dk + at_head, rows, kv_heads * HEAD_DIM, rows >= 0, dk_tile * scale, HEAD_DIM, BLOCK_D)
    _store_rows(dv + at_head, rows, kv_heads * HEAD_DIM, rows >= 0, dv_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["seq_len", "num_q", "num_live", "num_blocks", "width", "first_column", "held"])
def column_kernel(
    q, k, v, dout, lse, delta, dk, dv, doc_start,
    q_ids, order, offsets, bits, bits_row, column_position, column_row, column_first,
    scale2, scale, heads, group, seq_len, num_q, num_live, num_blocks, width, first_column, held,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, do_sb, do_ss, do_sh, bits_sb, bits_sh,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, HAS_DOC: tl.constexpr, TAIL: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dk and dv [B, H, held, D] of BLOCK_N columns of one query head, from the first query block that lies behind them; the
    ``held`` columns from ``first_column`` (a multiple of BLOCK_N) on."""
    SUB_M: tl.constexpr = BLOCK // BLOCK_M
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    at = first_column + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    position = tl.load(column_position + bh * width + at, mask=at < width, other=0)
    row = tl.load(column_row + bh * width + at, mask=at < width, other=-1)
    there = row >= 0
    k_tile = _load_rows(k + b * k_sb + (h // group) * k_sh, row, k_ss, there, HEAD_DIM, BLOCK_D, True, UPCAST)
    v_tile = _load_rows(v + b * v_sb + (h // group) * v_sh, row, v_ss, there, HEAD_DIM, BLOCK_D, True, UPCAST)
    length = num_q.to(tl.int64) * BLOCK
    q_base, do_base = q + b * q_sb + h * q_sh, dout + b * do_sb + h * do_sh
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    m = tl.arange(0, BLOCK_M)
    # Columns are ascending, so the first of the tile is the one that most query blocks look back at.
    first = tl.load(column_first + bh * width + first_column + tl.program_id(0) * BLOCK_N)
    next_slot = first_entry(order, first * SUB_M, num_live * SUB_M, SUB_M)
    next_id = tl.load(q_ids + next_slot)
    for step in range(first * SUB_M, num_live * SUB_M):
        slot, q_id = next_slot, next_id
        next_slot = entry_after(order, step, num_live * SUB_M, SUB_M)
        next_id = tl.load(q_ids + next_slot)
        live = there & (position < q_id * BLOCK)
        row_bits = bits + b * bits_sb + h * bits_sh + tl.load(bits_row + slot) if HAS_BLOCKS else bits
        live = live & ~_covered(offsets + bh * num_blocks, row_bits, q_id, position // BLOCK, live, HAS_BLOCKS)
        here = slot * BLOCK + (step % SUB_M) * BLOCK_M + m
        q_tile, do, lse2, d = _load_queries(
            q_base, do_base, lse + bh * length, delta + bh * length, here, q_ss, do_ss,
            (step % SUB_M) * BLOCK_M + m < seq_len - q_id * BLOCK, HEAD_DIM, BLOCK_D, TAIL, UPCAST)  # fmt: skip
        keep = live[:, None] & (here[None, :] >= 0)
        if HAS_DOC:
            keep = keep & (position[:, None] >= tl.load(doc_start + b * length + here)[None, :])
        dk_tile, dv_tile = _key_gradient(
            q_tile, do, k_tile, v_tile, keep, lse2, d, dk_tile, dv_tile, scale2, True, PRECISION
        )
    place = at - first_column
    _store_rows(dk + bh * held * HEAD_DIM, place, HEAD_DIM, at < width, dk_tile * scale, HEAD_DIM, BLOCK_D)
    _store_rows(dv + bh * held * HEAD_DIM, place, HEAD_DIM, at < width, dv_tile, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["member", "width", "first_column", "held", "num_rows"])
def fold_kernel(
    part_k, part_v, dk, dv, column_row, member, heads, group, width, first_column, held, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the columns of one query head of every group to dk and dv; a row occurs once per head, so no two programs meet."""
    bk = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    b, kv = bk // kv_heads, bk % kv_heads
    bh = b * heads + kv * group + member
    at = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(column_row + bh * width + first_column + at, mask=at < held, other=-1)
    live = row >= 0
    stride = kv_heads * HEAD_DIM
    first = (b * num_rows * kv_heads + kv) * HEAD_DIM
    tile = _load_rows(part_k + bh * held * HEAD_DIM, at, HEAD_DIM, live, HEAD_DIM, BLOCK_D, True, False)
    tile += _load_rows(dk + first, row, stride, live, HEAD_DIM, BLOCK_D, True, False)
    _store_rows(dk + first, row, stride, live, tile, HEAD_DIM, BLOCK_D)
    tile = _load_rows(part_v + bh * held * HEAD_DIM, at, HEAD_DIM, live, HEAD_DIM, BLOCK_D, True, False)
    tile += _load_rows(dv + first, row, stride, live, HEAD_DIM, BLOCK_D, True, False)
    _store_rows(dv + first, row, stride, live, tile, HEAD_DIM, BLOCK_D)
