"""Our tasks as YAML files for lm-eval, one per (task, length), and per (suite, length) a group with RULER's plain average.

`mtrain lm-eval write-tasks DIR --lengths 3K` makes them for any lengths; `eval/tasks` in the repository holds the usual ones.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from mtrain.data.tokenizer import byte_tokenizer
from mtrain_eval.infinitebench.catalogue import ENTRIES
from mtrain_eval.niah import tasks as niah_tasks
from mtrain_eval.ruler import tasks as ruler_tasks
from mtrain_eval.sample import SuiteOptions

LENGTHS = tuple(4096 * 2**k for k in range(8))
# InfiniteBench has one length, that of its books; prompts are cut in the middle to this many tokens.
INFINITEBENCH_LENGTH = 131072
VERSION = 1.0


@dataclass(frozen=True)
class Entry:
    """One task as lm-eval sees it: ``max_new_tokens`` is 0 for texts that are scored, not continued."""

    suite: str
    name: str
    lengths: tuple[int, ...]
    max_new_tokens: int


def entries(lengths: Sequence[int]) -> list[Entry]:
    """The tasks that are texts in and texts out. What is asked token by token (retrieval) or from stand-ins (twins) is
    `mtrain eval`'s alone."""
    options = SuiteOptions(byte_tokenizer())
    sizes = tuple(lengths)
    made = [Entry("ruler", task.name, sizes, task.max_new_tokens) for task in ruler_tasks(options)]
    made += [
        Entry("niah", task.name, sizes, task.max_new_tokens)
        for task in niah_tasks(options)
        if hasattr(task, "max_new_tokens")
    ]
    made += [Entry("infinitebench", entry.name, (INFINITEBENCH_LENGTH,), entry.max_new_tokens) for entry in ENTRIES]
    made.append(Entry("pg19", "pg19", sizes, 0))
    return made


def write_tasks(directory: Path, lengths: Sequence[int] = LENGTHS) -> list[Path]:
    """Write them below a directory; returns the files, bases included."""
    written = []
    score = {"metric": "score", "aggregation": "mean", "higher_is_better": True}
    perplexity = {"metric": "token_perplexity", "aggregation": _Function("perplexity"), "higher_is_better": False}
    written.append(_write(directory / "_generate", _base("generate_until", "{{prompt}}", "{{target}}", "score", score)))
    written.append(
        _write(directory / "_perplexity", _base("loglikelihood_rolling", "", "{{text}}", "token_nll", perplexity))
    )
    for entry in entries(lengths):
        for length in entry.lengths:
            name = f"{entry.name}_{length}"
            body: dict[str, object] = {
                "include": "../_generate" if entry.max_new_tokens else "../_perplexity",
                "task": name,
                # A name of ours: lm-eval has tasks and groups called ruler_vt and infinitebench.
                "tag": [f"mtrain_{entry.name}"],
                "dataset_kwargs": {"task": entry.name, "length": length},
            }
            if entry.max_new_tokens:
                body["generation_kwargs"] = {"until": [], "do_sample": False, "max_gen_toks": entry.max_new_tokens}
            written.append(_write(directory / entry.suite / f"{name}.yaml", body))
    for (suite, length), members in _groups(lengths).items():
        name = f"{suite}_{length}"
        if members != [name]:
            written.append(_write(directory / suite / f"_{name}.yaml", _group(name, members)))
    return written


def names_to_type(lengths: Sequence[int]) -> list[list[str]]:
    """Per suite, what stands for all of it at one length: a group, or its only task."""
    names: dict[str, list[str]] = {}
    for suite, length in _groups(lengths):
        names.setdefault(suite, []).append(f"{suite}_{length}")
    return list(names.values())


def _groups(lengths: Sequence[int]) -> dict[tuple[str, int], list[str]]:
    """(suite, length) -> its tasks."""
    found: dict[tuple[str, int], list[str]] = {}
    for entry in entries(lengths):
        for length in entry.lengths:
            found.setdefault((entry.suite, length), []).append(f"{entry.name}_{length}")
    return found


def _base(kind: str, text: str, target: str, scorer: str, metric: dict[str, object]) -> dict[str, object]:
    return {
        "output_type": kind,
        "test_split": "test",
        "custom_dataset": _Function("dataset"),
        "doc_to_text": text,
        "doc_to_target": target,
        "process_results": _Function(scorer),
        "num_fewshot": 0,
        # Otherwise lm-eval would make all 500 samples to choose examples from, whatever --limit says.
        "fewshot_config": {"samples": []},
        "metric_list": [metric],
        "metadata": {"version": VERSION},
    }


def _group(name: str, members: list[str]) -> dict[str, object]:
    plain = [{"metric": "score", "aggregation": "mean", "weight_by_size": False}]
    return {"group": name, "task": members, "aggregate_metric_list": plain, "metadata": {"version": VERSION}}


class _Function(str):
    """A function of `mtrain_eval.harness.documents`, in the tag that lm-eval's YAML has for it."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _Function, lambda dumper, name: dumper.represent_scalar("!function", f"mtrain_eval.harness.documents.{name}")
)


def _write(path: Path, body: dict[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.dump(body, Dumper=_Dumper, sort_keys=False, width=120)
    # The dumper puts quotes after a tag, which lm-eval would take for part of the name.
    path.write_text(re.sub(r"!function '(.*)'", r"!function \1", text), encoding="utf-8")
    return path
