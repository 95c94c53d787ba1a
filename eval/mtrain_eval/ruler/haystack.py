"""Haystacks of RULER's needles: essays word by word, repeated when they end."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.errors import EvalError
from mtrain_eval.prose import essay_source, load_essays, split_sentences
from mtrain_eval.sample import SuiteOptions


class Essays:
    """All essays as one endless row of words, with its sentences. Read or made when first needed."""

    def __init__(self, options: SuiteOptions) -> None:
        self._options = options

    @property
    def source(self) -> str:
        """``local``, ``published`` or ``synthetic``."""
        return essay_source(self._options)

    @cached_property
    def words(self) -> list[str]:
        return [word for sentence in self._sentences for word in sentence.split(" ")]

    @cached_property
    def starts(self) -> list[int]:
        """First word of each sentence."""
        sizes = [len(sentence.split(" ")) for sentence in self._sentences]
        return [0, *np.cumsum(sizes)[:-1].tolist()]

    @cached_property
    def costs(self) -> np.ndarray:
        """float64 [words + 1], estimated tokens before each word."""
        return np.concatenate([[0.0], np.cumsum(token_costs(self._options.tokenizer, self.words))])

    def cost(self, words: int) -> float:
        """Estimated tokens of the first so many words."""
        rounds, rest = divmod(words, len(self.words))
        return float(rounds * self.costs[-1] + self.costs[rest])

    def sentences(self, words: int) -> int:
        """How many sentences the first so many words are; the last one may be cut."""
        rounds, rest = divmod(words, len(self.words))
        return rounds * len(self.starts) + bisect_left(self.starts, rest)

    def start(self, sentence: int) -> int:
        """First word of a sentence, counted through the repetitions."""
        rounds, rest = divmod(sentence, len(self.starts))
        return rounds * len(self.words) + self.starts[rest]

    def text(self, start: int, stop: int) -> str:
        """Words start to stop, with spaces between them."""
        size, pieces = len(self.words), []
        while start < stop:
            rounds, at = divmod(start, size)
            end = min(stop, (rounds + 1) * size)
            pieces += self.words[at : at + end - start]
            start = end
        return " ".join(pieces)

    @cached_property
    def _sentences(self) -> list[str]:
        texts, _ = load_essays(self._options)
        found = split_sentences(" ".join(texts))
        if not found:
            raise EvalError("the essays hold no words; put the original texts there")
        return found


def token_costs(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> np.ndarray:
    """float64 [words], tokens of each word after a space, each on its own: an estimate of what it adds to a text."""
    distinct = list(dict.fromkeys(words))
    encoded = tokenizer([f" {word}" for word in distinct], add_special_tokens=False)["input_ids"]
    tokens = {word: max(len(ids), 1) for word, ids in zip(distinct, encoded, strict=True)}
    return np.asarray([tokens[word] for word in words], dtype=np.float64)
