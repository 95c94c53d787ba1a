"""The quickstart's report: how the runs went, what the models can do, and whether the promises held."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrain.metrics import read_lines
from mtrain.quickstart.measure import DEPTH_BINS, Exam, Result

_BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Promise:
    """One bar of the quickstart: what was asked and what came out."""

    text: str
    measured: str
    held: bool


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """A curve in one line of text, the values averaged into at most ``width`` bins."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def describe_run(title: str, output: Path, seconds: float) -> list[str]:
    """Loss curve, speed, density, recall and imbalance of one run, from its run.jsonl."""
    lines = read_lines(output / "run.jsonl", having="loss")
    losses = [line["loss"] for line in lines]
    text = [f"{title}: {lines[-1]['step']} steps, {lines[-1]['tokens']:,} tokens, {seconds:.0f} s with start-up"]
    text.append(f"  loss   {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}")
    measured = [line["validation_loss"] for line in read_lines(output / "run.jsonl", having="validation_loss")]
    if held_out := [loss for loss in measured if loss is not None]:  # None stands for one that was not finite
        text.append(f"  held-out loss {held_out[0]:.3f} {sparkline(held_out)} {held_out[-1]:.3f}")
    speed = sorted(line["tokens_per_s"] for line in lines)[len(lines) // 2]
    facts = [f"{speed:,.0f} tokens/s (median)"]
    for key, name in (("density", "density"), ("recall", "recall")):
        values = [line[key] for line in lines if key in line]
        if values:
            facts.append(f"{name} {sum(values) / len(values):.3f}")
    for key, name in (("worker_imbalance", "worker imbalance"), ("step_imbalance", "step imbalance")):
        values = [line[key] for line in lines if key in line]
        if values:
            facts.append(f"{name} {sum(values) / len(values):.3f}")
    return [*text, "  " + ", ".join(facts), f"  files  {output}"]


def accuracy_table(results: Mapping[str, Result], lengths: Sequence[int]) -> list[str]:
    """Markdown: a row per subject, accuracy by length, then by depth at the last length, then held-out loss."""
    depths = [f"depth {100 * i // DEPTH_BINS}-{100 * (i + 1) // DEPTH_BINS}%" for i in range(DEPTH_BINS)]
    head = ["model, attention at evaluation", *(str(length) for length in lengths), *depths, "held-out loss", "density"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for label, result in results.items():
        cells = [f"{100 * result.accuracy[length]:.1f}" for length in lengths]
        cells += [f"{100 * value:.0f}" for value in result.by_depth]
        cells += [f"{result.text_loss:.4f}", "" if result.density is None else f"{result.density:.3f}"]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def promises(
    results: Mapping[str, Result], final: int, before: Sequence[str], sparse: Sequence[str], dense: str
) -> list[Promise]:
    """The bars of the main job.

    Args:
        results: by label.
        final: the extended length (tokens).
        before: labels of the model before the extension.
        sparse: labels of the sparsely extended model, under sparse and under dense attention.
        dense: label of the densely extended twin.
    """

    def accuracy(label: str) -> float:
        return 100 * results[label].accuracy[final]

    found = [Promise(f"retrieval at {final} below 50 %: {b}", f"{accuracy(b):.1f} %", accuracy(b) < 50) for b in before]
    for label in sparse:
        gap = accuracy(dense) - accuracy(label)
        found.append(
            Promise(f"retrieval at {final} at least 90 %: {label}", f"{accuracy(label):.1f} %", accuracy(label) >= 90)
        )
        found.append(Promise(f"within 2 points of the dense twin: {label}", f"{gap:+.1f} behind", gap <= 2))
        ratio = results[label].text_loss / results[dense].text_loss - 1
        found.append(
            Promise(f"held-out loss within 1 % of the dense twin: {label}", f"{100 * ratio:+.2f} %", ratio <= 0.01)
        )
    return found


def write_report(
    path: Path,
    runs: Sequence[Sequence[str]],
    results: Mapping[str, Result],
    exam: Exam,
    bars: Sequence[Promise],
    wall: float,
) -> str:
    """Assemble the report, write it as markdown (and the raw figures as JSON beside it), and return it."""
    answers = next(iter(results.values())).answers
    parts = ["# Quickstart: a context extension in miniature", ""]
    for lines in runs:
        parts += ["```", *lines, "```"]
    parts += [
        "",
        f"Retrieval accuracy in percent by context length ({exam.pairs} key-value pairs hidden in held-out library source, "
        f"{exam.questions} questions a prompt; {answers} answers at {exam.lengths[-1]}, chance 1.6 %), and mean loss of held-out "
        f"source text at {exam.lengths[-1]} tokens (nats per byte):",
        "",
        *accuracy_table(results, exam.lengths),
        "",
        *(f"- [{'x' if bar.held else ' '}] {bar.text}: {bar.measured}" for bar in bars),
        "",
        f"Whole quickstart: {wall / 60:.1f} minutes.",
    ]
    text = "\n".join(parts)
    path.write_text(text + "\n")
    raw: dict[str, Any] = {label: vars(result) for label, result in results.items()}
    path.with_suffix(".json").write_text(
        json.dumps({"results": raw, "promises": [vars(bar) for bar in bars]}, indent=1)
    )
    return text
