"""InfiniteBench's scorers against cases worked by hand from the official rules, the odd ones first of all."""

from __future__ import annotations

from typing import Any

import pytest

from mtrain.errors import EvalError
from mtrain_eval.infinitebench.catalogue import ENTRIES
from mtrain_eval.infinitebench.labels import as_targets, restore
from mtrain_eval.infinitebench.scorers import SCORERS

UUID = "0f3a9c5e-7b1d-4e2f-8a6c-1d2e3f4a5b6c"

EXACT: dict[str, list[tuple[str, Any, float]]] = {
    "passkey": [
        ("71432", "71432", 1),
        (" The pass key is 71432. Remember", "71432", 1),
        ("7 1432", "71432", 0),  # the first run of digits is 7
        ("714321", "71432", 0),
        ("key 1: 71432", "71432", 0),
        ("\n\n71432", "71432", 1),
        ("٧١٤٣٢", "71432", 0),  # digits of another script are none
        ("no digits", "71432", 0),
        ("", "71432", 0),
    ],
    "number_string": [
        ("2200012222", "2200012222", 1),
        ("-2200012222-", "2200012222", 1),
        ("220001222", "2200012222", 0),
        ("2,200,012,222", "2200012222", 0),
        ("", "2200012222", 0),
    ],
    "kv_retrieval": [
        (f'"{UUID}"', UUID, 1),
        (f"{{{UUID}}}, and so on", UUID, 1),
        (f"is:{UUID}.\nKey", UUID, 1),
        (UUID.upper(), UUID, 0),
        (UUID[:-1], UUID, 0),
        (f"({UUID})", UUID, 0),  # brackets are not among the marks
        (f"x\u2028{UUID}", UUID, 1),  # white space of any kind parts words
        ("", UUID, 0),
    ],
    "code_run": [
        ("17", 17, 1),
        ("The value is 17.", 17, 1),
        ("`-4`", -4, 1),
        ("func_3(2) = -4", -4, 1),
        ("17 is it", 17, 0),  # only the last word counts
        ("17.0", 17, 0),  # "17 0": the last word is 0
        ("17.0", 0, 1),
        ("- 4", -4, 0),
        ("17,", 17, 0),  # a comma stays
        ("9" * 5000, 17, 0),
        ("  \n", 17, 0),
        ("", 0, 0),
    ],
    "math_find": [
        ("88", 88, 1),
        ("88 or 12", 88, 1),
        ("12.0", 12, 1),  # the official code ends in an error here
        ("12.9", 12, 1),  # int(float(..))
        ("12.", 12, 1),
        ("49.5", 49.5, 1),
        ("49", 49.0, 1),
        ("49.50", 49.5, 1),
        ("49,5", 49.5, 0),
        ("-88", 88, 1),  # signs are not read
        ("largest: 2 is 88", 88, 0),
        ("9" * 5000, 88, 0),
        ("", 88, 0),
    ],
    "math_calc": [
        ("4, 8, 15", [4, 8, 15], 1),
        ("[4, 8, 15, 16, 23]", [4, 8, 15], 1),
        ("4, 8", [4, 8, 15], 2 / 3),
        ("4, 9, 15", [4, 8, 15], 1 / 3),
        ("1, 4, 8, 15", [4, 8, 15], 0),  # the first number of the expression repeated: all is shifted
        ("04 8", [4, 8], 1),
        ("0", [0, 3], 1 / 2),
        ("-4", [4], 1),
        ("9" * 5000, [4], 0),
        ("", [4], 0),
    ],
    "code_debug": [
        ("B. Spider.crawl", ["Spider.crawl", "B"], 1),
        ("B: yes", ["Spider.crawl", "B"], 1),
        ("  B.", ["Spider.crawl", "B"], 1),
        ("B", ["Spider.crawl", "B"], 0),  # a bare letter is no answer
        ("b.", ["Spider.crawl", "B"], 0),
        ("Spider.crawl", ["Spider.crawl", "B"], 0),
        ("A. or B.", ["Spider.crawl", "B"], 0),
        ("The answer is: B", ["Spider.crawl", "B"], 1),
        ("The answer is:B", ["Spider.crawl", "B"], 0),  # the character after the prefix is passed over
        ("The answer is:  B", ["Spider.crawl", "B"], 1),  # runs of blanks become one
        (
            "answer: `Spider.crawl`",
            ["Spider.crawl", "B"],
            1,
        ),  # "`" becomes a blank, blanks become one, one is passed over
        ("The Answer: B", ["Spider.crawl", "B"], 0),  # prefixes in small letters only
        ("the bug is: Spider.crawl()", ["Spider.crawl", "B"], 1),
        ("The correct option is: B", ["Spider.crawl", "B"], 1),
        ("answer: A, but it is: B", ["Spider.crawl", "B"], 1),  # "is:" is looked for before "answer:"
        ("The answer is:", ["Spider.crawl", "B"], 0),
        ("", ["Spider.crawl", "B"], 0),
    ],
    "longbook_choice_eng": [
        ("C", ["the sea", "C"], 1),
        ("C. the hill", ["the sea", "C"], 1),
        ("Certainly B", ["the sea", "C"], 1),  # the first character decides
        ("Because of A", ["the sea", "B"], 1),
        ("the sea", ["the sea", "C"], 1),
        ("The sea", ["the sea", "C"], 0),
        ("the answer is C", ["the sea", "C"], 1),
        ("the answer is: the sea", ["the sea", "C"], 1),
        ("I say answer: the sea!", ["the sea", "C"], 1),
        ("the correct option is  C", ["the sea", "C"], 1),
        ("the answer is", ["the sea", "C"], 0),
        ("the answer is: A, no, C", ["the sea", "C"], 0),
        ("I pick C!", ["the sea", "C"], 1),
        ("I pick AB, then C", ["the sea", "C"], 0),  # a word of these letters decides, and is none of them
        ("I pick c", ["the sea", "C"], 0),
        ("\n", ["the sea", "C"], 0),
        ("", ["the sea", "C"], 0),
    ],
    "longdialogue_qa_eng": [
        ("ACE", ["ACE", "ACE ROTHSTEIN"], 1),
        ("ace!", ["ACE", "ACE ROTHSTEIN"], 1),
        ("It is\nAce.", ["ACE", "ACE ROTHSTEIN"], 1),
        ("ROTHSTEIN", ["ACE", "ROTHSTEIN"], 0),  # only the first name counts
        ("FACE", ["ACE"], 0),
        ("Ace-high", ["ACE"], 0),
        ("ACE ROTHSTEIN", ["ACE ROTHSTEIN"], 0),  # two words are never one
        ("", ["ACE"], 0),
    ],
    "longbook_qa_eng": [
        ("Peyton", ['"Peyton"'], 1),
        ("the Peyton", ["Peyton"], 1),
        ("Peyton Smith", ["Peyton"], 2 / 3),
        ("a cat", ["cat", "dog"], 1),
        ("cat-dog", ["cat dog"], 0),  # marks are deleted, not made blanks
        ("a.", ["a"], 0),  # both are an article and nothing else
        ("th.e cat", ["cat"], 1),  # marks go before articles: "the cat"
        ("cat cat", ["cat"], 2 / 3),
        ("CAT\nDOG", ["dog cat"], 1),
        ("É", ["é"], 1),
        ("", ["cat"], 0),
    ],
    "longbook_qa_chn": [
        ("素素", ["素素"], 1),
        ("素素。", ["云林", "素素"], 1),
        ("素\u2028 素\n", ["素素"], 1),
        ("云素", ["素素"], 1 / 2),
        ("“素素”，", ["素素"], 1),
        ("《素》", ["素"], 2 / 3),  # the list of marks has the closing one only
        ("Ace", ["ACE"], 1),
        ("。！", ["素素"], 0),
        ("", ["素素"], 0),
    ],
    "longbook_sum_eng": [
        ("the cat sat", ["the cat sat"], 1),
        ("the cat sat", ["the cat ran"], 2 / 3),
        ("the cats sat", ["the cat sat"], 2 / 3),  # no stemmer
        ("dog cat", ["cat dog"], 1 / 2),  # the longest common subsequence is one word
        ("dog\ncat", ["cat\ndog"], 1),  # lines in any order
        ("the cat", ["a dog", "the cat"], 1),  # the best of several
        ("", ["the cat"], 0),
    ],
}


