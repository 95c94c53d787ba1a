"""Offline twins of InfiniteBench's synthetic tasks: the same rules at any length, for any tokenizer, with no download.

A twin is no InfiniteBench score, and its name and source say so. math_calc has none: half of its tokens would have to be
generated one by one (its published budget is 30,000), and no published model gets anywhere with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from random import Random
from typing import Any

from mtrain_eval.infinitebench import haystacks
from mtrain_eval.infinitebench.catalogue import BY_SPLIT, Entry
from mtrain_eval.infinitebench.fitting import fill
from mtrain_eval.infinitebench.haystacks import Made, Maker
from mtrain_eval.infinitebench.labels import as_targets, restore
from mtrain_eval.infinitebench.prompts import Frame, frame
from mtrain_eval.infinitebench.scorers import SCORERS
from mtrain_eval.sample import DoesNotFitError, Figure, Prediction, Sample, SuiteOptions
from mtrain_eval.seeds import sample_random
from mtrain_eval.statistics import mean_figures
from mtrain_eval.tokens import count_tokens, encode_prompt

# split -> (fewest units, bytes of " " and the longest answer: never fewer than its tokens)
RULES = {
    "passkey": (2, 6),
    "number_string": (2, 11),
    "kv_retrieval": (2, 37),
    "code_run": (max(haystacks.DEPTHS), 5),
    "math_find": (8, 5),
}
_SIMPLE: dict[str, Callable[[Random, int], Maker]] = {
    "passkey": haystacks.passkey,
    "number_string": haystacks.number_string,
    "kv_retrieval": haystacks.kv_retrieval,
    "math_find": haystacks.math_find,
}
_PROBES = 10  # samples measured to tell how short a sample can be: two of each depth of code_run


def twin_name(split: str) -> str:
    """Of the twin of a task."""
    return f"infinitebench_twin_{split}"


class TwinTask:
    """The twin of one task."""

    suite = "infinitebench"
    source = "synthetic"

    def __init__(self, options: SuiteOptions, split: str) -> None:
        self.name = twin_name(split)
        self._options = options
        self._entry: Entry = BY_SPLIT[split]
        self._fewest, answer = RULES[split]
        self.metric = self._entry.metric
        # The benchmark's number is for tokenizers that merge; the answer fits for any.
        self.max_new_tokens = max(self._entry.max_new_tokens, answer)

    def count(self, length: int) -> int | None:
        """As many as one likes."""
        return None

    def sample(self, length: int, index: int) -> Sample:
        """Sample ``index``: with one unit of haystack more it would have more than length - max_new_tokens tokens.

        Raises:
            DoesNotFitError: the length is too short for any.
        """
        if length < self._shortest:
            raise DoesNotFitError(
                f"{self.name} needs a length of {self._shortest} with this tokenizer, not {length}", self._shortest
            )
        room = length - self.max_new_tokens
        core = self._core(room)
        while True:
            make = self._maker(self._options.seed, length, index, core)
            fewest = max(self._fewest, core)
            if self._tokens(make(fewest)) <= room:
                break
            if core <= self._fewest:
                raise DoesNotFitError(f"{self.name}, sample {index}, needs more than a length of {length}")
            core = max(self._fewest, core * 3 // 4)
        units = fill(lambda n: self._tokens(make(n)), room, fewest, int(room / self._unit))
        return self._finished(make(units), length, index)

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        """By the official scorer."""
        label = restore(self._entry.label, sample.targets)
        return {self.metric: SCORERS[self._entry.split](prediction.text, label)}

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """The mean."""
        return mean_figures(rows)

    def _finished(self, made: Made, length: int, index: int) -> Sample:
        around = self._frame(made)
        text = around.before + made.context + around.after
        ids = encode_prompt(self._options.tokenizer, text)
        depth = None
        if made.needle_at is not None:
            before = count_tokens(self._options.tokenizer, around.before + made.context[: made.needle_at])
            depth = before / len(ids)
        return Sample(
            task=self.name,
            length=length,
            index=index,
            ids=ids,
            text=text,
            targets=as_targets(made.label),
            max_new_tokens=self.max_new_tokens,
            depth=depth,
            meta=made.meta,
        )

    def _maker(self, seed: int, length: int, index: int, core: int) -> Maker:
        random = sample_random(seed, self.name, length, index)
        split = self._entry.split
        return haystacks.code_run(random, index, core) if split == "code_run" else _SIMPLE[split](random, index)

    def _frame(self, made: Made) -> Frame:
        return frame(self._entry, made.question)

    def _tokens(self, made: Made) -> int:
        around = self._frame(made)
        return count_tokens(self._options.tokenizer, around.before + made.context + around.after)

    def _core(self, room: int) -> int:
        """Functions of code_run that may be called: about nine of ten; the fewest for the other tasks, which have no such."""
        if self._entry.split != "code_run":
            return self._fewest
        return max(self._fewest, int(0.9 * (room - self._probes[0]) / self._unit))

    @cached_property
    def _probes(self) -> tuple[int, int, int]:
        """(tokens of the largest smallest sample, and of one sample with the fewest and with 64 units); of no seed or length,
        so that samples depend on nothing but themselves."""
        sizes = [self._tokens(self._maker(0, 0, index, self._fewest)(self._fewest)) for index in range(_PROBES)]
        return max(sizes), sizes[0], self._tokens(self._maker(0, 0, 0, self._fewest)(64))

    @cached_property
    def _shortest(self) -> int:
        """Length that any sample can have: some tokens above the largest of the probes."""
        return self._probes[0] + self._probes[0] // 16 + self.max_new_tokens

    @cached_property
    def _unit(self) -> float:
        """Tokens of a unit, about; at least a hundredth."""
        _, few, many = self._probes
        return max(0.01, (many - few) / (64 - self._fewest))
