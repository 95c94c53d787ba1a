"""Pictures of a run: needle maps (length x depth), tasks x lengths, perplexity over lengths and over positions.

Colours mean the same in every picture: red 0 %, yellow 50 %, green 100 %; differences from purple (worse) over white to blue
(better). A cell without a sample is hatched, never coloured.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mtrain_eval.results import SHARES, Results, figure, lengths, rows_of, short, suites, task_names
from mtrain_eval.tables import BEYOND, heading

RED_YELLOW_GREEN = ("#d7301f", "#fed976", "#1a9850")
PURPLE_WHITE_BLUE = ("#762a83", "#f7f7f7", "#2166ac")
LINES = ("#1b6ca8", "#d95f02", "#4d9221", "#7b3294")
HATCH = "////"
DOTS = 110  # per inch
# Rows that carry a depth without having been asked for one are sorted into so many bins.
DEPTH_BINS = 10


class View(NamedTuple):
    """What one panel shows: one kind of attention of a run, under a name."""

    name: str
    results: Results
    attention: str


def draw_all(results: Results, output: Path) -> dict[str, str]:
    """Draw every picture that the results hold something for; file name -> caption."""
    drawn: dict[str, tuple[Any, str]] = {}
    for name in needle_tasks(results):
        drawn[f"needle_{name}.png"] = (needle_map(results, name), f"{name}: length x depth of the needle")
    if any(suite in SHARES for suite in suites(results)):
        drawn["tasks.png"] = (task_map(results), "tasks x lengths")
    for name in perplexity_tasks(results):
        drawn[f"{name}.png"] = (perplexity_curve(results, name), f"{name}: over lengths")
        if position_buckets(results, name):
            drawn[f"{name}_positions.png"] = (position_curve(results, name), f"{name}: loss by position")
    for file, (picture, _) in drawn.items():
        save(picture, output / file)
    return {file: caption for file, (_, caption) in drawn.items()}


def as_png(picture: Any) -> bytes:
    """A picture as the bytes of a PNG."""
    buffer = io.BytesIO()
    picture.savefig(buffer, format="png", dpi=DOTS, metadata={"Software": None})
    return buffer.getvalue()


def save(picture: Any, path: Path) -> None:
    """Write a picture, whole or not at all; the same picture gives the same bytes."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(as_png(picture))
    temporary.replace(path)


# --- maps ----------------------------------------------------------------------------------------------------------------


def needle_tasks(results: Results) -> list[str]:
    """Tasks of the needle suite whose samples have a depth."""
    with_depth = {row["task"] for row in results["samples"] if row["depth"] is not None}
    return [name for name in task_names(results, "niah") if name in with_depth]


def needle_grid(results: Results, attention: str, task: str) -> dict[tuple[int, float], float]:
    """(length, depth) -> mean of the task's metric over the samples there."""
    metric = results["tasks"][task]["metric"]
    cells: dict[tuple[int, float], list[float]] = {}
    for row in rows_of(results, attention, task):
        if row["depth"] is not None and metric in row["scores"]:
            cells.setdefault((row["length"], depth_of_row(row)), []).append(row["scores"][metric])
    return {key: sum(values) / len(values) for key, values in cells.items()}


def depth_of_row(row: Mapping[str, Any]) -> float:
    """The depth asked for; where there is none, the real one in the middle of its bin."""
    asked = row["meta"].get("depth_asked")
    if asked is not None:
        return float(asked)
    return (min(int(row["depth"] * DEPTH_BINS), DEPTH_BINS - 1) + 0.5) / DEPTH_BINS


def needle_map(results: Results, task: str, views: Sequence[View] | None = None) -> Any:
    """Length across, depth downwards; a panel per view (default: per attention), and their difference when there are two."""
    views = own_views(results) if views is None else views
    grids = {view.name: needle_grid(view.results, view.attention, task) for view in views}
    across = sorted({length for view in views for length in lengths_of(view.results, task)})
    down = sorted({depth for grid in grids.values() for _, depth in grid})
    values = {
        name: np.array([[grid.get((length, depth), np.nan) for length in across] for depth in down])
        for name, grid in grids.items()
    }
    labels = [f"{100 * depth:.0f} %" for depth in down]
    return _panels(
        results,
        values,
        across,
        labels,
        f"{task} ({results['tasks'][task]['source']}): right answers in %",
        "depth of the needle",
    )


