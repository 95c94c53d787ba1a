"""Offline twins of InfiniteBench's synthetic tasks: length, places, uniqueness, determinism, an oracle that reads the prompt."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from random import Random

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from mtrain.data.tokenizer import byte_tokenizer
from mtrain.errors import EvalError
from mtrain_eval.infinitebench import haystacks, tasks
from mtrain_eval.infinitebench.fitting import fill
from mtrain_eval.infinitebench.haystacks import NOISE, sweep
from mtrain_eval.sample import DoesNotFitError, Prediction, Sample, SuiteOptions, Task
from mtrain_eval.tokens import count_tokens
from tests.mtrain_eval.small_tokenizers import byte_bpe, piece_bpe

SPLITS = ("passkey", "number_string", "kv_retrieval", "code_run", "math_find")
# The longest that one more unit of haystack can be.
UNITS = {
    "passkey": NOISE,
    "number_string": NOISE,
    "kv_retrieval": f', "{"0" * 36}": "{"0" * 36}"',
    "code_run": "\n\ndef func_1234(x):\n    return func_1234(x) + 17",
    "math_find": ", 99",
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerBase]:
    return {"bytes": byte_tokenizer(), "bpe": byte_bpe(), "pieces": piece_bpe()}


def twin(tokenizer: PreTrainedTokenizerBase, split: str, seed: int = 0) -> Task:
    return {task.name: task for task in tasks(SuiteOptions(tokenizer, seed))}[f"infinitebench_twin_{split}"]


# --- an oracle that knows the task and nothing of how it was made ----------------------------------------------------------


def _hidden_key(text: str) -> str:
    (key, again) = re.findall(r"\b[0-9]{5,}\b", text)
    assert key == again
    return key


def _pair(text: str) -> str:
    content = json.loads(text[text.index("{") : text.index("}") + 1])
    return str(content[re.findall(r'Key: "(.+?)"', text)[0]])


def _call(text: str) -> str:
    space: dict[str, Callable[[int], int]] = {}
    exec(text[text.index("def ") : text.index("\n\nPlease")], space)  # the prompt's own functions
    name, argument = re.findall(r"value of (func_[0-9]+)\((-?[0-9]+)\) is", text)[0]
    return str(space[name](int(argument)))


def _number(text: str) -> str:
    numbers = ast.literal_eval(text[text.index("[") : text.index("]") + 1])
    wanted = re.findall(r"The (.+) number of the list is:", text)[0]
    if wanted == "median":
        return str(float(np.median(numbers)))
    place = {"second": 2, "third": 3}.get(wanted.split()[0], 1)
    distinct = sorted(set(numbers))
    return str(distinct[-place] if wanted.endswith("largest") else distinct[place - 1])


ORACLES: dict[str, Callable[[str], str]] = {
    "passkey": _hidden_key,
    "number_string": _hidden_key,
    "kv_retrieval": _pair,
    "code_run": _call,
    "math_find": _number,
}


def check(task: Task, split: str, sample: Sample, tokenizer: PreTrainedTokenizerBase) -> None:
    """What holds for every sample of every twin."""
    used = len(sample.ids) + sample.max_new_tokens
    assert used <= sample.length
    unit = len(tokenizer(UNITS[split], add_special_tokens=False)["input_ids"])
    assert sample.length - used < unit + 2, (sample.length, used, unit)  # 2: where a unit meets its neighbour
    assert np.array_equal(tokenizer(sample.text)["input_ids"][: len(sample.ids)], sample.ids)
    answer = ORACLES[split](sample.text)
    assert task.score(sample, Prediction(text=answer)) == {"accuracy": 1.0}
    assert task.score(sample, Prediction(text="")) == {"accuracy": 0.0}
    assert len(tokenizer(" " + answer, add_special_tokens=False)["input_ids"]) <= sample.max_new_tokens
    if sample.depth is not None:
        needle = sample.text.index(sample.targets[0] if split != "kv_retrieval" else '"' + _key(sample))
        opening = sample.text.rindex("\n", 0, needle) + 1 if split != "kv_retrieval" else needle
        assert sample.depth == count_tokens(tokenizer, sample.text[:opening]) / len(sample.ids)


def _key(sample: Sample) -> str:
    return str(re.findall(r'Key: "(.+?)"', sample.text)[0])


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["bytes", "bpe", "pieces"])
def test_length_depth_and_oracle(tokenizers: dict[str, PreTrainedTokenizerBase], name: str, split: str) -> None:
    tokenizer = tokenizers[name]
    task = twin(tokenizer, split)
    for length, count in ((1000, 50), (1777, 10), (4096, 4)):
        for index in range(count):
            check(task, split, task.sample(length, index), tokenizer)


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_sample_whatever_else_was_made(tokenizers: dict[str, PreTrainedTokenizerBase], split: str) -> None:
    """Samples made in order and in no order, by another task object, among other lengths."""
    length, count = 880, 300
    first = twin(tokenizers["bytes"], split)
    samples = [first.sample(length, index) for index in range(count)]
    second = twin(tokenizers["bytes"], split)
    for index in Random(0).sample(range(count), count // 2):
        if index % 20 == 0:
            second.sample(length + 99, index)
        again = second.sample(length, index)
        assert again.text == samples[index].text and again.targets == samples[index].targets
        assert again.depth == samples[index].depth and np.array_equal(again.ids, samples[index].ids)
    prompts = Counter(sample.text for sample in samples)
    # Five digits repeat now and then (birthdays: about one pair in 59 * 100,000); nothing else does.
    assert len(prompts) >= count - 1
    other = twin(tokenizers["bytes"], split, seed=1)
    assert all(other.sample(length, index).text != samples[index].text for index in range(20))
    assert all(first.sample(length + 1, index).targets != () for index in range(3))


def test_places_sweep_the_haystack_evenly(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """59 places x 10 as published, exact to the line; any few samples are spread."""
    before: Counter[int] = Counter()
    for index in range(590):
        lines = haystacks.passkey(Random(index), index)(5220).context.split("\n")
        before[next(i for i, line in enumerate(lines) if "pass key" in line)] += 1
    assert sorted(before) == list(range(0, 5221, 90)) and set(before.values()) == {10}  # the published numbers

    task = twin(tokenizers["bytes"], "passkey")
    for index in range(59):
        lines = task.sample(6000, index).text.split("\n")
        at = next(i for i, line in enumerate(lines) if "pass key is" in line) - 2  # less instruction and blank line
        assert at == lines.count(NOISE.strip()) * sweep(index, 59) // 58

    for places in (59, 500):
        order = [sweep(index, places) for index in range(places)]
        assert sorted(order) == list(range(places))
        for few in (5, 10, 20):
            gaps = np.diff([0, *sorted(order[:few]), places])
            assert gaps.max() <= 2.7 * places / few


def test_kv_places_and_unique_keys(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    task = twin(tokenizers["bytes"], "kv_retrieval")
    for index in range(0, 500, 7):
        sample = task.sample(3000, index)
        pairs = re.findall(r'"([0-9a-f-]{36})": "([0-9a-f-]{36})"', sample.text)
        texts = [text for pair in pairs for text in pair]
        assert len(set(texts)) == len(texts) > 50
        assert pairs[len(pairs) * sweep(index, 500) // 500] == (_key(sample), sample.targets[0])
        assert sample.text.count(_key(sample)) == 2 and sample.text.count(sample.targets[0]) == 1


def test_number_strings_double_neighbours() -> None:
    """Ten digits from five: every run's neighbour differs or was doubled, and at most five runs of digits are left."""
    for index in range(300):
        key = str(haystacks.number_string(Random(index), index)(2).label)
        assert len(key) == 10 and key.isdigit()
        assert len(re.findall(r"(.)\1*", key)) <= 5


