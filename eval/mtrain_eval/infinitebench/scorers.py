"""InfiniteBench's scorers, with every quirk of theirs (facts: OpenBMB/InfiniteBench, src/compute_scores.py at 88b3daa).

Each takes the prediction and the label in the types of the official files (`labels.restore`) and gives a share in 0..1. Where
the official code ends in an error (math_find on "12.0" with an integer label; numbers of thousands of digits), the rule of
MInference's copy or plain comparison of digits takes its place; nothing that the official code scores is scored otherwise.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

_KV_MARKS = "\n:\"'.,?!{}"
_RUN_MARKS = "\n.`'\":"
_CHOICE_MARKS = "\n\"'.,?!{}"
_CHOICE_PREFIXES = ("answer is:", "answer:", "answer is", "option is")
_DEBUG_MARKS = ("\n", "`", "'", '"', "-", "*", "Option", "option")
_DEBUG_PREFIXES = ("answer is:", "is:", "answer:", "correct option is:")
# The benchmark's list of Chinese marks by code point; it has the closing title mark (U+300B) but not the opening one, nor
# the angle brackets U+3008 and U+3009: these stay in the text.
_ZH_MARKS = frozenset(
    [
        *map(chr, (0xFF01, 0xFF1F, 0xFF61, 0x3002)),
        *map(chr, (*range(0xFF02, 0xFF0E), 0xFF0F, *range(0xFF1A, 0xFF1F), 0xFF20)),
        *map(chr, (*range(0xFF3B, 0xFF41), *range(0xFF5B, 0xFF61), *range(0xFF62, 0xFF65))),
        *map(chr, (0x3001, 0x3003, *range(0x300B, 0x3012), *range(0x3014, 0x3020), 0x3030, 0x303E, 0x303F)),
        *map(chr, (0x2013, 0x2014, 0x2018, 0x2019, *range(0x201B, 0x2020), 0x2026, 0x2027, 0xFE4F)),
        *string.punctuation,
    ]
)


def first_digits(prediction: str, label: str) -> float:
    """passkey, number_string: the first run of digits is the label."""
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and found[0] == label)


def has_word(prediction: str, label: str) -> float:
    """kv_retrieval: the label is one of the words."""
    return float(label in _spaced(prediction, _KV_MARKS).split())


def last_integer(prediction: str, label: int) -> float:
    """code_run: the last word, as an integer."""
    words = _spaced(prediction.strip(), _RUN_MARKS).split()
    try:
        return float(bool(words) and int(words[-1]) == label)
    except ValueError:
        return 0.0


def first_number(prediction: str, label: int | float) -> float:
    """math_find: the first number, without its sign. An integer label asks for its part before the point only."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    if found is None:
        return 0.0
    try:
        return float((int(found[0].split(".")[0]) if isinstance(label, int) else float(found[0])) == label)
    except ValueError:  # more digits than Python turns into an integer
        return 0.0


def longest_prefix(prediction: str, label: Sequence[int]) -> float:
    """math_calc: numbers right before the first wrong one, as share of all. Signs are not read."""
    count = 0
    for right, found in zip(label, re.findall(r"[0-9]+", prediction), strict=False):
        if (found.lstrip("0") or "0") != str(right):
            break
        count += 1
    return count / len(label)


def debug_option(prediction: str, label: Sequence[str]) -> float:
    """code_debug: starts with "X." or "X:", or the letter or function follows the first prefix found (in their order).

    One character is passed over after a prefix, upper and lower case differ, and a bare letter is no answer.
    """
    function, letter = label
    text = prediction.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _single_spaced(_spaced(text, _DEBUG_MARKS))
    after = _after_prefix(text, _DEBUG_PREFIXES)
    return float(after is not None and after != "" and after.startswith((letter, function)))


def choice(prediction: str, label: Sequence[str]) -> float:
    """longbook_choice_eng: first letter, else the option's text, else after a prefix, else the first word of letters A-D."""
    text = prediction.strip()
    if not text:
        return 0.0
    if text[0] in "ABCD":
        return float(text[0] in label)
    if text in label:
        return 1.0
    text = _single_spaced(_spaced(text, _CHOICE_MARKS))
    after = _after_prefix(text, _CHOICE_PREFIXES)
    if after is not None:
        return float(after != "" and after.startswith(tuple(label)))
    for word in text.split():
        if word in "ABCD":  # "AB" too, which is then wrong
            return float(word in label)
    return 0.0


def first_name(prediction: str, label: Sequence[str]) -> float:
    """longdialogue_qa_eng: only the first of the names counts, as one whole upper-cased word."""
    return float(label[0] in [word.upper() for word in _spaced(prediction.strip(), _KV_MARKS).split()])


def qa_f1(prediction: str, label: Sequence[str]) -> float:
    """longbook_qa_eng: best F1 over words, normalised as in SQuAD (marks are deleted before articles)."""
    return max((_f1(_words(prediction), _words(right)) for right in label), default=0.0)


def zh_f1(prediction: str, label: Sequence[str]) -> float:
    """longbook_qa_chn: best F1 over characters without marks and white space."""
    return max((_f1(_characters(prediction), _characters(right)) for right in label), default=0.0)


def rouge_lsum(prediction: str, label: Sequence[str]) -> float:
    """longbook_sum_eng: rougeLsum F1 as Hugging Face's evaluate has it: sentences are lines, no stemmer, best reference."""
    return float(_rouge().score_multi(list(label), prediction)["rougeLsum"].fmeasure)


SCORERS: dict[str, Callable[[str, Any], float]] = {
    "passkey": first_digits,
    "number_string": first_digits,
    "kv_retrieval": has_word,
    "longbook_sum_eng": rouge_lsum,
    "longbook_qa_eng": qa_f1,
    "longbook_choice_eng": choice,
    "longdialogue_qa_eng": first_name,
    "longbook_qa_chn": zh_f1,
    "code_debug": debug_option,
    "code_run": last_integer,
    "math_calc": longest_prefix,
    "math_find": first_number,
}


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=False)


def _spaced(text: str, marks: Iterable[str]) -> str:
    for mark in marks:
        text = text.replace(mark, " ")
    return text


def _single_spaced(text: str) -> str:
    return re.sub(" {2,}", " ", text)


def _after_prefix(text: str, prefixes: Sequence[str]) -> str | None:
    """What follows the first of the prefixes that is there, less one character; None: there is none."""
    for prefix in prefixes:
        at = text.find(prefix)
        if at >= 0:
            return text[at + len(prefix) + 1 :]
    return None


def _words(text: str) -> list[str]:
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _characters(text: str) -> list[str]:
    return [letter for letter in text.lower() if letter not in _ZH_MARKS and not letter.isspace()]


def _f1(prediction: Sequence[str], right: Sequence[str]) -> float:
    same = sum((Counter(prediction) & Counter(right)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(right)
    return 2 * precision * recall / (precision + recall)
