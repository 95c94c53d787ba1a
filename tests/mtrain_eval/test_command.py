"""`mtrain eval` as typed: every mistake is one line and exit 2, and two processes give what one gives."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import mtrain_eval.command
from mtrain import cli, comm
from mtrain.cli import main
from mtrain.errors import LaunchError
from mtrain.export import export_model
from mtrain.models.build import adopt_special_tokens, load_model
from mtrain.recipe import ModelRecipe
from mtrain_eval.ruler.qa_data import HOTPOT, SQUAD
from mtrain_eval.suites import FOLDERS
from tests.mtrain.processes import run_processes
from tests.mtrain.tiny import MODEL
from tests.mtrain_eval.fakes import WORDS, FakeTask, fake_suite, rows_in

__all__ = ["fake_suite"]
ATTENTION = {"pattern": "vertical_slash", "block": 8, "sink": 2, "local": 8, "probe": 8,
             "budget": {"kind": "topk", "columns": 8, "slashes": 4}}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, exported as a training would."""
    recipe = ModelRecipe(config=dict(MODEL))
    made = load_model(recipe, seed=3, vocab_size=len(WORDS))
    adopt_special_tokens(made, WORDS, {})
    training = {"step": 1, "tokens": 1, "recipe": {"attention": ATTENTION, "train": {"seq_len": 256}}}
    return export_model(made, WORDS, tmp_path_factory.mktemp("models") / "export", training=training)


def test_evaluates_and_goes_on(
    model: Path, tmp_path: Path, fake_suite: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["eval", str(model), "--suite", "fake", "--lengths", "80,160", "--output", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["mtrain", *words, "--limit", "2"])
    assert main([*words, "--attention", "both", "--limit", "2", "--tasks", "fake_text,fake_next"]) == 0
    printed = capsys.readouterr()
    assert "fake_text" in printed.out and "Traceback" not in printed.err
    first = rows_in(tmp_path / "run")
    assert len(first) == 8 and all(row["density"] < 1 for row in first["sparse/fake_text/160.jsonl"])
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["run"]["command"].startswith("mtrain eval") and len(results["samples"]) == 16
    assert results["run"]["model"]["training"]["seq_len"] == 256 and results["run"]["model"]["own_positions"] == 256
    assert main([*words, "--attention", "both", "--limit", "3", "--tasks", "fake_text,fake_next"]) == 0
    assert "resuming: 16 answers are already there" in capsys.readouterr().err
    second = rows_in(tmp_path / "run")
    assert all(rows[:2] == first[name] and len(rows) == 3 for name, rows in second.items())
    assert main(["eval", "--compare", f"{tmp_path / 'run'}:dense", f"{tmp_path / 'run'}:sparse"]) == 0
    assert "fake_text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which model? mtrain eval MODEL --lengths 4K,8K"),
        (["MODEL"], "which lengths?"),
        (["MODEL", "--lengths", "4X"], "--lengths: expected a whole number such as 4096 or 4K (K = 1024), got '4X'"),
        (["MODEL", "--lengths", ","], "--lengths: give at least one"),
        (["MODEL", "--lengths", "0"], "got '0'"),
        (["MODEL", "--lengths", "1.5K"], "got '1.5K'"),
        (["MODEL", "--lengths", "128", "--max-positions", "-3"], "--max-positions: expected a whole number"),
        (["MODEL", "--lengths", "128", "--rope", "yarn"], "--rope: expected a section such as"),
        (["MODEL", "--lengths", "128", "--rope", "{rope_type: yarnn, factor: 2}", "--suite", "fake"], "yarnn"),
        (["MODEL", "--lengths", "128", "--limit", "0"], "--limit must be at least 1"),
        (["MODEL", "--lengths", "128", "--limit", "many"], "invalid int value: 'many'"),
        (["MODEL", "--lengths", "128", "--timeout", "0"], "--timeout must be above 0"),
        (["MODEL", "--lengths", "128", "--timeout", "nan"], "at most 2592000 seconds, got nan"),
        (["MODEL", "--lengths", "128", "--timeout", "inf"], "at most 2592000 seconds, got inf"),
        (["MODEL", "--lengths", "128", "--outer", "2"], "--outer 2 x --inner 1 must be the 1 process(es)"),
        (["MODEL", "--lengths", "128", "--suite", "rulr"], "unknown suite 'rulr'; did you mean 'ruler'?"),
        (["MODEL", "--lengths", "128", "--suite", ""], "--suite names none"),
        (["MODEL", "--lengths", "128", "--suite", "fake", "--tasks", "fake_cod"], "did you mean 'fake_code'?"),
        (["MODEL", "--lengths", "128,1K", "--suite", "fake"], "length 1024 is beyond the model's 256 positions"),
        (["MODEL", "--lengths", "128", "--suite", "fake", "--data-dir", "no/where"], "no/where: no such directory"),
        (["MODEL", "--lengths", "128", "--suite", "fake", "--recipe", "no.yaml", "--attention", "sparse"], "no.yaml"),
        (["no/such/model", "--lengths", "128"], "no such directory: 'no/such/model'; give a model's directory"),
        (["nosuchdir", "--lengths", "128"], "no such directory: 'nosuchdir'"),
        (["runs/sparse"], "no such directory: 'runs/sparse'"),
        (["MODEL", "--suite", "rulr"], "unknown suite 'rulr'"),
        (["MODEL", "--suite", "fake", "--tasks", "fake_cod"], "did you mean 'fake_code'?"),
        (["MODEL", "--suite", "fake", "--tasks", "cod", "--lengths", "128"], "unknown task 'cod'"),
        (
            ["MODEL", "--suite", "fake", "--tasks", "retrieval_single", "--lengths", "128"],
            "task 'retrieval_single' belongs to suite retrieval, which was not asked for: --suite fake,retrieval",
        ),
        (["MODEL", "--suite", "pg19", "--tasks", "pg19", "--data-dir", "no/where"], "--data-dir no/where: no such"),
        (["MODEL", "--lengths", "128", "--recipe", "a.yaml"], "give --attention sparse or --attention both"),
        (["--compare", "a"], "expected 2 arguments"),
        (["MODEL", "--compare", "a", "b"], "--compare takes two finished runs and no model"),
        (["--compare", "no/a", "no/b"], "no/a"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    words: list[str], message: str, model: Path, tmp_path: Path, fake_suite: None, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *[str(model) if word == "MODEL" else word for word in words]]) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("mtrain: error: ") and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.glob("runs/eval/*/*"))


