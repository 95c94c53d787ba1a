"""RULER's samples: length, depth, needles, answers, and that nothing but (seed, task, length, index) changes them."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtrain.data.tokenizer import byte_tokenizer
from mtrain.errors import EvalError
from mtrain_eval.ruler import aggregation, niah, sizing, tasks
from mtrain_eval.ruler.summary import TASKS
from mtrain_eval.ruler.task import ATTEMPTS, Draft, Plan, RulerTask
from mtrain_eval.ruler.words import Draws, all_words, word_list
from mtrain_eval.sample import DoesNotFitError, Prediction, Sample, SuiteOptions
from mtrain_eval.tokens import count_tokens, encode_prompt
from mtrain_eval.upstream import constant
from tests.mtrain_eval.oracle import answer
from tests.mtrain_eval.small_tokenizers import byte_bpe, piece_bpe


@lru_cache
def whole_words() -> PreTrainedTokenizerFast:
    """Every word is one token, most of them the unknown one."""
    core = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "is": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


TOKENIZERS = {"bytes": byte_tokenizer, "byte_bpe": byte_bpe, "piece_bpe": piece_bpe, "words": whole_words}
NEEDLES = [name for name in TASKS if "niah" in name]
ONE_NEEDLE = [name for name in NEEDLES if "single" in name or "multikey" in name]


@lru_cache
def all_tasks(tokenizer: str = "bytes", seed: int = 0) -> dict[str, RulerTask]:
    return {task.name: task for task in tasks(SuiteOptions(TOKENIZERS[tokenizer](), seed))}


def plan_of(task: RulerTask, sample: Sample) -> Plan:
    """The plan that a sample was made by."""
    for attempt in range(ATTEMPTS):
        plan = task.plan(sample.length, sample.index, attempt)
        if text_of(task, plan.build(sample.meta["units"])) == sample.text:
            return plan
    raise AssertionError("no plan makes this sample")


def text_of(task: RulerTask, draft: Draft) -> str:
    return task.join(draft.prompt, draft.prefix)


def check_length(task: RulerTask, sample: Sample) -> None:
    """Never above; with one unit more it would be; the ids are those of the text."""
    tokenizer = task.options.tokenizer
    assert sample.ids.tolist() == encode_prompt(tokenizer, sample.text).tolist()
    assert len(sample.ids) + sample.max_new_tokens <= sample.length
    longer = text_of(task, plan_of(task, sample).build(sample.meta["units"] + 1))
    assert count_tokens(tokenizer, longer) + sample.max_new_tokens > sample.length


def check_answer(task: RulerTask, sample: Sample) -> None:
    """Who reads the prompt can answer it."""
    assert task.score(sample, Prediction(answer(sample.text)))[task.metric] == 1.0
    assert task.score(sample, Prediction("I do not know"))[task.metric] == 0.0


def check_needles(task: RulerTask, sample: Sample) -> None:
    """Every key and value once, the right ones asked for, the depth where the needle is."""
    text = sample.text
    found = re.findall(r"One of the special magic (\w+) for (.+?) is: (\S+)\.", text)
    kind = niah.KINDS[task.name.removeprefix("ruler_")]
    keys, values = Counter(key.lower() for _, key, _ in found), Counter(value for _, _, value in found)
    assert set(values.values()) == {1} and set(keys.values()) == {kind.values}
    expected = kind.keys * kind.values + (sample.meta["units"] if kind.haystack == "needle" else 0)
    assert len(found) == expected and {named for named, _, _ in found} == {kind.value}
    assert len(sample.targets) == kind.queries * kind.values
    assert all(
        any(value == target for _, key, value in found if key in sample.meta["query"]) for target in sample.targets
    )
    if kind.value == "numbers":
        assert all(re.fullmatch(r"[1-9]\d{6}", target) for target in sample.targets)
    else:
        assert all(re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab]\w{3}-\w{12}", t) for t in sample.targets)
    if task.name in ONE_NEEDLE:
        assert sample.depth is not None
        start = text.index(next(m for m in found_sentences(text) if m.endswith(f" {sample.targets[0]}.")))
        at = count_tokens(task.options.tokenizer, text[:start]) / len(sample.ids)
        assert sample.depth == at and 0 < sample.depth < 1
    else:
        assert sample.depth is None
    assert len(sample.meta["depths"]) == kind.keys * kind.values


def found_sentences(text: str) -> list[str]:
    return re.findall(r"One of the special magic \w+ for .+? is: \S+\.", text)


@pytest.mark.parametrize("name", NEEDLES)
def test_hundreds_of_needles_on_bytes(name: str) -> None:
    task, seen = all_tasks()[name], set()
    for index in range(150):
        sample = task.sample(1000 + 7 * (index % 3), index)
        check_length(task, sample)
        check_answer(task, sample)
        check_needles(task, sample)
        seen.update(sample.targets)
    assert len(seen) == 150 * len(sample.targets)


@pytest.mark.parametrize("name", [name for name in TASKS if name not in NEEDLES])
def test_dozens_of_the_other_tasks_on_bytes(name: str) -> None:
    task = all_tasks()[name]
    for index in range(40):
        sample = task.sample(2048 + 5 * (index % 4), index)
        check_length(task, sample)
        check_answer(task, sample)


@pytest.mark.parametrize("tokenizer", ["byte_bpe", "piece_bpe", "words"])
@pytest.mark.parametrize("name", TASKS)
def test_other_tokenizers(name: str, tokenizer: str) -> None:
    task = all_tasks(tokenizer)[name]
    for index in range(6):
        sample = task.sample(2000 + index, index)
        check_length(task, sample)
        check_answer(task, sample)
        if name in NEEDLES:
            check_needles(task, sample)


@pytest.mark.parametrize("name", TASKS)
def test_nothing_else_changes_a_sample(name: str) -> None:
    """Neither the order, nor what was made before, nor the number of samples: only seed, task, length and index."""
    wanted = [(length, index) for length in (2048, 2300) for index in range(4)]
    first = [all_tasks()[name].sample(*which) for which in wanted]
    fresh = {task.name: task for task in tasks(SuiteOptions(byte_tokenizer(), 0))}[name]
    mixed = list(zip(wanted, first, strict=True))
    random.Random(3).shuffle(mixed)
    for which, sample in mixed:
        again = fresh.sample(*which)
        assert again.text == sample.text and again.targets == sample.targets and again.meta == sample.meta
        assert again.depth == sample.depth and again.ids.tolist() == sample.ids.tolist()
    assert len({sample.text for sample in first}) == len(first)
    other = all_tasks(seed=1)[name].sample(*wanted[0])
    assert other.text != first[0].text


@pytest.mark.parametrize("tokenizer", ["bytes", "byte_bpe"])
@pytest.mark.parametrize("name", TASKS)
def test_too_short_a_length_says_which_would_do(name: str, tokenizer: str) -> None:
    task = all_tasks(tokenizer)[name]
    for length in (1, 33, 200, 256):
        with pytest.raises(DoesNotFitError, match=f"{name} does not fit {length} tokens") as error:
            task.sample(length, 0)
    needed = int(re.findall(r"from about (\d+)", str(error.value))[-1])
    assert needed > 256
    for index in range(5):
        sample = task.sample(needed, index)
        assert len(sample.ids) + sample.max_new_tokens <= needed


def test_common_words_fit_two_ranges() -> None:
    """From 4096 tokens on words are repeated more often, and with long words 4096 tokens are not enough for that."""
    task = all_tasks("bytes")["ruler_cwe"]
    found = {}
    for length in (300, 4096):
        with pytest.raises(DoesNotFitError) as error:
            task.sample(length, 0)
        numbers = re.search(r"it fits from about (\d+) to 4095, and from about (\d+) on$", str(error.value))
        assert numbers
        found[length] = (int(numbers[1]), int(numbers[2]))
    (below, above), again = found[300], found[4096]
    assert below < 4095 < 4096 < above and abs(again[0] - below) < 0.05 * below and abs(again[1] - above) < 0.05 * above
    for length in (below, 4095, above):
        assert len(task.sample(length, 0).ids) + task.max_new_tokens <= length
    with pytest.raises(DoesNotFitError):
        task.sample(int(0.93 * above), 0)
    with pytest.raises(DoesNotFitError):
        task.sample(int(0.93 * below), 0)
    with pytest.raises(DoesNotFitError, match=r"it fits from about \d+ on$"):
        all_tasks("byte_bpe")["ruler_fwe"].sample(100, 0)


@pytest.mark.parametrize("name", ["ruler_niah_single_1", "ruler_niah_multiquery", "ruler_niah_multikey_3"])
def test_all_samples_of_a_length_fit_or_none(name: str) -> None:
    task, outcomes = all_tasks("piece_bpe")[name], []
    with pytest.raises(DoesNotFitError) as error:
        task.sample(100, 0)
    needed = int(re.findall(r"from about (\d+)", str(error.value))[-1])
    for length in range(needed - 60, needed + 2, 6):
        fits = set()
        for index in range(25):
            try:
                sample = task.sample(length, index)
                assert len(sample.ids) + sample.max_new_tokens <= length
                fits.add(True)
            except DoesNotFitError:
                fits.add(False)
        assert len(fits) == 1
        outcomes += fits
    assert outcomes == sorted(outcomes) and len(set(outcomes)) == 2


def test_needles_are_shuffled() -> None:
    """The values of a key do not stand in the order in which they are asked for, nor do the keys."""
    for name in ("ruler_niah_multivalue", "ruler_niah_multiquery"):
        orders = set()
        for index in range(150):
            sample = all_tasks()[name].sample(1200, index)
            orders.add(tuple(np.argsort([sample.text.index(f" {target}.") for target in sample.targets]).tolist()))
        assert len(orders) == 24


@pytest.mark.parametrize("name", ["ruler_niah_single_2", "ruler_niah_multivalue"])
def test_depths_among_essays_are_the_official_grid(name: str) -> None:
    """Forty depths, none twice in a sample, at int(sentences * depth / 100): between whole sentences."""
    task, grid = all_tasks()[name], np.round(np.linspace(0, 100, 40)).astype(int).tolist()
    assert grid == niah.DEPTHS and len(set(grid)) == 40
    seen: set[int] = set()
    for index in range(40):
        sample = task.sample(6000, index)
        count = task.essays.sentences(sample.meta["units"])  # type: ignore[attr-defined]
        places = [round(count * share) for share in sample.meta["depths"]]
        assert places == sorted(places)
        allowed = {int(count * depth / 100): depth for depth in grid}
        assert set(places) <= set(allowed)
        seen |= {allowed[place] for place in places}
        body = sample.text.split("\n")[1]
        for sentence in found_sentences(sample.text):
            before, after = body.split(sentence)
            # Never within a sentence; the last one is cut where the length ends.
            assert "" in (before.strip(), after.strip()) or before.rstrip()[-1] in ".!?"
            body = body.replace(sentence, "", 1)
    assert {0, 100} <= seen if name.endswith("value") else len(seen) > 15


def test_noise_lines_and_needles_stand_on_lines_of_their_own() -> None:
    task = all_tasks()["ruler_niah_single_1"]
    places = set()
    for index in range(60):
        sample = task.sample(1400, index)
        lines = sample.text.split("\n")[1:-1]
        assert Counter(lines)[niah.noise_line()] == sample.meta["units"] == len(lines) - 1
        places.add([line.startswith("One") for line in lines].index(True))
    assert places == set(range(sample.meta["units"]))  # before any line, never after the last: as the original inserts


def test_prompts_are_worded_as_published() -> None:
    """Singular for one answer; the answer begins as lm-eval's own code begins it."""
    made = all_tasks()
    one, many = made["ruler_niah_single_3"].sample(1200, 0), made["ruler_niah_multiquery"].sample(1200, 0)
    assert one.text.startswith(
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will"
    )
    assert "quiz you about the uuid afterwards.\n" in one.text
    assert one.text.endswith(f"? The special magic uuid for {one.meta['query']} mentioned in the provided text is")
    assert many.text.startswith("Some special magic numbers are hidden within")
    assert many.text.endswith(
        f"? The special magic numbers for {many.meta['query']} mentioned in the provided text are"
    )
    assert re.fullmatch(r"\S+, \S+, \S+, and \S+", many.meta["query"])
    tracking = made["ruler_vt"].sample(2048, 0).text
    assert "assgined" not in tracking and tracking.count("variables are assigned the value") == 2
    assert tracking.endswith(", they are: ")
    assert made["ruler_qa_1"].sample(2048, 0).text.endswith("? Answer:")
    assert [task.max_new_tokens for task in made.values()] == [128] * 8 + [30, 120, 50, 32, 32]
    for name, file in (
        ("cwe", "cwe_utils.py"),
        ("fwe", "fwe_utils.py"),
        ("qa_1", "qa_utils.py"),
        ("qa_2", "qa_utils.py"),
    ):
        assert made[f"ruler_{name}"].max_new_tokens == constant(f"ruler/{file}", "CONFIG")["tokens_to_generate"]
    assert constant("ruler/vt_utils.py", "CONFIG")["variable_tracking"]["tokens_to_generate"] == 30


