"""One job of the study: make what is missing of a (seed, method) and say it in a file."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from mtrain.errors import MtrainError
from mtrain.metrics import RUN_FILE, read_lines
from mtrain.recipe import Recipe
from scripts.parity_study.examine import examine
from scripts.parity_study.methods import METHODS, attention_of, base_recipe, evaluations, method_recipe

RESULT = "parity.json"
WARM = "nothing more (warm start)"


def warm_start(runs: Path, seed: int, exam: dict[str, int]) -> None:
    """Train the base model of a seed and see what it can do at the longer length, unless it is there."""
    base, dense = base_recipe(runs, seed), method_recipe(runs, seed, "dense")
    made = _so_far(base, exam)
    if not made["evaluations"]:
        _train(base)
        made["evaluations"]["dense"] = examine(dataclasses.replace(dense, output=base.output), dense.attention, exam)
        _write(base, made)


def run_method(runs: Path, seed: int, method: str, exam: dict[str, int]) -> None:
    """Train a method and evaluate it, as far as that is not done.

    Raises:
        MtrainError: a result that was made with other settings.
    """
    recipe = method_recipe(runs, seed, method)
    made = _so_far(recipe, exam)
    started = time.process_time()
    if "train_cpu_s" not in made:
        _train(recipe)
        made |= {"method": method, "seed": seed, "train_cpu_s": time.process_time() - started, "cpu_s": 0.0}
    for name in evaluations(method):
        if name not in made["evaluations"]:
            made["evaluations"][name] = examine(recipe, attention_of(name, recipe), exam)
            made["cpu_s"], started = made["cpu_s"] + time.process_time() - started, time.process_time()
            _write(recipe, made)


def _so_far(recipe: Recipe, exam: dict[str, int]) -> dict[str, Any]:
    """The result of a run as far as it is there; only figures made with the same settings may stand in one file."""
    file, asked = Path(recipe.output) / RESULT, {"recipe": recipe.to_dict(), "exam": exam}
    if not file.exists():
        return {"asked": asked, "evaluations": {}}
    made: dict[str, Any] = json.loads(file.read_text())
    if made["asked"] != asked:
        raise MtrainError(f"{file} was made with other settings; remove its folder, or give another --runs")
    return made


def _write(recipe: Recipe, made: dict[str, Any]) -> None:
    file = Path(recipe.output) / RESULT
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(made))
    temporary.replace(file)


def results(runs: Path, seeds: list[int]) -> dict[tuple[int, str], dict[str, Any]]:
    """Every result that is there, by (seed, method or WARM), with the lines of its run in "lines"."""
    found = {}
    for seed in seeds:
        warm = Path(base_recipe(runs, seed).output) / RESULT
        if warm.exists():
            found[seed, WARM] = json.loads(warm.read_text())
        for method in METHODS:
            folder = Path(method_recipe(runs, seed, method).output)
            made = json.loads((folder / RESULT).read_text()) if (folder / RESULT).exists() else {"evaluations": {}}
            if {"dense", method} <= set(made["evaluations"]):
                found[seed, method] = {**made, "lines": read_lines(folder / RUN_FILE, having="loss")}
    return found


def _train(recipe: Recipe) -> None:
    from mtrain.trainer import train

    torch.set_num_threads(1)
    export = Path(recipe.output) / "export"
    if not (export / "config.json").exists():
        summary = train(recipe)
        if summary["stopped"]:
            raise MtrainError(
                f"{recipe.output} was stopped after step {summary['step']}; the same command goes on from there"
            )