def test_a_missing_tokenizer_or_package_is_said(
    model: Path, tmp_path: Path, fake_suite: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    assert main(["eval", str(bare), "--lengths", "128", "--suite", "fake"]) == 2
    assert "save the model's tokenizer beside it" in capsys.readouterr().err

    def sample(*_: Any) -> None:
        raise ModuleNotFoundError("No module named 'wonderwords'")

    monkeypatch.setattr(FakeTask, "sample", sample)
    assert main(["eval", str(model), "--lengths", "128", "--suite", "fake", "--output", str(tmp_path / "run")]) == 2
    assert "No module named 'wonderwords'; " in (err := capsys.readouterr().err) and "pip install 'mtrain[eval]'" in err


def test_missing_samples_are_exit_3_and_an_interruption_says_how_to_go_on(
    model: Path, tmp_path: Path, fake_suite: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [
        "eval",
        str(model),
        "--lengths",
        "128",
        "--suite",
        "fake",
        "--limit",
        "2",
        "--output",
        str(tmp_path / "run"),
    ]
    words += ["--tasks", "fake_next"]
    real = FakeTask.score
    monkeypatch.setattr(FakeTask, "score", lambda task, sample, _: {"right": [1.0, float("nan")][sample.index]})
    assert main(words) == 3
    assert "1 samples are missing" in capsys.readouterr().err

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeTask, "score", interrupted)
    assert main(words) == 130
    assert f"every answer so far is in {tmp_path / 'run'}, the same command goes on" in capsys.readouterr().err
    monkeypatch.setattr(FakeTask, "score", real)
    assert main(words) == 0
    assert [row["index"] for row in rows_in(tmp_path / "run")["dense/fake_next/128.jsonl"]] == [0, 1]


def test_nothing_measured_is_exit_3_and_tasks_that_fit_nowhere_are_named(
    model: Path, tmp_path: Path, fake_suite: None, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(model), "--suite", "fake", "--limit", "1", "--output", str(tmp_path / "run")]
    for _ in range(2):  # the second time it is known from the disk
        assert main([*words, "--lengths", "50,60", "--attention", "both"]) == 3
        err = capsys.readouterr().err
        assert "would do): fake_code (64), fake_text (64), fake_next (64), fake_large (200)" in err
        assert err.endswith(
            "nothing was measured: no sample fits --lengths 50, 60; the smallest length that would do is 64 (fake_code)\n"
        )
    assert main([*words, "--lengths", "60,80", "--tasks", "next,fake_large"]) == 0
    err = capsys.readouterr().err
    assert err.endswith(
        "not measured, no sample fits (in brackets the smallest length that would do): fake_large (200)\n"
    )
    # What was measured before, at another length, is not what was asked for now.
    assert main([*words, "--lengths", "60", "--tasks", "next"]) == 3
    assert "would do is 64 (fake_next)" in capsys.readouterr().err


def test_a_directory_of_a_run_points_to_its_model(
    model: Path, tmp_path: Path, fake_suite: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dense", "sparse"):
        (tmp_path / "quick" / name).mkdir(parents=True)
        (tmp_path / "quick" / name / "export").symlink_to(model)
    assert main(["eval", str(tmp_path / "quick" / "sparse"), "--lengths", "128"]) == 2
    assert f"is the directory of a run; its model is {tmp_path / 'quick/sparse/export'}\n" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "quick"), "--lengths", "128"]) == 2
    assert f"{tmp_path / 'quick/dense/export'} or {tmp_path / 'quick/sparse/export'}\n" in capsys.readouterr().err
    assert main(["eval", str(model / "config.json"), "--lengths", "128"]) == 2
    assert "is a file; give the model's directory" in capsys.readouterr().err


