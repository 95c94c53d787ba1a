"""What right answers, guesses and half-understood questions score, through the very path that a model's answers take.

A suite that cannot be imported or made fails here, and so does a task whose question no rule of the oracle knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from mtrain.data.tokenizer import VALUES, byte_tokenizer
from mtrain_eval.ask import ask, check_sample, make_row
from mtrain_eval.sample import DoesNotFitError, Figure, Sample, SuiteOptions, Task
from mtrain_eval.suites import SUITES, make_tasks
from tests.mtrain_eval.oracle import Chooser, Guesser, Oracle, candidates

TOKENIZER = byte_tokenizer()
LENGTHS = (512, 1024, 2048, 4096)
SAMPLES = 12
# Not retrieval: there is no answer to find.
PERPLEXITY = ("pg19",)
# Most that a guess may score on average, where that is not next to nothing: one of 64 values, one of about 100 numbers.
CHANCE = {"retrieval": 1 / 64, "niah_pairs": 1 / 64, "infinitebench_twin_math_find": 1 / 80}


def tasks_of(suite: str, seed: int = 0) -> list[Task]:
    tasks = make_tasks([suite], SuiteOptions(TOKENIZER, seed))
    assert tasks, f"suite {suite} has no tasks"
    return tasks


def samples_of(task: Task, count: int = SAMPLES) -> Iterator[Sample]:
    """Samples at the two shortest lengths that the task has, half of them each."""
    fitting: list[int] = []
    for length in (*LENGTHS, 8192):
        try:
            task.sample(length, 0)
        except DoesNotFitError:
            continue
        fitting.append(length)
        if len(fitting) == 2:
            break
    assert len(fitting) == 2, f"{task.name} has no samples of {LENGTHS} tokens"
    for length in fitting:
        for index in range(count // 2):
            sample = task.sample(length, index)
            check_sample(sample)
            yield sample


def figure_of(task: Task, engine: Oracle, count: int = SAMPLES) -> Figure:
    """The task's main figure for a model."""
    rows = [make_row(task, sample, ask(engine, sample)) for sample in samples_of(task, count)]
    return task.aggregate(rows)[task.metric]


@pytest.mark.parametrize("suite", [name for name in SUITES if name not in PERPLEXITY])
def test_the_oracle_is_always_right(suite: str) -> None:
    engine = Oracle(TOKENIZER)
    for task in tasks_of(suite):
        figure = figure_of(task, engine)
        assert (figure.value, figure.n) == (1.0, SAMPLES), task.name


@pytest.mark.parametrize("suite", [name for name in SUITES if name not in PERPLEXITY])
def test_a_guesser_is_near_chance(suite: str) -> None:
    vocabulary = TOKENIZER.get_vocab()
    engine = Guesser(TOKENIZER, [vocabulary[name] for name in VALUES])
    for task in tasks_of(suite):
        chance = CHANCE.get(task.name, CHANCE.get(task.suite, 0.001))
        figure = figure_of(task, engine)
        # five standard deviations of as many coins
        assert figure.value <= chance + 5 * math.sqrt(chance / figure.n), (task.name, figure)


@pytest.mark.parametrize(
    ("suite", "name"),
    [
        ("ruler", "ruler_niah_multikey_1"),
        ("ruler", "ruler_niah_multikey_2"),
        ("ruler", "ruler_niah_multikey_3"),
        ("infinitebench", "infinitebench_twin_kv_retrieval"),
    ],
)
def test_a_value_without_the_key_is_not_enough(suite: str, name: str) -> None:
    """Distractors do distract: a model that says any value in the prompt is right as often as there are values."""
    (task,) = (task for task in tasks_of(suite) if task.name == name)
    chance = [1 / len(candidates(sample.text)) for sample in samples_of(task, 48)]
    figure = figure_of(task, Chooser(TOKENIZER), 48)
    expected, deviation = sum(chance), math.sqrt(sum(p * (1 - p) for p in chance))
    assert max(chance) < 0.5 and abs(48 * figure.value - expected) < 4 * deviation


@pytest.mark.parametrize("suite", PERPLEXITY)
def test_perplexity_of_knowing_all_and_of_knowing_nothing(suite: str) -> None:
    for task in tasks_of(suite):
        assert figure_of(task, Oracle(TOKENIZER)).value == pytest.approx(1.0)
        guesser = Guesser(TOKENIZER, [0])
        assert figure_of(task, guesser).value == pytest.approx(len(TOKENIZER), rel=1e-6)


def test_every_suite_is_here() -> None:
    assert set(SUITES) == {"ruler", "niah", "infinitebench", "pg19", "retrieval"}, "a new suite needs its oracle"