def test_code_run_has_its_depths_and_its_functions(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    task = twin(tokenizers["bytes"], "code_run")
    for index in range(60):
        text = task.sample(4000, index).text
        functions = re.findall(
            r"def func_(\d+)\(x\):\n    return (?:func_(\d+)\(x\)|x)(?: ([+-]) (\d+))?\n", text + "\n"
        )
        names = [int(name) for name, *_ in functions]
        assert names == sorted(names) and len(set(names)) == len(names) > 60
        called = {name: callee for name, callee, *_ in functions}
        assert all(callee == "" or callee in called for callee in called.values())
        assert all((sign, int(number)) != ("+", 0) for _, _, sign, number in functions if number)
        increments = [int(sign + number) for _, _, sign, number in functions if number]
        assert min(increments) >= -12 and max(increments) <= 17
        at, depth = re.findall(r"value of func_(\d+)\(", text)[0], 0
        while at:
            at, depth = called[at], depth + 1
        assert depth == (2, 4, 6, 8, 10)[index % 5]


def test_math_find_asks_its_seven_questions_in_turn(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    task = twin(tokenizers["bytes"], "math_find")
    asked: Counter[str] = Counter()
    for index in range(70):
        sample = task.sample(3000, index)
        numbers = ast.literal_eval(sample.text[sample.text.index("[") : sample.text.index("]") + 1])
        wanted = sample.meta["question"]
        asked[wanted] += 1
        if "largest" in wanted:
            assert min(numbers) <= 5 and 74 <= max(numbers) <= 99 and 70 <= int(sample.targets[0])
        elif "smallest" in wanted:
            assert max(numbers) >= 94 and 0 <= int(sample.targets[0]) <= 26
    assert set(asked.values()) == {10} and len(asked) == 7


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", ["bytes", "bpe", "pieces"])
def test_shortest_length(tokenizers: dict[str, PreTrainedTokenizerBase], name: str, split: str) -> None:
    """Below some length no sample is made, from there on all are."""
    task = twin(tokenizers[name], split)
    with pytest.raises(DoesNotFitError, match="needs a length of") as caught:
        task.sample(10, 0)
    shortest = int(re.findall(r"length of (\d+)", str(caught.value))[0])
    with pytest.raises(DoesNotFitError):
        task.sample(shortest - 1, 3)
    for index in range(40):
        assert len(task.sample(shortest, index).ids) + task.sample(shortest, index).max_new_tokens <= shortest


def test_names_and_sources_say_what_they_are(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    for task in tasks(SuiteOptions(tokenizers["bytes"])):
        assert task.name.startswith("infinitebench_twin_") and task.source == "synthetic" and task.count(4096) is None
        row = {"task": task.name, "length": 4096, "index": 0, "scores": {task.metric: 1.0}}
        assert task.aggregate([row])[task.metric].value == 1.0


# --- how many units fill a length ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [1, 7, 500, 100_000])
def test_fill_stops_between_what_fits_and_what_does_not(guess: int) -> None:
    random = Random(3)
    sizes = np.cumsum([random.choice((1, 2, 2, 3, 40)) for _ in range(300_000)]).tolist()
    for room in (130, 131, 1000, 77_777):
        calls: list[int] = []

        def tokens(n: int, calls: list[int] = calls) -> int:
            calls.append(n)
            return int(sizes[n])

        n = fill(tokens, room, 2, guess)
        assert sizes[n] <= room < sizes[n + 1]
        assert len(calls) == len(set(calls)) <= 40


def test_fill_gives_up_when_text_makes_no_tokens() -> None:
    with pytest.raises(EvalError, match="cannot fill a length"):
        fill(lambda n: 5, 100, 2, 4)