def test_a_lost_peer_says_that_the_same_command_goes_on(
    model: Path, tmp_path: Path, fake_suite: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = "look at its log, then start again from the last checkpoint"
    assert advice in Path(comm.__file__).read_text()  # good for training only

    def lost(*_: Any) -> None:
        raise LaunchError(f"process 1 lost its peer; {advice}")

    monkeypatch.setattr(FakeTask, "score", lost)
    words = ["eval", str(model), "--lengths", "128", "--suite", "fake", "--output", str(tmp_path / "run")]
    assert main(words) == 2
    err = capsys.readouterr().err
    assert f"look at its log; every answer so far is in {tmp_path / 'run'}, the same command goes on" in err


def test_help_shows_where_data_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    out = capsys.readouterr().out
    assert all(f"D/{folder}/" in out for folders in FOLDERS.values() for folder in folders)
    assert f"D/ruler/{SQUAD.file} " in out and f"D/ruler/{HOTPOT.file} " in out


def test_without_the_package_the_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("mtrain_eval"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="mtrain_eval")
        return real(name, *rest)

    monkeypatch.setattr(cli.importlib, "import_module", missing)
    assert main(["eval", "model", "--lengths", "4K"]) == 2
    assert "pip install 'mtrain[eval]'" in capsys.readouterr().err
    assert main(["inspect"]) == 0


def test_defaults_are_those_of_the_config() -> None:
    from mtrain_eval.config import DEFAULT_SUITES, LIMIT, EvalConfig

    parser = argparse.ArgumentParser()
    mtrain_eval.command.configure(parser)
    config = mtrain_eval.command.make_config(parser.parse_args(["a/m", "--lengths", "8K,512,8192,1M"]))
    assert config == EvalConfig("a/m", (512, 8192, 1 << 20), DEFAULT_SUITES, limit=LIMIT)


def launched(words: list[str]) -> int:
    torch.manual_seed(0)
    return main(words)


def test_two_processes_equal_one(model: Path, tmp_path: Path, fake_suite: None) -> None:
    """The whole command in two real processes, with a real model and sparse attention over their ring."""
    words = ["eval", str(model), "--suite", "fake", "--lengths", "70,150", "--attention", "both", "--limit", "2"]
    assert main([*words, "--output", str(tmp_path / "one")]) == 0
    assert run_processes(launched, 2, tmp_path / "ranks", [*words, "--output", str(tmp_path / "two")]) == [0, 0]
    one, two = rows_in(tmp_path / "one"), rows_in(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 16
    for name, rows in one.items():
        for a, b in zip(rows, two[name], strict=True):
            if "scores" in a:
                assert a.pop("scores") == pytest.approx(b.pop("scores"), rel=1e-5)
            assert a == b
    assert json.loads((tmp_path / "two/run.json").read_text())["model"]["ranks"] == 2
    halves = ["--replicas", "2", "--output", str(tmp_path / "halves")]
    assert run_processes(launched, 2, tmp_path / "replicas", [*words, *halves]) == [0, 0]
    # Nothing is split over ranks, so nothing is rounded otherwise.
    assert rows_in(tmp_path / "halves") == rows_in(tmp_path / "one")
    refused = run_processes(
        launched, 2, tmp_path / "again", [*words, "--seed", "1", "--output", str(tmp_path / "two")], timeout=20
    )
    assert refused == [2, 2]
