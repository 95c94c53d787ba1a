"""Figures and their intervals: worked by hand, against tables, and by how often they hold the truth."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from mtrain.errors import EvalError
from mtrain_eval.sample import Figure
from mtrain_eval.statistics import (
    bootstrap_ratio,
    bootstrap_ratio_difference,
    difference_of,
    mcnemar,
    mean_difference,
    mean_figure,
    mean_figures,
    mean_of,
    paired_difference,
    wilson,
)
from mtrain_eval.student import student_t, student_t_share


def row(
    index: int, score: float, *, prompt: str = "p", task: str = "t", length: int = 64, **scores: float
) -> dict[str, Any]:
    return {
        "task": task,
        "length": length,
        "index": index,
        "prompt_sha256": f"{prompt}{index}",
        "scores": {"match": score, **scores},
    }


def test_student_t_is_the_table() -> None:
    # two-sided 95 % points of any printed table
    table = {
        1: 12.706,
        2: 4.303,
        3: 3.182,
        4: 2.776,
        5: 2.571,
        9: 2.262,
        10: 2.228,
        30: 2.042,
        100: 1.984,
        10**6: 1.960,
    }
    for degrees, point in table.items():
        assert student_t(degrees) == pytest.approx(point, abs=6e-4)
        assert student_t_share(student_t(degrees), degrees) == pytest.approx(0.95, abs=1e-6)
    assert student_t(1000) == pytest.approx(student_t(1001), abs=1e-5)  # where the series hands over


def test_wilson_by_hand() -> None:
    # 8 of 10: (0.8 + 0.19207) / 1.38415 -+ 1.95996 / 1.38415 * sqrt(0.016 + 0.0096037)
    low, high = wilson(0.8, 10)
    assert (low, high) == (pytest.approx(0.49016, abs=1e-5), pytest.approx(0.94332, abs=1e-5))
    assert wilson(0.0, 10) == (0.0, pytest.approx(0.27753, abs=1e-5))
    assert wilson(1.0, 10) == (pytest.approx(0.72247, abs=1e-5), 1.0)


def test_means_by_hand() -> None:
    figures = mean_figures([row(0, 1.0, f1=0.5), row(1, 0.0, f1=0.7), row(2, 1.0), row(3, 1.0, f1=0.3)])
    match, f1 = figures["match"], figures["f1"]
    assert (match.value, match.n) == (0.75, 4)
    assert match.stderr == pytest.approx(math.sqrt(0.25 / 4))  # variance of 1, 0, 1, 1 with n - 1 is 0.25
    assert (match.low, match.high) == pytest.approx(wilson(0.75, 4))
    assert (f1.value, f1.n) == (pytest.approx(0.5), 3)
    assert f1.stderr == pytest.approx(0.2 / math.sqrt(3))
    assert f1.low == pytest.approx(0.5 - 4.30265273 * 0.2 / math.sqrt(3))
    assert f1.high == pytest.approx(0.5 + 4.30265273 * 0.2 / math.sqrt(3))


def test_intervals_of_shares_stay_inside_and_others_do_not() -> None:
    shares = mean_figure([0.9, 1.0, 0.2])
    assert shares.high == 1.0 and shares.low is not None and shares.low >= 0
    same = mean_figure([0.75, 0.75, 0.75])
    assert same.stderr == 0.0 and same.low is not None and same.low < 0.75 < same.high  # type: ignore[operator]
    free = mean_figure([0.9, 1.0, 0.2], shares=False)
    assert free.high is not None and free.high > 1.0
    nll = mean_figure([2.0, 2.5, 3.0])
    assert nll.high == pytest.approx(2.5 + 4.30265273 * 0.5 / math.sqrt(3))


def test_one_sample_has_no_error_and_none_no_figure() -> None:
    assert mean_figures([row(0, 1.0)]) == {"match": Figure(1.0, 1)}
    assert mean_figures([]) == {}
    assert bootstrap_ratio([3.0], [2.0]) == Figure(1.5, 1)
    one = paired_difference([row(0, 1.0)], [row(0, 0.0)], "match")
    assert one is not None and (one.value, one.n, one.stderr, one.low, one.p) == (-1.0, 1, None, None, None)
    assert not one.clear
    assert mean_of([]) is None and mean_difference([]) is None
    assert mean_of([Figure(0.5, 1), mean_figure([1.0, 0.0])]) == Figure(0.5, 3)


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(EvalError, match="t, length 64, sample 3: score 'match' is nan"):
        mean_figures([row(0, 1.0), row(3, float("nan"))])


def test_mean_of_figures_by_hand() -> None:
    whole = mean_of([Figure(0.5, 10, 0.1, 0.3, 0.8), Figure(1.0, 10, 0.0, 0.7, 1.0)])
    assert whole is not None
    assert (whole.value, whole.n, whole.stderr) == (0.75, 20, pytest.approx(0.05))
    assert whole.low == pytest.approx(0.75 - math.sqrt(0.2**2 + 0.3**2) / 2)
    assert whole.high == pytest.approx(0.75 + math.sqrt(0.3**2) / 2)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * (1 + 8) / 256)
    assert mcnemar(4, 4) == 1.0


def test_binary_differences_by_hand() -> None:
    a = [row(i, value) for i, value in enumerate([1, 1, 1, 0, 0, 1, 0, 1])]
    b = [row(i, value) for i, value in enumerate([1, 0, 1, 1, 0, 0, 0, 0])]
    found = paired_difference(a, b, "match")
    assert found is not None
    assert (found.value, found.n, found.better, found.worse) == (-0.25, 8, 1, 3)
    assert (found.mean_a, found.mean_b) == (5 / 8, 3 / 8)
    assert found.p == pytest.approx(2 * (1 + 4) / 16)
    # one success and one failure more: 2 / 10 against 4 / 10
    half = 1.959964 * math.sqrt((0.2 + 0.4 - 0.04) / 10)
    assert (found.low, found.high) == (pytest.approx(-0.2 - half), pytest.approx(-0.2 + half))
    assert not found.clear


def test_differences_of_shares_by_hand() -> None:
    found = difference_of([(0.5, 0.75), (0.25, 0.25), (0.5, 1.0)])
    assert found.value == pytest.approx(0.25)
    assert found.stderr == pytest.approx(0.25 / math.sqrt(3))
    assert found.high == pytest.approx(0.25 + 4.30265273 * 0.25 / math.sqrt(3))
    # t = sqrt(3) with two degrees of freedom: 1 - t / sqrt(2 + t^2)
    assert found.p == pytest.approx(1 - math.sqrt(3 / 5))
    equal = difference_of([(0.5, 0.5), (0.25, 0.25)])
    assert equal.value == 0 and equal.p == 1.0 and equal.low is not None and equal.low < 0 < equal.high  # type: ignore[operator]


def test_pairs_are_the_same_sample_with_the_same_prompt() -> None:
    a = [row(0, 1.0), row(1, 0.0), row(2, 1.0, task="u"), row(3, 1.0, length=128)]
    b = [row(3, 0.0), row(1, 1.0), row(2, 0.0), row(0, 1.0)]
    found = paired_difference(a, b, "match")
    assert found is not None and (found.n, found.value) == (2, 0.5)
    assert paired_difference(a, b, "other") is None
    with pytest.raises(EvalError, match="t, length 64, sample 1: the two runs asked different prompts"):
        paired_difference(a, [row(1, 1.0, prompt="q")], "match")


def test_mean_difference_by_hand() -> None:
    first, second = difference_of([(0.0, 0.2), (0.0, 0.4)]), difference_of([(2.0, 1.0), (2.0, 3.0)])
    whole = mean_difference([first, second])
    assert whole is not None
    assert whole.value == pytest.approx(0.15)
    assert whole.stderr == pytest.approx(math.sqrt(0.1**2 + 1.0**2) / 2)
    assert (whole.n, whole.better, whole.worse) == (4, 3, 1)
    assert whole.mean_b - whole.mean_a == pytest.approx(whole.value)


def test_ratio_by_hand_and_repeatable() -> None:
    nll, tokens = [200.0, 330.0, 90.0], [100.0, 150.0, 50.0]
    found = bootstrap_ratio(nll, tokens, np.exp)
    assert found.value == pytest.approx(math.exp(620 / 300))
    assert found == bootstrap_ratio(nll, tokens, np.exp)
    assert found.low is not None and found.low < found.value < found.high  # type: ignore[operator]
    assert found.low >= math.exp(1.8) - 1e-12 and found.high <= math.exp(2.2) + 1e-12  # type: ignore[operator]
    same = bootstrap_ratio_difference((nll, tokens), (nll, tokens), np.exp)
    assert (same.value, same.stderr, same.low, same.high) == (0.0, 0.0, 0.0, 0.0)
    worse = bootstrap_ratio_difference((nll, tokens), ([210.0, 345.0, 95.0], tokens), np.exp)
    assert worse.value == pytest.approx(math.exp(650 / 300) - math.exp(620 / 300))
    assert worse.low is not None and worse.low > 0  # every document is worse: paired, that is clear


def share_inside(truth: float, figures: list[Any]) -> float:
    return sum(figure.low <= truth <= figure.high for figure in figures) / len(figures)


ROUNDS = 1500  # a coverage of 95 % is then known to 1.1 points (two standard errors)


@pytest.mark.parametrize(("truth", "n"), [(0.5, 10), (0.95, 25), (0.99, 100)])
def test_coverage_of_shares(truth: float, n: int) -> None:
    draws = np.random.default_rng(1).random((ROUNDS, n)) < truth
    assert share_inside(truth, [mean_figure(draw) for draw in draws.astype(float)]) > 0.92


def test_coverage_of_means_of_tasks() -> None:
    truths = np.array([1.0, 0.98, 0.7, 0.4])
    rng = np.random.default_rng(2)
    found = []
    for _ in range(ROUNDS):
        found.append(mean_of([mean_figure((rng.random(20) < truth).astype(float)) for truth in truths]))
    assert 0.93 < share_inside(truths.mean(), found) < 0.995


@pytest.mark.parametrize("n", [8, 40])
def test_coverage_of_paired_differences(n: int) -> None:
    rng = np.random.default_rng(3)
    both, only_b, only_a = 0.8, 0.03, 0.1
    found = []
    for _ in range(ROUNDS):
        u = rng.random(n)
        a = (u < both) | ((u >= both) & (u < both + only_a))
        b = (u < both) | ((u >= both + only_a) & (u < both + only_a + only_b))
        found.append(difference_of(np.stack([a, b], 1).astype(float).tolist()))
    assert 0.93 < share_inside(only_b - only_a, found) <= 1.0


@pytest.mark.parametrize("n", [5, 20])
def test_coverage_of_perplexity(n: int) -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(800, 1200, size=(300, n)).astype(float)
    nll = tokens * rng.normal(2.0, 0.3, size=(300, n))
    found = [bootstrap_ratio(x, y, np.exp, rounds=400) for x, y in zip(nll, tokens, strict=True)]
    assert share_inside(math.exp(2.0), found) > 0.9
