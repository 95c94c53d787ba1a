"""RULER's real data, on small files in the original formats, and the stand-ins for it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mtrain.data.tokenizer import byte_tokenizer
from mtrain.errors import DataError, EvalError
from mtrain_eval.ruler import qa_data, tasks
from mtrain_eval.ruler.qa import QuestionAnswering
from mtrain_eval.ruler.synthetic_qa import PEOPLE, synthetic_questions
from mtrain_eval.ruler.task import RulerTask
from mtrain_eval.sample import DoesNotFitError, Prediction, SuiteOptions
from mtrain_eval.suites import make_tasks, stand_in_notes

SQUAD: dict[str, Any] = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rivers",
            "paragraphs": [
                {
                    "context": "The Elbe flows to Hamburg.",
                    "qas": [
                        {
                            "question": "Where does the Elbe flow?",
                            "id": "1",
                            "is_impossible": False,
                            "answers": [
                                {"text": "Hamburg", "answer_start": 18},
                                {"text": "to Hamburg", "answer_start": 15},
                                {"text": "Hamburg", "answer_start": 18},
                            ],
                        },
                        {
                            "question": "Who owns the Elbe?",
                            "id": "2",
                            "is_impossible": True,
                            "answers": [],
                            "plausible_answers": [{"text": "Hamburg", "answer_start": 18}],
                        },
                    ],
                },
                {"context": "The Rhine flows to the sea. " * 12, "qas": []},
            ],
        },
        {
            "title": "Hills",
            "paragraphs": [
                {
                    "context": "The Brocken is a hill.",
                    "qas": [
                        {
                            "question": "What is the Brocken?",
                            "id": "3",
                            "is_impossible": False,
                            "answers": [{"text": "a hill", "answer_start": 15}],
                        }
                    ],
                }
            ],
        },
    ],
}
HOTPOT: list[dict[str, Any]] = [
    {
        "_id": "a",
        "question": "Where was the maker of Bell born?",
        "answer": "Oslo",
        "type": "bridge",
        "supporting_facts": [["Bell", 0], ["Ann", 0]],
        "context": [["Bell", ["Bell was made by Ann.", " It rings."]], ["Ann", ["Ann was born in Oslo."]]],
    },
    {"_id": "b", "question": "Is it red?", "answer": "yes", "context": [["Box", ["The box is red."]]]},
]


def made(folder: Path | None, online: bool = False) -> dict[str, RulerTask]:
    return {task.name: task for task in tasks(SuiteOptions(byte_tokenizer(), 0, folder, online))}


def test_a_haystack_that_ends_amid_a_question_does_not_change_the_answer_prefix(tmp_path: Path) -> None:
    (tmp_path / "paul_graham_essays").mkdir()
    text = "What is the thing that one should have built before all the others that exist "
    (tmp_path / "paul_graham_essays" / "a.txt").write_text(text * 40)
    for name in ("ruler_niah_single_2", "ruler_niah_multivalue"):
        sample = made(tmp_path)[name].sample(2048, 0)
        question, prefix = sample.text.rsplit("\n", 1)[1].split("?")
        assert prefix.startswith(" The special magic number") and question.startswith("What ") and len(prefix) < 120


def test_squad_as_it_is_distributed(tmp_path: Path) -> None:
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(SQUAD))
    task = made(tmp_path)["ruler_qa_1"]
    assert isinstance(task, QuestionAnswering)
    assert task.source == "local" and task.count(2048) == 2  # the one without an answer is left out
    known = task.questions()
    assert known.docs == tuple(sorted(known.docs)) and len(known.docs) == 3
    first, second = known.questions
    assert first.answers == ("Hamburg", "to Hamburg") and second.answers == ("a hill",)
    assert [known.docs[i] for i in first.gold] == ["The Elbe flows to Hamburg."]
    assert [known.docs[i][:9] for i in first.more] == ["The Rhine"] and second.more == ()

    sample = task.sample(700, 0)  # room for little beside: paragraphs of the same article come first
    assert sample.targets == ("Hamburg", "to Hamburg") and sample.meta["question"] == 0
    assert "Question: Where does the Elbe flow? Answer:" in sample.text
    assert task.score(sample, Prediction("it flows to hamburg")) == {"string_match_part": 1.0, "null": 0.0}
    shown = re.findall(r"Document (\d+):\n(.*)", sample.text)
    assert [number for number, _ in shown] == [str(i + 1) for i in range(len(shown))]
    assert ("The Elbe flows to Hamburg." in dict(shown).values()) and sample.meta["documents"] == len(shown)

    longer = task.sample(2048, 1)  # more documents than there are: they repeat
    assert longer.meta["documents"] > 3 and longer.text.count("The Brocken is a hill.") >= 2
    again = task.sample(2048, 3)  # more samples than questions: other documents around the same question
    assert again.meta["question"] == 1 and again.targets == longer.targets


def test_the_article_of_a_question_comes_before_others(tmp_path: Path) -> None:
    known = qa_data.squad(SQUAD["data"])
    task = made(None)["ruler_qa_1"]
    assert isinstance(task, QuestionAnswering)
    for index in range(8):
        order = task._order(known.questions[0], len(known.docs), 1024, index, 0)
        assert order[:2] == [*known.questions[0].gold, *known.questions[0].more] and sorted(order) == [0, 1, 2]


def test_hotpot_as_it_is_distributed(tmp_path: Path) -> None:
    (tmp_path / "ruler").mkdir()
    (tmp_path / "ruler" / "hotpot_dev_distractor_v1.json").write_text(json.dumps(HOTPOT))
    task = made(tmp_path)["ruler_qa_2"]
    assert task.source == "local" and task.count(2048) == 2
    sample = task.sample(600, 0)
    assert sample.targets == ("Oslo",)
    assert "\nBell\nBell was made by Ann. It rings." in sample.text and "\nAnn\nAnn was born in Oslo." in sample.text
    with pytest.raises(EvalError, match=r"no dev-v2\.0\.json .*download SQuAD 2\.0 from https.*--online"):
        made(tmp_path)["ruler_qa_1"].sample(2048, 0)


def test_questions_that_do_not_fit_are_left_out(tmp_path: Path) -> None:
    long = {"_id": "c", "question": "Long?", "answer": "long", "context": [["Long", ["word " * 300]]]}
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps([long, *HOTPOT]))
    task = made(tmp_path)["ruler_qa_2"]
    assert [task.sample(700, index).meta["question"] for index in range(5)] == [1, 2, 1, 2, 1]
    assert [task.sample(4000, index).meta["question"] for index in (3, 0, 1)] == [0, 0, 1]
    with pytest.raises(DoesNotFitError, match="ruler_qa_2 does not fit 300 tokens"):
        task.sample(300, 0)


@pytest.mark.parametrize("content", ["{", '{"data": 3}', "[]", '{"data": []}', '{"data": [{"paragraphs": [{}]}]}'])
def test_another_format_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "dev-v2.0.json").write_text(content)
    with pytest.raises(EvalError, match=r"dev-v2\.0\.json is not SQuAD 2\.0 in its original format.*get it again"):
        made(tmp_path)["ruler_qa_1"].sample(2048, 0)


def test_rows_of_the_hub_are_the_same_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    squad_rows = [
        {
            "title": article["title"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {"text": [answer["text"] for answer in qa["answers"]], "answer_start": []},
        }
        for article in SQUAD["data"]
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
    ]
    hotpot_rows = [
        {
            "question": item["question"],
            "answer": item["answer"],
            "context": {"title": [t for t, _ in item["context"]], "sentences": [s for _, s in item["context"]]},
        }
        for item in HOTPOT
    ]
    asked: list[tuple[Any, ...]] = []

    def answered(path: str, name: str | None, split: str, streaming: bool) -> Any:
        asked.append((path, name, split, streaming))
        return squad_rows if "squad" in path else hotpot_rows

    monkeypatch.setattr(qa_data, "open_hf", answered)
    qa_data._from_hub.cache_clear()
    options = SuiteOptions(byte_tokenizer(), online=True)
    assert qa_data.load_published(options, qa_data.HOTPOT) == qa_data.hotpot(HOTPOT)
    found = qa_data.load_published(options, qa_data.SQUAD).questions
    assert [(q.text, q.answers) for q in found] == [(q.text, q.answers) for q in qa_data.squad(SQUAD["data"]).questions]
    assert asked == [
        ("hotpotqa/hotpot_qa", "distractor", "validation", False),
        ("rajpurkar/squad_v2", None, "validation", False),
    ]

    def refused(*args: Any, **more: Any) -> Any:
        raise DataError("data: no network")

    monkeypatch.setattr(qa_data, "open_hf", refused)
    qa_data._from_hub.cache_clear()
    with pytest.raises(EvalError, match=r"no network; without a network download https.*--data-dir"):
        qa_data.load_published(options, qa_data.SQUAD)
    qa_data._from_hub.cache_clear()


def test_essays_of_a_folder_are_the_haystack(tmp_path: Path) -> None:
    folder = tmp_path / "paul_graham_essays"
    folder.mkdir()
    text = "First   there was\none thing. Then another! " + "Something followed it, slowly. " * 30
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": text}))
    task = made(tmp_path)["ruler_niah_single_2"]
    assert task.source == "local" and task.count(1024) is None
    sample = task.sample(4096, 0)  # longer than the essays: they repeat
    body = sample.text.split("\n", 1)[1]
    assert body.lstrip().startswith(("First there was one thing. ", "One of the special"))
    assert body.count("First there was one thing.") == 4
    assert task.essays.starts[:3] == [0, 5, 7]  # type: ignore[attr-defined]


def test_without_its_data_a_task_stands_in_but_not_when_it_was_named_or_half_is_there(tmp_path: Path) -> None:
    options = SuiteOptions(byte_tokenizer(), 0, tmp_path)
    found = made(tmp_path)
    assert found["ruler_niah_single_2"].source == found["ruler_qa_1"].source == "synthetic"
    assert found["ruler_niah_single_2"].sample(2048, 0).targets and found["ruler_qa_1"].count(4096) == PEOPLE
    assert [task.name for task in make_tasks(["ruler"], options, ["ruler_vt"])] == ["ruler_vt"]
    for name, wanted in (
        ("ruler_niah_multiquery", r"paul_graham_essays: put PaulGrahamEssays\.json .*--online"),
        ("ruler_qa_2", r"no hotpot_dev_distractor_v1\.json .*download HotpotQA from https.*--online"),
    ):
        with pytest.raises(EvalError, match=wanted):
            make_tasks(["ruler"], options, [name])
        assert make_tasks(["ruler"], SuiteOptions(byte_tokenizer()), [name])  # no directory was given: none is missed
    (note,) = stand_in_notes(make_tasks(["ruler"], options), options)
    assert "ruler_niah_single_2" in note and "ruler_qa_2" in note and "ruler_vt" not in note

    (tmp_path / "ruler").mkdir()
    (tmp_path / "paul_graham_essays").mkdir()
    with pytest.raises(EvalError, match=r"paul_graham_essays holds no text.*put the essays there"):
        made(tmp_path)["ruler_niah_single_3"].sample(2048, 0)
    with pytest.raises(EvalError, match=r"no dev-v2\.0\.json in .*ruler"):
        found["ruler_qa_1"].count(4096)
    online = made(tmp_path, online=True)
    assert {task.source for task in online.values()} == {"published", "generated"}


@pytest.mark.parametrize("hops", [1, 2])
def test_made_up_questions_have_one_answer(hops: int) -> None:
    known = synthetic_questions(hops)
    assert known.source == "synthetic" and len(known.questions) == len(known.docs) == PEOPLE
    assert len({question.text for question in known.questions}) == PEOPLE
    assert len({question.answers for question in known.questions}) == PEOPLE
    assert len({doc.split("\n")[0] for doc in known.docs}) == PEOPLE
    whole = "\n".join(known.docs)
    for question in known.questions[::50]:
        (answer,) = question.answers
        assert len(question.gold) == hops and whole.count(f" {answer}") == 1
        assert f" {answer}" in known.docs[question.gold[-1]]
        if hops == 2:
            person, teacher = (known.docs[i].split("\n")[0] for i in question.gold)
            assert person in question.text and teacher in known.docs[question.gold[0]] and teacher not in question.text
