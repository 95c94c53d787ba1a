"""Needles in prose: a sentence to recall (Kamradt 2023) and a magic number (MInference's variant, Jiang et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mtrain.errors import EvalError
from mtrain_eval.niah.cities import CITIES
from mtrain_eval.niah.grid import depth_of, spread_depths
from mtrain_eval.niah.haystack import Frame, Haystack
from mtrain_eval.niah.scores import first_line, found, rouge_1, word_recall
from mtrain_eval.prose import essay_source, load_essays
from mtrain_eval.sample import DoesNotFitError, Figure, Prediction, Sample, SuiteOptions
from mtrain_eval.seeds import sample_rng
from mtrain_eval.statistics import mean_figures
from mtrain_eval.tokens import count_tokens


class Essays:
    """The haystack that the tasks of one run share; read and counted when the first sample is made."""

    def __init__(self, options: SuiteOptions) -> None:
        self.options = options

    @cached_property
    def haystack(self) -> Haystack:
        texts, _ = load_essays(self.options)
        return Haystack(self.options.tokenizer, texts)


@dataclass(frozen=True)
class Needle:
    """One question: the prompt without its haystack, and what a right answer contains."""

    frame: Frame
    answer: str


class ProseTask:
    """A needle in prose. Sample ``index`` lies at depth ``index`` of the grid, going round."""

    suite = "niah"
    name: str
    metric: str
    max_new_tokens: int

    def __init__(self, options: SuiteOptions, essays: Essays | None = None, points: int | None = None) -> None:
        self.options = options
        self.essays = essays or Essays(options)
        self.depths = spread_depths() if points is None else spread_depths(points)
        self.source = essay_source(options)

    def needle(self, rng: np.random.Generator) -> Needle:
        """A needle to hide."""
        raise NotImplementedError

    def largest(self) -> int:
        """Tokens that surely hold any prompt of this task with no haystack, and as much haystack as its needle is long."""
        raise NotImplementedError

    def count(self, length: int) -> int | None:
        """See Task: as many as one likes."""
        return None

    def sample(self, length: int, index: int) -> Sample:
        """See Task."""
        if length < self._shortest:
            raise DoesNotFitError(
                f"{self.name}: {length} tokens do not hold the question, its answer and a haystack as long as the needle; "
                f"it takes {self._shortest} with this tokenizer",
                self._shortest,
            )
        depth, round_ = depth_of(index, self.depths)
        rng = sample_rng(self.options.seed, self.name, length, index)
        haystack = self.essays.haystack
        for _ in range(20):
            needle, start = self.needle(rng), int(rng.integers(len(haystack.sentences)))
            filled = haystack.fill(needle.frame, length - self.max_new_tokens, depth, start)
            # An answer that also stands elsewhere in an essay would be no needle.
            if filled.text.count(needle.answer) == needle_count(needle):
                break
        else:
            raise EvalError(
                f"{self.name}: the essays themselves hold the answer {needle.answer!r}; take other essays for --data-dir"
            )
        return Sample(
            task=self.name,
            length=length,
            index=index,
            ids=filled.ids,
            text=filled.text,
            targets=(needle.answer,),
            max_new_tokens=self.max_new_tokens,
            depth=filled.needle_at / len(filled.ids),
            meta={"depth_asked": depth, "round": round_, "haystack": self.source, "sentences": filled.sentences},
        )

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        """``exact``: the answer stands in the prediction; ``word_recall`` and ``rouge_1`` of the prediction's first line."""
        (answer,), line = sample.targets, first_line(prediction.text)
        return {
            "exact": found(prediction.text, answer),
            "word_recall": word_recall(line, answer),
            "rouge_1": rouge_1(line, answer),
        }

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """See Task: means over samples."""
        return mean_figures(rows)

    @cached_property
    def _shortest(self) -> int:
        return self.largest() + self.max_new_tokens


class KamradtTask(ProseTask):
    """Greg Kamradt's test with a needle of our own of the same kind: one fact about San Francisco among unrelated prose."""

    name = "niah_kamradt"
    metric = "word_recall"
    max_new_tokens = 64

    _ANSWER = "buy a warm bagel and row a boat on Stow Lake"
    _OPENING = "A visitor with one free afternoon in San Francisco should"
    _NEEDLE = Needle(
        Frame(
            head="Read this text. A question about it follows.\n\n",
            needle=f"{_OPENING} {_ANSWER}.",
            tail="\n\nQuestion: What should a visitor with one free afternoon in San Francisco do? Answer from the text alone.\n"
            f"Answer: {_OPENING}",
        ),
        _ANSWER,
    )

    def needle(self, rng: np.random.Generator) -> Needle:
        """See ProseTask: always the same one."""
        return self._NEEDLE

    def largest(self) -> int:
        """See ProseTask."""
        return _tokens(self.options, self._NEEDLE)


class NumberTask(ProseTask):
    """The magic number of a city: seven digits that stand nowhere else."""

    name = "niah_number"
    metric = "exact"
    max_new_tokens = 32

    def needle(self, rng: np.random.Generator) -> Needle:
        """See ProseTask: a city and a number from 1,000,000 to 9,999,999."""
        return self._ask(CITIES[int(rng.integers(len(CITIES)))], str(rng.integers(10**6, 10**7)))

    def largest(self) -> int:
        """See ProseTask."""
        # A number may take a token more than this one does for some tokenizers, never more than one for each digit.
        return max(_tokens(self.options, self._ask(city, "7777777")) for city in CITIES) + 14

    @staticmethod
    def _ask(city: str, number: str) -> Needle:
        fact = f"The special magic number of {city} is"
        return Needle(
            Frame(
                head="A special magic number is hidden in this text. Remember it; you will be asked for it.\n\n",
                needle=f"{fact} {number}.",
                tail=f"\n\nQuestion: What is the special magic number of {city}?\nAnswer: {fact}",
            ),
            number,
        )


def needle_count(needle: Needle) -> int:
    """How often the answer stands in the prompt without its haystack: once, in the needle."""
    return (needle.frame.head + needle.frame.needle + needle.frame.tail).count(needle.answer)


def _tokens(options: SuiteOptions, needle: Needle) -> int:
    frame = needle.frame
    bare = count_tokens(options.tokenizer, frame.head + frame.needle + frame.tail)
    return bare + count_tokens(options.tokenizer, frame.needle)
