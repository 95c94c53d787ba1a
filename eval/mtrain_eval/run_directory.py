"""The directory of a run: made, found again, refused when it holds something else. The first rank only."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from mtrain.errors import EvalError
from mtrain.recipe.schema import AttentionRecipe
from mtrain_eval import fingerprint
from mtrain_eval.config import EvalConfig, read_training
from mtrain_eval.sample import Task
from mtrain_eval.store import DOES_NOT_FIT, LOCK, Store, locked, write_whole

FORMAT = 1
FILE = "run.json"


def open_run(
    config: EvalConfig,
    recipes: Mapping[str, AttentionRecipe | None],
    tasks: Sequence[Task],
    *,
    command: str,
    facts: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write run.json, or add to the one of the same run; returns what it holds now.

    Args:
        config: what is asked.
        recipes: per kind of attention its recipe.
        tasks: what is asked, as objects.
        command: as typed.
        facts: about this start: ranks, device, positions.
        say: told when a run is resumed.

    Raises:
        EvalError: the directory holds a run of something else, or files that no evaluation made.
    """
    path = config.output / FILE
    # A start that failed before its first answer binds nobody.
    old = _read(path) if Store(config.output).cells() else {}
    model = model_directory(config.model)
    known = old.get("model", {}).get("weights", [])
    weights = fingerprint.digest_weights(model, known) if model is not None else []
    now = make_fingerprint(config, recipes, model, weights)
    if old:
        fingerprint.require_same(now, old["fingerprint"], config.output)
        now["attention"] = {**old["fingerprint"]["attention"], **now["attention"]}
        stored = Store(config.output, say)
        answers = sum(DOES_NOT_FIT not in row for cell in stored.cells() for row in stored.read(cell))
        say(f"{config.output}: resuming: {answers} answers are already there")
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    commit = fingerprint.git_commit()
    run = {
        "format": FORMAT,
        "command": command,
        "config": config.to_dict(),
        "fingerprint": now,
        "versions": fingerprint.versions(),
        "git": commit,
        "model": {"path": config.model, "training": _training(config.model), **facts, "weights": weights},
        "tasks": {
            **old.get("tasks", {}),
            **{task.name: {"suite": task.suite, "metric": task.metric, "source": task.source} for task in tasks},
        },
        "history": [*old.get("history", []), {"command": command, "started": started, "git": commit}],
    }
    write_whole(path, json.dumps(run, indent=1) + "\n")
    return run


def prepare(output: Path, resume: bool, say: Callable[[str], None]) -> None:
    """An output directory that is new, or a run's.

    Raises:
        EvalError: it is a file, holds files that no evaluation made, or a run that is to be set aside is still going on.
    """
    if output.exists() and not output.is_dir():
        raise EvalError(f"--output {output} is a file; give a directory")
    if output.is_dir() and any(file.name != LOCK for file in output.iterdir()):
        if not (output / FILE).exists():
            raise EvalError(f"{output} holds files that no evaluation made; give another --output")
        if not resume:
            number = 1
            while (aside := output.with_name(f"{output.name}_{number}")).exists():
                number += 1
            with locked(output):  # a run that still writes would go on in the new directory
                output.rename(aside)
            say(f"the earlier evaluation is now {aside}")
    output.mkdir(parents=True, exist_ok=True)


def make_fingerprint(
    config: EvalConfig,
    recipes: Mapping[str, AttentionRecipe | None],
    model: Path | None,
    weights: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """What must be the same for rows to be averaged."""
    attention = {mode: None if recipe is None else asdict(recipe) for mode, recipe in recipes.items()}
    return {
        "model": fingerprint.digest_model(weights),
        "config": model and fingerprint.digest_files(model, fingerprint.CONFIGS),
        "tokenizer": model and fingerprint.digest_files(model, fingerprint.TOKENIZERS),
        "attention": json.loads(json.dumps(attention)),
        "data": {"directory": fingerprint.digest_data(config.data_dir), "online": config.online},
        "seed": config.seed,
        "dtype": config.dtype,
        "max_positions": config.max_positions,
        "rope": None if config.rope is None else dict(config.rope),
        "versions": fingerprint.versions(),
    }


def check_model(model: str) -> None:
    """Refuse a path that is no model before the hub is asked for it.

    Raises:
        EvalError: there is no such directory, or it is a run's, which has its model in ``export``.
    """
    path = Path(model)
    if path.is_dir():
        exports = sorted(str(file.parent) for where in ("", "*/") for file in path.glob(f"{where}export/config.json"))
        if exports and not (path / "config.json").exists():
            raise EvalError(f"{model} is the directory of a run; its model is {' or '.join(exports)}")
        return
    if path.exists():
        raise EvalError(f"{model} is a file; give the model's directory")
    # A hub id is OWNER/NAME; a few old ones are a bare NAME, and are believed when they lie in the cache.
    hub_id = model.count("/") == 1 and not model.startswith(("runs/", ".", "/", "~"))
    if not hub_id and ("/" in model or model_directory(model) is None):
        raise EvalError(
            f"no such directory: {model!r}; give a model's directory, such as runs/NAME/export, or a hub id OWNER/NAME"
        )


def model_directory(model: str) -> Path | None:
    """Where the files of a model are: the directory itself, or the hub's snapshot in the cache; None: nowhere."""
    if Path(model).is_dir():
        return Path(model)
    try:
        config = cached_file(model, "config.json", local_files_only=True)
    except (OSError, ValueError):  # ValueError: it cannot be a hub id
        return None
    return None if config is None else Path(config).parent


def _training(model: str) -> dict[str, Any]:
    """Of the training, what a report shows: its length, its steps, its attention."""
    training = read_training(model)
    if not training:
        return {}
    recipe = training.get("recipe", {})
    return {
        "name": recipe.get("name"),
        "step": training.get("step"),
        "tokens": training.get("tokens"),
        "seq_len": recipe.get("train", {}).get("seq_len"),
        "attention": recipe.get("attention"),
    }


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(run, dict) and run["format"] == FORMAT and isinstance(run["fingerprint"]["attention"], dict)
    except (ValueError, KeyError, TypeError, AssertionError):
        raise EvalError(
            f"{path} is damaged or of another version, so it cannot be told whether the rows beside it belong to this run; "
            "give another --output, or start anew with --no-resume"
        ) from None
    return run
