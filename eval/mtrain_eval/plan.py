"""What is left to ask, found from what is stored, and who asks it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtrain_eval.config import EvalConfig
from mtrain_eval.sample import DoesNotFitError, Task
from mtrain_eval.store import DOES_NOT_FIT, Cell, Store


@dataclass(frozen=True)
class CellPlan:
    """What is left to ask of a cell.

    Attributes:
        cell: which.
        pending: samples to ask, in order.
        stored: prompt_sha256 of the samples that some attention has answered already, by index.
        own: an answered sample of this very cell, to be made once more and compared; None: there is none.
    """

    cell: Cell
    pending: list[int]
    stored: dict[int, str]
    own: int | None

    @property
    def tokens(self) -> int:
        """Of all samples to ask: what the cell costs, roughly."""
        return self.cell.length * len(self.pending)


def make_plan(config: EvalConfig, tasks: Sequence[Task], store: Store) -> tuple[list[Any], int]:
    """What is left to ask, as JSON: [[cell, pending, stored hashes, own index], ...], and how many samples are stored.

    Short lengths come first within an attention, so that mistakes and first figures do not wait for the long ones.
    """
    wanted = [(length, task) for length in config.lengths for task in tasks]
    hashes: dict[tuple[str, int], dict[int, str]] = {}
    rows_of = {}
    for cell in store.cells():
        rows = rows_of[cell] = store.read(cell)
        known = hashes.setdefault((cell.task, cell.length), {})
        known.update({row["index"]: row["prompt_sha256"] for row in rows if DOES_NOT_FIT not in row})
    counts = {(task.name, length): _count(task, length, config.limit) for length, task in wanted}
    plan: list[Any] = []
    stored = 0
    for attention in config.attention:
        for length, task in wanted:
            cell = Cell(attention, task.name, length)
            rows = rows_of.get(cell, [])
            if rows and DOES_NOT_FIT in rows[0]:
                continue
            done = {row["index"] for row in rows}
            stored += len(done & set(range(counts[task.name, length])))
            pending = [index for index in range(counts[task.name, length]) if index not in done]
            if pending:
                plan.append([cell, pending, hashes.get((task.name, length), {}), min(done, default=None)])
    return plan, stored


def unmeasured(config: EvalConfig, tasks: Sequence[Task], store: Store) -> list[tuple[str, int | None, str]]:
    """Tasks of which no sample fits what is asked, with the smallest length that would do (None: not known) and the reason."""
    found: list[tuple[str, int | None, str]] = []
    for task in tasks:
        cells = [Cell(attention, task.name, length) for attention in config.attention for length in config.lengths]
        rows = [row for cell in cells for row in store.read(cell)]
        if rows and all(DOES_NOT_FIT in row for row in rows):
            found.append((task.name, _needed(task, max(config.lengths)), rows[-1][DOES_NOT_FIT]))
        elif not rows and not any(_count(task, length, 1) for length in config.lengths):
            found.append((task.name, None, f"{task.name}: its data holds no samples"))
    return found


def _needed(task: Task, length: int) -> int | None:
    try:
        task.sample(length, 0)
    except DoesNotFitError as error:
        return error.needed
    return None


def _count(task: Task, length: int, limit: int) -> int:
    try:
        count = task.count(length)
    except DoesNotFitError:
        return limit  # making the first sample will say so, and it is noted there
    return limit if count is None else min(count, limit)


def deal(plans: Sequence[CellPlan], replicas: int) -> list[list[CellPlan]]:
    """The cells of each replica, in the order of the plan and with about the same number of tokens for all.

    A cell is never divided: its file has one writer.
    """
    shares: list[list[CellPlan]] = [[] for _ in range(replicas)]
    load = [0] * replicas
    for plan in sorted(plans, key=lambda plan: -plan.tokens):
        lightest = load.index(min(load))
        shares[lightest].append(plan)
        load[lightest] += plan.tokens
    order = {plan.cell: number for number, plan in enumerate(plans)}
    return [sorted(share, key=lambda plan: order[plan.cell]) for share in shares]
