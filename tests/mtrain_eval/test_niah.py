"""The needle grid: exact lengths, depths where they were asked for, one needle each, the same for every order of asking."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from mtrain.data.tokenizer import byte_tokenizer
from mtrain.errors import EvalError
from mtrain_eval.niah import tasks
from mtrain_eval.niah.grid import depth_of, spread_depths
from mtrain_eval.niah.haystack import Frame, Haystack
from mtrain_eval.niah.prose_tasks import Essays, KamradtTask, NumberTask
from mtrain_eval.niah.scores import first_line, found, rouge_1, word_recall
from mtrain_eval.sample import DoesNotFitError, Prediction, Sample, SuiteOptions, Task
from mtrain_eval.suites import make_tasks, stand_in_notes
from mtrain_eval.tokens import encode_prompt
from tests.mtrain_eval.small_tokenizers import byte_bpe, piece_bpe

BYTES = byte_tokenizer()
TOKENIZERS = {"bytes": BYTES, "byte_bpe": byte_bpe(), "piece_bpe": piece_bpe()}
PROSE = ("niah_kamradt", "niah_number")


def task_of(name: str, tokenizer: PreTrainedTokenizerBase = BYTES, **more: object) -> Task:
    (task,) = make_tasks(["niah"], SuiteOptions(tokenizer, **more), [name])  # type: ignore[arg-type]
    return task


# --- the grid ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [2, 3, 5, 9, 10, 35])
def test_depths_are_an_even_grid_from_both_ends(points: int) -> None:
    depths = spread_depths(points)
    assert depths[:2] == (0.0, 1.0)
    assert sorted(depths) == pytest.approx(np.linspace(0, 1, points))


def test_every_beginning_of_the_grid_covers_the_range() -> None:
    depths = spread_depths()
    assert depths == (0, 1, 0.5, 0.25, 0.75, 0.125, 0.375, 0.625, 0.875)
    assert set(depths[:5]) == set(spread_depths(5)) and set(depths[:3]) == set(spread_depths(3))
    assert [depth_of(index, depths) for index in (0, 1, 8, 9, 19)] == [(0, 0), (1, 0), (0.875, 0), (0, 1), (1, 2)]


# --- samples -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", PROSE)
def test_hundreds_of_samples_have_the_length_the_depth_and_one_needle(name: str, tokenizer: str) -> None:
    task = task_of(name, TOKENIZERS[tokenizer], seed=3)
    for length, count in ((512, 180), (777, 90), (2048, 45)) if tokenizer == "bytes" else ((512, 45), (2048, 18)):
        texts = set()
        for index in range(count):
            sample = task.sample(length, index)
            assert length - 1 <= len(sample.ids) + sample.max_new_tokens <= length
            check_needle(sample, TOKENIZERS[tokenizer])
            texts.add(sample.text)
        assert len(texts) == count


def check_needle(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> None:
    """The text is what the ids say; the answer stands once; the needle stands between sentences, where it was asked for."""
    np.testing.assert_array_equal(sample.ids, encode_prompt(tokenizer, sample.text))
    (answer,) = sample.targets
    assert sample.text.count(answer) == 1
    head, body, question = sample.text.split("\n\n")
    place = body.index(answer)
    start = max(body.rfind(". ", 0, place) + 2, 0) if ". " in body[:place] else 0
    end = body.index(".", place) + 1
    asked = sample.meta["depth_asked"]
    before = len(encode_prompt(tokenizer, sample.text[: len(head) + 2 + start].rstrip(" ")))
    assert sample.depth == pytest.approx(before / len(sample.ids), abs=2.5 / len(sample.ids))
    if asked == 0:
        assert start == 0
    elif asked == 1:
        assert end == len(body)
    else:
        # Half a sentence of made prose, and the needle itself, are at most 160 characters.
        share = start / (len(body) - (end - start))
        assert abs(share - asked) * len(body) < 160, (share, asked)
    assert question.startswith("Question: ") and not question.endswith(" ")


def test_thousands_of_numbers_are_seven_digits_of_many_cities() -> None:
    task = task_of("niah_number")
    numbers, cities = [], set()
    for index in range(2000):
        sample = task.sample(512, index)
        numbers.append(sample.targets[0])
        assert re.fullmatch(r"[1-9]\d{6}", sample.targets[0])
        assert re.findall(r"\d+", sample.text) == [sample.targets[0]]
        cities.add(re.search(r"magic number of (\w+) is \d", sample.text)[1])  # type: ignore[index]
    assert len(set(numbers)) > 1990 and len(cities) > 90


@pytest.mark.parametrize("name", [*PROSE, "niah_pairs"])
def test_a_sample_depends_on_its_number_alone(name: str) -> None:
    forth = {index: task_of(name).sample(1024, index) for index in range(12)}
    again = task_of(name)
    again.sample(2048, 5)
    for index in reversed(range(12)):
        sample = again.sample(1024, index)
        np.testing.assert_array_equal(sample.ids, forth[index].ids)
        assert sample.meta == forth[index].meta and sample.targets == forth[index].targets
    assert not np.array_equal(task_of(name, seed=1).sample(1024, 3).ids, forth[3].ids)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_a_long_prompt_is_exact_too_and_goes_round_the_essays(tokenizer: str, tmp_path: Path) -> None:
    (tmp_path / "paul_graham_essays").mkdir()
    essay = tmp_path / "paul_graham_essays" / "short.txt"
    essay.write_text(
        "A first sentence with some words. And was there a second? Yes! There was a third, 4567 words long."
    )
    task = task_of("niah_number", TOKENIZERS[tokenizer], data_dir=tmp_path)
    assert task.source == "local"
    sample = task.sample(20_000, 2)
    assert 20_000 - 2 <= len(sample.ids) + sample.max_new_tokens <= 20_000
    assert sample.meta["sentences"] > 200 and sample.meta["haystack"] == "local"
    assert sample.depth == pytest.approx(0.5, abs=0.01)


def test_text_without_full_stops_still_has_places_in_the_middle() -> None:
    haystack = Haystack(BYTES, ["word " * 5000])
    frame = Frame("Head.\n\n", "The needle.", "\n\nQuestion?")
    made = haystack.fill(frame, 8000, 0.5, 0)
    assert len(made.ids) == 8000 and 0.4 < made.needle_at / 8000 < 0.6
    assert made.text[made.needle_at :].startswith(" The needle. word")


def test_an_answer_that_stands_in_the_essays_is_refused(tmp_path: Path) -> None:
    (tmp_path / "paul_graham_essays").mkdir()
    text = "You may buy a warm bagel and row a boat on Stow Lake. "
    (tmp_path / "paul_graham_essays" / "a.txt").write_text(text * 50)
    with pytest.raises(EvalError, match="essays themselves hold the answer"):
        task_of("niah_kamradt", data_dir=tmp_path).sample(2048, 0)


@pytest.mark.parametrize("name", PROSE)
def test_a_tokenizer_that_knows_no_places_of_its_tokens(name: str) -> None:
    """Those written in Python have no offsets; this one also puts an end token after a text."""
    for index in range(3):
        sample = task_of(name, ByT5Tokenizer()).sample(2048, index)
        assert len(sample.ids) + sample.max_new_tokens == 2048
        assert sample.targets[0] in sample.text and sample.ids[-1] != ByT5Tokenizer().eos_token_id


def test_made_prose_stands_in_unless_the_task_was_named_or_the_folder_is_there(tmp_path: Path) -> None:
    options = SuiteOptions(byte_tokenizer(), data_dir=tmp_path)
    assert [task.source for task in tasks(options)] == ["synthetic", "synthetic", "generated"]
    with pytest.raises(EvalError, match="no essays in .*paul_graham_essays: put"):
        make_tasks(["niah"], options, ["niah_number"])
    assert make_tasks(["niah"], options, ["niah_pairs"])
    (tmp_path / "PaulGrahamEssays").mkdir()
    (note,) = stand_in_notes(make_tasks(["niah"], options), options)
    assert f"no {tmp_path / 'paul_graham_essays'} (should {tmp_path / 'PaulGrahamEssays'} be called that?)" in note
    (tmp_path / "paul_graham_essays").mkdir()
    with pytest.raises(EvalError, match="holds no text"):
        tasks(options)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", PROSE)
def test_what_does_not_fit_says_what_does(name: str, tokenizer: str) -> None:
    task = task_of(name, TOKENIZERS[tokenizer])
    with pytest.raises(DoesNotFitError) as caught:
        task.sample(64, 0)
    takes = int(re.search(r"takes (\d+)", str(caught.value))[1])  # type: ignore[index]
    for index in range(18):
        sample = task.sample(takes, index)
        assert takes - 4 <= len(sample.ids) + sample.max_new_tokens <= takes
        with pytest.raises(DoesNotFitError):
            task.sample(takes - 1, index)


def test_a_needle_of_one_run_may_have_other_depths() -> None:
    options = SuiteOptions(BYTES)
    essays = Essays(options)
    task = KamradtTask(options, essays, points=3)
    assert [task.sample(1024, index).meta["depth_asked"] for index in range(4)] == [0, 1, 0.5, 0]
    assert NumberTask(options, essays).essays.haystack is essays.haystack


# --- pairs of symbols ----------------------------------------------------------------------------------------------------


def test_pairs_stand_only_with_the_symbols() -> None:
    assert [task.name for task in tasks(SuiteOptions(BYTES))] == [*PROSE, "niah_pairs"]
    assert [task.name for task in tasks(SuiteOptions(byte_bpe()))] == list(PROSE)


def test_pairs_lie_at_their_depth_and_have_one_answer() -> None:
    task = task_of("niah_pairs")
    for index in range(360):
        sample = task.sample(600, index)
        assert len(sample.ids) == 600 and sample.kind == "recall" and sample.max_new_tokens == 0
        (at,) = sample.at
        key, value = sample.ids[at], sample.ids[at + 1]
        places = np.flatnonzero(sample.ids == key)
        assert len(places) == 2 and places[1] == at == 598 and sample.ids[places[0] + 1] == value
        assert sample.depth == pytest.approx(places[0] / 600)
        # The others of the 32 pairs may stand before it.
        assert abs(sample.depth - sample.meta["depth_asked"]) < 2 * 32 / 600 + 0.01
    with pytest.raises(DoesNotFitError):
        task.sample(64, 0)


# --- answers -------------------------------------------------------------------------------------------------------------


def oracle(sample: Sample) -> str:
    """Answers from the prompt alone: what follows the question's words where they stand first."""
    opening = sample.text.rsplit("Answer: ", 1)[1]
    rest = sample.text.split(opening, 1)[1]
    return rest[: rest.index(".") + 1] + " And more."