def task_map(results: Results, views: Sequence[View] | None = None) -> Any:
    """Tasks downwards, lengths across; panels as in `needle_map`. Tasks and lengths are those of the first view's run."""
    views = own_views(results) if views is None else views
    names = [name for suite in suites(results) if suite in SHARES for name in task_names(results, suite)]
    across = sorted({length for suite in suites(results) if suite in SHARES for length in lengths(results, suite)})
    values = {}
    for view in views:
        found = [[figure(view.results, view.attention, name, length) for length in across] for name in names]
        values[view.name] = np.array([[np.nan if one is None else one.value for one in row] for row in found])
    labels = [name + ("*" if results["tasks"][name]["source"] == "synthetic" else "") for name in names]
    title = "share of right answers in %" + (
        " (* synthetic text)" if any(label.endswith("*") for label in labels) else ""
    )
    return _panels(results, values, across, labels, title, "")


def own_views(results: Results) -> list[View]:
    """One per kind of attention of a run."""
    return [View(attention, results, attention) for attention in results["attentions"]]


def lengths_of(results: Results, task: str) -> list[int]:
    """Lengths at which one task was asked, those that do not fit included."""
    found = {row["length"] for row in results["samples"] if row["task"] == task}
    return sorted(found | {cell["length"] for cell in results["does_not_fit"] if cell["task"] == task})


def _panels(
    results: Results,
    values: Mapping[str, np.ndarray],
    across: Sequence[int],
    down: Sequence[str],
    title: str,
    y_label: str,
) -> Any:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    panels: list[tuple[str, np.ndarray, tuple[str, ...], float]] = [
        (attention, 100 * grid, RED_YELLOW_GREEN, 0.0) for attention, grid in values.items()
    ]
    if len(values) == 2:
        (first, a), (second, b) = values.items()
        panels.append((f"{second} - {first}", 100 * (b - a), PURPLE_WHITE_BLUE, -100.0))
    size = (2.2 + max(2.4, 0.62 * len(across)) * len(panels), 1.6 + max(1.2, 0.3 * len(down)))
    picture = Figure(figsize=size, layout="constrained")
    axes = picture.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for i, (axis, (name, grid, colours, lowest)) in enumerate(zip(axes, panels, strict=True)):
        colour_map = LinearSegmentedColormap.from_list(name, colours)
        image = axis.pcolormesh(
            np.ma.masked_invalid(grid), cmap=colour_map, vmin=lowest, vmax=100.0, edgecolors="white", linewidth=1
        )
        _fill(axis, grid, lowest)
        axis.set_title(name, fontsize=10)
        axis.set_xticks(np.arange(len(across)) + 0.5, [heading(results, length) for length in across], fontsize=8)
        axis.set_xlabel(_length_label(results, across), fontsize=9)
        axis.set_yticks(np.arange(len(down)) + 0.5, list(down), fontsize=8)
        if i == 0:
            axis.set_ylabel(y_label, fontsize=9)
            axis.invert_yaxis()  # shared: the start of the text, and the first task, on top
        picture.colorbar(image, ax=axis, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7)
    picture.suptitle(title, fontsize=11)
    return picture


def _fill(axis: Any, grid: np.ndarray, lowest: float) -> None:
    """Numbers (in %) into the cells, hatches where there is no sample."""
    from matplotlib.patches import Rectangle

    for (row, column), value in np.ndenumerate(grid):
        if np.isnan(value):
            cell = Rectangle((column, row), 1, 1, facecolor="#eeeeee", edgecolor="#999999", hatch=HATCH, linewidth=0)
            axis.add_patch(cell)
        else:
            text = f"{round(value):+d}" if lowest < 0 and round(value) else str(round(value))
            strong = abs(value) > 60 if lowest < 0 else value < 20 or value > 85
            colour = "white" if strong else "black"
            axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=colour)


