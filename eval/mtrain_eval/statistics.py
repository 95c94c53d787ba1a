"""Figures with their error: means over samples, ratios over documents, differences between two runs on the same prompts.

One sample has no known error: its standard error and its interval are None, never NaN. All intervals are 95 %.

Intervals, and why these:

    shares that are 0 or 1     Wilson 1927: never empty at 0 % or 100 %, where the usual one is
    other means                Student's t
    differences of 0/1 pairs   Bonett & Price 2012 (doi 10.3102/1076998611411915), Wald's with one success and one failure
                               added: never empty when no pair disagrees; the p-value is McNemar's exact one
    other differences          paired t
    means of several figures   Zou & Donner 2008 (doi 10.1002/sim.3095), which adds up the squared half-widths of the parts
    ratios                     bootstrap over documents, percentiles widened for few documents as in Hesterberg 2015
                               (doi 10.1080/00031305.2015.1089789)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from mtrain.errors import EvalError
from mtrain_eval.sample import Figure
from mtrain_eval.student import Z, student_t, student_t_share

ROUNDS = 2000  # bootstrap resamples; the error of a percentile's rank is below 0.5 points
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """What changed from run a to run b, on the same prompts.

    Attributes:
        value: mean of b minus a, in the metric's unit.
        n: pairs.
        stderr: of the value; None for one pair.
        low, high: 95 % confidence interval; None for one pair.
        p: probability of a difference this large if there were none (two-sided); None for one pair.
        better, worse: pairs in which b's value is higher or lower.
        mean_a, mean_b: the two means over the pairs.
    """

    value: float
    n: int
    stderr: float | None
    low: float | None
    high: float | None
    p: float | None
    better: int
    worse: int
    mean_a: float
    mean_b: float

    @property
    def clear(self) -> bool:
        """Does the interval leave out zero?"""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


# --- means ---------------------------------------------------------------------------------------------------------------


def mean_figures(rows: Iterable[Row], *, shares: bool = True) -> dict[str, Figure]:
    """Metric name -> mean over the stored rows that have it.

    Args:
        rows: stored rows of one (task, length), each with ``scores``.
        shares: are the scores shares in 0..1? Their intervals stay in 0..1. False: any number.

    Raises:
        EvalError: a score that is not finite.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        for metric, value in row["scores"].items():
            if not math.isfinite(value):
                where = f"{row.get('task', '?')}, length {row.get('length', '?')}, sample {row.get('index', '?')}"
                raise EvalError(
                    f"{where}: score {metric!r} is {value}, expected a finite number; delete that row and resume"
                )
            values.setdefault(metric, []).append(float(value))
    return {metric: mean_figure(found, shares=shares) for metric, found in values.items()}


def mean_figure(values: Sequence[float], *, shares: bool = True) -> Figure:
    """Mean of at least one value, with stderr and interval."""
    x = np.asarray(values, dtype=np.float64)
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Figure(mean, 1)
    stderr = float(x.std(ddof=1)) / math.sqrt(n)
    inside = shares and bool(((x >= 0) & (x <= 1)).all())
    if inside and (is_binary(x) or stderr == 0.0):
        # Equal shares that are not 0 or 1 tell nothing of their spread; no share spreads more than a coin of that mean.
        return Figure(mean, n, stderr, *wilson(mean, n))
    half = student_t(n - 1) * stderr
    low, high = mean - half, mean + half
    return Figure(mean, n, stderr, max(low, 0.0), min(high, 1.0)) if inside else Figure(mean, n, stderr, low, high)


