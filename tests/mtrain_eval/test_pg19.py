"""Perplexity: which texts, which windows, and sums checked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from mtrain.data.stdlib import TokenizerKey, stdlib_text
from mtrain.data.tokenizer import byte_tokenizer
from mtrain.errors import DataError, EvalError
from mtrain_eval.pg19 import books as books_module
from mtrain_eval.pg19 import tasks
from mtrain_eval.pg19.books import Books
from mtrain_eval.pg19.figures import nll_sums, perplexity, perplexity_figures
from mtrain_eval.pg19.task import BooksRolling, BooksTask, BooksWhole
from mtrain_eval.sample import DoesNotFitError, Prediction, Sample, SuiteOptions
from mtrain_eval.suites import make_tasks, stand_in_notes
from mtrain_eval.tokens import encode_prompt
from tests.mtrain_eval.small_tokenizers import byte_bpe

BYTES = byte_tokenizer()
SIZES = (500, 40, 260, 1200, 333, 90)


def shelf(folder: Path) -> Path:
    """Six books of SIZES letters; letter by letter one can tell which book and place it is from."""
    (folder / "pg19").mkdir()
    for number, size in enumerate(SIZES):
        words = " ".join(f"{number}w{place}" for place in range(size))
        (folder / "pg19" / f"book{number}.txt").write_text(words[: size - 1] + ".")
    return folder


def options(folder: Path | None = None, tokenizer: PreTrainedTokenizerBase = BYTES, **more: Any) -> SuiteOptions:
    return SuiteOptions(tokenizer, data_dir=folder, **more)


# --- books ---------------------------------------------------------------------------------------------------------------


def test_books_from_a_folder_of_files_or_rows(tmp_path: Path) -> None:
    shelf(tmp_path)
    (tmp_path / "pg19" / "rows.jsonl").write_text('{"text": "row one"}\n{"text": " "}\n{"text": "row three"}\n')
    books = Books(options(tmp_path))
    assert books.source == "local"
    assert [name for name, _ in books.named] == [f"book{i}.txt" for i in range(6)] + ["rows.jsonl:1", "rows.jsonl:3"]
    assert books.lengths.tolist() == [*SIZES, 7, 9]
    np.testing.assert_array_equal(books.named[6][1], encode_prompt(BYTES, "row one"))


def test_without_books_the_held_out_library_stands_in(tmp_path: Path) -> None:
    for books in (Books(options()), Books(options(tmp_path))):
        assert books.source == "synthetic"
    assert len(books.named) > 10 and (np.diff(books.lengths) <= 0).all()
    with pytest.raises(EvalError, match=r"no books in .*pg19: put the test books"):
        make_tasks(["pg19"], options(tmp_path), ["pg19_rolling"])
    made = make_tasks(["pg19"], options(tmp_path))
    (note,) = stand_in_notes(made, options(tmp_path))
    assert f"there is no {tmp_path / 'pg19'}; made-up text stands in for pg19, pg19_rolling" in note
    for name in ("PG-19", "infinitebench"):  # the second belongs to another suite
        (tmp_path / name).mkdir()
    (note,) = stand_in_notes(made, options(tmp_path))
    assert f"no {tmp_path / 'pg19'} (should {tmp_path / 'PG-19'} be called that?); made-up" in note
    with pytest.raises(EvalError, match=r"no books in .*; there is no .*pg19 \(should .*PG-19 be called that"):
        make_tasks(["pg19"], options(tmp_path), ["pg19"])
    (note,) = stand_in_notes(made, options(tmp_path / "infinitebench"))
    assert f"no {tmp_path / 'infinitebench/pg19'}; made-up" in note
    (tmp_path / "books" / "pg19").mkdir(parents=True)
    (note,) = stand_in_notes(made, options(tmp_path / "books" / "pg19"))
    assert f"(give --data-dir {tmp_path / 'books'}?)" in note
    # None of it is what training reads; all of it is what validation reads.
    trained, kept = (bytes(stdlib_text(TokenizerKey(BYTES), held).astype(np.uint8)) for held in (False, True))
    for _, ids in books.named:
        text = bytes(ids.astype(np.uint8))
        assert text in kept and text not in trained


def test_a_folder_of_books_without_any_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pg19").mkdir()
    (tmp_path / "pg19" / "books.zip").write_bytes(b"not unpacked")
    with pytest.raises(EvalError, match=r"pg19 holds no text .*put the books"):
        tasks(options(tmp_path))
    assert {task.source for task in tasks(options(tmp_path, online=True))} == {"published"}
    (tmp_path / "pg19" / "diary.txt").write_text("My own words, which are no book of PG-19.")
    assert {task.source for task in tasks(options(tmp_path, online=True))} == {"local"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("a.txt", b"\n", "holds no text"), ("a.txt", b"\xff", "not UTF-8"), ("a.jsonl", b'{"t": 1}', "no field 'text'")],
)
def test_files_that_hold_no_books_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / "pg19").mkdir()
    (tmp_path / "pg19" / name).write_bytes(content)
    (task, _) = tasks(options(tmp_path))  # cheap: nothing is read yet
    with pytest.raises(EvalError, match=message):
        task.sample(64, 0)


def test_books_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a first book"}, {"text": "a second book"}]
    monkeypatch.setattr(books_module, "open_hf", lambda *_, **__: rows)
    books = Books(options(online=True))
    assert books.source == "published" and books.lengths.tolist() == [12, 13]

    def refuse(*_: object, **__: object) -> None:
        raise DataError("no connection")

    monkeypatch.setattr(books_module, "open_hf", refuse)
    with pytest.raises(EvalError, match="no connection.*DATA_DIR/pg19.*--online"):
        _ = Books(options(online=True)).lengths


# --- one pass at full length ---------------------------------------------------------------------------------------------


def test_the_first_tokens_of_every_book_that_is_long_enough(tmp_path: Path) -> None:
    task = BooksWhole(options(shelf(tmp_path)))
    assert task.count(300) == 3
    for index, book in enumerate((0, 3, 4)):
        sample = task.sample(300, index)
        assert sample.kind == "score" and sample.max_new_tokens == 0 and len(sample.ids) == 300
        np.testing.assert_array_equal(sample.ids, task.books.named[book][1][:300])
        assert (sample.meta["document"], sample.meta["joined"], sample.meta["long_enough"]) == (book, 1, 3)
    with pytest.raises(EvalError, match="no sample 3"):
        task.sample(300, 3)


def test_too_few_long_books_are_joined_with_an_end_token_between(tmp_path: Path) -> None:
    task = BooksWhole(options(shelf(tmp_path)))
    assert task.count(501) == 2  # one book alone is as long
    first, second = task.sample(501, 0), task.sample(501, 1)
    assert [first.meta["joined"], second.meta["joined"]] == [2, 2] and first.meta["long_enough"] == 1
    assert first.ids[500] == BYTES.eos_token_id and (first.ids[:500] < 256).all()
    assert second.ids[260] == BYTES.eos_token_id and second.meta["titles"] == ["book2.txt", "book3.txt"]
    assert task.count(1500) == 1 and task.sample(1500, 0).meta["joined"] == 4


def test_joined_books_have_one_start_token(tmp_path: Path) -> None:
    task = BooksWhole(options(shelf(tmp_path), byte_bpe()))
    sample = task.sample(int(task.books.lengths.max()) + 9, 0)
    assert sample.meta["joined"] > 1 and np.flatnonzero(sample.ids == 0).tolist() == [0]
    assert (sample.ids == 1).sum() == sample.meta["joined"] - 1
    parts = [ids[1:] for _, ids in task.books.named]
    ends = np.cumsum([1] + [len(part) + 1 for part in parts])
    for part, begin in list(zip(parts, ends, strict=False))[: sample.meta["joined"] - 1]:
        np.testing.assert_array_equal(sample.ids[begin : begin + len(part)], part)


@pytest.mark.parametrize("length", [4, 15, 2430])
def test_a_length_that_no_text_fills_does_not_fit(tmp_path: Path, length: int) -> None:
    task = BooksWhole(options(shelf(tmp_path)))
    assert task.count(sum(SIZES) + 5) == 1
    for ask in (lambda: task.sample(length, 0), lambda: task.count(length)):
        with pytest.raises(DoesNotFitError, match="2423 tokens long") as caught:
            ask()
        assert caught.value.needed == (16 if length < 16 else None)  # more books, or less length, would do


# --- rolling windows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [BYTES, byte_bpe()], ids=["bytes", "byte_bpe"])
@pytest.mark.parametrize(("length", "stride"), [(64, None), (64, 63), (64, 1), (100, 37), (400, 399), (5000, None)])
def test_windows_score_every_token_once(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, length: int, stride: int | None
) -> None:
    task = BooksRolling(options(shelf(tmp_path), tokenizer), stride=stride)
    seen = [np.zeros(size, dtype=int) for size in task.books.lengths]
    count = task.count(length)
    assert count is not None
    for index in range(count):
        sample = task.sample(length, index)
        book, begin, scored = (sample.meta[key] for key in ("document", "begin", "scored_from"))
        whole = task.books.named[book][1]
        np.testing.assert_array_equal(sample.ids, whole[begin : begin + len(sample.ids)])
        assert len(sample.ids) <= length and 1 <= scored < len(sample.ids)
        if begin:  # as much context as there is room for, and no more new tokens than asked
            assert len(sample.ids) == length and len(sample.ids) - scored <= (stride or length // 2)
        seen[book][begin + scored : begin + len(sample.ids)] += 1
    for counts in seen:
        assert counts[0] == 0 and (counts[1:] == 1).all()
    with pytest.raises(EvalError, match=f"no sample {count}"):
        task.sample(length, count)


def test_few_windows_are_of_many_books_and_the_same_ones_again(tmp_path: Path) -> None:
    shelf(tmp_path)
    task, again = BooksRolling(options(tmp_path)), BooksRolling(options(tmp_path))
    order = [task.sample(32, index).meta for index in range(20)]
    assert len({meta["document"] for meta in order}) >= 3
    assert [again.sample(32, index).meta for index in reversed(range(20))] == order[::-1]
    assert [BooksRolling(options(tmp_path, seed=1)).sample(32, index).meta for index in range(20)] != order


@pytest.mark.parametrize(("length", "stride"), [(8, None), (64, 64), (64, 0)])
def test_windows_that_cannot_be(tmp_path: Path, length: int, stride: int | None) -> None:
    with pytest.raises(DoesNotFitError, match="a stride from 1"):
        BooksRolling(options(shelf(tmp_path)), stride=stride).sample(length, 0)


# --- sums and figures ----------------------------------------------------------------------------------------------------


def test_sums_by_hand() -> None:
    logprobs = -np.arange(1, 10, dtype=np.float32)  # of tokens 1 .. 9: the loss is the position
    assert nll_sums(logprobs) == {
        "nll_sum": 45.0,
        "tokens": 9.0,
        "last_nll": 45.0,
        "last_tokens": 9.0,
        "bucket_0_nll": 1.0,
        "bucket_0_tokens": 1.0,
        "bucket_1_nll": 5.0,
        "bucket_1_tokens": 2.0,
        "bucket_2_nll": 22.0,
        "bucket_2_tokens": 4.0,
        "bucket_3_nll": 17.0,
        "bucket_3_tokens": 2.0,
    }
    assert nll_sums(logprobs, scored_from=5) == {
        "nll_sum": 35.0,
        "tokens": 5.0,
        "last_nll": 35.0,
        "last_tokens": 5.0,
        "bucket_2_nll": 18.0,
        "bucket_2_tokens": 3.0,
        "bucket_3_nll": 17.0,
        "bucket_3_tokens": 2.0,
    }


@pytest.mark.parametrize("scored_from", [1, 2, 3, 1000, 1024, 1025, 4094])
def test_buckets_hold_every_scored_token_once(scored_from: int) -> None:
    logprobs = -np.random.default_rng(0).random(4095, dtype=np.float32)
    sums = nll_sums(logprobs, scored_from)
    for what, whole in (("nll", "nll_sum"), ("tokens", "tokens")):
        parts = sum(value for name, value in sums.items() if name.startswith("bucket_") and name.endswith(what))
        assert parts == pytest.approx(sums[whole], rel=1e-12)
    assert sums["tokens"] == 4096 - scored_from and sums["last_tokens"] == min(1024, 4096 - scored_from)
    assert sums["last_nll"] == pytest.approx(
        -logprobs[max(scored_from - 1, 4095 - 1024) :].astype(float).sum(), rel=1e-12
    )


def test_sums_are_of_doubles() -> None:
    # In float32 one more than 2^24 is 2^24 again.
    assert nll_sums(np.array([-(2.0**24), -1, -1, -1], dtype=np.float32))["nll_sum"] == 2**24 + 3


def row(index: int, scores: dict[str, float], **meta: Any) -> dict[str, Any]:
    return {"task": "pg19", "length": 8, "index": index, "scores": scores, "meta": meta}


def scores_of(nll: float, tokens: float, words: float, size: float, **more: float) -> dict[str, float]:
    return {
        "nll_sum": nll,
        "tokens": tokens,
        "last_nll": nll / 2,
        "last_tokens": tokens / 4,
        "words": words,
        "bytes": size,
        **more,
    }


def test_figures_by_hand() -> None:
    rows = [
        row(
            0,
            scores_of(20, 10, 4, 20, bucket_0_nll=1, bucket_0_tokens=1, bucket_1_nll=6, bucket_1_tokens=2),
            document=0,
        ),
        row(1, scores_of(10, 30, 8, 60, bucket_0_nll=3, bucket_0_tokens=1), document=7),
    ]
    figures = perplexity_figures(rows)
    expected = {
        "perplexity": math.exp(30 / 40),
        "document_perplexity": (math.exp(2) + math.exp(1 / 3)) / 2,
        "last_perplexity": math.exp(15 / 10),
        "word_perplexity": math.exp(30 / 12),
        "byte_perplexity": math.exp(30 / 80),
        "bits_per_byte": 30 / 80 / math.log(2),
        "nll_to_2": 2.0,
        "nll_to_4": 3.0,
    }
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(expected, rel=1e-12)
    perplexity_figure = figures["perplexity"]
    assert perplexity_figure.n == 2 and perplexity_figure.low is not None and perplexity_figure.high is not None
    assert perplexity_figure.low < perplexity_figure.value < perplexity_figure.high
    assert figures["nll_to_4"].n == 1 and figures["nll_to_4"].stderr is None


def test_windows_of_one_book_are_one_draw() -> None:
    rows = [row(index, scores_of(20 + index, 10, 4, 20), document=index % 2) for index in range(6)]
    figure = perplexity_figures(rows)["perplexity"]
    assert figure.n == 2 and figure.value == pytest.approx(math.exp((6 * 20 + 15) / 60))
    assert perplexity_figures([row(0, scores_of(1, 2, 0, 0))])["word_perplexity"].value == pytest.approx(math.e)


def test_a_hopeless_model_has_a_finite_perplexity() -> None:
    figures = perplexity_figures([row(index, scores_of(1e6 + index, 10, 4, 20), document=index) for index in range(3)])
    assert all(math.isfinite(figure.value) for figure in figures.values())
    assert perplexity(1e6, 10) == math.exp(300)


def uniform(sample: Sample) -> Prediction:
    return Prediction(logprobs=np.full(len(sample.ids) - 1, -math.log(256), dtype=np.float32))


@pytest.mark.parametrize("name", ["pg19", "pg19_rolling"])
def test_a_model_that_knows_nothing_has_the_perplexity_of_its_alphabet(tmp_path: Path, name: str) -> None:
    task: BooksTask = {one.name: one for one in tasks(options(shelf(tmp_path)))}[name]  # type: ignore[assignment]
    count = task.count(80)
    assert count
    samples = [task.sample(80, index) for index in range(count)]
    rows = [row(s.index, task.score(s, uniform(s)), **s.meta) for s in samples]
    json.dumps(rows, allow_nan=False)
    figures = task.aggregate(rows)
    for metric in ("perplexity", "document_perplexity", "last_perplexity", "byte_perplexity"):
        assert figures[metric].value == pytest.approx(256, rel=1e-6)
    assert figures["bits_per_byte"].value == pytest.approx(8, rel=1e-6)
    assert rows[0]["scores"]["perplexity"] == pytest.approx(256, rel=1e-6)
    text = bytes(samples[0].ids[samples[0].meta["scored_from"] :].astype(np.uint8)).decode()
    assert (samples[0].meta["bytes"], samples[0].meta["words"]) == (len(text), len(text.split()))
    with pytest.raises(EvalError, match="log-probabilities of 79"):
        task.score(task.sample(80, 0), Prediction(logprobs=np.zeros(80, np.float32)))
