"""mtrain's own retrieval: the very prompts of the quickstart, and relatives with one answer each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mtrain.data.retrieval import retrieval_prompts
from mtrain.data.symbols import symbols_of
from mtrain.data.tokenizer import byte_tokenizer
from mtrain.errors import EvalError
from mtrain.quickstart import measure as measure_module
from mtrain.quickstart.measure import Exam, Subject, measure
from mtrain.recipe import load_recipe
from mtrain_eval.retrieval import EXAM, SHAPES, tasks
from mtrain_eval.retrieval.task import RecallTask
from mtrain_eval.sample import DoesNotFitError, Prediction, Sample, SuiteOptions
from tests.mtrain_eval.small_tokenizers import byte_bpe

BYTES = byte_tokenizer()
RELATIVES = list(SHAPES)


def task_of(name: str, seed: int = 2026) -> RecallTask:
    (task,) = [task for task in tasks(SuiteOptions(BYTES, seed=seed)) if task.name == name]
    assert isinstance(task, RecallTask)
    return task


def oracle(sample: Sample) -> Prediction:
    """Reads the answers off the haystack: what follows the key where it stands first; after a value, what follows it there."""
    ask = int(np.flatnonzero(sample.ids == symbols_of(BYTES).ask)[-1])
    place, tokens = -1, []
    for at in sample.at:
        if at - 1 not in sample.at:  # a key
            place = int(np.flatnonzero(sample.ids[:ask] == sample.ids[at])[0])
        place += 1
        tokens.append(int(sample.ids[place]))
    return Prediction(tokens=tuple(tokens))


def forgetful(tokens: np.ndarray, at: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """A stand-in for a model, right about 7 times in 10, by a rule that looks at the prompt alone."""
    return np.where((tokens.sum() + 37 * at + answers) % 10 < 7, answers, 0)


def rows_of(task: RecallTask, length: int, count: int) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        sample = task.sample(length, index)
        at = np.asarray(sample.at)
        tokens = forgetful(sample.ids, at, sample.ids[at + 1])
        rows.append({"index": index, "scores": task.score(sample, Prediction(tokens=tuple(tokens.tolist())))})
    return rows


def test_the_exam_has_the_prompts_of_the_quickstart() -> None:
    task = task_of("retrieval")
    for length in (300, 1024):
        prompts = retrieval_prompts(BYTES, length, None, 6, 2026, pairs=EXAM.pairs, questions=EXAM.questions)
        for index in (5, 0, 3):
            sample = task.sample(length, index)
            np.testing.assert_array_equal(sample.ids, prompts.tokens[index].numpy())
            assert sample.at == tuple(prompts.at[index].tolist()) and sample.kind == "recall"
            np.testing.assert_array_equal(sample.ids[np.asarray(sample.at) + 1], prompts.answers[index].numpy())
            assert sample.targets == tuple(BYTES.convert_ids_to_tokens(prompts.answers[index].tolist()))
            np.testing.assert_allclose(sample.meta["depths"], prompts.depths[index].numpy(), atol=1e-4)


def test_the_exam_gives_the_number_of_the_quickstart(monkeypatch: pytest.MonkeyPatch) -> None:
    exam = Exam(lengths=(400, 700), prompts=5, final_prompts=8, text_rows=1)

    def answers(_: None, tokens: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(forgetful(tokens.numpy(), at.numpy(), tokens[at + 1].numpy()))

    monkeypatch.setattr(measure_module, "_load", lambda *_: None)
    monkeypatch.setattr(measure_module, "_answers", answers)
    monkeypatch.setattr(measure_module, "_text_loss", lambda *_: torch.ones(2, dtype=torch.float64))
    theirs = measure(Subject("x", "bytes"), exam, load_recipe("quickstart"))
    task = task_of("retrieval", exam.seed)
    for length, count in ((400, exam.prompts), (700, exam.final_prompts)):
        ours = task.aggregate(rows_of(task, length, count))
        assert 0.5 < ours["accuracy"].value < 0.9
        assert ours["accuracy"].value == pytest.approx(theirs.accuracy[length], abs=1e-12)
    names = [f"accuracy_depth_{low}_{low + 20}" for low in range(0, 100, 20)]
    assert [ours[name].value for name in names] == pytest.approx(theirs.by_depth, abs=1e-12)
    assert theirs.accuracy[700] != pytest.approx(
        task_accuracy(task_of("retrieval", 7), 700, exam.final_prompts), abs=1e-12
    )


def task_accuracy(task: RecallTask, length: int, count: int) -> float:
    return task.aggregate(rows_of(task, length, count))["accuracy"].value


@pytest.mark.parametrize("name", ["retrieval", *RELATIVES])
def test_an_oracle_is_always_right(name: str) -> None:
    task, shape = task_of(name), SHAPES.get(name, EXAM)
    rows = []
    for index in range(200):
        sample = task.sample(400, index)
        assert len(sample.ids) == 400 and len(sample.at) == shape.questions * shape.values == len(sample.targets)
        scores = task.score(sample, oracle(sample))
        assert scores["accuracy"] == 1
        assert task.score(sample, Prediction(tokens=(0,) * len(sample.at)))["accuracy"] == 0
        rows.append({"index": index, "scores": scores})
    figures = task.aggregate(rows)
    assert {figure.value for figure in figures.values()} == {1.0} and len(figures) == 6
    assert all(figure.low is not None and 0.5 < figure.low < 1 for figure in figures.values())


@pytest.mark.parametrize("name", ["retrieval", *RELATIVES])
def test_thousands_of_samples_have_one_place_for_every_key(name: str) -> None:
    task, shape, symbols = task_of(name), SHAPES.get(name, EXAM), symbols_of(BYTES)
    depths: list[float] = []
    seen = set()
    for index in range(600):
        sample = task.sample(400, index)
        ask = 400 - 1 - shape.questions * (1 + shape.values)
        assert sample.ids[ask] == symbols.ask and (sample.ids == symbols.ask).sum() == 1
        hay = sample.ids[:ask]
        keys = np.flatnonzero(np.isin(hay, symbols.keys))
        assert len(keys) == shape.pairs == len(set(hay[keys].tolist()))
        assert np.isin(hay, symbols.values).sum() == shape.pairs * shape.values
        firsts = [at for at in sample.at if at - 1 not in sample.at]
        where = [int(np.flatnonzero(hay == sample.ids[at])[0]) for at in firsts]
        assert sample.meta["depths"] == pytest.approx([(place - 1) / (ask - 1) for place in where], abs=1e-4)
        if shape.questions == 1:
            assert sample.depth == pytest.approx(where[0] / 400, abs=1e-9)
        else:
            assert sample.depth is None
        depths += sample.meta["depths"]
        seen.add(sample.ids.tobytes())
    assert len(seen) == 600
    assert 0.4 < np.mean(depths) < 0.6 and min(depths) < 0.05 and max(depths) > 0.9


@pytest.mark.parametrize("name", ["retrieval", *RELATIVES])
def test_samples_depend_on_seed_and_number_alone(name: str) -> None:
    forth = [task_of(name).sample(300, index).ids for index in range(6)]
    again = task_of(name)
    for index in reversed(range(6)):
        np.testing.assert_array_equal(again.sample(300, index).ids, forth[index])
        assert not np.array_equal(task_of(name, seed=1).sample(300, index).ids, forth[index])


@pytest.mark.parametrize("name", ["retrieval", *RELATIVES])
def test_the_shortest_sample(name: str) -> None:
    task = task_of(name)
    with pytest.raises(DoesNotFitError, match=r"takes \d+$") as caught:
        task.sample(10, 0)
    shortest = int(str(caught.value).split()[-1])
    assert len(task.sample(shortest, 0).ids) == shortest
    with pytest.raises(DoesNotFitError):
        task.sample(shortest - 1, 0)


def test_values_of_one_key_differ() -> None:
    task, values = task_of("retrieval_multivalue"), symbols_of(BYTES).values
    for index in range(100):
        sample = task.sample(200, index)
        answers = sample.ids[np.asarray(sample.at) + 1]
        assert len(set(answers.tolist())) == 4 and np.isin(answers, values).all()


def test_figures_by_depth_count_answers() -> None:
    task = task_of("retrieval")
    rows = [
        {"index": 0, "scores": {"accuracy": 0.5, "depth_0_right": 1.0, "depth_0_asked": 2.0}},
        {
            "index": 1,
            "scores": {
                "accuracy": 1.0,
                "depth_0_right": 1.0,
                "depth_0_asked": 1.0,
                "depth_4_right": 1.0,
                "depth_4_asked": 1.0,
            },
        },
    ]
    figures = task.aggregate(rows)
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {"accuracy": 0.75, "accuracy_depth_0_20": 2 / 3, "accuracy_depth_80_100": 1.0}
    )
    assert figures["accuracy_depth_80_100"].stderr is None


def test_a_tokenizer_without_symbols_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    few = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(EvalError, match="suite retrieval: .*0 key symbols.*leave `retrieval` out of --suite"):
        tasks(SuiteOptions(few))
    # Whole words may stand for symbols.
    assert [task.name for task in tasks(SuiteOptions(byte_bpe()))] == ["retrieval", *RELATIVES]
