"""The words of RULER: wonderwords' own lists, in an order that nothing can change."""

from __future__ import annotations

import importlib.util
import random
import uuid
from functools import cache, lru_cache
from pathlib import Path

from mtrain.errors import EvalError
from mtrain_eval.upstream import INSTALL

_TRIES = 200  # draws of a word not drawn yet; one of 6 million, so a second try is rare already


@cache
def word_list(kind: str) -> tuple[str, ...]:
    """Sorted distinct words of one kind: ``noun``, ``adjective`` or ``verb``.

    Raises:
        EvalError: wonderwords is not installed.
    """
    spec = importlib.util.find_spec("wonderwords")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise EvalError(f"the words of RULER come from wonderwords, which is not installed; {INSTALL}")
    text = (Path(places[0]) / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({word.strip() for word in text.split("\n") if word.strip()}))


@lru_cache(maxsize=1)
def all_words() -> tuple[str, ...]:
    """Sorted distinct nouns, adjectives and verbs: the vocabulary of common words extraction."""
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in word_list(kind)}))


class Draws:
    """Random keys and values of needles, each different from all that this object drew before, whatever its case.

    RULER draws with replacement; a key that happens to be drawn twice would have two answers.
    """

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seen: set[str] = set()

    def one(self, kind: str) -> str:
        """One of ``words`` (adjective-noun), ``numbers`` (7 digits) or ``uuids`` (version 4)."""
        draw = {"words": self._word, "numbers": self._number, "uuids": self._uuid}[kind]
        for _ in range(_TRIES):
            text = draw()
            if text.lower() not in self._seen:
                self._seen.add(text.lower())
                return text
        raise EvalError(f"no {kind} left to draw after {len(self._seen)}; the length is beyond what this task can fill")

    def _word(self) -> str:
        return f"{self._rng.choice(word_list('adjective'))}-{self._rng.choice(word_list('noun'))}"

    def _number(self) -> str:
        return str(self._rng.randint(10**6, 10**7 - 1))

    def _uuid(self) -> str:
        return str(uuid.UUID(int=self._rng.getrandbits(128), version=4))