@pytest.mark.parametrize("name", PROSE)
def test_an_oracle_has_everything_right_and_silence_nothing(name: str) -> None:
    task = task_of(name)
    samples = [task.sample(1024, index) for index in range(18)]
    for sample in samples:
        line = Prediction(oracle(sample).removesuffix(" And more."))
        assert task.score(sample, line) == {"exact": 1, "word_recall": 1, "rouge_1": 1}
        assert task.score(sample, Prediction(oracle(sample)))[task.metric] == 1
        assert set(task.score(sample, Prediction("")).values()) == {0}
    rows = [{"index": s.index, "scores": task.score(s, Prediction(oracle(s)))} for s in samples]
    figure = task.aggregate(rows)[task.metric]
    assert (figure.value, figure.n) == (1, 18) and figure.low is not None and 0.7 < figure.low < 1


def test_an_oracle_has_all_pairs_right() -> None:
    task = task_of("niah_pairs")
    sample = task.sample(512, 4)
    first = int(np.flatnonzero(sample.ids == sample.ids[sample.at[0]])[0])
    right = Prediction(tokens=(int(sample.ids[first + 1]),))
    assert task.score(sample, right) == {"accuracy": 1}
    assert task.score(sample, Prediction(tokens=(0,))) == {"accuracy": 0}
    assert task.aggregate([{"scores": task.score(sample, right)}])["accuracy"].value == 1


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("1234567", 1),
        ("It is 1234567.", 1),
        ("12345678", 1),
        ("1,234,567", 0),
        ("123456", 0),
        ("", 0),
        ("１２３４５６７", 0),
    ],
)
def test_the_number_is_looked_for_as_it_is(text: str, exact: int) -> None:
    task = task_of("niah_number")
    sample = Sample("niah_number", 512, 0, np.zeros(1, dtype=np.int64), targets=("1234567",))
    assert task.score(sample, Prediction(text))["exact"] == exact


def test_words_of_an_answer() -> None:
    answer = "buy a warm bagel and row a boat on Stow Lake"
    assert word_recall("Row on STOW lake, then buy bagels", answer) == 4 / 7  # bagel, warm, boat are missing
    assert word_recall("a and on", answer) == 0
    assert word_recall("it was so", "it was so") == 1  # nothing but small words
    assert word_recall("anything", "...") == 0
    assert found("ÄPFEL und", "äpfel") == 1 and found("x", "") == 0
    assert first_line("\n  \n a line \nanother") == "a line" and first_line("\n") == ""


def test_rouge_1_is_the_one_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1"], use_stemmer=False)
    rng = np.random.default_rng(0)
    words = "buy a warm bagel, and Row a boat; on Stow-Lake 7 it's".split()
    pairs = [(" ".join(rng.choice(words, 6)), " ".join(rng.choice(words, 9))) for _ in range(50)]
    for text, answer in [*pairs, ("", "x"), ("x", ""), ("a b", "c d"), ("same words", "same words")]:
        assert rouge_1(text, answer) == pytest.approx(scorer.score(answer, text)["rouge1"].fmeasure)
