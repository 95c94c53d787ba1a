"""The loop: every attention, length, task and sample that is not on disk yet is asked, scored and stored.

All ranks of a ring walk through the same plan, which the first rank makes from what is stored; only that rank touches files.
Every sample is made on every rank from its seeds and compared, so no rank can wait for the others in another question. Several
rings (replicas) deal the cells out among them; the first rank of each writes its own cells.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mtrain.comm import Ring
from mtrain.errors import EvalError, LaunchError, MtrainError
from mtrain.recipe.schema import AttentionRecipe
from mtrain_eval import run_directory
from mtrain_eval.agree import describe, on_all, on_first
from mtrain_eval.ask import EngineLike, all_finite, ask, check_sample, make_row, prompt_sha256
from mtrain_eval.config import EvalConfig, attention_recipes
from mtrain_eval.plan import CellPlan, deal, make_plan, unmeasured
from mtrain_eval.progress import Progress, say
from mtrain_eval.sample import DoesNotFitError, Sample, SuiteOptions, Task
from mtrain_eval.store import DOES_NOT_FIT, Cell, Store, locked
from mtrain_eval.suites import make_tasks, stand_in_notes

LoadEngine = Callable[[EvalConfig, AttentionRecipe | None, Ring], EngineLike]


@dataclass
class Outcome:
    """How an evaluation ended, the same on every rank.

    Attributes:
        asked: samples asked in this call.
        stored: samples that were on disk before.
        missing: samples that were asked and have no row, because a score was no number.
        tasks: the tasks of the run.
        unmeasured: see `plan.unmeasured`.
    """

    tasks: list[Task]
    asked: int = 0
    stored: int = 0
    missing: int = 0
    unmeasured: list[tuple[str, int | None, str]] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        """Whether no task has a sample that fits."""
        return len(self.unmeasured) == len(self.tasks)


def evaluate(
    config: EvalConfig,
    ring: Ring,
    load: LoadEngine,
    *,
    tokenizer: Any,
    positions: int,
    command: str = "",
    resume: bool = True,
    facts: Mapping[str, Any] | None = None,
    everyone: Ring | None = None,
) -> Outcome:
    """Ask everything that is not stored yet; every rank makes this call.

    Args:
        config: what.
        ring: the ranks that share each prompt; the first writes.
        load: makes an engine; called once per attention that has something to ask.
        tokenizer: the model's.
        positions: longest text the model takes.
        command: as typed, for the record.
        resume: False: an earlier run in the same directory is set aside.
        facts: for the record.
        everyone: the ranks of several such rings (replicas), which deal the cells out among them; None: the ring is alone.

    Raises:
        EvalError: a suite, task, length or attention that cannot be, another run in the directory, data that is missing.
    """
    made: dict[str, Any] = {}

    def start() -> tuple[int, str]:
        made["recipes"] = attention_recipes(config)
        made["options"] = SuiteOptions(tokenizer, config.seed, config.data_dir, config.online)
        made["tasks"] = make_tasks(config.suites, made["options"], config.tasks)
        check_lengths(config.lengths, positions)
        return _number(json.dumps(config.to_dict(), sort_keys=True)), ""

    everyone = everyone or ring
    on_all(everyone, start)
    tasks: list[Task] = made["tasks"]
    store = Store(config.output, say)
    with contextlib.ExitStack() as stack:
        stack.callback(store.close)

        def open_directory() -> None:
            run_directory.prepare(config.output, resume, say)
            stack.enter_context(locked(config.output))
            known = {"positions": positions, "ranks": everyone.world_size, **(facts or {})}
            run_directory.open_run(config, made["recipes"], tasks, command=command, facts=known, say=say)
            # A task that was named has its data, or would have been refused.
            for note in [] if config.tasks else stand_in_notes(tasks, made["options"]):
                say(note)

        on_first(everyone, open_directory)
        found, stored = on_first(everyone, lambda: make_plan(config, tasks, store))
        plans = [
            CellPlan(Cell(*cell), pending, {int(index): sha for index, sha in hashes.items()}, own)
            for cell, pending, hashes, own in found
        ]
        replica, replicas = everyone.rank // ring.world_size, everyone.world_size // ring.world_size
        runner, trouble = Runner(config, ring, store, tasks, show=everyone.rank == 0), None
        try:
            runner.run(deal(plans, replicas)[replica], load, made["recipes"])
        except MtrainError as error:
            if replicas == 1 or isinstance(error, LaunchError):
                raise  # of a lost peer nobody should wait for the others to hear
            trouble = describe(error)  # the other replicas are told when they have done their share
        if replicas > 1:
            on_all(everyone, lambda: (0, ""), trouble)
        mine = [runner.asked, runner.missing] if ring.rank == 0 else [0, 0]
        asked, missing = everyone.all_reduce(torch.tensor(mine)).tolist()
        left = on_first(everyone, lambda: unmeasured(config, tasks, store))
    return Outcome(tasks, asked, stored, missing, [(name, needed, reason) for name, needed, reason in left])


def check_lengths(lengths: Sequence[int], positions: int) -> None:
    """Refuse what the model cannot take, before any work is done.

    Raises:
        EvalError: with what would extend it.
    """
    beyond = [length for length in lengths if length > positions]
    if beyond:
        raise EvalError(
            f"length {beyond[-1]} is beyond the model's {positions} positions (max_position_embeddings): ask for shorter "
            "lengths, extend the model by training at that length (mtrain train with model.max_position_embeddings and "
            f"model.rope), or try without training: --max-positions {beyond[-1]}, with --rope for another RoPE, such as "
            "--rope '{rope_type: yarn, factor: 4}'"
        )


class Runner:
    """Walks through a plan.

    Attributes:
        asked: samples that were asked.
        missing: samples without a row.
    """

    def __init__(self, config: EvalConfig, ring: Ring, store: Store, tasks: Sequence[Task], *, show: bool) -> None:
        self.config, self.ring, self.store, self.show = config, ring, store, show
        self.tasks = {task.name: task for task in tasks}
        self.asked, self.missing = 0, 0
        self._trouble: str | None = None  # of the first rank's files; told to all with the next sample
        self._progress = Progress(False, 0)

    def run(self, plans: Sequence[CellPlan], load: LoadEngine, recipes: Mapping[str, AttentionRecipe | None]) -> None:
        """Ask all of it.

        Raises:
            EvalError: on all ranks alike; what was answered before is stored.
        """
        self._progress = Progress(self.show, sum(plan.tokens for plan in plans))
        try:
            for attention in self.config.attention:
                mine = [plan for plan in plans if plan.cell.attention == attention]
                if not mine:
                    continue
                engine = load(self.config, recipes[attention], self.ring)
                check_lengths([plan.cell.length for plan in mine], engine.max_positions)
                for plan in mine:
                    self._cell(plan, engine)
                del engine  # two copies of a large model would not fit
            self._on_all(lambda: (0, ""))
        finally:
            self._progress.close()

    def _cell(self, plan: CellPlan, engine: EngineLike) -> None:
        cell, task = plan.cell, self.tasks[plan.cell.task]
        if plan.own is not None:
            self._make(plan, task, plan.own)
        for number, index in enumerate(plan.pending):
            self._progress.show(f"{cell.attention} {cell.task} {cell.length}")
            sample, reason = self._make(plan, task, index)
            if sample is None:
                if number == 0 and plan.own is None:
                    self._append(cell, {DOES_NOT_FIT: reason})
                    self._progress.advance(cell.length * len(plan.pending))
                    return
                # Published questions are of all sizes: one that is too long says nothing of those after it.
                self._say(f"{cell.attention} {cell.task} {cell.length}, sample {index} is left out: {reason}")
                self._progress.advance(cell.length)
                continue
            answer = ask(engine, sample)
            self.asked += 1
            row = make_row(task, sample, answer)
            if all_finite(row["scores"]):
                self._append(cell, row)
            else:
                self.missing += 1
                self._say(f"{cell.attention} {cell.task} {cell.length}, sample {index}: {row['scores']}; not stored")
            self._progress.advance(cell.length)

    def _make(self, plan: CellPlan, task: Task, index: int) -> tuple[Sample | None, str]:
        """A sample on every rank, known to be the same one and the same as the stored one; or why there is none."""
        made: list[Sample] = []
        cell = plan.cell

        def make() -> tuple[int, str]:
            try:
                sample = task.sample(cell.length, index)
            except DoesNotFitError as error:
                return 0, str(error)
            check_sample(sample)
            sha = prompt_sha256(sample)
            if plan.stored.get(index, sha) != sha:
                raise EvalError(
                    f"{self.config.output}: {cell.task}, length {cell.length}, sample {index} was another question when it "
                    "was answered (the code or the data of the suite has changed); give another --output, or start anew "
                    "with --no-resume"
                )
            made.append(sample)
            return _number(sha), ""

        reason = self._on_all(make)
        return (made[0] if made else None), reason

    def _append(self, cell: Cell, row: Mapping[str, Any]) -> None:
        if self.ring.rank == 0:
            try:
                self.store.append(cell, row)
            except OSError as error:
                self._trouble = f"cannot write to {self.store.path(cell)}: {error.strerror or error}"

    def _on_all(self, action: Callable[[], tuple[int, str]]) -> str:
        return on_all(self.ring, action, self._trouble) or ""

    def _say(self, text: str) -> None:
        if self.ring.rank == 0:
            say(text)


def _number(text: str) -> int:
    """62 bits of a text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2
