"""The suites. A new one is a package with ``tasks(options)`` and one line here."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

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
    """All tasks of some suites, or only those named.

    Raises:
        EvalError: an unknown suite or task, or one whose data is not at hand.
    """
    modules = [importlib.import_module(f"mtrain_eval.{name}") for name in find_suites(suites)]
    made = [task for module in modules for task in module.tasks(options)]
    known = {task.name: task for task in made}
    for name in only:
        for module in modules:
            # A suite may know a task that it cannot make here and now as it was meant, and say what it takes.
            missing = getattr(module, "missing", None)
            reason = missing(name, options) if missing else None
            if reason:
                raise EvalError(reason)
        if name not in known:
            raise EvalError(f"unknown task {name!r}; {_nearest(name, known)}tasks: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(only)] if only else made


def stand_in_notes(tasks: Sequence[Task], options: SuiteOptions) -> list[str]:
    """Where a data directory was given and suites do without it: what stands in, and what is left out; one line per suite."""
    if options.data_dir is None:
        return []
    notes = []
    for suite in dict.fromkeys(task.suite for task in tasks):
        made_up = [task.name for task in tasks if task.suite == suite and task.source == "synthetic"]
        left_out = getattr(importlib.import_module(f"mtrain_eval.{suite}"), "left_out", None)
        parts = [f"made-up text stands in for {', '.join(made_up)}"] if made_up else []
        if left_out and (names := left_out(options)):
            parts.append(f"left out: {', '.join(names)}")
        if parts:
            notes.append(f"{suite}: {options.data_dir} has not all of its data; {'; '.join(parts)}")
    return notes


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