@pytest.mark.parametrize(
    ("split", "prediction", "label", "score"),
    [pytest.param(split, *case, id=f"{split}-{i}") for split, cases in EXACT.items() for i, case in enumerate(cases)],
)
def test_cases_worked_by_hand(split: str, prediction: str, label: Any, score: float) -> None:
    assert SCORERS[split](prediction, label) == pytest.approx(score, abs=1e-12)


def test_every_task_has_a_scorer_and_cases() -> None:
    assert set(SCORERS) == set(EXACT) == {entry.split for entry in ENTRIES}
    assert len(ENTRIES) == 12


OPTIONS = ["the hill", "the wood", "the sea", "the town"]


@pytest.mark.parametrize(
    ("kind", "answer", "label"),
    [
        ("text", "0071", "0071"),
        ("text", ["0071"], "0071"),
        ("texts", ["ACE", "A. R."], ["ACE", "A. R."]),
        ("texts", "one", ["one"]),
        ("integer", ["-14"], -14),
        ("integer", [4], 4),
        ("number", ["88"], 88),
        ("number", 88, 88),
        ("number", ["49.5"], 49.5),
        ("number", [49.0], 49.0),
        ("integers", ["79", "5"], [79, 5]),
        ("integers", [[79, 5]], [79, 5]),
        ("integers", "[79, 5]", [79, 5]),
        ("option", ["the sea"], ["the sea", "C"]),
        ("option", "the sea", ["the sea", "C"]),
        ("option", ["the sea", "C"], ["the sea", "C"]),
        ("option", ["C"], ["the sea", "C"]),
    ],
)
def test_labels_get_their_type_back(kind: Any, answer: Any, label: Any) -> None:
    found = restore(kind, answer, OPTIONS)
    assert found == label and type(found) is type(label)
    again = restore(kind, as_targets(found))
    assert again == label and type(again) is type(label)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [("integer", "four"), ("number", ""), ("integers", "none"), ("option", "the lake"), ("text", []), ("texts", None)],
)
def test_answers_of_another_type_are_refused(kind: Any, answer: Any) -> None:
    with pytest.raises(EvalError, match="answer"):
        restore(kind, answer, OPTIONS)
