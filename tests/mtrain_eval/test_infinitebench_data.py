"""InfiniteBench on its own data: files as downloaded and as the hub's schema has them, prompts, cutting in the middle."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrain.data.tokenizer import byte_tokenizer
from mtrain.errors import EvalError
from mtrain_eval.infinitebench import tasks
from mtrain_eval.infinitebench.catalogue import BY_SPLIT, ENTRIES
from mtrain_eval.infinitebench.data import Lines
from mtrain_eval.infinitebench.prompts import frame
from mtrain_eval.infinitebench.summary import AVERAGES, summarise
from mtrain_eval.results import build
from mtrain_eval.sample import DoesNotFitError, Figure, Prediction, SuiteOptions, Task
from mtrain_eval.show import Table
from mtrain_eval.store import Cell, Store
from mtrain_eval.suites import make_tasks, stand_in_notes
from mtrain_eval.tables import all_tables
from mtrain_eval.tokens import encode_prompt
from tests.mtrain_eval.hand_made import HandTask, make_run
from tests.mtrain_eval.hand_made import row as hand_row

TOKENIZER = byte_tokenizer()
SEPARATORS = "one\u2028two\u2029three\x85four\x0bfive\x1csix"  # str.splitlines would cut here
OPTIONS = ["the hill", "the wood", "the sea", "the town"]

# split -> (question, official answer, the same as the hub's schema has it, a right prediction, a wrong one)
ROWS: dict[str, tuple[str, Any, list[str], str, str]] = {
    "passkey": ("What is the pass key?", "71432", ["71432"], " 71432.", " 7143"),
    "number_string": ("What is the sequence of digits?", "2200012222", ["2200012222"], "2200012222", "220001222"),
    "kv_retrieval": ('\nKey: "k"\nThe value is: ', "5e6b-90", ["5e6b-90"], '"5e6b-90"', "5e6b"),
    "longbook_sum_eng": ("", ["a cat"], ["a cat"], "a cat", "two dogs"),
    "longbook_qa_eng": ("Who?", ["Peyton", "P."], ["Peyton", "P."], "the Peyton", "nobody"),
    "longbook_choice_eng": ("Where?", ["the sea", "C"], ["the sea"], "C", "A"),
    "longdialogue_qa_eng": ("Which character is $$MASK$$ ?", ["ACE", "BEN"], ["ACE", "BEN"], "Ace", "Ben"),
    "longbook_qa_chn": ("谁？", ["素素"], ["素素"], "素素。", "云林"),
    "code_debug": ("Which?", ["the sea", "C"], ["the sea"], "C.", "C"),
    "code_run": ("Give the value of func_12(-7).", -14, ["-14"], "it is -14", "14"),
    "math_calc": ("", [4, 8, 15], ["4", "8", "15"], "[4, 8, 15]", "4 8 16"),
    "math_find": ("One number. The second largest number of the list is: ", 49.5, ["49.5"], "49.5", "49"),
}


def write(folder: Path, hub: bool = False, context: str = SEPARATORS) -> SuiteOptions:
    """All 12 files with three rows each, as downloaded or as exported from the hub's schema."""
    place = folder / "infinitebench"
    place.mkdir(parents=True)
    for split, (question, official, exported, _, _) in ROWS.items():
        options = OPTIONS if BY_SPLIT[split].label == "option" else []
        row = {
            "id": 7,
            "context": context,
            "input": question,
            "answer": exported if hub else official,
            "options": options,
        }
        lines = [json.dumps(row | {"id": 7 + i}, ensure_ascii=False) for i in range(3)]
        end = "\r\n" if hub else "\n"
        (place / f"{split}.jsonl").write_bytes((end.join([lines[0], "", *lines[1:]]) + end * hub).encode())
    return SuiteOptions(TOKENIZER, data_dir=folder)


def published(options: SuiteOptions) -> dict[str, Task]:
    return {task.name: task for task in tasks(options) if task.source != "synthetic"}


