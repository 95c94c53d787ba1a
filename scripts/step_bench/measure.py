"""Turns: at every length each attention that still fits runs one step, round by round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mtrain.data.loader import Batch
from scripts.step_bench.bench import Bench, Contestant, Step
from scripts.step_bench.laps import PARTS

Record = dict[str, Any]
LEARNING_RATE = 1e-6  # a real update, too small to change what attention looks like


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds after the warm-up, and seconds per length after which no round begins."""

    rounds: int
    seconds: float


def is_out_of_memory(error: BaseException) -> bool:
    """torch's own error on any device, Triton's and the driver's, and the host's."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    named = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return named or (isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words))


def attempt(bench: Bench, work: Callable[[], Any]) -> Any:
    """The result of ``work``; None when memory ends, with everything that it held given back."""
    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    bench.recover()
    return None


def run(
    bench: Bench, lengths: list[int], makers: dict[str, Callable[[Batch], Contestant]], effort: Effort
) -> Iterator[list[Record]]:
    """The records of one length after the other. An attention that met the end of memory is not tried at greater lengths."""
    alive = dict(makers)
    for length in sorted(lengths):
        records = measure(bench, bench.batch(length), alive, effort)
        for record in records:
            if record.get("out_of_memory"):
                del alive[record["key"]]
        yield records
        if not alive:
            return


def measure(
    bench: Bench, batch: Batch, makers: dict[str, Callable[[Batch], Contestant]], effort: Effort
) -> list[Record]:
    """One record per attention at one length.

    The first step of each is its warm-up and shows whether it fits. Where the warm-ups alone took longer than the time given,
    they are the measurement (everything was compiled at shorter lengths by then), and the record says so.
    """
    length, records = batch.tokens.shape[1], []
    turns: list[tuple[Record, Contestant, list[Step]]] = []
    begin = time.perf_counter()
    warmups = []
    for key, make in makers.items():
        record: Record = {"key": key, "length": length, "name": key}
        records.append(record)
        contestant = attempt(bench, partial(make, batch))
        step = contestant and attempt(bench, partial(bench.step, contestant, batch, LEARNING_RATE))
        if not step:
            record["out_of_memory"] = True
            continue
        record.update(name=contestant.name, kind=contestant.kind, wanted=contestant.wanted)
        record["density"], record["tile_density"] = (1.0, 1.0) if contestant.attend else bench.densities()
        record["budget"] = _budget(contestant)
        warmups.append(step)
        turns.append((record, contestant, []))
    enough = sum(step.seconds for step in warmups) > effort.seconds
    for number in range(0 if enough else effort.rounds):
        if number and time.perf_counter() - begin > effort.seconds:
            break
        for record, contestant, steps in turns:
            if not record.get("out_of_memory"):
                step = attempt(bench, partial(bench.step, contestant, batch, LEARNING_RATE))
                record["out_of_memory"] = step is None  # it fitted once, by luck
                steps.append(step)
    for (record, _, steps), warmup in zip(turns, warmups, strict=True):
        if not record.get("out_of_memory"):
            _summarize(record, steps or [warmup], warm=bool(steps))
    bench.recover()
    _compare(records)
    return records


def _budget(contestant: Contestant) -> str:
    if contestant.kind == "dense":
        return ""
    return ", ".join(f"{key}={value}" for key, value in vars(contestant.recipe.budget).items() if key != "kind")


def _summarize(record: Record, steps: list[Step], warm: bool) -> None:
    seconds = [step.seconds for step in steps]
    total = sum(seconds)
    record["steps"], record["warmed_up"], record["seconds"] = len(steps), warm, seconds
    record["step_s"] = statistics.median(seconds)
    record["tokens_per_s"] = record["length"] / record["step_s"]
    record["peak_mb"] = max(step.peak_mb for step in steps)
    record["share"] = {part: sum(step.parts[part] for step in steps) / total for part in PARTS}
    record["loss"] = steps[-1].result.loss


def _compare(records: list[Record]) -> None:
    """Dense seconds over own seconds, round by round: median, least, most."""
    dense = next((r for r in records if r.get("kind") == "dense" and "seconds" in r), None)
    for record in records:
        if dense is not None and record is not dense and "seconds" in record:
            ratios = [a / b for a, b in zip(dense["seconds"], record["seconds"], strict=True)]
            record["times_dense"] = [statistics.median(ratios), min(ratios), max(ratios)]


def longest(results: list[Record]) -> dict[str, tuple[int | None, int | None]]:
    """By attention: (the longest length that fitted, the first that did not; None where there was none)."""
    found: dict[str, tuple[int | None, int | None]] = {}
    for record in sorted(results, key=lambda r: r["length"]):
        fits, fails = found.get(record["key"], (None, None))
        if record.get("out_of_memory"):
            found[record["key"]] = fits, fails or record["length"]
        else:
            found[record["key"]] = record["length"], fails
    return found
