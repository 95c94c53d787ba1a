"""The runner: what is stored, what is asked again, what is refused, and that ranks never disagree."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mtrain.comm import Ring, run_ranks
from mtrain.errors import EvalError, LaunchError
from mtrain_eval import runner
from mtrain_eval.ask import cut, make_stop, prompt_sha256
from mtrain_eval.plan import CellPlan, deal
from mtrain_eval.sample import DoesNotFitError, Sample, SuiteOptions
from mtrain_eval.store import ROW_KEYS, Cell, Store, locked
from tests.mtrain_eval.fakes import WORDS, FakeTask, config_of, fake_suite, rows_in, run_fake

__all__ = ["fake_suite"]
pytestmark = pytest.mark.usefixtures("fake_suite")


class Stopped(BaseException):
    """Like KeyboardInterrupt, but not caught by pytest."""


def stop_at(wanted: int) -> Any:
    def before(count: int) -> None:
        if count == wanted:
            raise Stopped

    return before


def test_every_cell_is_asked_and_stored(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    outcome = run_fake(config)
    rows = rows_in(config.output)
    # two attentions x (code, text, next at both lengths; large at 300 only, noted at 100)
    assert len(rows) == 2 * 2 * 4 and outcome.asked == 2 * (4 + 3 + 4 + 4 + 3 + 4 + 4) and not outcome.missing
    assert rows["dense/fake_large/100.jsonl"] == [{"does_not_fit": "fake_large needs 200 tokens"}]
    assert [len(rows[f"sparse/fake_{name}/300.jsonl"]) for name in ("code", "text", "next", "large")] == [4, 3, 4, 4]
    dense, sparse = rows["dense/fake_code/100.jsonl"][2], rows["sparse/fake_code/100.jsonl"][2]
    assert dense.keys() == ROW_KEYS - {"prefill_s", "decode_s"}
    assert dense["prediction"].strip() == dense["targets"][0] and dense["scores"] == {"right": 1.0}
    assert dense["generated_tokens"] == 8 and dense["density"] is None and sparse["density"] == 0.25  # " 123456\n"
    assert dense["prompt_sha256"] == sparse["prompt_sha256"] != rows["dense/fake_code/100.jsonl"][1]["prompt_sha256"]
    assert rows["dense/fake_next/100.jsonl"][0]["scores"] == {"right": 1.0}
    assert all(row["scores"]["tokens"] > 0 and row["prediction"] == "" for row in rows["dense/fake_text/100.jsonl"])


def test_a_second_call_asks_nothing(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    first = run_fake(config)
    before = rows_in(config.output)
    second = run_fake(config, before=stop_at(0))
    assert (second.asked, second.stored) == (0, first.asked) and rows_in(config.output) == before


def test_stopped_at_any_sample_and_resumed_is_the_same_as_never_stopped(tmp_path: Path) -> None:
    whole = config_of(tmp_path, limit=2)
    total = run_fake(whole).asked
    want = rows_in(whole.output)
    assert total == 2 * (3 * 2 + 4 * 2)
    for place in range(total):
        config = replace(whole, output=tmp_path / f"stopped_{place}")
        with pytest.raises(Stopped):
            run_fake(config, before=stop_at(place))
        outcome = run_fake(config)
        assert (outcome.stored, outcome.asked) == (place, total - place)
        assert rows_in(config.output) == want, place


def test_limit_order_and_selection_never_change_a_row(tmp_path: Path) -> None:
    whole = config_of(tmp_path)
    run_fake(whole)
    want = rows_in(whole.output)
    config = config_of(tmp_path, output=tmp_path / "parts", limit=1, lengths=(300,), attention=("sparse",))
    run_fake(replace(config, tasks=("fake_next",)))
    run_fake(replace(config, tasks=("fake_large", "fake_code"), limit=2))
    run_fake(replace(config, lengths=(100, 300), limit=4))
    run_fake(replace(whole, output=config.output))
    assert rows_in(config.output) == want


@pytest.mark.parametrize("cut_at", range(1, 40, 3))
def test_a_crash_in_the_middle_of_a_line(tmp_path: Path, cut_at: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    run_fake(config)
    want = rows_in(config.output)
    path = config.output / "dense/fake_code/300.jsonl"
    data = path.read_bytes()
    last = len(data.splitlines()[-1]) + 1
    path.write_bytes(data[: -last * cut_at // 40])
    assert run_fake(config).asked == 1
    assert rows_in(config.output) == want
    broken = list(path.parent.glob("300.jsonl.broken-*"))
    assert [file.name for file in broken] == ["300.jsonl.broken-1"] and len(broken[0].read_bytes()) <= last
    assert "1 broken line moved to 300.jsonl.broken-1; 3 good rows kept" in capsys.readouterr().err


def test_garbage_is_set_aside_and_good_rows_are_kept(tmp_path: Path) -> None:
    config = config_of(tmp_path, attention=("dense",), lengths=(100,), tasks=("fake_code",))
    run_fake(config)
    want = rows_in(config.output)
    path = config.output / "dense/fake_code/100.jsonl"
    lines = path.read_bytes().splitlines()
    other = json.dumps({**json.loads(lines[1]), "length": 300}).encode()  # a row of another file
    bad = [b"\xff\xfe\x00", b"[1]", b"{}", other, lines[1].replace(b'"index": 1', b'"index": true'), b"[" * 100_000]
    path.write_bytes(b"\n".join([lines[0], *bad, lines[0], b"", lines[2], lines[3]]))
    assert run_fake(config).asked == 1
    assert sorted(rows_in(config.output)["dense/fake_code/100.jsonl"], key=lambda row: row["index"]) == list(
        want["dense/fake_code/100.jsonl"]
    )
    assert (path.parent / "100.jsonl.broken-1").read_bytes().split(b"\n")[:-1] == bad
    path.write_bytes(path.read_bytes() + b"more\n")
    Store(config.output, lambda text: None).read(Cell("dense", "fake_code", 100))
    assert (path.parent / "100.jsonl.broken-2").read_bytes() == b"more\n"


def test_rows_are_on_disk_one_by_one_and_hold_any_text(tmp_path: Path) -> None:
    store, cell = Store(tmp_path), Cell("dense", "t", 8)
    row = dict.fromkeys(ROW_KEYS, None) | {"task": "t", "length": 8, "scores": {"a": 1}, "prompt_sha256": "0"}
    texts = ["line\u2028sep\n\r\x85", "\ud800 half", "中文 \x00"]
    for index, text in enumerate(texts):
        store.append(cell, {**row, "index": index, "prediction": text})
        assert [stored["prediction"] for stored in Store(tmp_path).read(cell)] == texts[: index + 1]
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.append(cell, {**row, "index": 9, "scores": {"a": float("nan")}})
    assert len(Store(tmp_path).read(cell)) == 3
    store.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"dtype": "bfloat16"}, "dtype: auto -> bfloat16"),
        ({"max_positions": 2000}, "max_positions: None -> 2000"),
        ({"rope": {"rope_type": "yarn"}}, "rope.rope_type: none -> yarn"),
        ({"online": True}, "data.online: False -> True"),
    ],
)
def test_another_fingerprint_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    config = config_of(tmp_path)
    run_fake(config)
    before = rows_in(config.output)
    with pytest.raises(EvalError, match="holds an evaluation of something else") as caught:
        run_fake(replace(config, **changes))
    assert words in str(caught.value) and "--no-resume" in str(caught.value) and "another --output" in str(caught.value)
    assert rows_in(config.output) == before


def test_other_files_of_the_model_or_the_data_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl").write_text("one")
    config = config_of(tmp_path, data_dir=data)
    run_fake(config)
    model = Path(config.model)

    def refused(file: Path, content: bytes) -> str:
        old = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        with pytest.raises(EvalError, match="something else") as caught:
            run_fake(config)
        file.write_bytes(old) if old is not None else file.unlink()
        return str(caught.value)

    assert "model: " in refused(model / "model.safetensors", b"WEIGHTS" * 99)
    assert "model: " in refused(model / "model-2.safetensors", b"")
    assert "tokenizer: " in refused(model / "tokenizer.json", b"{ }")
    assert "config: " in refused(model / "config.json", b"{ }")
    assert "data.directory: " in refused(data / "a.jsonl", b"four")
    training = json.loads((model / "mtrain.json").read_text())
    training["recipe"]["attention"]["sink"] = 3
    assert "attention.sparse.sink: 2 -> 3" in refused(model / "mtrain.json", json.dumps(training).encode())
    assert run_fake(config).asked == 0


def test_no_resume_sets_the_earlier_run_aside(tmp_path: Path) -> None:
    config = config_of(tmp_path, attention=("dense",))
    run_fake(config)
    want = rows_in(config.output)
    run_fake(replace(config, seed=1), resume=False)
    assert rows_in(tmp_path / "run_1") == want
    assert rows_in(config.output).keys() == want.keys() and rows_in(config.output) != want


def test_directories_of_others_are_left_alone(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.output.mkdir()
    (config.output / "thesis.tex").write_text("x")
    with pytest.raises(EvalError, match="holds files that no evaluation made"):
        run_fake(config, resume=False)
    with pytest.raises(EvalError, match="is a file"):
        run_fake(replace(config, output=config.output / "thesis.tex"))
    assert [file.name for file in config.output.iterdir()] == ["thesis.tex"]
    (config.output / "thesis.tex").unlink()
    run_fake(replace(config, limit=1))
    (config.output / "run.json").write_text("x")
    with pytest.raises(EvalError, match="run.json is damaged"):
        run_fake(config)


def test_a_start_that_failed_before_its_first_answer_binds_nobody(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(Stopped):
        run_fake(replace(config, seed=1), before=stop_at(0))
    assert run_fake(config).asked > 0


def test_one_sample_that_does_not_fit_does_not_end_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakeTask.sample

    def sample(self: FakeTask, length: int, index: int) -> Sample:
        if index == 1:
            raise DoesNotFitError("its question is too long")
        return made(self, length, index)

    monkeypatch.setattr(FakeTask, "sample", sample)
    config = config_of(tmp_path, attention=("dense",), tasks=("fake_code", "fake_text"), lengths=(300,))
    for asked in (5, 0):  # again, with the one that does not fit as the first that is left
        assert run_fake(config).asked == asked
        for task, there in (("fake_code", [0, 2, 3]), ("fake_text", [0, 2])):
            rows = Store(config.output).read(Cell("dense", task, 300))
            assert [row["index"] for row in rows] == there


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config.output.mkdir()
    with locked(config.output), pytest.raises(EvalError, match="another evaluation is writing"):
        run_fake(config)
    run_fake(config)
    with locked(config.output), pytest.raises(EvalError, match="another evaluation is writing"):
        run_fake(replace(config, seed=1), resume=False)  # its rows would land among the new ones
    assert not (tmp_path / "run_1").exists()


def test_another_question_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, attention=("dense",))
    run_fake(config)
    real = FakeTask.sample
    monkeypatch.setattr(FakeTask, "sample", lambda *a: replace(real(*a), targets=("other",)))
    assert run_fake(config).asked == 0  # nothing is added, so nothing is mixed
    with pytest.raises(EvalError, match="fake_code, length 100, sample 0 was another question"):
        run_fake(replace(config, limit=5))
    with pytest.raises(EvalError, match="was another question"):
        run_fake(replace(config, attention=("sparse",)))


def test_lengths_beyond_the_model(tmp_path: Path) -> None:
    config = config_of(tmp_path, lengths=(100, 2000))
    with pytest.raises(EvalError, match="length 2000 is beyond the model's 1000 positions.*--max-positions 2000"):
        run_fake(config)
    assert not config.output.exists()
    run_fake(replace(config, max_positions=2000, limit=1))


def test_samples_longer_than_their_length_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FakeTask.sample

    def longer(task: FakeTask, length: int, index: int) -> Sample:
        sample = real(task, length, index)
        return replace(sample, ids=np.pad(sample.ids, (length - 12 - len(sample.ids) + int(index == 1), 0)))

    monkeypatch.setattr(FakeTask, "sample", longer)
    with pytest.raises(EvalError, match="fake_code, length 100, sample 1: takes 101 tokens"):
        run_fake(config_of(tmp_path))


def test_scores_that_are_no_number_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(tmp_path, attention=("dense",), tasks=("fake_code",))
    with monkeypatch.context() as patch:
        patch.setattr(FakeTask, "score", lambda task, sample, _: {"right": [1, float("nan")][sample.index == 2]})
        outcome = run_fake(config)
    assert outcome.missing == 2  # one in each cell
    assert [row["index"] for row in rows_in(config.output)["dense/fake_code/300.jsonl"]] == [0, 1, 3]
    assert run_fake(config).asked == 2


def test_tasks_that_fit_nowhere_are_told_from_those_that_were_measured(tmp_path: Path) -> None:
    outcome = run_fake(config_of(tmp_path, lengths=(100,), limit=1))
    assert outcome.unmeasured == [("fake_large", 200, "fake_large needs 200 tokens")] and not outcome.nothing
    config = config_of(tmp_path, lengths=(10, 20))
    outcomes = run_ranks(lambda ring: run_fake(config, ring), inner=2)
    assert all(one.nothing and [name for name, *_ in one.unmeasured][-1] == "fake_large" for one in outcomes)
    assert run_fake(config_of(tmp_path, lengths=(20, 300), limit=1)).unmeasured == []


def test_a_task_without_samples_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTask, "count", lambda *_: 0)
    outcome = run_fake(config_of(tmp_path, tasks=("code",)))
    assert outcome.unmeasured == [("fake_code", None, "fake_code: its data holds no samples")] and outcome.nothing


def test_sparse_needs_something_that_says_which(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    stored = Path(config.model) / "mtrain.json"
    stored.write_text("{broken")
    with pytest.raises(EvalError, match="mtrain.json is damaged"):
        run_fake(config)
    stored.unlink()
    with pytest.raises(EvalError, match="does not say which sparse attention.*--recipe FILE"):
        run_fake(config)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("attention: {pattern: dense}")
    with pytest.raises(EvalError, match="mine.yaml is dense"):
        run_fake(replace(config, recipe=str(recipe)))
    recipe.write_text("attention: {pattern: a_shape, bloc: 8}")
    with pytest.raises(EvalError, match="did you mean 'attention.block'"):
        run_fake(replace(config, recipe=str(recipe)))
    recipe.write_text("attention: {pattern: a_shape, block: 8}")
    run_fake(replace(config, recipe=str(recipe)))
    run = json.loads((config.output / "run.json").read_text())
    assert run["fingerprint"]["attention"]["sparse"]["pattern"] == "a_shape"


def test_run_json_says_what_was_done(tmp_path: Path) -> None:
    config = config_of(tmp_path, attention=("dense",), lengths=(100,))
    run_fake(config, command="mtrain eval x")
    run_fake(replace(config, attention=("sparse",), tasks=("fake_code",)), command="mtrain eval y", facts={"a": 1})
    run = json.loads((config.output / "run.json").read_text())
    assert [entry["command"] for entry in run["history"]] == ["mtrain eval x", "mtrain eval y"]
    assert run["command"] == "mtrain eval y" and run["config"]["attention"] == ["sparse"]
    assert set(run["fingerprint"]["attention"]) == {"dense", "sparse"} and set(run["tasks"]) > {"fake_text"}
    assert run["versions"]["torch"] and run["model"]["training"]["seq_len"] == 500 and run["model"]["a"] == 1
    assert run["model"]["weights"][0]["name"] == "model.safetensors" and run["model"]["positions"] == 1000


# --- several ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [2, 3])
def test_ranks_equal_one(tmp_path: Path, inner: int) -> None:
    config = config_of(tmp_path)
    alone = run_fake(config)
    want = rows_in(config.output)
    config = replace(config, output=tmp_path / "ring")
    outcomes = run_ranks(lambda ring: run_fake(config, ring), inner=inner)
    assert [outcome.asked for outcome in outcomes] == [alone.asked] * inner and rows_in(config.output) == want


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_equal_one(tmp_path: Path, replicas: int) -> None:
    config = config_of(tmp_path, limit=3)
    alone = run_fake(config)
    want = rows_in(config.output)
    config = replace(config, output=tmp_path / "replicas")
    outcomes = run_ranks(lambda ring: run_fake(config, everyone=ring), inner=replicas)
    assert [outcome.asked for outcome in outcomes] == [alone.asked] * replicas and rows_in(config.output) == want
    outcomes = run_ranks(lambda ring: run_fake(config, everyone=ring), inner=replicas)
    assert [(outcome.asked, outcome.stored) for outcome in outcomes] == [(0, alone.asked)] * replicas


def test_cells_are_dealt_out_evenly_and_whole() -> None:
    plans = [CellPlan(Cell("dense", f"t{n}", 100 * (n % 7 + 1)), list(range(n % 3 + 1)), {}, None) for n in range(40)]
    shares = deal(plans, 3)
    assert sorted(plan.cell for share in shares for plan in share) == sorted(plan.cell for plan in plans)
    costs = [sum(plan.tokens for plan in share) for share in shares]
    assert max(costs) - min(costs) <= 100
    assert all(share == sorted(share, key=plans.index) for share in shares)
    assert deal(plans[:1], 2) == [plans[:1], []]


def test_what_ends_one_replica_ends_the_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FakeTask.sample

    def sample(task: FakeTask, length: int, index: int) -> Sample:
        if (task.name, length, index) == ("fake_next", 300, 1):
            raise EvalError("no such book")
        return real(task, length, index)

    monkeypatch.setattr(FakeTask, "sample", sample)
    config = config_of(tmp_path, attention=("dense",))

    def work(ring: Ring) -> str:
        with pytest.raises(EvalError) as caught:
            run_fake(config, everyone=ring)
        return str(caught.value)

    errors = run_ranks(work, inner=2, timeout=20)
    assert errors[0] == errors[1] and "no such book" in errors[0]
    monkeypatch.setattr(FakeTask, "sample", real)
    run_fake(config)
    run_fake(replace(config, output=tmp_path / "whole"))
    assert rows_in(config.output) == rows_in(tmp_path / "whole")


def errors_of_ranks(config: Any, **options: Any) -> list[str]:
    def work(ring: Ring) -> str:
        try:
            run_fake(config, ring, **options)
        except (EvalError, LaunchError) as error:
            return str(error)
        return ""

    return run_ranks(work, inner=2, timeout=20)


def test_a_full_disk_ends_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = Store.append, [0]

    def append(store: Store, cell: Cell, row: Any) -> None:
        count[0] += 1
        if count[0] == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(store, cell, row)

    monkeypatch.setattr(Store, "append", append)
    config = config_of(tmp_path)
    errors = errors_of_ranks(config)
    assert errors[0] == errors[1] and "cannot write to" in errors[0] and "No space left on device" in errors[0]
    assert sum(len(rows) for rows in rows_in(config.output).values()) == 5
    monkeypatch.setattr(Store, "append", real)
    run_fake(config)
    run_fake(replace(config, output=tmp_path / "whole"))
    assert rows_in(config.output) == rows_in(tmp_path / "whole")


def test_what_one_rank_lacks_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    real = FakeTask.sample

    def sample(task: FakeTask, length: int, index: int) -> Sample:
        if index == 2 and threading.current_thread().name == "rank 1":
            raise EvalError("no data on this node")
        return real(task, length, index)

    monkeypatch.setattr(FakeTask, "sample", sample)
    assert errors_of_ranks(config_of(tmp_path)) == ["rank 1: no data on this node"] * 2

    def other(task: FakeTask, length: int, index: int) -> Sample:
        made = real(task, length, index)
        return replace(made, targets=("x",)) if threading.current_thread().name == "rank 1" else made

    monkeypatch.setattr(FakeTask, "sample", other)
    errors = errors_of_ranks(config_of(tmp_path, output=tmp_path / "other"))
    assert errors[0] == errors[1] and "rank(s) [1] made another sample than rank 0" in errors[0]


def test_a_directory_that_is_refused_ends_all_ranks(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    run_fake(config)
    errors = errors_of_ranks(replace(config, seed=3))
    assert errors[0] == errors[1] and "seed: 0 -> 3" in errors[0]


# --- small parts ---------------------------------------------------------------------------------------------------------


def test_stop_strings() -> None:
    assert cut("answer 12\nmore END", ("END", "\n")) == "answer 12"
    assert cut("answer", ("\n",)) == "answer" and cut("\n", ("\n",)) == "" and cut("x", ()) == "x"
    stop = make_stop(WORDS, ("\n\nQ:", "é€"))
    for text in ("long " * 30 + "\n\nQ:", "é€", "x€é€"):
        tokens = WORDS(text, add_special_tokens=False)["input_ids"]
        assert [stop(tokens[: n + 1]) for n in range(len(tokens))] == [False] * (len(tokens) - 1) + [True]


def test_the_hash_of_a_question_covers_what_decides_its_answer() -> None:
    plain = FakeTask("fake_code", SuiteOptions(WORDS)).sample(100, 0)
    others = [{"ids": plain.ids + 1}, {"kind": "score"}, {"max_new_tokens": 5}, {"stop": ("x",)}, {"targets": ("1",)},
              {"at": (1,)}]  # fmt: skip
    hashes = {prompt_sha256(replace(plain, **change)) for change in others}  # type: ignore[arg-type]
    assert len(hashes | {prompt_sha256(plain)}) == len(others) + 1
    assert prompt_sha256(replace(plain, ids=plain.ids.astype(np.int32))) == prompt_sha256(plain)
    assert runner._number(prompt_sha256(plain)) < 2**62
