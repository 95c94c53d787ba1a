"""RULER's scorers and summary figures against cases worked by hand and against published rows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from mtrain.data.tokenizer import byte_tokenizer
from mtrain_eval.ruler import tasks
from mtrain_eval.ruler.scorers import clean, string_match_all, string_match_part
from mtrain_eval.ruler.summary import TASKS, effective_length, summarise, weighted
from mtrain_eval.sample import Prediction, Sample, SuiteOptions

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@pytest.mark.parametrize(
    ("prediction", "targets", "all_of", "part"),
    [
        ("", ("1234567",), 0.0, 0.0),
        ("   \n\t ", ("1234567",), 0.0, 0.0),
        ("1234567", ("1234567",), 1.0, 1.0),
        ("The number is 1234567.", ("1234567",), 1.0, 1.0),
        ("12345678", ("1234567",), 1.0, 1.0),  # a substring counts, as in the original
        ("123456", ("1234567",), 0.0, 0.0),
        ("1 2 3 4 5 6 7", ("1234567",), 0.0, 0.0),
        ("11, 22 and 33", ("11", "22", "33", "44"), 0.75, 1.0),
        ("33 22 11 44", ("11", "22", "33", "44"), 1.0, 1.0),  # in any order
        ("55", ("11", "22", "33", "44"), 0.0, 0.0),
        ("11 11 11 11", ("11", "22"), 0.5, 1.0),
        ("aBcDe", ("ABCDE",), 1.0, 1.0),
        ("the DENVER broncos", ("Denver Broncos", "Denver"), 1.0, 1.0),
        ("denver", ("Denver Broncos", "Denver", "the Denver Broncos"), 1 / 3, 1.0),
        ("in Zürich, später", ("ZÜRICH",), 1.0, 1.0),
        ("在北京", ("北京", "上海"), 0.5, 1.0),
        ("İstanbul", ("istanbul",), 0.0, 0.0),  # lower case of the dotted capital is two characters
        ("new\nyork", ("new york",), 0.0, 0.0),  # newlines stay newlines
        ("new\x07york", ("new york",), 0.0, 0.0),  # control characters become newlines, not spaces
        ("new\tyork", ("new\nyork",), 1.0, 1.0),
        ("\x00 1234567 \x1f", ("1234567",), 1.0, 1.0),
        ("caf\u00e9\x7f", ("café\x7f",), 1.0, 1.0),  # 0x7f is kept
    ],
)
def test_scorers_by_hand(prediction: str, targets: tuple[str, ...], all_of: float, part: float) -> None:
    assert string_match_all(prediction, targets) == pytest.approx(all_of)
    assert string_match_part(prediction, targets) == part


def test_what_is_compared() -> None:
    assert clean("\x01 a\x02b\r\n ") == "a\nb"
    assert clean("\x00\x00") == ""
    assert clean("a b\u2028c") == "a b\u2028c"


def test_score_of_a_task_is_its_metric_and_whether_nothing_was_said() -> None:
    made = {task.name: task for task in tasks(SuiteOptions(byte_tokenizer()))}
    sample = Sample("x", 1, 0, np.zeros(1, np.int64), targets=("one", "two"))
    assert made["ruler_vt"].score(sample, Prediction("ONE")) == {"string_match_all": 0.5, "null": 0.0}
    assert made["ruler_qa_1"].score(sample, Prediction("two")) == {"string_match_part": 1.0, "null": 0.0}
    assert made["ruler_qa_2"].score(replace(sample, targets=("x",)), Prediction("\x00 \n")) == {
        "string_match_part": 0.0,
        "null": 1.0,
    }
    rows = [{"scores": made["ruler_vt"].score(sample, Prediction(text))} for text in ("one two", "one", "")]
    figures = made["ruler_vt"].aggregate(rows)
    assert figures["string_match_all"].value == 0.5 and figures["null"].value == pytest.approx(1 / 3)
    assert [task.metric for task in made.values()].count("string_match_part") == 2


# README of NVIDIA/RULER: 4K ... 128K, average, wAvg(inc), wAvg(dec), effective length.
PUBLISHED = {
    "GPT-4-1106": ((96.6, 96.3, 95.2, 93.2, 87.0, 81.2), 91.6, 89.0, 94.1, 65536),
    "Llama-3.1-8B": ((95.5, 93.8, 91.6, 87.4, 84.7, 77.0), 88.3, 85.4, 91.3, 32768),
    "ProLong-8B": ((94.5, 92.5, 92.3, 89.3, 83.2, 81.6), 88.9, 86.6, 91.2, 32768),
    "Gradient-8B": ((92.8, 90.3, 85.7, 79.9, 76.3, 69.5), 82.4, None, None, 16384),
}


@pytest.mark.parametrize("model", list(PUBLISHED))
def test_published_rows(model: str) -> None:
    row, mean, rising, falling, effective = PUBLISHED[model]
    figures = {task: {length: value / 100 for length, value in zip(LENGTHS, row, strict=True)} for task in TASKS}
    found = summarise(figures, dict.fromkeys(TASKS, "published"))
    assert found["average"] == pytest.approx({n: v / 100 for n, v in zip(LENGTHS, row, strict=True)})
    assert np.mean(list(found["average"].values())) * 100 == pytest.approx(mean, abs=0.051)
    if rising is not None:
        assert 100 * found["wavg_inc"] == pytest.approx(rising, abs=0.051)
        assert 100 * found["wavg_dec"] == pytest.approx(falling, abs=0.051)
    assert found["effective_length"] == effective
    assert found["name"] == "RULER" and found["notes"] == [] and found["synthetic"] == []


def test_threshold_is_of_the_printed_figure() -> None:
    assert effective_length({4096: 0.856}) == 4096
    assert effective_length({4096: 0.85551}) == 4096  # printed as 85.6
    assert effective_length({4096: 0.8554}) is None  # printed as 85.5
    assert effective_length({4096: 0.9, 8192: 0.8, 16384: 0.87}) == 16384  # the longest that passes
    assert effective_length({1024: 1.0, 2048: 1.0}) is None  # not a published length
    assert effective_length({}) is None


def test_weights_by_hand() -> None:
    assert weighted([0.5]) == (0.5, 0.5)
    rising, falling = weighted([1.0, 0.0, 0.5])
    assert math.isclose(rising, 2.5 / 6) and math.isclose(falling, 3.5 / 6)


def test_what_is_no_ruler_score_is_not_called_one() -> None:
    full = {task: {"4096": 1.0, "8192": 0.5} for task in TASKS}  # lengths as JSON has them
    found = summarise(full, {**dict.fromkeys(TASKS, "generated"), "ruler_qa_1": "synthetic"})
    assert found["average"] == {4096: 1.0, 8192: 0.5}
    assert found["name"] != "RULER" and found["synthetic"] == ["ruler_qa_1"] and "qa_1" in found["notes"][0]

    found = summarise(full, {**dict.fromkeys(TASKS, "generated"), "ruler_qa_1": "local"})
    assert found["name"] == "RULER's tasks on local data" and found["local"] == ["ruler_qa_1"]
    assert found["effective_length"] == 4096 and found["notes"] == [
        "Averages on local data: the text in qa_1 is whatever --data-dir holds."
    ]

    fewer = {task: {4096: 1.0} for task in TASKS} | {"ruler_vt": {8192: 0.0}, "ruler_cwe": {4096: 0.0, 8192: 1.0}}
    found = summarise(fewer)
    assert found["tasks"] == {4096: 12, 8192: 2}
    assert found["average"] == pytest.approx({4096: 11 / 12, 8192: 0.5})
    assert found["wavg_inc"] is None and found["wavg_dec"] is None and found["effective_length"] is None
    assert found["name"] != "RULER" and len(found["notes"]) == 2

    short = summarise({task: {1024: 1.0, 2048: 0.0} for task in TASKS})
    assert short["effective_length"] is None and math.isclose(short["wavg_inc"], 1 / 3)
    assert "4K" in short["notes"][-1]

    nothing = summarise({})
    assert nothing["average"] == {} and nothing["wavg_inc"] is None and nothing["effective_length"] is None
    assert summarise({"niah_kamradt": {4096: 1.0}})["average"] == {}  # not one of RULER's
