"""Synthetic tasks: every answer can be found in the haystack, the loss is where it should be, depth means what it says."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mtrain.data.documents import content_hash, read_stdlib
from mtrain.data.induction import InductionSource
from mtrain.data.packing import IGNORE, Row
from mtrain.data.retrieval import RetrievalMaker, RetrievalSource, RetrievalTask, retrieval_prompts
from mtrain.data.stdlib import TokenizerKey, stdlib_text
from mtrain.data.store import HELD_OUT_EVERY
from mtrain.data.tokenizer import load_tokenizer
from mtrain.errors import DataError

TOKENIZER = load_tokenizer("bytes")
BOS, EOS, ASK = 257, 258, 259


def _is_key(tokens: np.ndarray) -> np.ndarray:
    return (tokens >= 260) & (tokens < 324)


def _is_value(tokens: np.ndarray) -> np.ndarray:
    return tokens >= 324


def _retrieval(
    seq_len: int, length: int | None = None, packing: bool = True, seed: int = 0, **options: object
) -> RetrievalSource:
    return RetrievalSource(
        TOKENIZER, RetrievalTask.read(options), name="r", seed=seed, seq_len=seq_len, packing=packing, length=length
    )


def _documents(row: Row) -> list[tuple[np.ndarray, np.ndarray]]:
    """(tokens, labels) of each document of a row."""
    starts = row.doc_start.unique().tolist()
    ends = [*starts[1:], len(row.tokens)]
    return [(row.tokens[a:b].numpy(), row.labels[a:b].numpy()) for a, b in zip(starts, ends, strict=True)]


def _check_pairs_sample(tokens: np.ndarray, labels: np.ndarray) -> tuple[int, int]:
    """Checks one sample against the format; returns (pairs, questions)."""
    ask = int(np.flatnonzero(tokens == ASK)[0])
    hay, tail = tokens[1:ask], tokens[ask + 1 :]
    assert tokens[0] == BOS and (hay == ASK).sum() == 0
    at = np.flatnonzero(_is_key(hay))
    book = dict(zip(hay[at].tolist(), hay[at + 1].tolist(), strict=True))
    assert len(book) == len(at), "keys differ"
    assert _is_value(hay[at + 1]).all() and _is_value(hay).sum() == len(at)
    keys, values = tail[0::2], tail[1::2]
    assert len(set(keys.tolist())) == len(keys)
    assert [book[k] for k in keys.tolist()] == values.tolist()
    wanted = np.full(len(tokens), IGNORE)
    wanted[ask + 1 :: 2] = values
    assert labels.tolist() == wanted.tolist()
    return len(at), len(keys)


@pytest.mark.parametrize("haystack", ["stdlib", "symbols"])
@pytest.mark.parametrize(("seq_len", "length"), [(517, None), (512, 128), (509, 127), (777, 300)])
def test_every_answer_is_in_the_haystack(haystack: str, seq_len: int, length: int | None) -> None:
    source = _retrieval(seq_len, length, haystack=haystack, pairs=[4, 20], questions=[2, 9])
    seen = set()
    for index in range(12):
        row = source.row(index)
        documents = _documents(row)
        for tokens, _ in documents[:-1]:
            assert len(tokens) == (length or seq_len)
        for tokens, labels in documents:
            if (labels == IGNORE).all():  # the padding behind the last sample
                assert (tokens == 256).all() and seq_len % (length or seq_len) == len(tokens)
            else:
                seen.add(_check_pairs_sample(tokens, labels))
    assert min(p for p, _ in seen) >= 4 and max(p for p, _ in seen) <= 20 and len(seen) > 8
    assert min(q for _, q in seen) >= 2 and max(q for _, q in seen) <= 9


def test_questions_are_capped_by_pairs() -> None:
    for index in range(8):
        tokens, labels = _documents(_retrieval(200, pairs=[1, 3], questions=8).row(index))[0]
        pairs, questions = _check_pairs_sample(tokens, labels)
        assert questions == pairs <= 3


def test_alphabet_limits_the_symbols() -> None:
    tokens = torch.cat([_retrieval(300, alphabet=6, pairs=6).row(i).tokens for i in range(20)]).numpy()
    assert set(tokens[_is_key(tokens)].tolist()) == set(range(260, 266))
    assert set(tokens[_is_value(tokens)].tolist()) == set(range(324, 330))


def test_loss_on_all_covers_the_haystack() -> None:
    row = _retrieval(200, loss="all", pairs=4).row(0)
    assert (row.labels[:-1] == row.tokens[1:]).all() and row.labels[-1] == IGNORE


def test_unpacked_rows_hold_one_sample_and_padding() -> None:
    row = _retrieval(300, 200, packing=False, pairs=4).row(5)
    (tokens, labels), (rest, ignored) = _documents(row)
    _check_pairs_sample(tokens, labels)
    assert len(tokens) == 200 and (rest == 256).all() and (ignored == IGNORE).all()


def test_late_fraction_places_pairs_near_the_end() -> None:
    def late(fraction: float) -> float:
        maker = RetrievalMaker(TOKENIZER, RetrievalTask.read({"late_fraction": fraction, "pairs": 16, "questions": 16}))
        depths = np.concatenate([maker.make(np.random.default_rng(i), 2048)[1] for i in range(60)])
        return float((depths > 1 - 96 / 2048).mean())

    assert late(0.0) < 0.08 and 0.45 < late(0.5) < 0.6 and late(1.0) > 0.98


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.9, 1.0])
def test_prompts_ask_at_the_chosen_depth(depth: float) -> None:
    length, questions = 1001, 3
    prompts = retrieval_prompts(TOKENIZER, length, depth, 7, seed=3, pairs=12, questions=questions)
    assert prompts.tokens.shape == (7, length) and prompts.at.shape == prompts.answers.shape == (7, questions)
    assert (prompts.depths - depth).abs().max() <= 0.05 + 2 * 12 / length
    for tokens, at, answers, depths in zip(prompts.tokens, prompts.at, prompts.answers, prompts.depths, strict=True):
        body = tokens.numpy()
        ask = int(np.flatnonzero(body == ASK)[0])
        for where, answer, place in zip(at.tolist(), answers.tolist(), depths.tolist(), strict=True):
            hits = np.flatnonzero(body[:ask] == body[where])
            assert len(hits) == 1 and body[hits[0] + 1] == answer == body[where + 1]
            assert abs((hits[0] - 1) / (ask - 1) - place) < 1e-12


def test_prompts_repeat_and_differ() -> None:
    first = retrieval_prompts(TOKENIZER, 400, 0.5, 3, seed=1)
    assert torch.equal(first.tokens, retrieval_prompts(load_tokenizer("bytes"), 400, 0.5, 3, seed=1).tokens)
    assert not torch.equal(first.tokens, retrieval_prompts(TOKENIZER, 400, 0.5, 3, seed=2).tokens)
    assert len({tuple(row.tolist()) for row in first.tokens}) == 3
    everywhere = retrieval_prompts(TOKENIZER, 2000, None, 20, seed=0, questions=8).depths
    assert everywhere.min() < 0.1 and everywhere.max() > 0.9


def test_prompts_use_held_out_text() -> None:
    sides: dict[bool, list[bytes]] = {True: [], False: []}
    for document in read_stdlib():
        sides[content_hash(document.text) % HELD_OUT_EVERY == 7].append(document.text.encode())
    for side in (True, False):
        body = retrieval_prompts(TOKENIZER, 500, 0.0, 1, seed=0, pairs=1, spread=0.0, held_out=side).tokens[0].numpy()
        hay = body[3 : np.flatnonzero(body == ASK)[0]].astype(np.uint8).tobytes()
        assert hay in b"".join(sides[side]) and hay not in b"".join(sides[not side])


def test_needle_sentences_hold_the_answer() -> None:
    source = _retrieval(900, task="needle", pairs=4, questions=2, digits=4)
    for index in range(6):
        row = source.row(index)
        text = TOKENIZER.decode(row.tokens[1:])
        hay, *questions = text.rsplit("\nThe secret number of ", 2)
        assert len(questions) == 2 and hay.count("The secret number of") == 4
        for question in questions:
            assert f" The secret number of {question}" in hay
        answers = TOKENIZER.decode(row.labels[row.labels != IGNORE])
        assert answers == "".join(" " + question.split(" is ")[1] for question in questions)


def test_prose_fits_in_the_shortest_length() -> None:
    for options in ({"task": "needle", "pairs": 5, "questions": 5}, {"pairs": 7, "questions": 7}):
        maker = RetrievalMaker(TOKENIZER, RetrievalTask.read(options))
        for seed in range(30):
            assert len(maker.make(np.random.default_rng(seed), maker.shortest())[0]) == maker.shortest()
    with pytest.raises(DataError, match="do not fit in a sample of 29 tokens"):
        maker.make(np.random.default_rng(0), 29)


def test_haystack_longer_than_the_library_wraps() -> None:
    text = stdlib_text(TokenizerKey(TOKENIZER), True)
    maker = RetrievalMaker(TOKENIZER, RetrievalTask.read({"pairs": 2}), held_out=True)
    sample, _ = maker.make(np.random.default_rng(0), 2 * len(text) + 99)
    assert len(sample) == 2 * len(text) + 99 and sample.tokens.max() < 388


def test_induction_repeats_with_a_random_period() -> None:
    source = InductionSource(TOKENIZER, {}, name="i", seed=0, seq_len=500, length=64)
    periods = []
    for index in range(20):
        row = source.row(index)
        documents = _documents(row)
        assert [len(tokens) for tokens, _ in documents] == [64] * 7 + [52]
        for tokens, labels in documents:
            first = int(np.flatnonzero(labels != IGNORE)[0])  # position p predicts p + 1, the second repeated token
            assert (tokens[first:] == tokens[: len(tokens) - first]).all()
            assert (labels[first:-1] == tokens[first + 1 :]).all() and labels[-1] == IGNORE
            if len(tokens) == 64:
                periods.append(first)
    assert min(periods) == 8 and max(periods) == 48 and len(set(periods)) > 30


@pytest.mark.parametrize(("vocab", "low", "high"), [("symbols", 260, 388), ("text", 0, 256), ("all", 0, 388)])
def test_induction_vocabulary(vocab: str, low: int, high: int) -> None:
    source = InductionSource(TOKENIZER, {"vocab": vocab}, name="i", seed=0, seq_len=4000)
    tokens = torch.cat([source.row(i).tokens for i in range(3)])
    assert tokens.min() >= low and tokens.max() < high and len(tokens.unique()) > 0.9 * (high - low)
    assert not {256, 257, 258} & set(tokens.tolist())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pair": 3}, "did you mean 'pairs'"),
        ({"pairs": 0}, "at least 1"),
        ({"pairs": [8, 2]}, "a pair like"),
        ({"pairs": 65}, "65 pairs need as many different keys, but there are 64"),
        ({"pairs": 9, "alphabet": 8}, "raise `alphabet`"),
        ({"depth": 1.5}, "a number from 0 to 1"),
        ({"haystack": "books"}, "one of stdlib, symbols"),
        ({"questions": "many"}, "a whole number"),
        ({"pairs": True}, "a whole number"),
    ],
)
def test_wrong_options(options: dict[str, object], said: str) -> None:
    with pytest.raises(DataError, match=said):
        RetrievalTask.read(options)


def test_too_short_for_the_task() -> None:
    with pytest.raises(DataError, match=r"samples of 64 tokens are too short, its largest take \d+; raise `length`"):
        _retrieval(512, 64, pairs=32)
    with pytest.raises(DataError, match="cannot hold 32 pairs"):
        retrieval_prompts(TOKENIZER, 60, None, 1, 0)
    with pytest.raises(DataError, match="questions <= pairs"):
        retrieval_prompts(TOKENIZER, 600, None, 1, 0, pairs=3, questions=4)


def test_rows_depend_on_seed_name_and_number_only() -> None:
    one, two = _retrieval(300, pairs=8), _retrieval(300, pairs=8)
    backwards = [two.row(i).tokens for i in reversed(range(6))][::-1]
    assert all(torch.equal(one.row(i).tokens, backwards[i]) for i in range(6))
    assert not torch.equal(one.row(0).tokens, one.row(1).tokens)
    assert not torch.equal(one.row(0).tokens, _retrieval(300, seed=1, pairs=8).row(0).tokens)


def test_generation_is_never_the_bottleneck() -> None:
    """The slowest case (many short samples per row) makes far more than the 30K tokens/s that a small model eats."""
    source = _retrieval(4096, 512)
    source.row(0)
    start = time.process_time()
    for index in range(20):
        source.row(index)
    assert 20 * 4096 / (time.process_time() - start) > 300_000
