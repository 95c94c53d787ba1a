"""InfiniteBench (Zhang et al. 2024, arXiv 2402.13718): its 12 tasks on its own data, and offline twins of the synthetic ones.

Tasks on the published data (``infinitebench_passkey`` ...) are there when the data is: files in DATA_DIR/infinitebench, or
online. For the others a twin stands in (``infinitebench_twin_passkey`` ...), made by rule, which is no InfiniteBench score.
"""

from __future__ import annotations

from mtrain_eval.infinitebench.catalogue import ENTRIES
from mtrain_eval.infinitebench.data import available, where_from
from mtrain_eval.infinitebench.published import PublishedTask
from mtrain_eval.infinitebench.twins import RULES, TwinTask, twin_name
from mtrain_eval.sample import SuiteOptions, Task


def tasks(options: SuiteOptions) -> list[Task]:
    """The published tasks whose data is at hand, then the twins of synthetic ones whose data is not: the two would be averaged.

    Raises:
        EvalError: a folder for InfiniteBench without any file of it, and not online.
    """
    entries = available(options)
    there = {entry.split for entry in entries}
    published: list[Task] = [PublishedTask(options, entry) for entry in entries]
    return [*published, *(TwinTask(options, split) for split in RULES if split not in there)]


def missing(name: str, options: SuiteOptions) -> str | None:
    """Why a task of this suite is not among `tasks`, and what to do; None for names that it does not know."""
    there = available(options)
    for entry in ENTRIES:
        if name == entry.name and entry not in there:
            return where_from(options, entry)
        if name == twin_name(entry.split) and entry in there:
            return f"{name} stands in where the data is not at hand, and {entry.name} has it; leave out --data-dir or --online"
    return None


def left_out(options: SuiteOptions) -> list[str]:
    """The published tasks that are not among `tasks`."""
    there = available(options)
    return [entry.name for entry in ENTRIES if entry not in there]
