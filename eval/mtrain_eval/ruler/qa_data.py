"""Questions with the documents that answer them: SQuAD 2.0 and HotpotQA in their original files, or from the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mtrain.data.documents import open_hf
from mtrain.errors import DataError, EvalError
from mtrain_eval.sample import SuiteOptions


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        text: the question.
        answers: right answers, any of which counts.
        gold: numbers of the documents that must stand in the prompt.
        more: numbers of documents on the same subject, taken before others.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    more: tuple[int, ...] = ()


@dataclass(frozen=True)
class Questions:
    """Questions in the order of their file, and all documents."""

    questions: tuple[Question, ...]
    docs: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class DataSet:
    """Where a published set is to be had."""

    title: str
    file: str
    url: str
    hub: tuple[str, str | None, str]


FOLDER = "ruler"
SQUAD = DataSet(
    "SQuAD 2.0",
    "dev-v2.0.json",
    "https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json",
    ("rajpurkar/squad_v2", None, "validation"),
)
HOTPOT = DataSet(
    "HotpotQA",
    "hotpot_dev_distractor_v1.json",
    "https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/main/hotpot_dev_distractor_v1.json",
    ("hotpotqa/hotpot_qa", "distractor", "validation"),
)


def found_file(options: SuiteOptions, data: DataSet) -> Path | None:
    """The set's original file in the folder of data or in its subfolder ``ruler``; None when there is none."""
    folders = [] if options.data_dir is None else [options.data_dir, options.data_dir / FOLDER]
    return next((folder / data.file for folder in folders if (folder / data.file).is_file()), None)


def data_source(options: SuiteOptions, data: DataSet) -> str:
    """``local`` when the set's file is at hand, ``published`` when it may be fetched, else ``synthetic``.

    Raises:
        EvalError: the data directory has a folder for RULER, and the set is not in it.
    """
    if found_file(options, data):
        return "local"
    if options.online:
        return "published"
    if options.data_dir is not None and (options.data_dir / FOLDER).is_dir():
        raise EvalError(_absent(options.data_dir / FOLDER, data))
    return "synthetic"


def missing_data(options: SuiteOptions, data: DataSet) -> str | None:
    """What is missing in a data directory that was given, and what to do; None: nothing is, or none was given."""
    if options.data_dir is None or data_source(options, data) != "synthetic":
        return None
    return _absent(options.data_dir, data)


def _absent(folder: Path, data: DataSet) -> str:
    return (
        f"no {data.file} in {folder}: download {data.title} from {data.url} to {folder / data.file}; or give --online to fetch "
        f"{data.hub[0]}; or leave out --data-dir for made-up questions"
    )


def load_published(options: SuiteOptions, data: DataSet) -> Questions:
    """The set from its file, else from the hub.

    Raises:
        EvalError: a file of another format, or a hub that does not answer.
    """
    file = found_file(options, data)
    return _from_file(file, data) if file else _from_hub(data)


@lru_cache(maxsize=2)
def _from_file(file: Path, data: DataSet) -> Questions:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return squad(content["data"]) if data == SQUAD else hotpot(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvalError(
            f"{file} is not {data.title} in its original format ({type(error).__name__}: {error}); get it again from {data.url}"
        ) from error


@lru_cache(maxsize=2)
def _from_hub(data: DataSet) -> Questions:
    name, config, split = data.hub
    try:
        rows = open_hf(name, config, split, streaming=False)
    except DataError as error:
        raise EvalError(
            f"{error}; without a network download {data.url} to DATA_DIR/{data.file} and give --data-dir DATA_DIR, or leave out "
            "--online for made-up questions"
        ) from error
    return squad(squad_articles(rows)) if data == SQUAD else hotpot(hotpot_items(rows))


def squad(articles: Sequence[Mapping[str, Any]]) -> Questions:
    """SQuAD's field ``data``: the answerable questions; the other paragraphs of an article are ``more``."""
    docs = sorted({paragraph["context"] for article in articles for paragraph in article["paragraphs"]})
    number = {doc: i for i, doc in enumerate(docs)}
    found = []
    for article in articles:
        same = [number[paragraph["context"]] for paragraph in article["paragraphs"]]
        for paragraph, gold in zip(article["paragraphs"], same, strict=True):
            more = tuple(dict.fromkeys(i for i in same if i != gold))
            for qa in paragraph["qas"]:
                if not qa["is_impossible"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in qa["answers"]))
                    found.append(Question(qa["question"], answers, (gold,), more))
    return _checked(found, docs)


def hotpot(items: Sequence[Mapping[str, Any]]) -> Questions:
    """HotpotQA's list: all documents of a question, the misleading ones too, stand in its prompt."""
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in item["context"]] for item in items]
    docs = sorted({text for group in texts for text in group})
    number = {doc: i for i, doc in enumerate(docs)}
    found = [
        Question(item["question"], (item["answer"],), tuple(dict.fromkeys(number[text] for text in group)))
        for item, group in zip(items, texts, strict=True)
    ]
    return _checked(found, docs)


def squad_articles(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the hub's SQuAD as articles of the original file."""
    articles: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        answers = [{"text": text} for text in row["answers"]["text"]]
        qa = {"question": row["question"], "answers": answers, "is_impossible": not answers}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(qa)
    return [
        {"paragraphs": [{"context": context, "qas": qas} for context, qas in paragraphs.items()]}
        for paragraphs in articles.values()
    ]


def hotpot_items(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the hub's HotpotQA as items of the original file."""
    return [
        {
            "question": row["question"],
            "answer": row["answer"],
            "context": list(zip(row["context"]["title"], row["context"]["sentences"], strict=True)),
        }
        for row in rows
    ]


def _checked(found: list[Question], docs: list[str]) -> Questions:
    if not found or not all(question.answers for question in found):
        raise ValueError("no questions with answers")
    return Questions(tuple(found), tuple(docs), "published")