def test_a_chat_template_counts_as_part_of_the_length() -> None:
    asked = tasks(SuiteOptions(byte_bpe()), lambda prompt, prefix: f"<user>{prompt}</user><model>{prefix}")
    for task in asked:
        sample = task.sample(7000, 1)
        assert sample.text.startswith("<user>") and "</user><model>" in sample.text
        check_length(task, sample)


def test_variable_tracking_chains() -> None:
    for index in range(30):
        sample = all_tasks("byte_bpe")["ruler_vt"].sample(3000, index)
        example, asked = sample.text.split("\n\nMemorize")
        assert count_tokens(byte_bpe(), example + "\n\n") <= 500 or example.count(niah.noise_line()) == 5
        assert len(sample.targets) == len(set(sample.targets)) == 5
        assert all(re.fullmatch("[A-Z]{5}", name) for name in sample.targets)
        assert 10000 <= int(sample.meta["query"]) <= 99998
        lines = [line for line in asked.split("\n") if line.startswith("VAR ")]
        assert lines[0] == f"VAR {sample.targets[0]} = {sample.meta['query']}"
        chain = zip(sample.targets, sample.targets[1:], strict=False)
        assert lines[1:] == [f"VAR {new} = VAR {old} " for old, new in chain]
        names = re.findall(r"VAR ([A-Z]{3}) =", example)
        assert len(set(names)) == 5 and example.endswith(f", they are:  {' '.join(names)}")