def mean_of(figures: Sequence[Figure]) -> Figure | None:
    """Plain mean of independent figures (tasks of a suite), each weighing the same; None for none.

    Its error is unknown as soon as one part's is.
    """
    if not figures:
        return None
    k = len(figures)
    value, n = sum(figure.value for figure in figures) / k, sum(figure.n for figure in figures)
    if any(figure.stderr is None or figure.low is None or figure.high is None for figure in figures):
        return Figure(value, n)
    stderr = math.sqrt(sum((figure.stderr or 0.0) ** 2 for figure in figures)) / k
    below = math.sqrt(sum((figure.value - (figure.low or 0.0)) ** 2 for figure in figures)) / k
    above = math.sqrt(sum(((figure.high or 0.0) - figure.value) ** 2 for figure in figures)) / k
    return Figure(value, n, stderr, value - below, value + above)


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of n trials (Wilson 1927, eq. for the score interval)."""
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    # The interval touches 0 and 1 exactly where nothing, or everything, was right; rounding must not say otherwise.
    low, high = (0.0 if share == 0 else centre - half), (1.0 if share == 1 else centre + half)
    return max(0.0, low), min(1.0, high)


def is_binary(values: np.ndarray) -> bool:
    """Are all values 0 or 1?"""
    return bool(((values == 0) | (values == 1)).all())


# --- differences ---------------------------------------------------------------------------------------------------------


def paired_difference(a_rows: Iterable[Row], b_rows: Iterable[Row], metric: str) -> Difference | None:
    """b minus a over the samples that both have; None when they share none, or none that has the metric.

    Samples are the same when task, length and index are; their prompts must be the same too.

    Raises:
        EvalError: a sample whose prompts differ.
    """
    pairs = [
        (float(a["scores"][metric]), float(b["scores"][metric]))
        for a, b in pair_rows(a_rows, b_rows)
        if metric in a["scores"] and metric in b["scores"]
    ]
    return difference_of(pairs) if pairs else None


def pair_rows(a_rows: Iterable[Row], b_rows: Iterable[Row]) -> list[tuple[Row, Row]]:
    """Rows of the same task, length and index, in a's order.

    Raises:
        EvalError: the prompts of a pair differ.
    """
    other = {(row["task"], row["length"], row["index"]): row for row in b_rows}
    pairs = []
    for a in a_rows:
        key = (a["task"], a["length"], a["index"])
        b = other.get(key)
        if b is None:
            continue
        if a["prompt_sha256"] != b["prompt_sha256"]:
            raise EvalError(
                f"{key[0]}, length {key[1]}, sample {key[2]}: the two runs asked different prompts, so their answers cannot be "
                "paired; evaluate both with the same --seed, tokenizer and data"
            )
        pairs.append((a, b))
    return pairs


def difference_of(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Mean of b minus a over at least one pair (a, b); shares in 0..1 or any other numbers."""
    a, b = np.asarray(pairs, dtype=np.float64).T
    d, n = b - a, len(pairs)
    value, better, worse = float(d.mean()), int((d > 0).sum()), int((d < 0).sum())
    means = float(a.mean()), float(b.mean())
    if n == 1:
        return Difference(value, 1, None, None, None, None, better, worse, *means)
    stderr = float(d.std(ddof=1)) / math.sqrt(n)
    binary = is_binary(a) and is_binary(b)
    inside = bool(((a >= 0) & (a <= 1) & (b >= 0) & (b <= 1)).all())
    if binary or (inside and stderr == 0.0):
        low, high = _bonett_price(float(d[d > 0].sum()), float(-d[d < 0].sum()), n)
        low, high = min(low, value), max(high, value)
    else:
        half = student_t(n - 1) * stderr
        low, high = value - half, value + half
        if inside:
            low, high = max(low, -1.0), min(high, 1.0)
    if binary:
        p = mcnemar(better, worse)
    elif stderr == 0.0:
        p = 1.0 if value == 0.0 else 0.0
    else:
        p = 1.0 - student_t_share(abs(value) / stderr, n - 1)
    return Difference(value, n, stderr, low, high, p, better, worse, *means)


