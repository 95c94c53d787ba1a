"""Rows and batches: nothing lost, nothing crossing documents, and the same rows for every number of processes and restarts."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrain.data import Batch, Entry, Loader, SourceContext, build_source, held_out_rows, load_tokenizer, make_loader
from mtrain.data.corpus import CorpusSource, StreamSource
from mtrain.data.documents import Document, read_stdlib
from mtrain.data.packing import IGNORE, Row, Sample, fill_row, make_row
from mtrain.data.sources import source_names
from mtrain.data.store import build_store
from mtrain.errors import DataError
from mtrain.recipe import DataRecipe, ModelRecipe, ParallelRecipe, Recipe, SourceRecipe, TrainRecipe

TOKENIZER = load_tokenizer("bytes")
BOS, EOS, PAD = 257, 258, 256
LENGTHS = (1, 2, 63, 64, 65, 200, 3, 1, 500, 17)


def _texts(lengths: tuple[int, ...] = LENGTHS) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefgh", k=n)) for n in lengths]


def _documents(texts: list[str]) -> Any:
    return (Document(text, f"memory:{i}") for i, text in enumerate(texts, 1))


def _corpus(seq_len: int, texts: list[str] | None = None, **more: Any) -> CorpusSource:
    store = build_store(_documents(texts or _texts()), TOKENIZER, what="memory")
    return CorpusSource(store, TOKENIZER, name="corpus", seed=3, seq_len=seq_len, **more)


def _recipe(
    *sources: SourceRecipe, rows: int = 4, micro: int = 1, dp: int = 1, seq_len: int = 96, **data: Any
) -> Recipe:
    return Recipe(
        model=ModelRecipe(config={"model_type": "qwen2"}),
        data=DataRecipe(sources=sources, **data),
        train=TrainRecipe(steps=50, seq_len=seq_len, lr=1e-3, batch_rows=rows, micro_rows=micro),
        parallel=ParallelRecipe(dp=dp),
        seed=5,
    )


def _check_row(row: Row, seq_len: int) -> None:
    """The rules of packing that hold for every row of plain text."""
    assert row.tokens.shape == row.labels.shape == row.doc_start.shape == (seq_len,)
    assert row.tokens.dtype == row.labels.dtype == row.doc_start.dtype == torch.int64
    at = torch.arange(seq_len)
    assert (row.doc_start <= at).all() and (row.doc_start.diff() >= 0).all()
    assert (row.doc_start[row.doc_start] == row.doc_start).all()
    for i in range(seq_len):
        last = i + 1 == seq_len or row.doc_start[i + 1] != row.doc_start[i]
        padding = bool((row.tokens[int(row.doc_start[i]) :] == PAD).all())
        assert row.labels[i] == (IGNORE if last or padding else row.tokens[i + 1])


def _same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens)
        and torch.equal(x.labels, y.labels)
        and torch.equal(x.doc_start, y.doc_start)
        and (x.step, x.rows, x.sources) == (y.step, y.rows, y.sources)
        for x, y in zip(a, b, strict=True)
    )


def _stack(batches: list[Batch]) -> torch.Tensor:
    return torch.cat([torch.stack([b.tokens, b.labels, b.doc_start]) for b in batches], dim=1)


def test_make_row_masks_and_pads() -> None:
    samples = [
        Sample(np.array([7, 8, 9]), np.array([True, False, True])),
        Sample.of(np.array([1])),
        Sample.of(np.array([4, 5])),
    ]
    row = make_row(samples, 8, pad=0)
    assert row.tokens.tolist() == [7, 8, 9, 1, 4, 5, 0, 0]
    assert row.doc_start.tolist() == [0, 0, 0, 3, 4, 4, 6, 6]
    assert row.labels.tolist() == [IGNORE, 9, IGNORE, IGNORE, 5, IGNORE, IGNORE, IGNORE]
    with pytest.raises(ValueError, match="do not fit in a row of 5"):
        make_row(samples, 5, pad=0)


def test_fill_row_keeps_to_the_piece_grid() -> None:
    asked: list[int] = []

    def take(limit: int) -> np.ndarray:
        asked.append(limit)
        return np.ones(min(limit, 5), dtype=np.int64)

    row = fill_row(take, 20, 0, piece=8)
    assert asked == [8, 3, 8, 3, 4] and row.doc_start.unique().tolist() == [0, 5, 8, 13, 16]


@pytest.mark.parametrize("seq_len", [1, 7, 64, 97, 1000, 3001])
def test_packing_loses_and_repeats_no_token(seq_len: int) -> None:
    source = _corpus(seq_len)
    epoch = int(source.store.starts[-1])
    rows = [source.row(i) for i in range(-(-2 * epoch // seq_len))]
    for row in rows[: 300 // seq_len + 2]:
        _check_row(row, seq_len)
    stream = torch.cat([row.tokens for row in rows])[: 2 * epoch].tolist()
    wanted = Counter(_texts())
    for part in (stream[:epoch], stream[epoch:]):  # each epoch holds every document once, whole and in order
        pieces = bytes(0 if t == BOS else 1 if t == EOS else t for t in part).decode().split("\x01")
        assert Counter(piece.removeprefix("\x00") for piece in pieces[:-1]) == wanted and pieces[-1] == ""
    assert stream[:epoch] != stream[epoch:], "a new order in each epoch"
    targets = sum(int((row.labels != IGNORE).sum()) for row in rows[: epoch // seq_len])
    cuts = epoch // seq_len
    assert targets >= epoch - epoch % seq_len - 2 * len(LENGTHS) - cuts


def test_a_long_document_goes_on_in_the_next_row() -> None:
    source = _corpus(100, ["x" * 250], shuffle=False)
    rows = [source.row(i) for i in range(3)]
    assert [row.doc_start.unique().tolist() for row in rows] == [[0], [0], [0, 52]]
    assert [int((row.labels != IGNORE).sum()) for row in rows] == [99, 99, 51 + 47]


@pytest.mark.parametrize("length", [None, 50])
def test_without_packing_each_row_is_one_padded_piece(length: int | None) -> None:
    source = _corpus(80, packing=False, length=length)
    size = length or 80
    count = sum(-(-(n + 2) // size) for n in LENGTHS)
    rows = [source.row(i) for i in range(count)]
    tokens = 0
    for row in rows:
        _check_row(row, 80)
        used = int((row.tokens != PAD).sum())
        assert 1 <= used <= size and row.doc_start.unique().tolist() == ([0, used] if used < 80 else [0])
        tokens += used
    assert tokens == sum(LENGTHS) + 2 * len(LENGTHS)


def test_length_shortens_documents_within_packed_rows() -> None:
    whole, short = _corpus(128), _corpus(128, length=32)
    for i in range(9):
        assert torch.equal(whole.row(i).tokens, short.row(i).tokens)
        assert set(range(0, 128, 32)) <= set(short.row(i).doc_start.tolist())
        _check_row(short.row(i), 128)


def test_rows_come_in_any_order() -> None:
    source, other = _corpus(33), _corpus(33)
    order = np.random.default_rng(0).permutation(120)
    mixed = {int(i): source.row(int(i)) for i in order}
    assert all(torch.equal(mixed[i].tokens, other.row(i).tokens) for i in range(120))


def _stream(seq_len: int, texts: list[str], **more: Any) -> StreamSource:
    def open_at(epoch: int, first: int) -> Any:
        order = texts if epoch % 2 == 0 else texts[::-1]
        return _documents(order[first:])

    return StreamSource(open_at, TOKENIZER, name="stream", seq_len=seq_len, **more)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("length", [None, 40])
def test_stream_rows_are_those_of_the_corpus(packing: bool, length: int | None) -> None:
    texts = ["", *_texts(), " \n"]
    stream = _stream(100, texts, packing=packing, length=length)
    corpus = _corpus(100, _texts(), packing=packing, length=length, shuffle=False)
    epoch = sum(LENGTHS) + 2 * len(LENGTHS)
    for i in range(epoch // 100 if packing else 12):
        for key in ("tokens", "labels", "doc_start"):
            assert torch.equal(getattr(stream.row(i), key), getattr(corpus.row(i), key))


def test_stream_cursor_is_exact_at_every_row() -> None:
    texts = ["", *_texts(), "  "]
    source = _stream(70, texts)
    straight = [source.row(i).tokens for i in range(60)]
    for rows in range(40):
        saved = json.loads(json.dumps(_stream(70, texts).state_dict(rows)))
        resumed = _stream(70, texts)
        resumed.load_state_dict(saved, rows)
        assert all(torch.equal(resumed.row(i).tokens, straight[i]) for i in range(rows, rows + 15))
    assert torch.equal(source.row(3).tokens, straight[3]) and torch.equal(source.row(50).tokens, straight[50])


def test_a_stream_without_text_says_so() -> None:
    with pytest.raises(DataError, match="holds no text"):
        _stream(10, ["", " "]).row(0)


def _mixture(**train: Any) -> Recipe:
    return _recipe(
        SourceRecipe("python-stdlib", weight=2, until_step=8),
        SourceRecipe("retrieval", options={"pairs": [2, 6], "questions": 3}),
        SourceRecipe("induction", length=32, from_step=3),
        SourceRecipe("retrieval", length=48, from_step=5, options={"pairs": 4, "questions": 2}),
        **train,
    )


@pytest.mark.parametrize(("dp", "micro"), [(1, 3), (2, 1), (3, 2), (6, 1)])
def test_rows_do_not_depend_on_the_number_of_ranks(dp: int, micro: int) -> None:
    alone = make_loader(_mixture(rows=6, micro=6), TOKENIZER)
    loaders = [make_loader(_mixture(rows=6), TOKENIZER, rank, dp) for rank in range(dp)]
    for loader in loaders:
        loader.micro_rows = micro
    for step in range(12):
        parts = [loader.next_step() for loader in loaders]
        (whole,) = alone.next_step()
        assert torch.equal(_stack([b for part in parts for b in part]), _stack([whole]))
        assert [r for part in parts for b in part for r in b.rows] == list(range(6)) == list(whole.rows)
        assert {b.step for part in parts for b in part} == {step} and all(
            len(b.rows) <= micro for part in parts for b in part
        )
    assert all(loader.state_dict() == alone.state_dict() for loader in loaders)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (6, 1)])
def test_resume_is_exact_also_with_other_ranks(before: int, after: int) -> None:
    recipe = _mixture(rows=6)
    straight = make_loader(recipe, TOKENIZER)
    for _ in range(7):
        straight.next_step()
    stopped = make_loader(recipe, TOKENIZER, before - 1, before)
    for _ in range(7):
        stopped.next_step()
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = [make_loader(recipe, TOKENIZER, rank, after) for rank in range(after)]
    for loader in resumed:
        loader.load_state_dict(state)
    for _ in range(8):
        assert torch.equal(_stack([b for loader in resumed for b in loader.next_step()]), _stack(straight.next_step()))


def test_iterating_gives_the_same_micro_batches() -> None:
    loader, other = make_loader(_mixture(), TOKENIZER), make_loader(_mixture(), TOKENIZER)
    loader.micro_rows = other.micro_rows = 3
    wanted = [batch for _ in range(3) for batch in other.next_step()]
    assert [len(batch.rows) for batch in wanted] == [3, 1] * 3
    assert _same([batch for _, batch in zip(range(6), loader, strict=False)], wanted)


def test_mixture_follows_weights_and_windows() -> None:
    loader = make_loader(_mixture(rows=10), TOKENIZER)
    names = source_names(_mixture().data.sources)
    assert names == ["python-stdlib", "retrieval", "induction", "retrieval #2"]
    counts = [Counter(names[i] for i in loader.plan(step)) for step in range(400)]
    for step, count in enumerate(counts[:20]):
        active = {n for n, e in zip(names, loader.entries, strict=True) if e.active(step)}
        assert set(count) == active
    assert set(counts[7]) == set(names) and "python-stdlib" not in counts[8]
    assert all(6 <= count["python-stdlib"] <= 7 for count in counts[:3])  # 2 of 3, with ten rows
    late = sum(counts[8:], Counter())
    assert all(abs(late[name] / late.total() - 1 / 3) < 0.01 for name in names[1:])
    single = Loader([Entry(e.source, e.weight) for e in loader.entries], batch_rows=1, seed=1)
    drawn = Counter(single.plan(step)[0] for step in range(3000))
    assert abs(drawn[0] / 3000 - 0.4) < 0.03, "one row per step follows the weights in the long run"


def test_micro_rows_and_padding_free_synthetic_rows() -> None:
    batch = make_loader(
        _recipe(SourceRecipe("retrieval", length=48, options={"pairs": 4, "questions": 2})), TOKENIZER
    ).next_step()[0]
    assert batch.tokens.shape == (1, 96) and batch.doc_start.unique().tolist() == [0, 48]


def test_saved_state_must_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": "word " * n}) + "\n" for n in range(1, 40)))
    recipe = _recipe(SourceRecipe("jsonl", path=str(path)))
    state = make_loader(recipe, TOKENIZER).state_dict()
    make_loader(recipe, TOKENIZER).load_state_dict(state)
    with pytest.raises(DataError, match="with seed 5, this run has 6"):
        make_loader(replace(recipe, seed=6), TOKENIZER).load_state_dict(state)
    with pytest.raises(DataError, match="batch_rows 4, this run has 8"):
        make_loader(replace(recipe, train=replace(recipe.train, batch_rows=8)), TOKENIZER).load_state_dict(state)
    with pytest.raises(DataError, match="has the sources jsonl"):
        make_loader(_recipe(SourceRecipe("python-stdlib")), TOKENIZER).load_state_dict(state)
    with path.open("a") as handle:
        handle.write('{"text": "one more"}\n')
    with pytest.raises(DataError, match="is not the data of the checkpoint"):
        make_loader(recipe, TOKENIZER).load_state_dict(state)


def test_rows_must_share_out_evenly() -> None:
    with pytest.raises(DataError, match="4 rows per step cannot be shared evenly by 3"):
        make_loader(_mixture(rows=4), TOKENIZER, 0, 3)


def test_a_gap_in_the_windows_is_an_error() -> None:
    source = make_loader(_recipe(SourceRecipe("induction")), TOKENIZER).entries[0].source
    loader = Loader([Entry(source, until_step=2)], batch_rows=1)
    loader.next_step(), loader.next_step()
    with pytest.raises(DataError, match="no source is active in step 2"):
        loader.next_step()


def _pieces(tokens: torch.Tensor) -> set[str]:
    """Whole documents found in rows."""
    text = bytes(0 if t == BOS else 1 if t >= 256 else t for t in tokens.flatten().tolist())
    return {part.split(b"\x00")[-1].decode() for part in text.split(b"\x01")[:-1] if b"\x00" in part}


@pytest.mark.parametrize("streaming", [None, True, False])
def test_validation_rows_are_never_trained_on(tmp_path: Path, streaming: bool | None) -> None:
    texts = [f"document {i} " * 3 for i in range(120)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if streaming is None:
        source = SourceRecipe("jsonl", path=str(tmp_path))
    else:
        source = SourceRecipe("hf", path=str(tmp_path), options={"streaming": streaming})
    recipe = _recipe(source, validation_rows=3)
    loader = make_loader(recipe, TOKENIZER, cache_dir=tmp_path / "tokens", progress=False)
    trained = _pieces(torch.cat([b.tokens for _ in range(40) for b in loader.next_step()]))
    checked = _pieces(held_out_rows(recipe.data, TOKENIZER, 6, 96).tokens)
    assert checked and trained and not checked & trained and (checked | trained) <= set(texts)
    assert len(trained) > 100 and len(checked) < 12
    everything = make_loader(_recipe(source), TOKENIZER, cache_dir=tmp_path / "tokens", progress=False)
    assert _pieces(torch.cat([b.tokens for _ in range(80) for b in everything.next_step()])) & checked


def _documents_of(source: Any) -> set[int]:
    assert isinstance(source, CorpusSource)
    return set(source.documents.tolist())


def test_validation_rows_of_the_library_and_of_tasks() -> None:
    recipe = _mixture()
    rows = held_out_rows(recipe.data, TOKENIZER, 5, 200)
    assert set(rows.sources) == {"python-stdlib (held out)"} and rows.tokens.shape == (5, 200)
    trained = make_loader(_recipe(SourceRecipe("python-stdlib"), validation_rows=0), TOKENIZER)
    kept = _documents_of(trained.entries[0].source)
    assert 0.02 < 1 - len(kept) / len(list(read_stdlib())) < 0.1
    assert not kept & _documents_of(
        build_source(SourceRecipe("python-stdlib"), "s", SourceContext(TOKENIZER, 64, held_out=True))
    )
    again = held_out_rows(replace(recipe, seed=99).data, TOKENIZER, 5, 200)
    assert torch.equal(rows.tokens, again.tokens)
    single = held_out_rows(recipe.data, TOKENIZER, 4, 1000, single_document=True)
    assert (single.doc_start == 0).all() and ((single.labels != IGNORE).sum(1) == 999).all()
    tasks = held_out_rows(recipe.data, TOKENIZER, 4, 200, kinds=["retrieval", "induction"])
    assert len(set(tasks.sources)) == 3
    with pytest.raises(DataError, match="no held-out rows: count 4, kinds jsonl"):
        held_out_rows(recipe.data, TOKENIZER, 4, 200, kinds=["jsonl"])
    with pytest.raises(DataError, match="no document of 100000000 tokens"):
        held_out_rows(recipe.data, TOKENIZER, 1, 100_000_000, single_document=True)


@pytest.mark.parametrize("last", [1, 40, 95, 96, 500])
def test_loss_on_the_last_tokens_only(last: int) -> None:
    plain, tail = (
        make_loader(_recipe(SourceRecipe("python-stdlib", options=options), seq_len=96), TOKENIZER)
        for options in ({}, {"loss_last": last})
    )
    for _ in range(5):
        for a, b in zip(plain.next_step(), tail.next_step(), strict=True):
            first = max(0, 95 - last)  # the position that predicts the first of the last tokens
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.labels[:, first:], b.labels[:, first:])
            assert (b.labels[:, :first] == IGNORE).all()
    assert plain.state_dict() == tail.state_dict()
    data = _recipe(SourceRecipe("python-stdlib", options={"loss_last": last})).data
    assert (held_out_rows(data, TOKENIZER, 2, 96, single_document=True).labels[:, :-1] != IGNORE).all()


def test_holding_out_documents_that_a_checkpoint_was_trained_on_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "many.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 40}) + "\n" for i in range(60)))
    source = SourceRecipe("jsonl", path=str(tmp_path / "many.jsonl"))
    before = make_loader(_recipe(source, validation_rows=0), TOKENIZER).state_dict()
    with pytest.raises(DataError, match="restore .*data.validation_rows"):
        make_loader(_recipe(source, validation_rows=3), TOKENIZER).load_state_dict(before)


def test_a_lone_document_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("word " * 999)
    with pytest.raises(DataError, match="so none can be held out; set data.validation_rows=0 log.validate_every=0"):
        held_out_rows(DataRecipe(sources=(SourceRecipe("text", path=str(tmp_path)),)), TOKENIZER, 1, 64)


def test_streamed_dataset_resumes_exactly(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"body": f"row {i} " * (i % 37)}) + "\n" for i in range(40))
    )
    source = SourceRecipe("hf", path=str(tmp_path), field="body", options={"shuffle_buffer": 16})
    recipe = _recipe(source, SourceRecipe("induction"), rows=4)
    straight = make_loader(recipe, TOKENIZER)
    wanted = [straight.next_step() for _ in range(60)]  # more than two epochs
    stopped = make_loader(recipe, TOKENIZER, 1, 2)
    for _ in range(33):
        stopped.next_step()
    state = json.loads(json.dumps(stopped.state_dict()))
    assert state["sources"][f"hf {tmp_path}"]["state"]["epoch"] >= 1
    resumed = make_loader(recipe, TOKENIZER)
    resumed.load_state_dict(state)
    for step in range(33, 60):
        assert _same(resumed.next_step(), wanted[step])


@pytest.mark.parametrize(
    ("rows", "more", "said"),
    [
        ([{"text": "a"}, {"text": None}], {}, "row 1: field 'text' should be text, found null"),
        ([{"text": "a"}], {"field": "body"}, "row 0: no field 'body'; the row has 'text'"),
        ([{"text": "a"}], {"split": "validation"}, "split 'validation' does not load"),
        ([{"text": "a"}], {"options": {"streeming": True}}, "did you mean 'streaming'"),
        ([{"text": " "}], {}, "holds no text"),
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_bad_datasets(tmp_path: Path, rows: list[Any], more: dict[str, Any], said: str, streaming: bool) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {**more, "options": {"streaming": streaming, **more.get("options", {})}}
    with pytest.raises(DataError, match=said):
        make_loader(
            _recipe(SourceRecipe("hf", path=str(tmp_path), **more)),
            TOKENIZER,
            cache_dir=tmp_path / "c",
        ).next_step()


def test_wrong_options_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    context = SourceContext(TOKENIZER, 64)
    with pytest.raises(DataError, match="one of document, paragraph, line"):
        build_source(SourceRecipe("text", path=str(tmp_path), options={"by": "page"}), "t", context)
    with pytest.raises(DataError, match="has no option 'bye'; did you mean 'by'"):
        build_source(SourceRecipe("text", path=str(tmp_path), options={"bye": "line"}), "t", context)
