"""The stages of the quickstart, each one a command that a user could type.

1. base: a small Qwen2-architecture model is trained from scratch at a short context, dense (two data-parallel processes).
2. sparse: it is extended with vertical-slash attention on a striped ring over two processes, stopped once on purpose, resumed.
3. dense: the same extension with dense attention, the twin to compare with.
4. measure: the exports are loaded with plain transformers (dense) and with sparse attention, and compared.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtrain.errors import LaunchError
from mtrain.recipe import Recipe, find_recipe, load_recipe

BASE, EXTEND = "quickstart", "quickstart-extend"


@dataclass(frozen=True)
class Stage:
    """One command: what it is for, and its arguments after ``python``."""

    title: str
    arguments: tuple[str, ...]
    recipe: Recipe

    @property
    def output(self) -> Path:
        """Where the run writes."""
        return Path(self.recipe.output)

    @property
    def export(self) -> Path:
        """The plain Hugging Face directory that the run ends with."""
        return self.output / "export"


def plan(output: Path, overrides: Sequence[str] = ()) -> dict[str, list[Stage]]:
    """The stages by name ("base", "sparse", "dense"); a stage that is stopped and resumed is two commands.

    Args:
        output: directory under which every run gets its own.
        overrides: recipe overrides for all stages, such as ``train.steps=4``.
    """
    base = _stage("base model, short context, dense", BASE, [f"output={output / 'base'}", "parallel.dp=2", *overrides])
    start = [f"model.path={base.export}"]
    sparse = [f"output={output / 'sparse'}", *start, *overrides]
    dense = [f"output={output / 'dense'}", *start, "attention.pattern=dense", *overrides]
    whole = load_recipe(EXTEND, sparse)
    half = f"checkpoint.stop_after={max(1, whole.train.steps // 2)}"
    return {
        "base": [base],
        "sparse": [
            _stage("sparse extension on a ring of two, stopped half-way on purpose", EXTEND, [*sparse, half]),
            _stage("sparse extension, resumed from its checkpoint", EXTEND, sparse),
        ],
        "dense": [_stage("dense twin of the extension", EXTEND, dense)],
    }


def _stage(title: str, recipe: str, overrides: Sequence[str]) -> Stage:
    loaded = load_recipe(recipe, overrides)
    command = ("-m", "mtrain", "train", recipe, *overrides)
    if loaded.parallel.world_size > 1:
        config = find_recipe("accelerate/cpu_2")
        launch = ("-m", "accelerate.commands.launch", "--config_file", str(config))
        command = (*launch, "--num_processes", str(loaded.parallel.world_size), *command)
    return Stage(title, command, loaded)


def run_stage(stage: Stage) -> float:
    """Run a stage as its own process(es), output going to the terminal; returns wall seconds.

    Raises:
        LaunchError: the command failed; its own message stands above.
    """
    print(f"\n== {stage.title}\n   python {' '.join(stage.arguments)}", flush=True)
    started = time.monotonic()
    status = subprocess.run([sys.executable, *stage.arguments], check=False).returncode
    if status:
        raise LaunchError(
            f"the quickstart's stage {stage.title!r} ended with exit status {status}; its own message is above"
        )
    return time.monotonic() - started
