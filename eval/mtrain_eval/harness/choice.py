"""Which tasks a run of lm-eval gets: unknown names and keys end it in one line, tasks that do not fit their length stay out.

lm-eval knows no sample that cannot be made, so one such task would end the whole run. It is left out before the run begins and
named on stderr; a group that it belongs to is replaced by its other members, because a mean over fewer tasks is another number.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from mtrain.errors import EvalError
from mtrain_eval.harness.documents import dataset
from mtrain_eval.sample import DoesNotFitError

# Said of every task with documents of its own; what it advises, max_seq_lengths, our tasks do not take.
NOISE = "Custom kwargs can be passed to `--metadata`"
NOT_FOUND = "Tasks not found: "
OURS = f"{dataset.__module__}.{dataset.__name__}"

Spec = str | dict[str, Any]


@contextlib.contextmanager
def checked_tasks(say: Callable[[str], None]) -> Iterator[None]:
    """While this is open, lm-eval's `EvaluatorConfig.process_tasks` does what the module docstring says.

    Args:
        say: gets one line for every task left out.

    Raises (inside, when lm-eval resolves its tasks):
        EvalError: an unknown task or model_arg, or no task that fits.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    original = EvaluatorConfig.process_tasks
    quiet = _Quiet()
    logger = logging.getLogger("lm_eval.api.task")

    def process_tasks(config: Any, metadata: dict[str, Any] | None = None) -> Any:
        if config.model == "mtrain":
            from mtrain_eval.harness.lm import check_keys

            check_keys(config.model_args)
        try:
            manager = original(config, metadata)
        except ValueError as error:
            if not str(error).startswith(NOT_FOUND):
                raise
            raise _unknown(str(error).removeprefix(NOT_FOUND).split(", "), config.include_path) from None
        index = {name: entry.cfg or {"tags": sorted(entry.tags)} for name, entry in manager.task_index.items()}
        quiet.names = {name for name, body in index.items() if _is_ours(body)}
        quiet.names |= {task["task"] for task in config.tasks if isinstance(task, dict) and _is_ours(task)}
        config.tasks = fitting(config.tasks, index, config.metadata or {}, say)
        return manager

    EvaluatorConfig.process_tasks = process_tasks
    logger.addFilter(quiet)
    try:
        yield
    finally:
        EvaluatorConfig.process_tasks = original
        logger.removeFilter(quiet)


def fitting(
    tasks: Sequence[Spec],
    index: Mapping[str, Mapping[str, Any]],
    metadata: Mapping[str, Any],
    say: Callable[[str], None],
) -> list[Spec]:
    """The tasks without those of ours that do not fit their length; a group without one of its members becomes the others.

    Args:
        tasks: names of tasks, groups and tags, or bodies of tasks.
        index: name -> body of lm-eval's YAML file; of a tag ``{"tags": [names]}``.
        metadata: what lm-eval gives to `dataset` beside the body's own: model_args and ``--metadata``.
        say: gets a line for every task left out.

    Raises:
        EvalError: nothing is left; or a task of ours cannot be made for another reason.
    """
    reasons: dict[str, str] = {}
    kept: list[Spec] = []
    for task in tasks:
        kept += [spec for spec in _kept(task, index, metadata, reasons) if spec not in kept]
    if not kept and reasons:
        raise EvalError(f"no task fits its length: {'; '.join(reasons.values())}")
    for name, reason in reasons.items():
        say(f"left out {name}: {reason}")
    for task in tasks:
        if reasons and isinstance(task, str) and task not in kept and task not in reasons:
            say(f"{task} gets no mean without them; its other tasks run")
    return kept


def _kept(
    task: Spec, index: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, Any], reasons: dict[str, str]
) -> list[Spec]:
    body = task if isinstance(task, dict) else index.get(task, {})
    # Members with settings of their own are lm-eval's to read; ours have none.
    members = body.get("tags") or (body.get("task") if "group" in body else None)
    if isinstance(members, list) and all(isinstance(member, str) for member in members):
        left = [spec for member in members for spec in _kept(member, index, metadata, reasons)]
        return [task] if left == members else left
    if not _is_ours(body):
        return [task]
    try:
        made = dataset(**{**body.get("metadata", {}), **metadata, **body["dataset_kwargs"]})["test"]
        if len(made):
            made[0]
    except DoesNotFitError as error:
        reasons[body["task"]] = str(error.__cause__ or error)
        return []
    return [task]


def _is_ours(body: Mapping[str, Any]) -> bool:
    """A task of `dataset`; the index has it as text, with the file's folder before it."""
    given = body.get("custom_dataset")
    return given is dataset or (isinstance(given, str) and given.endswith(OURS))


def _unknown(names: Sequence[str], include_path: Any) -> EvalError:
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=include_path).all_tasks
    parts = []
    for name in names:
        near = _nearest(name, known)
        parts.append(f"unknown task {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ";"))
    more = "`mtrain lm-eval ls tasks` lists all"
    if not include_path:
        more += "; ours need --include_path eval/tasks"
    elif any(re.search(r"_\d+$", name) for name in names):
        more += "; `mtrain lm-eval write-tasks DIR --lengths 1K` makes ours for other lengths"
    return EvalError(f"{' '.join(parts)} {more}")


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """The same task at other lengths, shortest first; if there is none, what is spelt alike."""
    stem = re.sub(r"_\d+$", "", name)
    same = [other for other in known if re.fullmatch(re.escape(stem) + r"_\d+", other)] if stem != name else []
    return sorted(same, key=lambda other: int(other.rsplit("_", 1)[1]))[:3] or get_close_matches(
        name, known, cutoff=0.5
    )


class _Quiet(logging.Filter):
    """Drops `NOISE` about tasks of ours."""

    names: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """False: not to be shown."""
        text = record.getMessage()
        return not (NOISE in text and text.split(":")[0] in self.names)
