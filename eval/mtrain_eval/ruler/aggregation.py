"""RULER's aggregation tasks: which words are the most common (common_words_extraction.py, freq_words_extraction.py)."""

from __future__ import annotations

import math
import random
import string

import numpy as np

from mtrain_eval.ruler.haystack import token_costs
from mtrain_eval.ruler.task import Draft, Plan, RulerTask
from mtrain_eval.ruler.words import Draws, all_words
from mtrain_eval.sample import SuiteOptions
from mtrain_eval.upstream import constant

COMMON = 10  # words asked for
_LONG = 4096  # from this length on words are repeated more often


def _templates(file: str) -> tuple[str, str]:
    config = constant(f"ruler/{file}", "CONFIG")
    return str(config["template"]), str(config["answer_prefix"])


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i + 1}. {word}" for i, word in enumerate(words))


class CommonWords(RulerTask):
    """The ten words that stand 30 times in a numbered list in which all others stand 3 times; one-shot.

    Below 4096 tokens 6 times and once. Lists longer than wonderwords' 8166 words, which RULER fills from a file of English
    words that is not distributed with it as text, go on with adjective-noun pairs; the sample's meta counts them.
    """

    def __init__(self, options: SuiteOptions) -> None:
        super().__init__(options, "cwe", max_new_tokens=120)

    def plan(self, length: int, index: int, attempt: int) -> Plan:
        """A unit of haystack is one more distinct word."""
        often, seldom = (30, 3) if length >= _LONG else (6, 1)
        words = _shuffled(list(all_words()), self.rng(length, index, attempt, "words"))
        known = len(words)
        draws = Draws(self.rng(length, index, attempt, "pairs"))
        prompt, prefix = _templates("cwe_utils.py")
        example = self._example(length, index, attempt)
        costs = self._costs(words, often, seldom)

        def build(units: int) -> Draft:
            while len(words) < units:
                words.append(draws.one("words"))
            listed = words[:COMMON] * often + words[COMMON:units] * seldom
            context = _numbered(_shuffled(listed, self.rng(length, index, attempt, "order")))
            meta = {"words": units, "pairs": max(units - known, 0)}
            return Draft(example + prompt.format(context=context, query=""), prefix, tuple(words[:COMMON]), meta=meta)

        def cost(units: int) -> float:
            inside = min(units, known)
            items = COMMON * often + (units - COMMON) * seldom
            # Words after the list's end are pairs, as dear as two; a number has about as many tokens per digit as its place.
            return float(costs[inside] + (units - inside) * 2 * costs[known] / known) + items * self._number_cost(items)

        return Plan(build, smallest=2 * COMMON, cost=cost)

    def where_it_fits(self, length: int, needed: int) -> tuple[int, str]:
        """Two ranges, where the repetitions from 4096 tokens on need more than that."""
        below, above = (needed, self.enough(_LONG)) if length < _LONG else (self.enough(_LONG - 1), needed)
        if below >= _LONG:
            return max(above, _LONG), f"from about {max(above, _LONG)} on"
        first = below if length < _LONG else above
        if above <= _LONG:
            return first, f"from about {below} on"
        return first, f"from about {below} to {_LONG - 1}, and from about {above} on"

    def _example(self, length: int, index: int, attempt: int) -> str:
        """A shorter list of other words with its answer: 40 words 10 and 3 times, below 4096 tokens 20 words 3 times and once."""
        size, often, seldom = (40, 10, 3) if length >= _LONG else (20, 3, 1)
        rng = self.rng(length, index, attempt, "example")
        words = rng.sample(all_words(), size)
        listed = _shuffled(words[:COMMON] * often + words[COMMON:] * seldom, rng)
        prompt, prefix = _templates("cwe_utils.py")
        return f"{prompt.format(context=_numbered(listed), query='')}{prefix} {_numbered(words[:COMMON])}\n"

    def _costs(self, words: list[str], often: int, seldom: int) -> np.ndarray:
        """float64 [words + 1], estimated tokens of the first so many words with all their repetitions."""
        each = self._word_costs(words)
        each[:COMMON] *= often
        each[COMMON:] *= seldom
        return np.concatenate([[0.0], np.cumsum(each)])

    def _word_costs(self, words: list[str]) -> np.ndarray:
        if not hasattr(self, "_known_costs"):
            everything = all_words()
            self._known_costs = dict(zip(everything, token_costs(self.options.tokenizer, everything), strict=True))
        return np.asarray([self._known_costs[word] for word in words])

    def _number_cost(self, items: int) -> float:
        """Mean tokens of the numbers 1 to ``items`` with their point."""
        if not hasattr(self, "_digits"):
            self._digits = token_costs(self.options.tokenizer, ["7" * digits + "." for digits in range(1, 9)])
        total, below = 0.0, 0
        for digits in range(1, len(str(items)) + 1):
            upto = min(items, 10**digits - 1)
            total += (upto - below) * self._digits[min(digits, 8) - 1]
            below = upto
        return total / items


class FrequentWords(RulerTask):
    """The three most frequent of made-up words whose frequencies fall as rank^-2 (Zeta distribution).

    The word of rank 1 is written "..." and does not count, so ranks 2 to 4 are asked for.
    """

    ALPHA = 2.0
    LETTERS = 6
    # From this size on rank 4 is always more frequent than rank 5: floor(53 z / 16) > floor(53 z / 25), z = 6 / pi^2.
    SMALLEST = 53

    def __init__(self, options: SuiteOptions) -> None:
        super().__init__(options, "fwe", max_new_tokens=50)

    def plan(self, length: int, index: int, attempt: int) -> Plan:
        """A unit is one more in N, of which rank i gets floor(N i^-2 / zeta(2)) words."""
        size = max((length - self.max_new_tokens) // 50, 5)
        rng = self.rng(length, index, attempt, "vocabulary")
        vocabulary: dict[str, None] = {}
        for _ in range(2 * size + 100):
            vocabulary["".join(rng.choices(string.ascii_lowercase, k=self.LETTERS))] = None
            if len(vocabulary) == size:
                break
        words = ["...", *list(vocabulary)[1:]]
        prompt, prefix = _templates("fwe_utils.py")
        shares = np.arange(1, len(words) + 1) ** -self.ALPHA / (math.pi**2 / 6)
        likely = min(len(words), 2000)  # none further down occurs below 6 million words
        costs = token_costs(self.options.tokenizer, words[:likely])

        def build(units: int) -> Draft:
            counts = (units * shares).astype(int).tolist()
            listed = [word for word, count in zip(words, counts, strict=True) for _ in range(count)]
            context = " ".join(_shuffled(listed, self.rng(length, index, attempt, "order")))
            return Draft(
                prompt.format(context=context, query=""), prefix, tuple(words[1:4]), meta={"counts": counts[:5]}
            )

        def cost(units: int) -> float:
            return float((np.floor(units * shares[:likely]) * costs).sum())

        return Plan(build, self.SMALLEST, cost)


def _shuffled(words: list[str], rng: random.Random) -> list[str]:
    order = np.random.default_rng(rng.getrandbits(64)).permutation(len(words))
    return [words[i] for i in order]
