"""Selection by threshold instead of by sorting: which scores of a row are needed to reach a mass, or are its largest.

The set to keep is the first so many of the row sorted by (score, largest first; index, smallest first). So it is everything above
one threshold and the first few that equal it, and the threshold is found digit by digit (base 16): every pass over the scores adds
up mass and number of the scores above 15 candidates. Scores are integers, so the sums are exact in any order and the answer is
that of a sort, to the bit. Nothing is asked of the device and no row is ever moved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_kernels.gpu.probe import start

# Digits of base 16; scores are below 2^53, so that nothing is above the last candidate.
DIGITS = 14
BLOCK, RUNS = 512, 8  # scores that a program looks at in one go, and how often it does
WARPS = 8


@triton.jit
def _narrow(state, totals, step, target, floor, cap):
    """(threshold so far, mass above its range, count above its range), narrowed by the sums of the last pass."""
    j = tl.arange(0, 16)
    mass, count = tl.load(totals + j * 2), tl.load(totals + j * 2 + 1)
    # The first score below candidate j is still kept: the threshold is below that candidate.
    kept = ((mass < target) | (count < floor)) & (count < cap)
    digit = tl.sum(((j > 0) & (kept == 0)).to(tl.int64), 0)
    above = j == digit + 1
    mass_above, count_above = tl.sum(tl.where(above, mass, 0), 0), tl.sum(tl.where(above, count, 0), 0)
    last = digit == 15
    low = tl.load(state) + digit * step
    return low, tl.where(last, tl.load(state + 1), mass_above), tl.where(last, tl.load(state + 2), count_above)


@triton.jit
def _store(state, low, mass, count):
    tl.store(state, low)
    tl.store(state + 1, mass)
    tl.store(state + 2, count)


@triton.jit
def sums_kernel(
    scores, before, after, last_totals, totals, target, floor, cap, size, last_step, step,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """Adds to totals int64 [units, 16, 2]: mass and count of a row's scores from threshold + j * step on, j = 0 .. 15."""
    run, unit = tl.program_id(0), tl.program_id(1).to(tl.int64)
    j = tl.arange(0, 16)
    candidates = j.to(tl.int64) * step
    if not FIRST:
        low, mass_above, count_above = _narrow(
            before + unit * 3, last_totals + unit * 32, last_step, tl.load(target + unit), tl.load(floor + unit),
            tl.load(cap + unit),
        )  # fmt: skip
        candidates += low
        if run == 0:
            _store(after + unit * 3, low, mass_above, count_above)
    mass, count = tl.zeros([16], tl.int64), tl.zeros([16], tl.int64)
    for part in range(RUNS):
        index = (run * RUNS + part) * BLOCK + tl.arange(0, BLOCK)
        score = tl.load(scores + unit * size + index, mask=index < size, other=-1)
        above = score[:, None] >= candidates[None, :]
        mass += tl.sum(tl.where(above, score[:, None], 0), 0)
        count += tl.sum(above.to(tl.int64), 0)
    tl.atomic_add(totals + unit * 32 + j * 2, mass, sem="relaxed")
    tl.atomic_add(totals + unit * 32 + j * 2 + 1, count, sem="relaxed")


@triton.jit
def last_kernel(before, after, totals, target, floor, cap):
    """The threshold itself, and the mass and number of the scores above it."""
    unit = tl.program_id(0).to(tl.int64)
    low, mass, count = _narrow(
        before + unit * 3, totals + unit * 32, 1, tl.load(target + unit), tl.load(floor + unit), tl.load(cap + unit)
    )
    _store(after + unit * 3, low, mass, count)


def choose(scores: Tensor, target: Tensor, floor: Tensor, cap: Tensor) -> Tensor:
    """bool like ``scores``: per row the fewest scores, largest first (equal ones: lower index first), that reach the target.

    Args:
        scores: int64 [n, size], from 0, each and every row sum below 2^53.
        target: int64 [n], the sum to reach, at most that of the row.
        floor: int64 [n], keep at least so many. cap: int64 [n], keep at most so many.

    Static shapes, no host synchronisation; temporary memory is 8 bytes per score.
    """
    units, size = scores.shape
    scores = scores.contiguous()
    state = torch.zeros(DIGITS + 1, units, 3, dtype=torch.int64, device=scores.device)
    totals = torch.zeros(DIGITS, units, 16, 2, dtype=torch.int64, device=scores.device)
    limits = {"target": target.contiguous(), "floor": floor.contiguous(), "cap": cap.contiguous()}
    runs = min(RUNS, -(-size // BLOCK))
    grid = (-(-size // (BLOCK * runs)), units, 1)
    for digit in range(DIGITS):
        previous = max(0, digit - 1)
        start(
            sums_kernel, grid, scores=scores, before=state[previous], after=state[digit],
            last_totals=totals[previous], totals=totals[digit], size=size,
            last_step=16 ** (DIGITS - 1 - previous), step=16 ** (DIGITS - 1 - digit), FIRST=digit == 0,
            BLOCK=BLOCK, RUNS=runs, num_warps=WARPS, **limits,
        )  # fmt: skip
    ends = {"before": state[DIGITS - 1], "after": state[DIGITS], "totals": totals[DIGITS - 1]}
    start(last_kernel, (units, 1, 1), **ends, num_warps=1, **limits)
    threshold, mass, count = state[DIGITS].unbind(1)
    # How many scores equal to the threshold are kept. At threshold 0 they add no mass.
    missing = (target - mass).clamp_(min=0)
    wanted = torch.where(threshold > 0, -(-missing // threshold.clamp(min=1)), 0)
    ties = torch.minimum(torch.maximum(wanted, floor - count), cap - count)
    equal = scores == threshold[:, None]
    return (scores > threshold[:, None]) | (equal & (equal.cumsum(1) <= ties[:, None]))
