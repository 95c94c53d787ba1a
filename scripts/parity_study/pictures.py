"""The study's pictures: what the models can do, and what their masks kept while they were trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.parity_study.methods import LONGER, METHODS, SEQ_LEN

Results = Mapping[tuple[int, str], dict[str, Any]]


def draw(found: Results, folder: Path) -> list[tuple[str, str]]:
    """Write the pictures; (title, file name) of each."""
    import matplotlib

    matplotlib.use("Agg")
    made = []
    for title, file, paint in (
        ("Right answers by training and evaluation attention, one dot per seed", "parity.png", _answers),
        (
            "Recall, density and far pairs without gradient over training, means over seeds",
            "parity_training.png",
            _lines,
        ),
    ):
        figure = paint(found)
        figure.savefig(folder / file, dpi=110, bbox_inches="tight", metadata={"Software": None})
        made.append((title, file))
    return made


def _answers(found: Results) -> Any:
    from matplotlib.figure import Figure

    methods = [name for name in METHODS if any(method == name for _, method in found)]
    figure = Figure(figsize=(9, 3.6))
    axes = figure.add_subplot()
    for offset, evaluation, colour in ((-0.17, "own", "#1f6f8b"), (0.17, "dense", "#c9a227")):
        for place, method in enumerate(methods):
            shares = []
            for (_, name), result in sorted(found.items()):
                if name == method:
                    correct = result["evaluations"][method if evaluation == "own" else "dense"]["correct"]
                    shares.append(100 * sum(correct) / len(correct))
            label = f"{evaluation} attention at evaluation" if place == 0 else None
            axes.bar(place + offset, sum(shares) / len(shares), 0.32, color=colour, alpha=0.55, label=label)
            axes.plot([place + offset] * len(shares), shares, "o", color="#222222", markersize=3.5)
    axes.set_xticks(range(len(methods)), [name.replace(" ", "\n") for name in methods], fontsize=8)
    axes.set_ylim(0, 104)
    axes.set_ylabel("right answers, %")
    axes.legend(fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0))
    axes.grid(axis="y", alpha=0.3)
    return figure


def _lines(found: Results) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8))
    panels = figure.subplots(1, 4)
    for place, method in enumerate(METHODS):
        if method in LONGER:
            continue
        runs = [result["lines"] for (_, name), result in sorted(found.items()) if name == method]
        if not runs:
            continue
        style = {"label": method, "color": f"C{place}", "linestyle": "--" if "control" in method else "-", "lw": 1.3}
        for axes, key in ((panels[0], "recall"), (panels[1], "density")):
            axes.plot(*_curve(runs, lambda line, key=key: line.get(key)), **style)
        panels[2].plot(*_curve(runs, lambda line: _missing(line, -1)), **style)
        buckets = _by_distance(runs)
        panels[3].plot(np.exp2(np.arange(len(buckets))), buckets, marker=".", **style)
    for axes, title in zip(
        panels,
        (
            "recall of dense attention",
            "density",
            f"no gradient at distance {SEQ_LEN // 2}..{SEQ_LEN - 1}",
            "no gradient, by distance (2^n ..)",
        ),
        strict=True,
    ):
        axes.set_title(title, fontsize=9)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("step", fontsize=8)
    if any(line.get_xdata().size for line in panels[3].lines):
        panels[3].set_xscale("log", base=2)
    panels[3].set_xlabel("tokens between query and key", fontsize=8)
    panels[0].legend(fontsize=6)
    return figure


def _missing(line: dict[str, Any], bucket: int) -> float | None:
    reach = line.get("reach_any_head")
    return None if not reach or reach[bucket] is None else 1 - reach[bucket]


def _curve(runs: list[list[dict[str, Any]]], value: Any) -> tuple[list[int], list[float]]:
    """Mean over runs at every step that has the value."""
    values: dict[int, list[float]] = {}
    for lines in runs:
        for line in lines:
            found = value(line)
            if found is not None:
                values.setdefault(line["step"], []).append(found)
    steps = sorted(values)
    return steps, [sum(values[step]) / len(values[step]) for step in steps]


def _by_distance(runs: list[list[dict[str, Any]]]) -> list[float]:
    """Mean over runs and steps after the warm-up of the share that no head of a layer holds."""
    lines = [line for run in runs for line in run if line.get("reach_any_head") and line["step"] > 20]
    count = len(lines[0]["reach_any_head"]) if lines else 0
    result = []
    for bucket in range(count):
        values = [found for line in lines if (found := _missing(line, bucket)) is not None]
        result.append(sum(values) / len(values) if values else float("nan"))
    return result
