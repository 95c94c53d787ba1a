"""What a suite makes and what the runner does with it: samples, predictions, tasks. Every suite speaks these words.

A sample is one question to a model. Its ``kind`` says what the model has to do:

    generate   continue ``ids`` greedily for at most ``max_new_tokens`` tokens; the answer is text
    score      give the log-probability of every token of ``ids`` after the first
    recall     name the most likely next token at the positions ``at`` of ``ids``

Samples are made lazily, one at a time, from (seed, task, length, index) alone: limit, order, number of ranks and resuming
never change one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.errors import EvalError

Kind = Literal["generate", "score", "recall"]


class DoesNotFitError(EvalError):
    """The smallest sample of a task is longer than the length asked for; the runner notes it and goes on.

    Attributes:
        needed: the smallest length that would do, where the task knows it.
    """

    def __init__(self, reason: str, needed: int | None = None) -> None:
        super().__init__(reason)
        self.needed = needed


@dataclass(frozen=True, eq=False)
class Sample:
    """One question.

    Attributes:
        task, length, index: what it is; length in tokens of the model, generated ones included.
        ids: int64 [n], the tokens the model gets, special ones included; n + max_new_tokens <= length.
        text: the same as text, for the record and for harnesses that take text; "" where text makes no sense.
        targets: the right answers as text (scorers read these).
        kind: see the module docstring.
        max_new_tokens: generate only.
        stop: generate only; generation ends before the first of these strings.
        at: recall only, positions whose next token is asked; ``ids[at[j] + 1]`` are the right answers.
        depth: where the needle lies, 0 (start) to 1 (end), as share of the prompt's tokens; None: no single needle.
        truncated: tokens left out of the source's text to fit the length (InfiniteBench cuts the middle); never silent.
        meta: what the report may show beside it; JSON values only.
    """

    task: str
    length: int
    index: int
    ids: np.ndarray
    text: str = ""
    targets: tuple[str, ...] = ()
    kind: Kind = "generate"
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    at: tuple[int, ...] = ()
    depth: float | None = None
    truncated: int = 0
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model answered: text (generate), log-probabilities float32 [n - 1] (score), token ids (recall)."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: np.ndarray | None = None


@dataclass(frozen=True)
class Figure:
    """A number over samples, with what is known of its error.

    Attributes:
        value: in the metric's own unit (shares in 0..1; perplexity as it is).
        n: samples behind it.
        stderr: standard error of the value; None when it cannot be told (n = 1).
        low, high: 95 % confidence interval.
    """

    value: float
    n: int
    stderr: float | None = None
    low: float | None = None
    high: float | None = None


class Task(Protocol):
    """One task of a suite: makes samples, scores answers.

    Attributes:
        name: unique over all suites, e.g. ``ruler_niah_single_1``.
        suite: ``ruler``, ``niah``, ``infinitebench``, ``pg19`` or ``retrieval``.
        metric: the metric that tables show; a key of what `score` returns (or of what `aggregate` returns).
        source: where its text comes from: ``published`` (the benchmark's own data, fetched from the hub by its known name),
            ``local`` (files of the data directory, of which nobody knows whether they are the benchmark's), ``generated`` (the
            benchmark itself is generated, and this is its rule), or ``synthetic`` (a stand-in: never to be called by the
            benchmark's name).
    """

    name: str
    suite: str
    metric: str
    source: str

    def count(self, length: int) -> int | None:
        """Samples there are at this length; None: as many as one likes."""

    def sample(self, length: int, index: int) -> Sample:
        """Sample number ``index``. Raises DoesNotFitError when no sample of this task can be so short."""

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        """Metric name -> value of this one answer."""

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """Metric name -> figure over the stored rows of one (task, length); each row has the ``scores`` of `score`."""


@dataclass(frozen=True)
class SuiteOptions:
    """What every suite is told.

    Attributes:
        tokenizer: the model's own.
        seed: of all samples.
        data_dir: directory with the public data sets; None: none at hand.
        online: may data sets be fetched from the hub?
    """

    tokenizer: PreTrainedTokenizerBase
    seed: int = 0
    data_dir: Path | None = None
    online: bool = False
