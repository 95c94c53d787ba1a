"""InfiniteBench's tasks on its own data, or on files of a data directory that claim to be it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mtrain_eval.infinitebench.catalogue import Entry
from mtrain_eval.infinitebench.data import Lines, open_rows, row_source
from mtrain_eval.infinitebench.labels import as_targets, restore
from mtrain_eval.infinitebench.prompts import Frame, frame
from mtrain_eval.infinitebench.scorers import SCORERS
from mtrain_eval.sample import DoesNotFitError, Figure, Prediction, Sample, SuiteOptions
from mtrain_eval.statistics import mean_figures
from mtrain_eval.tokens import count_tokens, encode_prompt


class PublishedTask:
    """One of the 12 tasks; sample ``index`` is row ``index`` of its file, cut in the middle to fit the length."""

    suite = "infinitebench"

    def __init__(self, options: SuiteOptions, entry: Entry) -> None:
        self.name = entry.name
        self.metric = entry.metric
        self.source = row_source(options, entry)
        self._options = options
        self._entry = entry

    @cached_property
    def _rows(self) -> Lines:
        return open_rows(self._options, self._entry)

    def count(self, length: int) -> int | None:
        """Rows of the file."""
        return len(self._rows)

    def sample(self, length: int, index: int) -> Sample:
        """Row ``index``. Where the whole prompt has more than M = length - max_new_tokens tokens, its first M // 2 and its
        last M - M // 2 are kept (as the official code does; its copy for one model loses a token at odd M).

        Raises:
            DoesNotFitError: the cut would reach the instruction or the question.
            EvalError: the data cannot be read.
        """
        entry, tokenizer = self._entry, self._options.tokenizer
        row = self._rows[index]
        around = frame(entry, row.question, row.options)
        text = around.before + row.context + around.after
        ids = encode_prompt(tokenizer, text)
        room = length - entry.max_new_tokens
        truncated = max(0, len(ids) - room)
        if truncated:
            self._check(around, length)
            head, tail = ids[: room // 2], ids[len(ids) - (room - room // 2) :]
            # Halves of a character at the cut would be three bytes each when a harness makes tokens of the text again.
            text = self._text(head).rstrip("\ufffd") + self._text(tail).lstrip("\ufffd")
            ids = np.concatenate([head, tail])
        return Sample(
            task=self.name,
            length=length,
            index=index,
            ids=ids,
            text=text,
            targets=as_targets(row.label),
            max_new_tokens=entry.max_new_tokens,
            truncated=truncated,
            meta={"id": row.id},
        )

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        """The official score of this one answer."""
        label = restore(self._entry.label, sample.targets)
        return {self.metric: SCORERS[self._entry.split](prediction.text, label)}

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """The mean, as published."""
        return mean_figures(rows)

    def _check(self, around: Frame, length: int) -> None:
        """The instruction has the first half for itself, the question the second."""
        sides = [count_tokens(self._options.tokenizer, side) for side in around]
        needed = 2 * max(sides) + 2 + self._entry.max_new_tokens
        if length < needed:
            raise DoesNotFitError(
                f"{self.name} needs a length of {needed}: {self._entry.max_new_tokens} tokens are generated, and instruction "
                f"and question have {sides[0]} and {sides[1]}",
                needed,
            )

    def _text(self, ids: np.ndarray) -> str:
        return str(self._options.tokenizer.decode(ids.tolist(), skip_special_tokens=True))
