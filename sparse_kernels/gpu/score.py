"""Scoring kernels of vertical-slash estimation: how much probe rows attend to every key and to every token distance.

Two passes over the keys. The first leaves, per tile of keys, each probe row's largest score and sum of exponentials; the caller
joins them (over tiles, and over ranks). The second cuts every probability to a fixed-point integer and adds these over rows, per
key and per distance. A tile's numbers depend on nothing but its own keys and the probe rows, and integers have the same sum in
any order: so the result does not depend on how key blocks are shared out. Nothing of size probe rows x keys is ever stored.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load(base, rows, stride, count, column, D: tl.constexpr, DP: tl.constexpr):
    """Some columns of a matrix whose rows are ``stride`` apart; zeros beyond ``count`` rows and D columns."""
    place = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    mask = (rows < count)[:, None]
    if D != DP:
        mask = mask & (column < D)[None, :]
    return tl.load(place, mask=mask, other=0.0)


@triton.jit
def _scores(
    q, k, row, key, q_row, k_row, num_rows, key_rows, first, last, position, scale2,
    D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores in base 2, [rows, keys]; -inf where the probe row does not see the key."""
    dots = tl.zeros([BM, BN], tl.float32)
    for low in tl.static_range(0, DP, BD):
        column = low + tl.arange(0, BD)
        queries = _load(q, row, q_row, num_rows, column, D, DP)
        keys = _load(k, key, k_row, key_rows, column, D, DP)
        if UPCAST:
            queries, keys = queries.to(tl.float32), keys.to(tl.float32)
        dots = tl.dot(queries, tl.trans(keys), dots, input_precision=PRECISION)
    seen = (position[None, :] >= first[:, None]) & (position[None, :] <= last[:, None]) & (key < key_rows)[None, :]
    return tl.where(seen, dots * scale2, float("-inf"))


@triton.jit
def statistics_kernel(
    q, k, maxima, sums, first_key, last_key, block_ids, num_heads, num_rows, key_rows, scale2,
    q_batch, q_row, q_head, k_batch, k_row, k_head,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, PB: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """maxima, sums float32 [B, H, tiles of BN keys, R]: the largest score (base 2) of each probe row in the tile, and its sum of
    2^(score - that). A program takes BM rows of one head and one tile."""
    tile, unit = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    b, h = (unit // num_heads).to(tl.int64), (unit % num_heads).to(tl.int64)
    block, offset = tile // (PB // BN), tile % (PB // BN) * BN
    key = block * PB + offset + tl.arange(0, BN)
    position = tl.load(block_ids + block) * PB + offset + tl.arange(0, BN)
    first = tl.load(first_key + b * num_rows + row, mask=row < num_rows, other=0)
    last = tl.load(last_key + b * num_rows + row, mask=row < num_rows, other=-1)
    scores = _scores(
        q + b * q_batch + h * q_head, k + b * k_batch + (h // G) * k_head, row, key, q_row, k_row, num_rows, key_rows,
        first, last, position, scale2, D, DP, BD, BM, BN, UPCAST, PRECISION,
    )  # fmt: skip
    peak = tl.max(scores, 1)
    total = tl.sum(tl.exp2(scores - tl.where(peak == float("-inf"), 0.0, peak)[:, None]), 1)
    place = (unit.to(tl.int64) * tl.num_programs(0) + tile) * num_rows + row
    tl.store(maxima + place, peak, mask=row < num_rows)
    tl.store(sums + place, total, mask=row < num_rows)


@triton.jit
def scores_kernel(
    q, k, peak, factor, out, first_key, last_key, block_ids, windows, num_heads, num_rows, num_blocks, key_rows, width,
    scale2, q_batch, q_row, q_head, k_batch, k_row, k_head,
    G: tl.constexpr, PER: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BD: tl.constexpr, PB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to out int64 [B, H / PER, blocks, width]: per key block the column scores, then each window's scores by distance.

    Row r of a window is query e - r, so query - key is constant along r + c (c: place of the key in its block): the weights are
    read skewed, slot t of row r being key t - r, and added over rows. ``windows`` int32 [windows, 3]: first row, rows, place of
    slot 0 in ``width``. A program takes one head, BN keys of a block and one window. Integers are added atomically: the sum is
    the same in any order.
    """
    tile, unit, window = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (unit // num_heads).to(tl.int64), (unit % num_heads).to(tl.int64)
    block, offset = tile // (PB // BN), tile % (PB // BN) * BN
    start, size = tl.load(windows + window * 3), tl.load(windows + window * 3 + 1)
    c, r = tl.arange(0, BN), tl.arange(0, BM)
    row, mine = tl.where(r < size, start + r, num_rows), r < size
    first = tl.load(first_key + b * num_rows + row, mask=mine, other=2**31 - 1)
    last = tl.load(last_key + b * num_rows + row, mask=mine, other=-1)
    origin = tl.load(block_ids + block) * PB + offset
    if (origin <= tl.max(last, 0)) & (origin + BN > tl.min(first, 0)):
        scores = _scores(
            q + b * q_batch + h * q_head, k + b * k_batch + (h // G) * k_head, row, block * PB + offset + c, q_row, k_row,
            num_rows, key_rows, first, last, origin + c, scale2, D, DP, BD, BM, BN, UPCAST, PRECISION,
        )  # fmt: skip
        shift = tl.load(peak + unit.to(tl.int64) * num_rows + row, mask=mine, other=0.0)
        one = tl.load(factor + unit.to(tl.int64) * num_rows + row, mask=mine, other=0.0)
        weights = tl.exp2(scores - shift[:, None]) * one[:, None]
        home = out + ((unit // PER).to(tl.int64) * num_blocks + block) * width
        tl.atomic_add(home + offset + c, tl.sum(weights.to(tl.int64), 0), sem="relaxed")
        slots = home + tl.load(windows + window * 3 + 2) + offset
        for chunk in tl.static_range((BN + BM - 1 + BN - 1) // BN):
            t = chunk * BN + c
            source = t[None, :] - r[:, None]
            skewed = tl.gather(weights, tl.minimum(tl.maximum(source, 0), BN - 1), 1)
            skewed = tl.where((source >= 0) & (source < BN), skewed, 0.0)
            tl.atomic_add(slots + t, tl.sum(skewed.to(tl.int64), 0), mask=t < BN + size - 1, sem="relaxed")
