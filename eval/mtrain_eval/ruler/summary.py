"""RULER's summary figures over tasks and lengths (README of NVIDIA/RULER; Hsieh et al. 2024, section 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TASKS = (
    *("ruler_niah_single_1", "ruler_niah_single_2", "ruler_niah_single_3"),
    *("ruler_niah_multikey_1", "ruler_niah_multikey_2", "ruler_niah_multikey_3"),
    *("ruler_niah_multivalue", "ruler_niah_multiquery"),
    *("ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_1", "ruler_qa_2"),
)
THRESHOLD = 0.856  # Llama-2-7B-chat at 4K
SHORTEST = 4096  # of the published lengths


def weighted(averages: Sequence[float]) -> tuple[float, float]:
    """(wAvg inc, wAvg dec) of averages in the order of their lengths: weights 1..n, and n..1."""
    n = len(averages)
    total = n * (n + 1) / 2
    rising = sum((i + 1) * value for i, value in enumerate(averages)) / total
    falling = sum((n - i) * value for i, value in enumerate(averages)) / total
    return rising, falling


def effective_length(averages: Mapping[int, float]) -> int | None:
    """The longest length from 4K on whose average is at least 85.6 %, to one decimal as it is published; None: none."""
    passed = [
        n for n, value in averages.items() if n >= SHORTEST and round(100 * value, 1) >= round(100 * THRESHOLD, 1)
    ]
    return max(passed, default=None)


def summarise(
    figures: Mapping[str, Mapping[Any, float]],
    sources: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Average per length, weighted averages and effective length.

    Args:
        figures: task -> length -> value in 0..1; lengths are numbers, or numbers as text.
        sources: task -> its source, where known.

    Returns:
        ``average``       length -> plain mean over the tasks that have it
        ``tasks``         length -> how many tasks those are
        ``wavg_inc``, ``wavg_dec``  over all lengths; None unless all lengths have the same tasks
        ``effective_length``        over the lengths from 4K on that have all 13 tasks; None where none passes or has them
        ``synthetic``     tasks whose text is a stand-in: with any here the averages are not RULER scores
        ``local``         tasks on files of the data directory, of which nobody knows whether they are the published ones
        ``name``          what the averages may be called
        ``notes``         what a reader must know, in sentences
    """
    values = {
        task: {int(n): float(v) for n, v in row.items()} for task, row in figures.items() if task in TASKS and row
    }
    lengths = sorted({n for row in values.values() for n in row})
    have = {n: [task for task in TASKS if n in values.get(task, {})] for n in lengths}
    average = {n: sum(values[task][n] for task in have[n]) / len(have[n]) for n in lengths}
    synthetic, local = (
        [task for task in TASKS if task in values and (sources or {}).get(task) == source]
        for source in ("synthetic", "local")
    )
    whole = {n: value for n, value in average.items() if len(have[n]) == len(TASKS)}
    same = bool(lengths) and all(have[n] == have[lengths[0]] for n in lengths)
    rising, falling = weighted(list(average.values())) if same else (None, None)
    complete = bool(lengths) and len(whole) == len(lengths)
    return {
        "average": average,
        "tasks": {n: len(have[n]) for n in lengths},
        "wavg_inc": rising,
        "wavg_dec": falling,
        "effective_length": effective_length(whole),
        "synthetic": synthetic,
        "local": local,
        "name": ("RULER's tasks on local data" if local else "RULER")
        if complete and not synthetic
        else "RULER-shaped tasks",
        "notes": _notes(have, synthetic, local, same),
    }


def _notes(have: Mapping[int, list[str]], synthetic: list[str], local: list[str], same: bool) -> list[str]:
    notes = []
    if synthetic:
        names = ", ".join(task.removeprefix("ruler_") for task in synthetic)
        notes.append(f"Made-up text stands in for the published data in {names}: the averages are not RULER scores.")
    if local:
        names = ", ".join(task.removeprefix("ruler_") for task in local)
        notes.append(f"Averages on local data: the text in {names} is whatever --data-dir holds.")
    partial = [f"{n} ({len(tasks)})" for n, tasks in have.items() if len(tasks) < len(TASKS)]
    if partial:
        notes.append(f"Not all 13 tasks at length {', '.join(partial)}: no RULER score there, and no effective length.")
    if have and not same:
        notes.append("Lengths have different tasks: no weighted averages.")
    if have and max(have) < SHORTEST:
        notes.append("RULER's lengths begin at 4K: no effective length.")
    return notes
