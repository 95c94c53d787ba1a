"""Was the needle found? The value itself, the words of the answer, and ROUGE-1.

All three are shares in 0..1. Kamradt's own judge is a language model and not to be had offline; ROUGE-1 and word recall are what
later papers (Fu et al. 2024; SnapKV, PyramidKV) put in its place.
"""

from __future__ import annotations

import re
from collections import Counter

# Words that an answer may leave out without being wrong.
_SMALL = frozenset(
    "a an and at be for from has have in is it its of on or so that the then there they this to was with".split()
)


def found(text: str, value: str) -> float:
    """1.0 when the value stands in the text as it is, upper and lower case alike (MInference's test for its numbers)."""
    return float(bool(value) and value.casefold() in text.casefold())


def word_recall(text: str, answer: str) -> float:
    """Share of the answer's different words, small ones left out, that the text has too; 0 for an answer without words."""
    wanted = set(_words(answer)) - _SMALL or set(_words(answer))
    return len(wanted & set(_words(text))) / len(wanted) if wanted else 0.0


def rouge_1(text: str, answer: str) -> float:
    """F1 of the words that both have, counted as often as both have them (Lin 2004, ROUGE-1, without stemming)."""
    ours, theirs = Counter(_words(text)), Counter(_words(answer))
    both = sum((ours & theirs).values())
    return 2 * both / (ours.total() + theirs.total()) if both else 0.0


def first_line(text: str) -> str:
    """The first line that is not blank: a base model goes on and on after its answer."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
