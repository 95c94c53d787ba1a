"""The quickstart: its stages are real commands, its measurements are right, its report says what did not hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mtrain.cli import main
from mtrain.commands.quickstart import _fresh
from mtrain.data.retrieval import retrieval_prompts
from mtrain.data.tokenizer import load_tokenizer
from mtrain.export import export_model
from mtrain.metrics import read_lines
from mtrain.models import load_model
from mtrain.quickstart.measure import Exam, Result, Subject, by_depth, measure
from mtrain.quickstart.report import accuracy_table, promises, sparkline
from mtrain.quickstart.stages import plan
from mtrain.recipe import load_recipe


def test_the_stages_are_the_commands_of_the_main_job(tmp_path):
    stages = plan(tmp_path, ["seed=3"])
    assert list(stages) == ["base", "sparse", "dense"]
    [base], [first, second], [dense] = stages.values()
    assert base.recipe.attention.pattern == "dense" and base.recipe.train.seq_len == 512
    assert first.recipe.model.path == str(base.export) == second.recipe.model.path == dense.recipe.model.path
    assert (
        0 < first.recipe.checkpoint.stop_after < first.recipe.train.steps
        and second.recipe.checkpoint.stop_after is None
    )
    assert second.recipe.attention.pattern == "vertical_slash" and second.recipe.attention.layout == "striped"
    assert dense.recipe.attention.pattern == "dense" and dense.recipe.train == second.recipe.train
    assert second.recipe.parallel.inner == 2 and second.recipe.train.seq_len >= 2048
    assert all(stage.recipe.seed == 3 for parts in stages.values() for stage in parts)
    assert "accelerate.commands.launch" in second.arguments and second.arguments[-1] == "seed=3"


@pytest.mark.parametrize("sparse", [False, True])
def test_measure_counts_what_plain_transformers_predicts(tmp_path, sparse):
    recipe = load_recipe(
        "quickstart", ["attention.pattern=a_shape", "attention.sink=1", "attention.local=0"] if sparse else []
    )
    model = load_model(recipe.model, seed=1)
    tokenizer = load_tokenizer("bytes")
    export = export_model(model, tokenizer, tmp_path / "export")
    exam = Exam(lengths=(96, 192), prompts=2, final_prompts=3, pairs=4, questions=2, text_rows=1)
    result = measure(Subject("x", str(export), sparse=sparse), exam, recipe)
    prompts = retrieval_prompts(tokenizer, 192, None, 3, exam.seed, pairs=4, questions=2)
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(export)(input_ids=prompts.tokens).logits
    right = logits.argmax(-1).gather(1, prompts.at) == prompts.answers
    assert result.answers == right.numel() == 6 and set(result.accuracy) == {96, 192}
    assert 5.0 < result.text_loss < 7.0, "an untrained model knows nothing: ln 388 = 5.96"
    if sparse:
        assert result.density is not None and result.density < 0.75
    else:
        assert result.density is None and result.accuracy[192] == float(right.double().mean())


def test_by_depth_bins_answers():
    right = torch.tensor([[True, False], [True, True]])
    depths = torch.tensor([[0.0, 0.1], [0.5, 1.0]], dtype=torch.float64)
    values = by_depth(right, depths)
    assert values[0] == 0.5 and values[2] == 1.0 and values[4] == 1.0


def _results(before=0.2, sparse=0.97, dense=0.98, loss=2.0):
    return {
        "before": Result({512: 0.99, 4096: before}, [0.2] * 5, 640, 2.5),
        "sparse": Result({512: 0.99, 4096: sparse}, [0.9] * 5, 640, loss, 0.2),
        "dense": Result({512: 0.99, 4096: dense}, [0.9] * 5, 640, 2.0),
    }


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, [True, True, True, True]),
        ({"before": 0.5}, [False, True, True, True]),
        ({"sparse": 0.89, "dense": 0.9}, [True, False, True, True]),
        ({"sparse": 0.95, "dense": 0.98}, [True, True, False, True]),
        ({"loss": 2.03}, [True, True, True, False]),
    ],
)
def test_a_broken_promise_is_reported(change, held):
    bars = promises(_results(**change), 4096, ["before"], ["sparse"], "dense")
    assert [bar.held for bar in bars] == held


def test_the_table_has_a_row_for_every_subject():
    lines = accuracy_table(_results(), (512, 4096))
    assert len(lines) == 5 and lines[3].startswith("| sparse | 99.0 | 97.0 | 90 |") and lines[3].endswith("| 0.200 |")
    assert {line.count("|") for line in lines} == {11}


def test_sparkline_follows_the_curve():
    assert sparkline([]) == "" and sparkline([1.0]) == "▁"
    assert sparkline([3.0, 2.0, 1.0, 0.0, 3.0]) == "█▆▃▁█"
    assert len(sparkline(list(range(1000)))) == 60


@pytest.mark.parametrize("word", ["output=here", "model.path=there", "seed"])
def test_overrides_that_cannot_serve_every_stage(word, tmp_path, capsys):
    assert main(["quickstart", "--output", str(tmp_path / "new"), word]) == 2
    assert "cannot be given to every stage" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_nothing_of_an_earlier_quickstart_is_lost(tmp_path, capsys):
    output = tmp_path / "quickstart"
    for _ in range(2):
        _fresh(output)
        (output / "report.md").write_text("kept")
    assert main(["quickstart", "--output", str(output), "train.stepz=1"]) == 2
    assert "train.steps" in capsys.readouterr().err
    assert (output / "report.md").exists() and (tmp_path / "quickstart_1" / "report.md").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["quickstart", "quickstart_1"]


@pytest.mark.slow
def test_the_whole_job_in_two_steps_each(tmp_path):
    """Every stage really runs, is stopped and resumed; after two steps nothing is learnt, and the report says so."""
    output = tmp_path / "quickstart"
    overrides = ["train.steps=2", "train.warmup_steps=0", "log.every=1", "checkpoint.every=0"]
    command = [sys.executable, "-m", "mtrain", "quickstart", "--output", str(output), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "stopped after step 1 (stop_after)" in done.stderr
    report = (output / "report.md").read_text()
    assert "- [ ] retrieval at 4096 at least 90 %: sparse-trained, sparse" in report
    raw = json.loads((output / "report.json").read_text())
    assert len(raw["results"]) == 6 and raw["results"]["sparse-trained, sparse"]["density"] < 0.9
    steps = [line["step"] for line in read_lines(output / "sparse" / "run.jsonl", having="loss")]
    assert steps == [1, 2], "the resumed run goes on where the stopped one ended"
    again = subprocess.run(
        [sys.executable, "-m", "mtrain", "quickstart", "--output", str(Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert again.returncode == 2 and "holds files that no quickstart made" in again.stderr