def mean_difference(parts: Sequence[Difference]) -> Difference | None:
    """Plain mean of the differences of independent tasks, each weighing the same; None for none."""
    if not parts:
        return None
    if len(parts) == 1:
        return parts[0]
    whole = mean_of([Figure(part.value, part.n, part.stderr, part.low, part.high) for part in parts])
    assert whole is not None
    p = None
    if whole.low is not None and whole.high is not None:
        # The p-value that the interval stands for: how far zero lies, in half-widths on its side.
        half = whole.value - whole.low if whole.value > 0 else whole.high - whole.value
        p = 1.0 if whole.value == 0.0 else 2 * NormalDist().cdf(-Z * abs(whole.value) / half) if half > 0 else 0.0
    k = len(parts)
    return Difference(
        value=whole.value,
        n=whole.n,
        stderr=whole.stderr,
        low=whole.low,
        high=whole.high,
        p=p,
        better=sum(part.better for part in parts),
        worse=sum(part.worse for part in parts),
        mean_a=sum(part.mean_a for part in parts) / k,
        mean_b=sum(part.mean_b for part in parts) / k,
    )


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value that two answerers are equally good, from the pairs in which only one is right."""
    n, k = better + worse, min(better, worse)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


def _bonett_price(better: float, worse: float, n: int) -> tuple[float, float]:
    """Interval of (better - worse) / n, Bonett & Price 2012, eq. 5; pairs may be won in part."""
    up, down = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return max(-1.0, up - down - half), min(1.0, up - down + half)


# --- ratios over documents (perplexity) ----------------------------------------------------------------------------------


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> Figure:
    """transform(sum of numerators / sum of denominators) over at least one document, resampling documents.

    Perplexity is ``bootstrap_ratio(nll_sums, token_counts, np.exp)``.

    Args:
        numerators, denominators: one number per document; denominators are positive.
        transform: of the ratio, elementwise; None: the ratio itself.
        seed, rounds: of the resampling; the same documents always give the same interval.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    apply = transform or (lambda ratio: ratio)
    value, n = float(apply(top.sum() / bottom.sum())), len(top)
    if n == 1:
        return Figure(value, 1)
    drawn = _resample(n, seed, rounds)
    return _from_bootstrap(value, n, apply(top[drawn].sum(1) / bottom[drawn].sum(1)))


def bootstrap_ratio_difference(
    a: tuple[Sequence[float], Sequence[float]],
    b: tuple[Sequence[float], Sequence[float]],
    transform: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    seed: int = 0,
    rounds: int = ROUNDS,
) -> Figure:
    """The same for the ratio of b minus that of a, each (numerators, denominators) over the same documents in the same order."""
    apply = transform or (lambda ratio: ratio)
    (top_a, bottom_a), (top_b, bottom_b) = ((np.asarray(t, np.float64), np.asarray(u, np.float64)) for t, u in (a, b))
    value, n = float(apply(top_b.sum() / bottom_b.sum()) - apply(top_a.sum() / bottom_a.sum())), len(top_a)
    if n == 1:
        return Figure(value, 1)
    drawn = _resample(n, seed, rounds)
    spread = apply(top_b[drawn].sum(1) / bottom_b[drawn].sum(1)) - apply(top_a[drawn].sum(1) / bottom_a[drawn].sum(1))
    return _from_bootstrap(value, n, spread)


def _resample(n: int, seed: int, rounds: int) -> np.ndarray:
    """[rounds, n] indices of documents, drawn with replacement."""
    return np.random.default_rng(seed).integers(0, n, size=(rounds, n))


def _from_bootstrap(value: float, n: int, spread: np.ndarray) -> Figure:
    # Percentiles of n documents are too narrow by sqrt((n - 1) / n) and know nothing of Student's t: ask further out.
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student_t(n - 1))
    low, high = np.quantile(spread, [tail, 1 - tail])
    stderr = float(spread.std(ddof=1)) * math.sqrt(n / (n - 1))
    return Figure(value, n, stderr, min(float(low), value), max(float(high), value))
