"""What RULER's tasks share: a prompt of the right length, its tokens, its scores."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mtrain_eval.ruler.scorers import clean, string_match_all, string_match_part
from mtrain_eval.ruler.sizing import largest_fit
from mtrain_eval.sample import DoesNotFitError, Figure, Prediction, Sample, SuiteOptions
from mtrain_eval.seeds import sample_random
from mtrain_eval.statistics import mean_figures
from mtrain_eval.tokens import count_tokens, encode_prompt

ATTEMPTS = 64  # other keys and words, when those drawn first are a token too long
_PROBES = 16  # draws that tell whether a length has room
_TIGHT = 0.8  # of the room, that the smallest sample takes; words drawn for it differ in length by less


Join = Callable[[str, str], str]


def plain(prompt: str, answer_prefix: str) -> str:
    """Prompt and beginning of the answer as one text: how base models are asked, and how RULER asks them."""
    return prompt + answer_prefix


@dataclass(frozen=True)
class Draft:
    """A sample before it is tokenised.

    Attributes:
        prompt: all but the beginning of the answer.
        prefix: the beginning of the answer, which the model goes on from.
        targets: the right answers.
        needle: the sentence with the answer, where there is one only; its place gives the sample's depth.
        meta: as `Sample.meta`.
    """

    prompt: str
    prefix: str
    targets: tuple[str, ...]
    needle: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A sample that can still be of any size.

    Attributes:
        build: the sample with so many units of haystack; the same draft whenever it is called.
        smallest: fewest units with which it is a sample of its task.
        cost: as in `largest_fit`.
    """

    build: Callable[[int], Draft]
    smallest: int = 1
    cost: Callable[[int], float] | None = None


class RulerTask(ABC):
    """One of the 13. Sizing, tokens, depth and scores are here; subclasses say what stands in the prompt.

    Args:
        options: as for every suite.
        name: of the task without ``ruler_``.
        max_new_tokens: tokens that the answer may have; they are part of the length.

    Attributes:
        join: prompt and beginning of the answer -> text that the model gets; see `plain`.
    """

    suite = "ruler"
    metric = "string_match_all"
    source = "generated"

    def __init__(self, options: SuiteOptions, name: str, max_new_tokens: int) -> None:
        self.name = f"ruler_{name}"
        self.options = options
        self.max_new_tokens = max_new_tokens
        self.join: Join = plain
        self._needed: dict[int, list[int]] = {}  # length -> sizes of some smallest samples, sorted

    @abstractmethod
    def plan(self, length: int, index: int, attempt: int) -> Plan:
        """Sample number ``index`` in all sizes; another attempt draws other words."""

    def missing(self) -> str | None:
        """What is missing in a data directory that was given, and what to do; None: nothing is, or none was given."""
        return None

    def count(self, length: int) -> int | None:
        """Any number of samples."""
        return None

    def rng(self, length: int, index: int, attempt: int, stream: str) -> random.Random:
        """One stream of a sample's randomness."""
        return sample_random(self.options.seed, self.name, length, index, attempt, stream)

    def sample(self, length: int, index: int) -> Sample:
        """Prompt and generated tokens together are at most ``length``, and with one unit of haystack more they are not.

        Raises:
            DoesNotFitError: even the smallest haystack is too long; says which length would do.
            EvalError: data, lm-eval or wonderwords is missing.
        """
        budget = length - self.max_new_tokens
        for attempt in range(ATTEMPTS):
            plan = self.plan(length, index, attempt)
            needed = self._smallest(plan)
            if needed > _TIGHT * budget:
                self._check_room(length)
            if needed <= budget:
                return self._fitted(plan, length, index)
        raise self.too_short(length, length + 1)

    def _check_room(self, length: int) -> None:
        """All samples of a length fit, or none: a quarter of some draws must, and then each sample finds one that does."""
        if self._probed(length)[_PROBES // 4 - 1] > length:
            raise self.too_short(length, self.enough(length))

    def enough(self, length: int) -> int:
        """Tokens that are enough by the rules of a length; a little less may do too, because other words are drawn then."""
        return self._probed(length)[3 * _PROBES // 4]

    def _probed(self, length: int) -> list[int]:
        if length not in self._needed:
            sizes = [self._smallest(self.plan(length, 0, attempt)) for attempt in range(_PROBES)]
            self._needed[length] = sorted(size + self.max_new_tokens for size in sizes)
        return self._needed[length]

    def _smallest(self, plan: Plan) -> int:
        return len(self._encode(plan.build(plan.smallest)))

    def too_short(self, length: int, needed: int) -> DoesNotFitError:
        """The error that says what would do."""
        first, where = self.where_it_fits(length, needed)
        return DoesNotFitError(
            f"{self.name} does not fit {length} tokens: with this tokenizer, {self.max_new_tokens} generated tokens included, "
            f"it fits {where}",
            first,
        )

    def where_it_fits(self, length: int, needed: int) -> tuple[int, str]:
        """The first length that is enough, and all of them in words; by the rules of ``length``, ``needed`` tokens are."""
        return needed, f"from about {needed} on"

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        """The official score of one answer, and whether it was empty (RULER's count of nulls)."""
        match = string_match_part if self.metric == "string_match_part" else string_match_all
        return {self.metric: match(prediction.text, sample.targets), "null": float(not clean(prediction.text))}

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """Means over the samples."""
        return mean_figures(rows)

    def _encode(self, draft: Draft) -> np.ndarray:
        return encode_prompt(self.options.tokenizer, self.join(draft.prompt, draft.prefix))

    def _fitted(self, plan: Plan, length: int, index: int) -> Sample:
        encoded: dict[int, np.ndarray] = {}

        def count(units: int) -> int:
            if units not in encoded:
                encoded[units] = self._encode(plan.build(units))
            return len(encoded[units])

        units = largest_fit(count, length - self.max_new_tokens, plan.smallest, plan.cost)
        draft = plan.build(units)
        text = self.join(draft.prompt, draft.prefix)
        return Sample(
            task=self.name,
            length=length,
            index=index,
            ids=encoded[units],
            text=text,
            targets=draft.targets,
            max_new_tokens=self.max_new_tokens,
            depth=self._depth(text, draft.needle, len(encoded[units])),
            meta={**draft.meta, "units": units},
        )

    def _depth(self, text: str, needle: str | None, tokens: int) -> float | None:
        if needle is None:
            return None
        return count_tokens(self.options.tokenizer, text[: text.index(needle)]) / tokens