@pytest.mark.parametrize(("length", "often", "seldom", "shot"), [(4095, 6, 1, (3, 1)), (4096, 30, 3, (10, 3))])
def test_common_words_frequencies(length: int, often: int, seldom: int, shot: tuple[int, int]) -> None:
    task = all_tasks("byte_bpe")["ruler_cwe"]
    sample = task.sample(length, 0) if length < 4096 else all_tasks("byte_bpe")["ruler_cwe"].sample(length + 4000, 1)
    example, asked = sample.text.split("\nBelow is")
    counts = Counter(re.split(r"\s*\d+\. ", asked.split("\n")[1])[1:])
    assert [count for _, count in counts.most_common(10)] == [often] * 10
    assert {count for _, count in counts.most_common()[10:]} == {seldom}
    assert {word for word, _ in counts.most_common(10)} == set(sample.targets)
    assert len(counts) == sample.meta["words"] and set(counts) <= set(all_words())
    shown = Counter(re.split(r"\s*\d+\. ", example.split("\n")[1])[1:])
    assert Counter(shown.values()) == Counter({shot[0]: 10, shot[1]: {3: 10, 10: 30}[shot[0]]})
    told = re.split(r"\s*\d+\. ", example.rsplit("are:", 1)[1])[1:]
    assert set(told) == {word for word, _ in shown.most_common(10)}


