"""Texts for haystacks: made by rule, or read from a folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from mtrain.errors import DataError, EvalError
from mtrain_eval import prose
from mtrain_eval.niah.cities import CITIES
from mtrain_eval.prose import essay_source, load_essays, split_sentences, synthetic_prose
from mtrain_eval.sample import SuiteOptions


def options(data_dir: Path | None = None, **more: object) -> SuiteOptions:
    return SuiteOptions(None, data_dir=data_dir, **more)  # type: ignore[arg-type]


def essays_in(folder: Path) -> Path:
    (folder / "paul_graham_essays").mkdir()
    return folder / "paul_graham_essays"


def test_made_sentences_are_plain_and_many() -> None:
    made = synthetic_prose(np.random.default_rng(0), 3000)
    assert made == synthetic_prose(np.random.default_rng(0), 3000)
    assert len(set(made)) > 2500
    text = " ".join(made)
    assert text.isascii() and not re.search(r"[\d{}]|  ", text)
    assert not re.search(r"\b[Aa] [aeiou]", text)
    for sentence in made:
        assert sentence[0].isupper() and sentence.endswith(".") and sentence.count(".") == 1
    # What needles are made of stands nowhere in the hay.
    assert not [city for city in CITIES if city in text] and len(set(CITIES)) == len(CITIES)
    assert split_sentences(text) == made


def test_made_essays_depend_on_the_seed_and_are_as_much_as_the_originals() -> None:
    essays, source = load_essays(options())
    assert source == essay_source(options()) == "synthetic"
    assert 500_000 < sum(map(len, essays)) < 1_000_000
    assert load_essays(options())[0] == essays != load_essays(options(seed=1))[0]


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("  \n ", []),
        ("no end", ["no end"]),
        ("One.\n\nTwo?  Three!", ["One.", "Two?", "Three!"]),
        ('He said "no." Then 3.5 left. (Yes.) e.g. this', ['He said "no."', "Then 3.5 left.", "(Yes.) e.g. this"]),
        ("Wait... what? “Why?” ‘So.’", ["Wait... what?", "“Why?”", "‘So.’"]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    assert split_sentences(text) == sentences


def test_essays_from_a_folder_in_every_form(tmp_path: Path) -> None:
    folder = essays_in(tmp_path)
    (folder / "a.txt").write_text("plain")
    (folder / "b.jsonl").write_text('{"text": "row 1"}\n{"text": "row 2", "title": "x"}\n')
    (folder / "c.json").write_text(json.dumps({"text": "whole file"}, indent=1))
    (folder / "d.json").write_text(json.dumps(["a string", {"text": "an object"}]))
    (folder / "e.json").write_text('{"text": "lines"}\n{"text": "in json"}\n')
    (folder / "f.txt").write_text(" \n")
    (folder / "notes.csv").write_text("left out")
    essays, source = load_essays(options(tmp_path))
    assert source == essay_source(options(tmp_path)) == "local"
    assert essays == ["plain", "row 1", "row 2", "whole file", "a string", "an object", "lines", "in json"]


def test_a_data_directory_without_essays_gives_made_ones(tmp_path: Path) -> None:
    assert load_essays(options(tmp_path))[1] == essay_source(options(tmp_path)) == "synthetic"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" ", "holds no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.json", b"\xff\xfe", "not UTF-8"),
        ("a.json", b'[{"title": 1}]', "entry 0 is no text"),
        ("a.jsonl", b'{"title": "x"}', "no field 'text'"),
    ],
)
def test_files_that_hold_no_essays_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (essays_in(tmp_path) / name).write_bytes(content)
    with pytest.raises(EvalError, match=message):
        load_essays(options(tmp_path))


def test_files_come_before_the_hub_and_are_local_data(tmp_path: Path) -> None:
    (essays_in(tmp_path) / "a.txt").write_text("mine")
    assert load_essays(options(tmp_path, online=True)) == (["mine"], "local")


def test_a_hub_that_does_not_answer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise DataError("no connection")

    monkeypatch.setattr(prose, "open_hf", refuse)
    prose._fetched.cache_clear()
    with pytest.raises(EvalError, match="no connection.*DATA_DIR/paul_graham_essays.*--online"):
        load_essays(options(online=True))


def test_essays_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(prose, "open_hf", lambda *args, **_: asked.append(args) or {"text": ["x", "y"]})
    prose._fetched.cache_clear()
    assert load_essays(options(online=True)) == (["x", "y"], "published") and asked[0][0] == "baber/paul_graham_essays"
    prose._fetched.cache_clear()
