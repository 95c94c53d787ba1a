"""A small run directory written by hand: two kinds of attention, four tasks, cells that do not fit, hostile answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtrain_eval.sample import Figure, Prediction, Sample
from mtrain_eval.statistics import mean_figures
from mtrain_eval.store import Cell, Store

HOSTILE = '<script>alert("x")</script> | a & b\n![x](http://example.org/x.png)\x07 \ud800'


@dataclass
class HandTask:
    """A task that only aggregates."""

    name: str
    suite: str
    metric: str = "match"
    source: str = "generated"

    def count(self, length: int) -> int | None:
        return None

    def sample(self, length: int, index: int) -> Sample:
        raise NotImplementedError

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        raise NotImplementedError

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        return mean_figures(rows, shares=self.metric != "perplexity")


TASKS = [
    HandTask("grid", "niah"),
    HandTask("keys", "retrieval"),
    HandTask("prose", "retrieval", source="synthetic"),
    HandTask("books", "pg19", metric="perplexity", source="synthetic"),
]


def row(task: HandTask, length: int, index: int, score: float, **more: Any) -> dict[str, Any]:
    """One stored row."""
    made = {
        "task": task.name,
        "suite": task.suite,
        "length": length,
        "index": index,
        "scores": {task.metric: score},
        "prediction": f"answer {index}",
        "targets": [] if task.metric == "perplexity" else [f"target {index}"],
        "prompt_tokens": length - 10,
        "generated_tokens": 4,
        "truncated": 0,
        "depth": None,
        "prefill_s": 0.5,
        "decode_s": 0.25,
        "density": None,
        "prompt_sha256": f"{task.name}-{length}-{index}",
        "meta": {},
    }
    return made | more


def make_run(output: Path, attentions: Sequence[str] = ("dense", "sparse"), *, seed: int = 0) -> Path:
    """A run whose dense answers are right, but for every fourth, and whose sparse answers miss every second."""
    output.mkdir(parents=True)
    run = {
        "format": 1,
        "command": "mtrain eval model --suite niah,<b>retrieval</b>",
        "config": {"limit": 8},
        "fingerprint": {"seed": seed, "tokenizer": "abc", "attention": dict.fromkeys(attentions)},
        "versions": {"mtrain": "0.1.0"},
        "git": None,
        "model": {"path": "model <x>", "training": {"seq_len": 2048}},
        "tasks": {task.name: {"suite": task.suite, "metric": task.metric, "source": task.source} for task in TASKS},
    }
    (output / "run.json").write_text(json.dumps(run))
    store = Store(output)
    for attention in attentions:
        sparse = attention == "sparse"
        for length in (1024, 4096):
            for task in TASKS[1:3]:
                if task.name == "prose" and length == 1024:
                    store.append(Cell(attention, task.name, length), {"does_not_fit": "prose takes 2000 tokens"})
                    continue
                for index in range(8):
                    right = float(index % (2 if sparse else 4) > 0)
                    more = {"density": 0.125} if sparse else {}
                    text = HOSTILE if index == 0 else "fine"
                    sha = f"{seed}-{task.name}-{length}-{index}"
                    answer = row(task, length, index, right, prediction=text, prompt_sha256=sha, **more)
                    store.append(Cell(attention, task.name, length), answer)
            for index in range(6):  # the last depth is asked at 4096 only
                depth = (0.0, 0.5, 1.0)[index % 3]
                if depth == 1.0 and length == 1024:
                    continue
                right = float(not (sparse and depth == 0.0))
                answer = row(TASKS[0], length, index, right, depth=depth * 0.9, meta={"depth_asked": depth})
                store.append(Cell(attention, "grid", length), answer)
            for index in range(4):
                answer = row(TASKS[3], length, index, 8.0 + index + 0.5 * sparse - length / 4096)
                store.append(Cell(attention, "books", length), answer)
    store.close()
    return output