def test_common_words_beyond_the_list_are_pairs() -> None:
    task, known = all_tasks()["ruler_cwe"], len(all_words())
    draft = task.plan(1 << 22, 0, 0).build(known + 5)
    assert draft.meta["pairs"] == 5 and draft.meta["words"] == known + 5
    asked = draft.prompt.split("\nBelow is")[1].split("\n")[1]
    counts = Counter(re.split(r"\s*\b\d+\. ", asked)[1:])
    assert len(counts) == known + 5 and Counter(counts.values()) == Counter({30: 10, 3: known - 5})


def test_frequent_words_fall_as_zeta() -> None:
    task = all_tasks("byte_bpe")["ruler_fwe"]
    for index in range(10):
        sample = task.sample(4096, index)
        listed = re.search(r"coded words\. (.*)\nQuestion", sample.text)
        assert listed is not None
        counts = Counter(listed[1].split())
        n = sample.meta["units"]
        zeta = [math.floor(n * i**-2.0 / (math.pi**2 / 6)) for i in range(1, 81)]
        assert sorted(counts.values(), reverse=True) == [count for count in zeta if count]
        assert counts["..."] == zeta[0] and [counts[word] for word in sample.targets] == zeta[1:4]
        assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


def test_the_three_frequent_words_are_always_clear() -> None:
    share = [i**-2.0 / (math.pi**2 / 6) for i in range(1, 6)]
    smallest = aggregation.FrequentWords.SMALLEST
    assert all(int(n * share[3]) > int(n * share[4]) for n in range(smallest, 20000))
    assert int((smallest - 1) * share[3]) == int((smallest - 1) * share[4])


