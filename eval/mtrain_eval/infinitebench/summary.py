"""The two means over InfiniteBench's tasks that papers print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mtrain_eval.infinitebench.catalogue import BY_SPLIT, ENTRIES
from mtrain_eval.sample import Figure
from mtrain_eval.statistics import mean_of

# name -> splits. MInference (Jiang et al. 2024, arXiv 2407.02490) leaves out code_run and math_calc; MTraining (Li et al. 2025,
# arXiv 2510.18830) prints five tasks.
AVERAGES: dict[str, tuple[str, ...]] = {
    "MInference, 10 tasks": tuple(entry.split for entry in ENTRIES if entry.split not in ("code_run", "math_calc")),
    "MTraining, 5 tasks": (
        "longbook_sum_eng",
        "longbook_qa_eng",
        "longbook_choice_eng",
        "longdialogue_qa_eng",
        "code_debug",
    ),
}


def summarise(figures: Mapping[str, Mapping[int, Figure]]) -> dict[str, Any]:
    """The means of `AVERAGES`, where all of their tasks were run on the published data.

    Args:
        figures: {task name: {length: figure of its metric}}; twins may be among them and never count.

    Returns:
        {name: {length as text: figure as dict}}, without names and lengths of which a task is missing.
    """
    found: dict[str, Any] = {}
    for name, splits in AVERAGES.items():
        parts = [figures.get(BY_SPLIT[split].name, {}) for split in splits]
        common = sorted(set.intersection(*(set(part) for part in parts)))
        means = {str(length): mean_of([part[length] for part in parts]) for length in common}
        if means:
            found[name] = {length: asdict(mean) for length, mean in means.items() if mean is not None}
    return found