@pytest.mark.parametrize("hub", [False, True], ids=["as downloaded", "hub schema"])
def test_all_tasks_read_both_formats_and_score_by_the_official_type(tmp_path: Path, hub: bool) -> None:
    found = published(write(tmp_path, hub))
    assert list(found) == [entry.name for entry in ENTRIES]
    for split, (question, _, _, right, wrong) in ROWS.items():
        task = found[f"infinitebench_{split}"]
        assert task.count(65536) == 3
        sample = task.sample(65536, 1)
        assert sample.meta == {"id": 8} and sample.truncated == 0
        assert SEPARATORS in sample.text and TOKENIZER.decode(sample.ids, skip_special_tokens=True) == sample.text
        assert len(sample.ids) + sample.max_new_tokens <= 65536
        assert (question.strip() in sample.text) or split in ("longdialogue_qa_eng", "code_debug", "code_run")
        assert task.score(sample, Prediction(text=right)) == {task.metric: 1.0}, split
        assert task.score(sample, Prediction(text=wrong))[task.metric] < 1, split
        row = {"task": task.name, "length": 65536, "index": 1, "scores": {task.metric: 0.5}}
        assert task.aggregate([row, row])[task.metric].value == 0.5


def test_generation_lengths_are_the_official_ones(tmp_path: Path) -> None:
    found = published(write(tmp_path))
    lengths = {
        name.removeprefix("infinitebench_"): task.sample(65536, 0).max_new_tokens for name, task in found.items()
    }
    assert lengths == {
        "passkey": 6,
        "number_string": 12,
        "kv_retrieval": 50,
        "longbook_sum_eng": 1200,
        "longbook_qa_eng": 40,
        "longbook_choice_eng": 40,
        "longdialogue_qa_eng": 40,
        "longbook_qa_chn": 40,
        "code_debug": 5,
        "code_run": 5,
        "math_calc": 30000,
        "math_find": 3,
    }


def test_prompts_have_instruction_context_question_options_and_stub() -> None:
    for entry in ENTRIES:
        question = ROWS[entry.split][0]
        before, after = frame(entry, question, tuple(OPTIONS))
        assert before.endswith("\n\n") and before.strip() and after.startswith("\n\n")
        assert "{" not in before + after
    before, after = frame(BY_SPLIT["code_run"], ROWS["code_run"][0])
    assert "func_12." in before and "func_12(-7)" in after and after.endswith("\n\nThe value of func_12(-7) is")
    before, after = frame(BY_SPLIT["math_find"], ROWS["math_find"][0])
    assert before == "What is the second largest number in the following list?\n\n"
    assert after == "\n\n" + ROWS["math_find"][0]
    _, after = frame(BY_SPLIT["longbook_choice_eng"], "Where {x}?", ("a", "b{", "c}", "d"))
    assert "Where {x}?" in after and "\nA. a\nB. b{\nC. c}\nD. d\n" in after
    _, after = frame(BY_SPLIT["passkey"], "What is the pass key?")
    assert after == "\n\nWhat is the pass key?\n\nThe pass key is"