def test_essays_repeat_when_they_end() -> None:
    essays = all_tasks()["ruler_niah_single_2"].essays  # type: ignore[attr-defined]
    size, sentences = len(essays.words), len(essays.starts)
    assert essays.text(size - 3, size + 2) == " ".join(essays.words[-3:] + essays.words[:2])
    assert essays.text(5, 5) == "" and essays.text(0, 2 * size + 1).split(" ") == essays.words * 2 + essays.words[:1]
    assert essays.sentences(size) == sentences and essays.sentences(size + 1) == sentences + 1
    assert essays.sentences(0) == 0 and essays.sentences(1) == 1
    assert essays.start(sentences) == size and essays.start(2 * sentences + 1) == 2 * size + essays.starts[1]
    assert essays.cost(2 * size + 7) == pytest.approx(2 * essays.cost(size) + essays.cost(7))
    for sentence in (1, 17, sentences - 1):
        assert essays.words[essays.start(sentence) - 1][-1] in ".!?"


def test_sources_are_told() -> None:
    found = {task.name.removeprefix("ruler_"): task.source for task in all_tasks().values()}
    synthetic = {name for name, source in found.items() if source == "synthetic"}
    essays = {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}
    assert synthetic == essays | {"qa_1", "qa_2"}
    assert set(found.values()) == {"synthetic", "generated"}
    assert tuple(all_tasks()) == TASKS and all(task.suite == "ruler" for task in all_tasks().values())


def test_words_come_in_one_order_and_never_twice() -> None:
    for kind, least in (("noun", 6000), ("adjective", 900), ("verb", 900)):
        words = word_list(kind)
        assert len(words) > least and list(words) == sorted(set(words)) and all(word == word.strip() for word in words)
    draws = Draws(random.Random(0))
    drawn = [draws.one("words") for _ in range(3000)]
    assert len({word.lower() for word in drawn}) == 3000
    stuck = Draws(random.Random(0))
    stuck._word = lambda: "the same"  # type: ignore[method-assign]
    assert stuck.one("words") == "the same"
    with pytest.raises(EvalError, match="no words left"):
        stuck.one("words")


# --- sizing --------------------------------------------------------------------------------------------------------------


def counted(count: Callable[[int], int]) -> tuple[Callable[[int], int], list[int]]:
    asked: list[int] = []

    def counting(n: int) -> int:
        asked.append(n)
        return count(n)

    return counting, asked


@pytest.mark.parametrize("price", [None, lambda n: 25.0 * n, lambda n: 9.0 * n, lambda n: 25.0 * n + 4000 * (n > 2000)])
def test_the_largest_fit_is_found_with_few_counts(price: Callable[[int], float] | None) -> None:
    noise = np.random.default_rng(0).integers(15, 36, 200000).cumsum().tolist()
    for budget in (140, 1000, 131072, 1 << 20):
        count, asked = counted(lambda n: 100 + noise[n])
        n = sizing.largest_fit(count, budget, 0, price)
        assert 100 + noise[n] <= budget < 100 + noise[n + 1]
        assert len(asked) <= 26 and max(asked) < 4 * n + 40  # halving at worst, and never a prompt of another size


def test_the_largest_fit_ends_for_strange_tokenizers() -> None:
    count, asked = counted(lambda n: n * n + (n % 3 == 0))  # falls now and then
    n = sizing.largest_fit(count, 1 << 20, 1)
    assert count(n) <= 1 << 20 < count(n + 1) and len(asked) < 70
    with pytest.raises(EvalError, match="no length can be filled"):
        sizing.largest_fit(lambda n: 5, 1000, 1)
    assert sizing.largest_fit(lambda n: 5 if n < 3 else 2000, 1000, 1, lambda n: 0.0) == 2
