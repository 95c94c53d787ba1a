"""The needle grid: one fact at a known depth of a haystack of exact length, for every length and depth.

niah_kamradt   a sentence about San Francisco in Paul Graham's essays (github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023); the
               needle is our own, and so are the words around it
niah_number    the magic number of a city (MInference's variant, arXiv 2407.02490)
niah_pairs     a key-value pair of mtrain's own symbols, where the tokenizer has them

The essays come from DATA_DIR/paul_graham_essays (source: local), or the hub with --online (published); otherwise prose made by rule
takes their place (source: synthetic).
"""

from __future__ import annotations

from mtrain_eval.niah.pairs import PairsTask, has_symbols
from mtrain_eval.niah.prose_tasks import Essays, KamradtTask, NumberTask
from mtrain_eval.prose import missing_essays
from mtrain_eval.sample import SuiteOptions, Task


def tasks(options: SuiteOptions) -> list[Task]:
    """The two tasks in prose, and the one in symbols where the tokenizer has them."""
    essays = Essays(options)
    made: list[Task] = [KamradtTask(options, essays), NumberTask(options, essays)]
    return [*made, PairsTask(options)] if has_symbols(options) else made


def missing(name: str, options: SuiteOptions) -> str | None:
    """What a task lacks in the data directory that was given, and what to do; None: nothing."""
    return missing_essays(options) if name in (KamradtTask.name, NumberTask.name) else None
