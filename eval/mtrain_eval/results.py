"""The one file a run ends in, results.json, and what it says in short: figures, means of suites, costs, every answer.

    {"format": 1, "run": {...}, "attentions": [...], "tasks": {task: {suite, metric, source}},
     "figures": {attention: {task: {length: {metric: figure}}}}, "does_not_fit": [{attention, task, length, reason}],
     "summary": {attention: {"suites": ..., "costs": ..., "ruler": ..., "infinitebench": ...}}, "samples": [rows]}

Lengths are strings there, because they are keys. `mtrain eval --compare` and the report read nothing else.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtrain.errors import EvalError
from mtrain_eval.sample import Figure, Task
from mtrain_eval.statistics import mean_figures, mean_of
from mtrain_eval.store import DOES_NOT_FIT, ROW_KEYS, Cell, Store, write_whole

FORMAT = 1
FILE = "results.json"
Results = dict[str, Any]

# Suites whose tasks all measure a share of right answers, so that their mean says something.
SHARES = ("ruler", "niah", "infinitebench", "retrieval")
# How the published benchmark is called, and how many tasks its score is a mean of.
PUBLISHED = {"ruler": ("RULER", 13), "infinitebench": ("InfiniteBench", 12)}


# --- writing -------------------------------------------------------------------------------------------------------------


def finish(output: Path, tasks: Sequence[Task]) -> Results:
    """Turn the rows of a run directory into results.json, results.md, pictures and report.html.

    Args:
        output: the run's directory, with run.json and the rows.
        tasks: those asked. Rows of other tasks that earlier commands left in the directory count too where a plain mean of
            their scores will do; else they are named under "left_out".

    Returns:
        What results.json holds.

    Raises:
        EvalError: there is no run in the directory, or a score is no number.
    """
    results = build(read_json(output / "run.json", "a directory that mtrain eval wrote"), output, tasks)
    text = json.dumps(results, allow_nan=False, indent=1) + "\n"
    write_whole(output / FILE, text)
    results = json.loads(text)  # what others will read: all keys are text
    # Both read this module; and matplotlib is wanted only when there is something to draw.
    importlib.import_module("mtrain_eval.html").publish(output, results)
    return results


@dataclass(frozen=True)
class _Described:
    """What this file needs of a task; of one asked by an earlier command, only what run.json remembers is known."""

    name: str
    suite: str
    metric: str
    source: str
    task: Task | None = None

    def can_aggregate(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """A task that is not at hand has figures only when they are means of its scores."""
        return self.task is not None or all(DOES_NOT_FIT in row or self.metric in row["scores"] for row in rows)

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """Metric name -> figure."""
        return mean_figures(rows) if self.task is None else self.task.aggregate(rows)


def _described(name: str, known: Mapping[str, Task], run: Mapping[str, Any]) -> _Described | None:
    if name in known:
        task = known[name]
        return _Described(name, task.suite, task.metric, task.source, task)
    about = run.get("tasks", {}).get(name)
    return None if about is None else _Described(name, about["suite"], about["metric"], about["source"])


def build(run: Mapping[str, Any], output: Path, tasks: Sequence[Task]) -> Results:
    """The same as a dict, written nowhere."""
    known = {task.name: task for task in tasks}
    results: Results = {
        "format": FORMAT,
        "run": dict(run),
        "attentions": [],
        "tasks": {},
        "figures": {},
        "does_not_fit": [],
        "left_out": [],
        "summary": {},
        "samples": [],
    }
    store = Store(output)
    # dense first, then sparse, whatever else; tasks as the suites order them
    order = {name: i for i, name in enumerate(known)}
    for cell in sorted(store.cells(), key=lambda cell: (cell.attention, order.get(cell.task, len(order)), cell.length)):
        task = _described(cell.task, known, run)
        rows = store.read(cell)
        if task is None or not task.can_aggregate(rows):
            results["left_out"].append(cell._asdict())
        elif rows:
            _add_cell(results, cell, task, rows)
    names = [*known, *[name for name in results["tasks"] if name not in known]]
    results["tasks"] = {name: results["tasks"][name] for name in names if name in results["tasks"]}
    results["summary"] = {attention: _summary(results, attention) for attention in results["attentions"]}
    return results


def _add_cell(results: Results, cell: Cell, task: _Described, rows: Sequence[Mapping[str, Any]]) -> None:
    if cell.attention not in results["attentions"]:
        results["attentions"].append(cell.attention)
    results["tasks"][task.name] = {"suite": task.suite, "metric": task.metric, "source": task.source}
    if DOES_NOT_FIT in rows[0]:
        results["does_not_fit"].append({**cell._asdict(), "reason": rows[0][DOES_NOT_FIT]})
        return
    found = task.aggregate(rows)
    if task.metric not in found:
        raise EvalError(
            f"{task.name}, length {cell.length}: no figure for its metric {task.metric!r}, only {sorted(found)}"
        )
    for metric, figure in found.items():
        if not math.isfinite(figure.value):
            raise EvalError(f"{task.name}, length {cell.length}: {metric} is {figure.value}, expected a finite number")
    per_task = results["figures"].setdefault(cell.attention, {}).setdefault(task.name, {})
    per_task[str(cell.length)] = {metric: asdict(figure) for metric, figure in found.items()}
    results["samples"] += [{**row, "attention": cell.attention} for row in rows]


# --- the short of it -----------------------------------------------------------------------------------------------------


def _summary(results: Results, attention: str) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "suites": {suite: suite_summary(results, attention, suite) for suite in suites(results) if suite in SHARES},
        "costs": {str(length): _costs(results, attention, length) for length in lengths(results)},
    }
    for suite in PUBLISHED:
        if suite in suites(results):
            summary[suite] = _of_suite(results, attention, suite)
    return summary


def suite_summary(results: Results, attention: str, suite: str) -> dict[str, Any]:
    """The mean of a suite's tasks per length, and what it may be called.

    Returns:
        label: how to name it; the benchmark's own name only when all of its tasks were run on its own text.
        synthetic: tasks whose text is a stand-in.
        local: tasks on files of the data directory.
        lengths: {length: {"mean": figure, "tasks": number of tasks in it, "missing": tasks that have no figure there}}.
    """
    names = [name for name, task in results["tasks"].items() if task["suite"] == suite]
    synthetic, local = (
        [name for name in names if results["tasks"][name]["source"] == source] for source in ("synthetic", "local")
    )
    per_length = {}
    for length in lengths(results, suite):
        found = {name: figure(results, attention, name, length) for name in names}
        whole = mean_of([one for one in found.values() if one is not None])
        if whole is not None:
            missing = [name for name, one in found.items() if one is None]
            per_length[str(length)] = {"mean": asdict(whole), "tasks": len(names) - len(missing), "missing": missing}
    called = label(suite, names, synthetic, local)
    return {"label": called, "synthetic": synthetic, "local": local, "lengths": per_length}


def label(suite: str, names: Sequence[str], synthetic: Sequence[str], local: Sequence[str] = ()) -> str:
    """What a mean over these tasks may be called."""
    mark = " (local data)" if local else ""
    if suite not in PUBLISHED:
        whole = f"{suite}: mean of {len(names)} task{'s' * (len(names) != 1)}"
        return (f"{whole}, {len(synthetic)} on synthetic text" if synthetic else whole) + mark
    title, size = PUBLISHED[suite]
    if synthetic:
        return f"{suite}-like, {len(synthetic)} of {len(names)} tasks on synthetic text{mark}: no {title} score"
    if len(names) < size:
        return f"mean of {len(names)} of {size} {title} tasks{mark}: no {title} score"
    return f"mean of the {size} {title} tasks{mark}" if local else f"{title} average"


def _costs(results: Results, attention: str, length: int) -> dict[str, Any]:
    """Means over all samples of one attention and length."""
    rows = [row for row in results["samples"] if row["attention"] == attention and row["length"] == length]
    tokens, decode = sum(row["generated_tokens"] for row in rows), sum(row["decode_s"] or 0.0 for row in rows)
    return {
        "samples": len(rows),
        "prompt_tokens": _mean(row["prompt_tokens"] for row in rows),
        "prefill_s": _mean(row["prefill_s"] for row in rows),
        "decode_tokens_per_s": tokens / decode if decode > 0 else None,
        "density": _mean(row["density"] for row in rows),
        "truncated": sum(bool(row["truncated"]) for row in rows),
    }


def _mean(values: Any) -> float | None:
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else None


def _of_suite(results: Results, attention: str, suite: str) -> dict[str, Any]:
    """What the suite itself makes of its figures: RULER's layout, InfiniteBench's two means."""
    summarise = importlib.import_module(f"mtrain_eval.{suite}.summary").summarise
    mine = {
        name: {
            int(length): Figure(**metrics[results["tasks"][name]["metric"]]) for length, metrics in per_length.items()
        }
        for name, per_length in results["figures"].get(attention, {}).items()
        if results["tasks"][name]["suite"] == suite
    }
    if suite == "ruler":
        values = {name: {length: one.value for length, one in row.items()} for name, row in mine.items()}
        found = summarise(values, {name: results["tasks"][name]["source"] for name in values})
    else:
        found = summarise(mine)
    return dict(found)


# --- reading -------------------------------------------------------------------------------------------------------------


def load_results(path: Path) -> Results:
    """results.json of a run directory (or the file itself).

    Raises:
        EvalError: it is missing, broken or of another format.
    """
    file = path / FILE if path.is_dir() else path
    results = read_json(file, "the --output of a finished mtrain eval")
    if results.get("format") != FORMAT:
        raise EvalError(
            f"{file} has format {results.get('format')!r}, this version reads {FORMAT}; run mtrain eval again with the same "
            "--output, it writes the file anew from the stored rows"
        )
    missing = {"run", "attentions", "tasks", "figures", "does_not_fit", "summary", "samples"} - results.keys()
    if missing:
        raise EvalError(f"{file} has no {', '.join(sorted(missing))}; run mtrain eval again with the same --output")
    whole = ROW_KEYS | {"attention"}
    if not all(isinstance(row, dict) and row.keys() >= whole for row in results["samples"]):
        raise EvalError(f"{file} holds samples that mtrain eval did not write so; run it again with the same --output")
    return results


def read_json(file: Path, expected: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        EvalError: the file is missing or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvalError(f"cannot read {file} ({error.strerror}); expected {expected}") from None
    except ValueError as error:
        raise EvalError(f"{file} is broken ({error}); run mtrain eval again with the same --output") from None
    if not isinstance(found, dict):
        raise EvalError(f"{file} holds no object; expected {expected}")
    return found


def figure(results: Results, attention: str, task: str, length: int, metric: str | None = None) -> Figure | None:
    """One figure (the task's main metric unless another is named); None where there is none."""
    cell = results["figures"].get(attention, {}).get(task, {}).get(str(length))
    found = None if cell is None else cell.get(metric or results["tasks"][task]["metric"])
    return None if found is None else Figure(**found)


def suites(results: Results) -> list[str]:
    """Suites that were run, in the order of their tasks."""
    return list(dict.fromkeys(task["suite"] for task in results["tasks"].values()))


def task_names(results: Results, suite: str) -> list[str]:
    """Tasks of a suite that were run."""
    return [name for name, task in results["tasks"].items() if task["suite"] == suite]


def lengths(results: Results, suite: str | None = None) -> list[int]:
    """Lengths asked, of one suite or all, those that fit nothing included."""
    names = set(results["tasks"] if suite is None else task_names(results, suite))
    found = {
        int(length)
        for per_task in results["figures"].values()
        for name, per_length in per_task.items()
        if name in names
        for length in per_length
    }
    return sorted(found | {cell["length"] for cell in results["does_not_fit"] if cell["task"] in names})


def rows_of(results: Results, attention: str, task: str, length: int | None = None) -> list[dict[str, Any]]:
    """Stored rows of one task, of one length or all."""
    return [
        row
        for row in results["samples"]
        if row["attention"] == attention and row["task"] == task and length in (None, row["length"])
    ]


def reason(results: Results, attention: str, task: str, length: int) -> str | None:
    """Why a cell does not fit; None when it does, or was never asked."""
    for cell in results["does_not_fit"]:
        if (cell["attention"], cell["task"], cell["length"]) == (attention, task, length):
            return str(cell["reason"])
    return None


def short(length: int) -> str:
    """4096 as 4K, 1048576 as 1M, 1000 as it is."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)
