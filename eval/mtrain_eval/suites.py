"""The suites. A new one is a package with ``tasks(options)`` and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from mtrain.errors import EvalError
from mtrain_eval.sample import SuiteOptions, Task

# name -> what it is; the code is in mtrain_eval.<name>, which has tasks(options) -> list of tasks
SUITES = {
    "ruler": "RULER's 13 tasks (Hsieh et al. 2024, arXiv 2404.06654)",
    "niah": "the needle grid, length x depth (Kamradt 2023)",
    "infinitebench": "InfiniteBench (Zhang et al. 2024, arXiv 2402.13718) and offline twins of its synthetic tasks",
    "pg19": "perplexity on books (Rae et al. 2020, arXiv 1911.05507)",
    "retrieval": "mtrain's own retrieval, the task of the quickstart: for models trained on it",
}

# suite -> {folder of the data directory: how the names begin of the tasks that read it}
FOLDERS = {
    "ruler": {"paul_graham_essays": "ruler_niah", "ruler": "ruler_qa"},
    "niah": {"paul_graham_essays": "niah"},
    "infinitebench": {"infinitebench": "infinitebench"},
    "pg19": {"pg19": "pg19"},
}


def find_suites(names: Sequence[str]) -> list[str]:
    """The suites of these names, each once, in the order given.

    Raises:
        EvalError: an unknown name, with the nearest known one.
    """
    for name in names:
        if name not in SUITES:
            raise EvalError(f"unknown suite {name!r}; {_nearest(name, SUITES)}suites: {', '.join(SUITES)}")
    return list(dict.fromkeys(names))


def make_tasks(suites: Sequence[str], options: SuiteOptions, only: Sequence[str] = ()) -> list[Task]:
    """All tasks of some suites, or only those named (the suite's name before a task's may be left out).

    Raises:
        EvalError: an unknown suite or task, or one whose data is not at hand.
    """
    modules = [importlib.import_module(f"mtrain_eval.{name}") for name in find_suites(suites)]
    made = [task for module in modules for task in module.tasks(options)]
    known = {task.name: task for task in made}
    names = [_whole_name(name, suites, known) for name in only]
    for name in names:
        for module in modules:
            # A suite may know a task that it cannot make here and now as it was meant, and say what it takes.
            missing = getattr(module, "missing", None)
            reason = missing(name, options) if missing else None
            if reason:
                hints = (
                    _absent_folders(options.data_dir, module.__name__.rpartition(".")[2], [name])
                    if options.data_dir
                    else []
                )
                raise EvalError("; ".join([reason, *(hint for hint in hints if hint.endswith("?)"))]))
        if name not in known:
            other = next(
                (one for one in SUITES if one not in suites and (name == one or name.startswith(f"{one}_"))), None
            )
            if other:
                raise EvalError(
                    f"task {name!r} belongs to suite {other}, which was not asked for: --suite {','.join([*suites, other])}"
                )
            raise EvalError(f"unknown task {name!r}; {_nearest(name, known)}tasks: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] if only else made


def _whole_name(name: str, suites: Sequence[str], known: Iterable[str]) -> str:
    whole = {f"{suite}_{name}" for suite in suites} & set(known)
    return whole.pop() if name not in known and len(whole) == 1 else name


def stand_in_notes(tasks: Sequence[Task], options: SuiteOptions) -> list[str]:
    """Where a data directory was given and suites do without it: what stands in, and what is left out; one line per suite."""
    if options.data_dir is None:
        return []
    notes = []
    for suite in dict.fromkeys(task.suite for task in tasks):
        made_up = [task.name for task in tasks if task.suite == suite and task.source == "synthetic"]
        left_out = getattr(importlib.import_module(f"mtrain_eval.{suite}"), "left_out", None)
        parts = [f"made-up text stands in for {', '.join(made_up)}"] if made_up else []
        names = left_out(options) if left_out else []
        if names:
            parts.append(f"left out: {', '.join(names)}")
        if parts:
            absent = _absent_folders(options.data_dir, suite, [*made_up, *names])
            notes.append(f"{suite}: {options.data_dir} has not all of its data; {'; '.join([*absent, *parts])}")
    return notes


def _absent_folders(data_dir: Path, suite: str, tasks: Sequence[str]) -> list[str]:
    """Folders that these tasks would read and that are not there, each with the one that may have been meant."""
    there = {path.name.lower(): path for path in data_dir.iterdir() if path.is_dir()}
    expected = {folder for folders in FOLDERS.values() for folder in folders}
    found = []
    for folder, prefix in FOLDERS.get(suite, {}).items():
        if (data_dir / folder).is_dir() or not any(name.startswith(prefix) for name in tasks):
            continue
        near = get_close_matches(folder, there.keys() - expected, n=1, cutoff=0.6)
        if near:
            hint = f" (should {there[near[0]]} be called that?)"
        else:
            hint = f" (give --data-dir {data_dir.parent}?)" if data_dir.name == folder else ""
        found.append(f"there is no {data_dir / folder}{hint}")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
