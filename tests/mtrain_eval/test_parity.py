"""The parity study: what it compares, that it does only what is missing, and that its words follow from its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mtrain.checkpoint import list_checkpoints, load_tensors
from mtrain.errors import MtrainError
from mtrain.patterns import PatternPlan
from scripts.parity_study import methods, work
from scripts.parity_study.examine import never_by_distance
from scripts.parity_study.methods import (
    CONTROLS,
    LONGER,
    MASKS,
    METHODS,
    SEQ_LEN,
    base_recipe,
    evaluations,
    method_recipe,
    slug,
)
from scripts.parity_study.report import report

EXAM = {"prompts": 16, "pairs": 4, "questions": 2, "rows": 2, "seed": 1}


def test_methods_differ_in_attention_only() -> None:
    recipes = {method: method_recipe(Path("runs"), 3, method).to_dict() for method in METHODS}
    assert len({recipe["output"] for recipe in recipes.values()}) == len({slug(name) for name in METHODS}) == 10
    assert {recipes[name]["train"].pop("steps") for name in METHODS if name in LONGER} == {4 * methods.STEPS}
    assert {recipes[name]["train"].pop("steps") for name in METHODS if name not in LONGER} == {methods.STEPS}
    for recipe in recipes.values():
        for key in ("name", "output", "attention"):
            del recipe[key]
        assert recipe == recipes["dense"]
    assert recipes["dense"]["model"]["path"] == str(Path(base_recipe(Path("runs"), 3).output) / "export")


def test_sparse_methods_may_see_about_a_third() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, SEQ_LEN, 4, 16, generator=draw)
    for method in METHODS:
        attention = method_recipe(Path("runs"), 0, method).attention
        if attention.pattern in ("dense", "xattention"):
            continue
        plan = PatternPlan(attention, 2)
        density = float(plan.index(0, q, k, step=methods.STEPS).density().mean())
        assert 0.25 < density < 0.45, (method, density)


def test_pairs_that_no_head_ever_had() -> None:
    union = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(1)) < 0.4
    found = never_by_distance(union)
    for bucket, low in enumerate((1, 2, 4, 8, 16)):
        pairs = [(i, j) for i in range(20) for j in range(i) if low <= i - j < 2 * low]
        missing = [1 - bool(union[layer, i, j]) for layer in range(2) for i, j in pairs]
        assert found[bucket] == pytest.approx(sum(missing) / len(missing))


def made_up(method: str, seed: int, right: float) -> dict:
    """A result in which a share of the prompts is answered."""
    evaluation = {
        "correct": [float((i * 7 + seed) % 100 < 100 * right) for i in range(100)],
        "by_depth": [right] * 4,
        "held_out_loss": 1 - right,
        "density": 0.3,
        "never": [0.0] * 8 + [0.5],
    }
    lines = [
        {"step": step, "recall": 0.5, "density": 0.3, "reach": [1.0] * 8 + [0.25], "reach_any_head": [1.0] * 8 + [0.5]}
        for step in (1, 21, 41)
    ]
    return {
        "asked": {"exam": EXAM},
        "evaluations": dict.fromkeys((*evaluations(method), *METHODS, *MASKS), evaluation),
        "lines": lines,
        "train_cpu_s": 1.0,
        "cpu_s": 2.0,
    }


def test_the_report_says_what_the_figures_say(tmp_path: Path) -> None:
    shares = {"dense": 0.98, "vertical_slash": 0.98, "moba": 0.5, "a_shape": 0.97, "window (control)": 0.96}
    shares["random columns (control)"] = 0.3
    found = {(seed, method): made_up(method, seed, right) for method, right in shares.items() for seed in (0, 1, 2)}
    del found[2, "moba"]
    text = report(found, "a command", tmp_path)
    assert (tmp_path / "parity.md").read_text() == text + "\n"
    assert (tmp_path / "parity.png").stat().st_size > 5000 and (tmp_path / "parity_training.png").exists()
    said = {line[2:].split(":")[0]: line for line in text.splitlines() if line.startswith("- ")}
    assert "within 2 points" in said["vertical_slash"] and "+0.0 points" in said["vertical_slash"]
    assert "undecided" in said["a_shape"] and "loses more than 2 points" in said["moba"]
    assert "fails, as a control must" in said["random columns (control)"]
    assert "DOES NOT FAIL" in said["window (control)"] and len(CONTROLS) == 2
    assert "fewer seeds so far: vertical_slash frozen (0), xattention (0), moba (2), xattention, 4x steps (0)" in text
    assert "| moba | 0.30 | 50.0 ± 0.0 |" in text and "| 50.0 | 75.0 |" not in text
    assert "| 75.0 | 50.0 | 50.0 |" in text  # one head, no head of a layer, never


def kept_masks(runs: Path) -> torch.Tensor:
    """bool [layers, S, S]: the pairs that some row's kept mask holds, from the checkpoint of the frozen run."""
    recipe = method_recipe(runs, 0, "vertical_slash frozen")
    plan = PatternPlan(recipe.attention, 2)
    (newest,) = list_checkpoints(Path(recipe.output) / "checkpoints")
    plan.load_state_dict(load_tensors(newest, "patterns_0"))
    other = torch.zeros(8, SEQ_LEN, 4, 16)  # what is estimated from it would be something else
    masks = [plan.index(layer, other, other, step=methods.STEPS).to_dense() for layer in range(2)]
    return torch.stack(masks).flatten(1, 2).any(1)


@pytest.mark.slow
def test_a_study_in_small_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "BASE_STEPS", 2)
    monkeypatch.setattr(methods, "STEPS", 3)
    monkeypatch.setattr(methods, "WARMUP", 1)
    monkeypatch.setitem(METHODS, "vertical_slash frozen", {**METHODS["vertical_slash frozen"], "dense_warmup_steps": 1})
    work.warm_start(tmp_path, 0, EXAM)
    for method in ("dense", "vertical_slash frozen"):
        work.run_method(tmp_path, 0, method, EXAM)
    files = [tmp_path / "seed0" / name / work.RESULT for name in ("dense", "vertical_slash_frozen")]
    made = {file: json.loads(file.read_text()) for file in files}
    for result in made.values():
        for evaluation in result["evaluations"].values():
            assert len(evaluation["correct"]) == EXAM["prompts"] and evaluation["held_out_loss"] > 0
            assert 0 < evaluation["density"] <= 1 and len(evaluation["never"]) == 9
    frozen = made[tmp_path / "seed0" / "vertical_slash_frozen" / work.RESULT]["evaluations"]
    assert frozen["vertical_slash frozen"]["never"] == pytest.approx(never_by_distance(kept_masks(tmp_path)))
    assert frozen["vertical_slash"]["density"] != frozen["vertical_slash frozen"]["density"]
    assert made[files[0]]["evaluations"]["dense"]["never"] == [0.0] * 9
    times = [file.stat().st_mtime_ns for file in files]
    for method in ("dense", "vertical_slash frozen"):
        work.run_method(tmp_path, 0, method, EXAM)
    assert [file.stat().st_mtime_ns for file in files] == times
    with pytest.raises(MtrainError, match="other settings"):
        work.run_method(tmp_path, 0, "dense", {**EXAM, "seed": 2})
    found = work.results(tmp_path, [0, 1])
    assert sorted(found) == [(0, "dense"), (0, work.WARM), (0, "vertical_slash frozen")]
    assert "vertical_slash frozen" in report(found, "a command", tmp_path / "report")