# --- curves --------------------------------------------------------------------------------------------------------------


def perplexity_tasks(results: Results) -> list[str]:
    """Tasks that measure no share, and have a figure at some length."""
    with_figures = {name for per_task in results["figures"].values() for name in per_task}
    names = [name for suite in suites(results) if suite not in SHARES for name in task_names(results, suite)]
    return [name for name in names if name in with_figures]


def perplexity_curve(results: Results, task: str) -> Any:
    """The task's main figure over lengths, with its 95 % interval, one line per attention."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6, 3.8), layout="constrained")
    axis = picture.subplots()
    metric, across = results["tasks"][task]["metric"], lengths_of(results, task)
    for number, attention in enumerate(results["attentions"]):
        found = [(length, one) for length in across if (one := figure(results, attention, task, length))]
        if not found:
            continue
        # A little apart, so that intervals of two lines do not hide each other.
        x, y = [length * 1.015**number for length, _ in found], [one.value for _, one in found]
        below = [0.0 if one.low is None else one.value - one.low for _, one in found]
        above = [0.0 if one.high is None else one.high - one.value for _, one in found]
        axis.errorbar(
            x,
            y,
            yerr=[below, above],
            label=attention,
            color=LINES[number % len(LINES)],
            marker="o",
            capsize=3,
            alpha=0.85,
        )
    _length_axis(results, axis, across)
    axis.set_ylabel(metric)
    axis.set_title(_curve_title(results, task, across), fontsize=11)
    axis.legend()
    return picture


def position_curve(results: Results, task: str) -> Any:
    """Mean loss by position in the document, at the greatest length that has figures, one line per attention."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(6, 3.8), layout="constrained")
    axis = picture.subplots()
    buckets = position_buckets(results, task)
    longest = max(buckets)
    for number, (attention, points) in enumerate(buckets[longest].items()):
        x, y = zip(*sorted(points.items()), strict=True)
        axis.plot(x, y, label=attention, color=LINES[number % len(LINES)], marker="o")
    _length_axis(results, axis, sorted({end for points in buckets[longest].values() for end in points}))
    axis.set_xlabel("position (end of the bucket)")
    axis.set_ylabel("loss in nats per token")
    axis.set_title(f"{_curve_title(results, task, [longest])} at {short(longest)}: loss by position", fontsize=11)
    axis.legend()
    return picture


def position_buckets(results: Results, task: str) -> dict[int, dict[str, dict[int, float]]]:
    """Length -> attention -> end of bucket -> mean loss there, from figures called ``nll_to_<end>``."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for attention in results["attentions"]:
        for length, metrics in results["figures"].get(attention, {}).get(task, {}).items():
            points = {
                int(metric.removeprefix("nll_to_")): one["value"]
                for metric, one in metrics.items()
                if metric.startswith("nll_to_")
            }
            if points:
                found.setdefault(int(length), {})[attention] = points
    return found


def _curve_title(results: Results, task: str, asked: Sequence[int]) -> str:
    """The task, what its text is, and of how many samples each point is."""
    counts = {len(rows_of(results, attention, task, length)) for attention in results["attentions"] for length in asked}
    counts.discard(0)
    number = f", n={min(counts)}" + (f"-{max(counts)}" if len(counts) > 1 else "") if counts else ""
    return f"{task} ({results['tasks'][task]['source']}{number})"


def _length_axis(results: Results, axis: Any, across: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(across), [heading(results, length) for length in across])
    axis.minorticks_off()
    axis.set_xlabel(_length_label(results, across))
    axis.grid(True, alpha=0.3)


def _length_label(results: Results, across: Sequence[int]) -> str:
    beyond = any(heading(results, length).endswith(BEYOND) for length in across)
    return "length in tokens" + (f" ({BEYOND} beyond training)" if beyond else "")
