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
from mtrain.recipe import Recipe, recipe_from_dict
from scripts.parity_study.examine import examine
from scripts.parity_study.methods import COMMON, METHODS, base_recipe, evaluations, method_recipe

RESULT = "parity.json"
WARM = "nothing more (warm start)"


def warm_start(runs: Path, seed: int, exam: dict[str, int]) -> None:
    """Train the base model of a seed and see what it can do at the longer length, unless it is there."""
    base, dense = base_recipe(runs, seed), method_recipe(runs, seed, "dense")
    _train(base)
    file = Path(base.output) / RESULT
    asked = {"recipe": base.to_dict(), "exam": exam, "evaluations": ["dense"]}
    if not _is_there(file, asked):
        found = {"dense": examine(dataclasses.replace(dense, output=base.output), dense.attention, exam)}
        _write(file, {"asked": asked, "evaluations": found})


def run_method(runs: Path, seed: int, method: str, exam: dict[str, int]) -> None:
    """Train a method and evaluate it, unless its result is there.

    Raises:
        MtrainError: a result that was made with other settings.
    """
    recipe = method_recipe(runs, seed, method)
    asked = {"recipe": recipe.to_dict(), "exam": exam, "evaluations": evaluations(method)}
    file = Path(recipe.output) / RESULT
    if _is_there(file, asked):
        return
    started, cpu = time.monotonic(), time.process_time()
    _train(recipe)
    trained = time.process_time() - cpu
    found = {name: examine(recipe, attention, exam) for name, attention in evaluated(recipe, method).items()}
    made: dict[str, Any] = {"asked": asked, "method": method, "seed": seed, "evaluations": found}
    made |= {"train_cpu_s": trained, "cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - started}
    _write(file, made)


def _is_there(file: Path, asked: dict[str, Any]) -> bool:
    if not file.exists():
        return False
    if json.loads(file.read_text())["asked"] != asked:
        raise MtrainError(f"{file} was made with other settings; remove its folder, or give another --runs")
    return True


def _write(file: Path, made: dict[str, Any]) -> None:
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(made))
    temporary.replace(file)


def evaluated(recipe: Recipe, method: str) -> dict[str, Any]:
    """The attention recipes under which a method's model is evaluated, by name."""
    plain = recipe.to_dict()
    return {
        name: recipe_from_dict({**plain, "attention": {**COMMON, **METHODS[name]}}).attention
        for name in evaluations(method)
    }


def results(runs: Path, seeds: list[int]) -> dict[tuple[int, str], dict[str, Any]]:
    """Every result that is there, by (seed, method or WARM), with the lines of its run in "lines"."""
    found = {}
    for seed in seeds:
        warm = Path(base_recipe(runs, seed).output) / RESULT
        if warm.exists():
            found[seed, WARM] = json.loads(warm.read_text())
        for method in METHODS:
            folder = Path(method_recipe(runs, seed, method).output)
            if (folder / RESULT).exists():
                found[seed, method] = json.loads((folder / RESULT).read_text())
                found[seed, method]["lines"] = read_lines(folder / RUN_FILE)
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
