"""One job of the study: make what is missing of a (seed, method) and say it in a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from mtrain.errors import MtrainError
from mtrain.recipe import Recipe
from scripts.parity_study.examine import examine
from scripts.parity_study.methods import METHODS, base_recipe, evaluations, method_recipe

RESULT = "parity.json"


def warm_start(runs: Path, seed: int) -> None:
    """Train the base model of a seed, unless it is there."""
    _train(base_recipe(runs, seed))


def run_method(runs: Path, seed: int, method: str, exam: dict[str, int]) -> None:
    """Train a method and evaluate it, unless its result is there.

    Raises:
        MtrainError: a result that was made with other settings.
    """
    recipe = method_recipe(runs, seed, method)
    asked = {"recipe": recipe.to_dict(), "exam": exam, "evaluations": evaluations(method)}
    file = Path(recipe.output) / RESULT
    if file.exists():
        if json.loads(file.read_text())["asked"] != asked:
            raise MtrainError(f"{file} was made with other settings; remove its folder, or give another --runs")
        return
    started, cpu = time.monotonic(), time.process_time()
    _train(recipe)
    trained = time.process_time() - cpu
    found = {name: examine(recipe, attention, exam) for name, attention in evaluated(recipe, method).items()}
    made: dict[str, Any] = {"asked": asked, "method": method, "seed": seed, "evaluations": found}
    made |= {"train_cpu_s": trained, "cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - started}
    temporary = file.with_suffix(".new")
    temporary.write_text(json.dumps(made))
    temporary.replace(file)


def evaluated(recipe: Recipe, method: str) -> dict[str, Any]:
    """The attention recipes under which a method's model is evaluated, by name."""
    from mtrain.recipe import recipe_from_dict
    from scripts.parity_study.methods import COMMON

    plain = recipe.to_dict()
    return {
        name: recipe_from_dict({**plain, "attention": {**COMMON, **METHODS[name]}}).attention
        for name in evaluations(method)
    }


def results(runs: Path, seeds: list[int]) -> dict[tuple[int, str], dict[str, Any]]:
    """Every result that is there, by (seed, method), with the lines of its run in "lines"."""
    from mtrain.metrics import RUN_FILE, read_lines

    found = {}
    for seed in seeds:
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
        train(recipe)