@pytest.mark.parametrize("length", [1000, 1001, 2047])
def test_the_middle_is_cut_on_token_ids(tmp_path: Path, length: int) -> None:
    context = "".join(f"{i:05d} " for i in range(2000))
    task = published(write(tmp_path, context=context))["infinitebench_passkey"]
    whole = task.sample(1 << 20, 0)
    cut = task.sample(length, 0)
    room = length - 6
    assert len(cut.ids) == room and cut.truncated == len(whole.ids) - room
    assert np.array_equal(cut.ids[: room // 2], whole.ids[: room // 2])
    assert np.array_equal(cut.ids[room // 2 :], whole.ids[len(whole.ids) - (room - room // 2) :])
    assert cut.text == TOKENIZER.decode(cut.ids, skip_special_tokens=True)
    assert cut.text.startswith(whole.text[:200]) and cut.text.endswith("What is the pass key?\n\nThe pass key is")


def test_a_prompt_of_exactly_the_length_is_whole(tmp_path: Path) -> None:
    task = published(write(tmp_path, context="x" * 3000))["infinitebench_passkey"]
    whole = len(task.sample(1 << 20, 0).ids)
    assert task.sample(whole + 6, 0).truncated == 0
    assert task.sample(whole + 5, 0).truncated == 1


def test_too_short_for_instruction_and_question(tmp_path: Path) -> None:
    found = published(write(tmp_path, context="x" * 3000))
    with pytest.raises(DoesNotFitError, match="needs a length of"):
        found["infinitebench_passkey"].sample(200, 0)
    with pytest.raises(DoesNotFitError, match="30000 tokens are generated"):
        found["infinitebench_math_calc"].sample(4096, 0)


def test_a_cut_inside_a_character_is_no_error(tmp_path: Path) -> None:
    task = published(write(tmp_path, context="素" * 3000))["infinitebench_longbook_qa_chn"]
    for length in (1000, 1001, 1002, 1003):
        sample = task.sample(length, 0)
        assert len(sample.ids) == length - 40 and sample.truncated > 0


# --- where the data is -----------------------------------------------------------------------------------------------------


def test_without_data_there_are_only_twins() -> None:
    made = tasks(SuiteOptions(TOKENIZER))
    assert {task.source for task in made} == {"synthetic"}
    assert all(task.name.startswith("infinitebench_twin_") for task in made) and len(made) == 5


def test_only_tasks_with_a_file_are_there(tmp_path: Path) -> None:
    options = write(tmp_path)
    for entry in ENTRIES[2:]:
        (tmp_path / "infinitebench" / f"{entry.split}.jsonl").unlink()
    assert [task.name.removeprefix("infinitebench_") for task in tasks(options)] == [
        "passkey",
        "number_string",
        "twin_kv_retrieval",
        "twin_code_run",
        "twin_math_find",
    ]


def test_a_cut_amid_a_character_makes_the_text_no_longer(tmp_path: Path) -> None:
    """Through lm-eval the text is what counts: a token more than the length, and a whole run would be refused."""
    (tmp_path / "infinitebench").mkdir()
    row = {"id": 0, "context": "\u6f22\u5b57\u4eee" * 900, "input": "\uff1f", "answer": ["x"]}
    (tmp_path / "infinitebench" / "longbook_qa_chn.jsonl").write_text(json.dumps(row))
    (task,) = published(SuiteOptions(TOKENIZER, data_dir=tmp_path)).values()
    for length in range(1000, 1006):  # cut at every byte of a character, on both sides
        sample = task.sample(length, 0)
        again = encode_prompt(TOKENIZER, sample.text)
        assert len(sample.ids) - 4 <= len(again) <= len(sample.ids) == length - sample.max_new_tokens
        assert "\ufffd" not in sample.text


def test_a_data_dir_without_the_files_says_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(
        EvalError, match="passkey.jsonl.*huggingface.co/datasets/xinrongzhang2022/InfiniteBench.*--online"
    ):
        (tmp_path / "infinitebench").mkdir()
        tasks(SuiteOptions(TOKENIZER, data_dir=tmp_path))


def test_a_data_dir_of_other_suites_leaves_the_twins(tmp_path: Path) -> None:
    options = SuiteOptions(TOKENIZER, data_dir=tmp_path)
    found = make_tasks(["infinitebench"], options)
    assert [task.name for task in found] == [task.name for task in tasks(SuiteOptions(TOKENIZER))]
    (note,) = stand_in_notes(found, options)
    assert "infinitebench_twin_passkey" in note and "left out: infinitebench_passkey, " in note
    assert f"there is no {tmp_path / 'infinitebench'}; made-up" in note
    assert stand_in_notes(found, SuiteOptions(TOKENIZER)) == []
    with pytest.raises(EvalError, match="passkey.jsonl: download"):
        make_tasks(["infinitebench"], options, ["infinitebench_passkey"])


def test_a_file_that_goes_away_says_where_to_put_it(tmp_path: Path) -> None:
    task = published(write(tmp_path))["infinitebench_passkey"]
    (tmp_path / "infinitebench" / "passkey.jsonl").unlink()
    with pytest.raises(EvalError, match="download .*/passkey.jsonl to .*infinitebench/passkey.jsonl"):
        task.count(4096)


def test_asking_for_a_task_by_name_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="code_debug.jsonl: download .* to DATA_DIR/infinitebench/code_debug.jsonl"):
        make_tasks(["ruler", "infinitebench"], SuiteOptions(TOKENIZER), ["infinitebench_code_debug"])
    with pytest.raises(EvalError, match="infinitebench_passkey has it; leave out --data-dir"):
        make_tasks(["infinitebench"], write(tmp_path), ["infinitebench_twin_passkey"])
    with pytest.raises(
        EvalError, match="unknown task 'infinitebench_twin_pass'; did you mean 'infinitebench_twin_passkey'"
    ):
        make_tasks(["infinitebench"], SuiteOptions(TOKENIZER), ["infinitebench_twin_pass"])


def test_online_fetches_one_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    asked: list[str] = []

    def download(repo: str, file: str, repo_type: str) -> str:
        asked.append(f"{repo_type}:{repo}/{file}")
        return str(tmp_path / "infinitebench" / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    found = published(SuiteOptions(TOKENIZER, online=True))
    assert len(found) == 12 and not asked
    assert found["infinitebench_code_run"].sample(4096, 2).targets == ("-14",)
    assert asked == ["dataset:xinrongzhang2022/InfiniteBench/code_run.jsonl"]


def test_a_hub_that_does_not_answer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    task = published(SuiteOptions(TOKENIZER, online=True))["infinitebench_math_find"]
    with pytest.raises(EvalError, match="no route.*DATA_DIR/infinitebench.*leave out --online"):
        task.count(4096)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"id": 1, "context": "x"', "row 0: no JSON"),
        (b"\xff\xfe{}", "row 0: not UTF-8"),
        (b"[1]", "expected an object"),
        (b'{"context": "x", "input": "y"}', "an `answer`"),
        (b'{"context": 3, "input": "y", "answer": "1"}', "expected texts"),
        (b'{"context": "x", "input": "y", "answer": ["lake"], "options": ["a"]}', "four options, found 1"),
        (b'{"context": "x", "input": "y", "answer": ["lake"], "options": ["a", "b", "c", "d"]}', "none of the options"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    file = tmp_path / "longbook_choice_eng.jsonl"
    file.write_bytes(b"\n \n" + content)
    with pytest.raises(EvalError, match=complaint) as caught:
        Lines(file, BY_SPLIT["longbook_choice_eng"])[0]
    assert str(file) in str(caught.value)


# --- means -----------------------------------------------------------------------------------------------------------------


def test_means_are_there_only_with_all_their_published_tasks() -> None:
    one = {entry.name: {4096: Figure(0.5, 4, 0.1, 0.3, 0.7), 8192: Figure(0.25, 4)} for entry in ENTRIES}
    found = summarise(one)
    assert list(found) == list(AVERAGES) == ["MInference, 10 tasks", "MTraining, 5 tasks"]
    assert [len(splits) for splits in AVERAGES.values()] == [10, 5]
    assert found["MTraining, 5 tasks"]["8192"]["value"] == 0.25
    assert found["MTraining, 5 tasks"]["4096"]["n"] == 20
    assert json.loads(json.dumps(found)) == found

    only = {name: figures for name, figures in one.items() if name != "infinitebench_passkey"}
    only["infinitebench_twin_passkey"] = one["infinitebench_passkey"]
    assert list(summarise(only)) == ["MTraining, 5 tasks"]
    only["infinitebench_code_debug"] = {4096: Figure(1.0, 4)}
    assert list(summarise(only)["MTraining, 5 tasks"]) == ["4096"]
    assert summarise({}) == {}
    assert summarise({name: {} for name in one}) == {}


def test_means_over_files_of_a_data_directory_do_not_claim_the_benchmark(tmp_path: Path) -> None:
    options = write(tmp_path / "data")
    assert {task.source for task in published(options).values()} == {"local"}
    (tmp_path / "data" / "infinitebench" / "passkey.jsonl").unlink()
    fetched = published(replace(options, online=True))["infinitebench_passkey"]
    assert fetched.source == "published"  # the one that is not in the folder comes from the hub

    def made(source: str) -> tuple[str, list[str], Table]:
        output = make_run(tmp_path / source, ("dense",))
        hands = [HandTask(entry.name, "infinitebench", source=source) for entry in ENTRIES]
        store = Store(output)
        for task in hands:
            store.append(Cell("dense", task.name, 4096), hand_row(task, 4096, 0, 1.0))
        store.close()
        run = json.loads((output / "run.json").read_text()) | {"config": {"data_dir": "my/data"}}
        tables = all_tables(build(run, output, hands))
        one = next(table for table in tables if table.title.startswith("infinitebench"))
        return next(table.title for table in tables if "over tasks" in table.title), one.total or [], one

    title, total, table = made("local")
    assert title == "InfiniteBench's tasks on local data: means over tasks in %"
    assert total[0] == "mean of the 12 InfiniteBench tasks (local data)" and table.rows[0][2] == "local data"
    assert table.notes[0].startswith("local data: whatever my/data holds")
    title, total, table = made("published")
    assert (title, total[0]) == ("InfiniteBench: means over tasks in %", "InfiniteBench average")
    assert not any("local" in note for note in table.notes)


def test_five_task_mean_of_the_published_table() -> None:
    """MTraining's dense row (En.Sum, En.QA, En.MC, En.Dia, Code.Debug): 18.5 8.2 63.5 6.0 26.3 is 24.5 on average."""
    values = dict(zip(AVERAGES["MTraining, 5 tasks"], (0.185, 0.082, 0.635, 0.060, 0.263), strict=True))
    found = summarise({f"infinitebench_{split}": {131072: Figure(value, 100)} for split, value in values.items()})
    assert round(found["MTraining, 5 tasks"]["131072"]["value"], 3) == 0.245
