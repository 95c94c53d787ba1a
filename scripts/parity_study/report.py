"""The study as tables and pictures, from whatever results are there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mtrain_eval.statistics import Difference, difference_of, mean_difference
from scripts.parity_study.methods import (
    BASE_LEN,
    BASE_STEPS,
    CONTROLS,
    METHODS,
    PAIRS,
    QUESTIONS,
    SEQ_LEN,
    STEPS,
    WARMUP,
    masks,
)
from scripts.parity_study.work import WARM

Results = Mapping[tuple[int, str], dict[str, Any]]
FAR = "256..511"


def report(found: Results, command: str, folder: Path) -> str:
    """Write parity.md with its pictures into a folder and return the text."""
    from scripts.parity_study.pictures import draw

    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(found, folder)
    text = "\n".join(
        [
            "# The published experiment in small",
            "",
            *_setting(found, command),
            "",
            "## Trained sparsely, and evaluated as trained",
            "",
            *_main_table(found),
            "",
            *_reading(found),
            "",
            "## The densely trained model under masks it was not trained for",
            "",
            *_masks_table(found),
            "",
            "## Over training",
            "",
            *_training_table(found),
            "",
            "## By depth of the asked pair",
            "",
            *_depth_table(found),
            "",
            *(f"![{title}]({file})" for title, file in pictures),
            "",
            *_limits(),
        ]
    )
    (folder / "parity.md").write_text(text + "\n")
    return text


def over_seeds(found: Results, method: str, value: Callable[[dict[str, Any]], float]) -> list[float]:
    """A figure of every seed of a method."""
    return [value(result) for (_, name), result in sorted(found.items()) if name == method]


def score(evaluation: str) -> Callable[[dict[str, Any]], float]:
    """The share of right answers under an attention."""

    def of(result: dict[str, Any]) -> float:
        correct = result["evaluations"][evaluation]["correct"]
        return sum(correct) / len(correct)

    return of


def difference_to_dense(found: Results, method: str, evaluation: str) -> Difference | None:
    """Share of right answers of a method minus that of its dense twin (dense attention): paired by prompt in each seed, then
    the mean over the seeds that have both."""
    parts = []
    for (seed, name), result in sorted(found.items()):
        if name == method and (seed, "dense") in found:
            twin = found[seed, "dense"]["evaluations"]["dense"]["correct"]
            parts.append(difference_of(list(zip(twin, result["evaluations"][evaluation]["correct"], strict=True))))
    return mean_difference(parts) if parts else None


def _setting(found: Results, command: str) -> list[str]:
    seeds = sorted({seed for seed, _ in found})
    exam = next(iter(found.values()))["asked"]["exam"]
    count = {method: len(over_seeds(found, method, lambda _: 0.0)) for method in METHODS}
    missing = [f"{method} ({n})" for method, n in count.items() if n < len(seeds)]
    cpu = sum(result.get("cpu_s", 0.0) for result in found.values())
    return [
        f"`{command}`; seeds {', '.join(map(str, seeds))}"
        + (f" (fewer seeds so far: {', '.join(missing)})" if missing else "")
        + f"; torch {torch.__version__} on the CPU, one thread per process; {time.strftime('%Y-%m-%d')}; "
        f"{cpu / 60:.0f} CPU minutes without the warm starts.",
        "",
        f"A model of two layers (119K parameters, 4 heads) learns key-value recall densely at {BASE_LEN} tokens ({BASE_STEPS} "
        f"steps, one warm start per seed). From there it is trained {STEPS} steps at {SEQ_LEN} tokens ({PAIRS} pairs in the "
        f"haystack, {QUESTIONS} questions a row) under each kind of attention: same start, rows, steps and learning rates "
        f"(those marked 4x: {4 * STEPS} steps). "
        f"Then every result answers the same {exam['prompts']} held-out prompts ({exam['prompts'] * QUESTIONS} answers a "
        "seed; guessing gives 1.6 %, guessing among the values present about 4 %), under the attention it was trained with "
        "and under dense attention. The sparse patterns see about a third of the causal pairs; xattention chooses its own "
        "share by its threshold. Figures are means over seeds, with the standard deviation over seeds after the ±. Intervals "
        "of differences are 95 % and come from pairing by prompt; they hold for these seeds.",
    ]


def _limits() -> list[str]:
    return [
        "## What this does not show",
        "",
        "- The needles are single random tokens, new in every row. Whoever summarises blocks (xattention, moba) meets the worst "
        "case, and a mask that was frozen on other rows cannot know where the needles are. Text, where neighbours speak of the "
        "same thing and heads look at the same places in every row, may be kinder to all three; that was not measured.",
        "- The model has two layers and no layer of it stays dense; the papers keep some dense or train for far longer.",
        "- moba chooses for a block of queries at once (see `mtrain/patterns/moba.py`); what that costs is in the second table, "
        "where each query chooses for itself.",
        "- Frozen masks are kept per row of the batch, so there are eight of them, re-used in turn.",
        "- Random columns and slashes are drawn per head and stay the same: the heads of a layer together see more than one "
        "head's budget, and so do those of all other patterns.",
    ]


def _main_table(found: Results) -> list[str]:
    head = "| trained with | density | right, own attention | right, dense attention | own minus dense twin (points) "
    head += "| held-out loss, own | CPU-s to train |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    warm = over_seeds(found, WARM, score("dense"))
    if warm:
        loss = over_seeds(found, WARM, lambda result: result["evaluations"]["dense"]["held_out_loss"])
        difference = _signed(difference_to_dense(found, WARM, "dense"))
        lines.append(
            f"| {WARM} | 1.00 | {_percent(warm)} | {_percent(warm)} | {difference} | {_mean(loss, '{:.3f}')} | |"
        )
    for method in METHODS:
        if not over_seeds(found, method, lambda _: 0.0):
            continue

        def own(key: str, method: str = method) -> list[float]:
            return over_seeds(found, method, lambda result: result["evaluations"][method][key])

        difference = "" if method == "dense" else _signed(difference_to_dense(found, method, method))
        cells = [
            _mean(own("density"), "{:.2f}", spread=False),
            _percent(over_seeds(found, method, score(method))),
            _percent(over_seeds(found, method, score("dense"))),
            difference,
            _mean(own("held_out_loss"), "{:.3f}"),
            _mean(over_seeds(found, method, lambda result: result["train_cpu_s"]), "{:.0f}", spread=False),
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _reading(found: Results) -> list[str]:
    """What the figures say, in words that follow from them."""
    lines = []
    for method in METHODS:
        difference = None if method == "dense" else difference_to_dense(found, method, method)
        if difference is None or difference.low is None or difference.high is None:
            continue
        low, high = 100 * difference.low, 100 * difference.high
        if method in CONTROLS:
            verdict = "fails, as a control must" if high < -10 else "DOES NOT FAIL, although it is a control"
        elif low > -2:
            verdict = "within 2 points of the dense twin"
        elif high < -2:
            verdict = "loses more than 2 points to the dense twin"
        else:
            verdict = "undecided: the interval holds both more and less than 2 points"
        losses = [
            sum(values) / len(values)
            for values in (
                over_seeds(found, name, lambda result, name=name: result["evaluations"][name]["held_out_loss"])
                for name in (method, "dense")
            )
        ]
        lines.append(
            f"- {method}: {100 * difference.value:+.1f} points [{low:+.1f}, {high:+.1f}], {verdict}; held-out loss "
            f"{losses[0]:.3f} against {losses[1]:.3f}."
        )
    fresh = {key: result for key, result in found.items() if "vertical_slash" in result["evaluations"]}
    frozen = over_seeds(fresh, "vertical_slash frozen", score("vertical_slash"))
    if frozen:
        lines.append(
            f"- The model trained with frozen masks, given fresh ones at evaluation: {_percent(frozen)} right."
        )
    return lines


def _masks_table(found: Results) -> list[str]:
    lines = ["| evaluated with | density | right | minus dense (points) |", "|---|---:|---:|---:|"]
    for name in masks():
        having = {key: result for key, result in found.items() if name in result["evaluations"]}
        shares = over_seeds(having, "dense", score(name))
        if shares:
            density = over_seeds(having, "dense", lambda result, name=name: result["evaluations"][name]["density"])
            difference = "" if name == "dense" else _signed(difference_to_dense(having, "dense", name))
            lines.append(f"| {name} | {_mean(density, '{:.2f}', spread=False)} | {_percent(shares)} | {difference} |")
    return lines


def _training_table(found: Results) -> list[str]:
    lines = [
        f"Recall is the share of a row's dense attention that its pattern keeps. The pairs at distance {FAR} without gradient: "
        "in one head; in all four heads of a layer; and, over all evaluation prompts, the pairs of positions that no head ever "
        f"had. Training steps from {WARMUP} on, measured every 20; rows of short packed documents are among them.",
        "",
        "| trained with | recall, first | recall, last | density in training | without gradient, a head | no head of a layer | "
        "never, in 256 prompts |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for method in METHODS:
        if not over_seeds(found, method, lambda _: 0.0):
            continue

        def logged(key: Callable[[dict[str, Any]], float], method: str = method) -> list[float]:
            def mean(result: dict[str, Any]) -> float:
                values = [key(line) for line in result["lines"] if line["step"] > WARMUP and line.get("reach")]
                return sum(values) / len(values) if values else math.nan

            return over_seeds(found, method, mean)

        def recall(place: int, method: str = method) -> list[float]:
            def at(result: dict[str, Any]) -> float:
                values = [line["recall"] for line in result["lines"] if line["step"] > WARMUP and "recall" in line]
                return values[place] if values else math.nan

            return over_seeds(found, method, at)

        cells = [
            _mean(recall(0), "{:.2f}", spread=False),
            _mean(recall(-1), "{:.2f}", spread=False),
            _mean(logged(lambda line: line["density"]), "{:.2f}", spread=False),
            _percent(logged(lambda line: 1 - far_of(line["reach"])), spread=False),
            _percent(logged(lambda line: 1 - far_of(line["reach_any_head"])), spread=False),
            _percent(
                over_seeds(
                    found,
                    method,
                    lambda result, method=method: result["evaluations"][method]["never"][-1],
                ),
                spread=False,
            ),
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def far_of(reach: list[float | None]) -> float:
    """The share in the bucket of the longest distances; a batch of short documents only has none: counted as reached."""
    return 1.0 if reach[-1] is None else reach[-1]


def _depth_table(found: Results) -> list[str]:
    lines = [
        "Right answers in percent under the own attention, by quarter of the haystack (first quarter: farthest from the question).",
        "",
        "| trained with | 0-25 % | 25-50 % | 50-75 % | 75-100 % |",
        "|---|---:|---:|---:|---:|",
    ]
    for method in METHODS:
        cells = []
        for depth in range(4):
            shares = over_seeds(
                found,
                method,
                lambda result, method=method, depth=depth: result["evaluations"][method]["by_depth"][depth],
            )
            cells.append(_percent(shares, spread=False))
        if cells[0]:
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def _mean(values: list[float], form: str, spread: bool = True) -> str:
    if not values:
        return ""
    mean = sum(values) / len(values)
    text = form.format(mean)
    if spread and len(values) > 1:
        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
        text += " ± " + form.format(deviation)
    return text


def _percent(values: list[float], spread: bool = True) -> str:
    return _mean([100 * value for value in values], "{:.1f}", spread)


def _signed(difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = f"{100 * difference.value:+.1f}"
    if difference.low is not None and difference.high is not None:
        text += f" [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
    return text
