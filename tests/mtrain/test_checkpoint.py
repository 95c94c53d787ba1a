"""Checkpoints: complete or absent whatever is killed when, verified on load, and never of another model."""

import itertools
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mtrain import checkpoint
from mtrain.checkpoint import (
    Checkpointer,
    list_checkpoints,
    load_state,
    load_tensors,
    pack_state,
    unpack_state,
    verify,
)
from mtrain.comm import SingleRing
from mtrain.errors import CheckpointError
from mtrain.optim import make_adamw
from mtrain.parallel import World
from mtrain.state import (
    changed_keys,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    require_same_config,
)


@pytest.fixture
def world():
    return World(Accelerator(cpu=True), 1, 0, SingleRing())


def save(directory: Path, world: World, *steps: int, keep: int = 2) -> Checkpointer:
    checkpointer = Checkpointer(directory, world, keep)
    for step in steps:
        weights = torch.full((5, 3), float(step))
        checkpointer.save(step, {"model": {"w": weights}, "optimizer": {"m/w": weights * 2}}, {"step": step})
    return checkpointer


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_round_trip_keeps_values_types_and_nesting(tmp_path, world):
    state = {
        "cursor": [{"row": 3, "carry": torch.arange(4)}, {}],
        "lr": 0.1,
        "plan": {"seen": torch.tensor([True])},
        "x": None,
    }
    path = Checkpointer(tmp_path, world, 1).save(7, {"model": {"w": torch.arange(6.0).view(2, 3).T}}, state)
    assert path.name == "step_00000007"
    read = load_state(path)
    assert torch.equal(read["cursor"][0]["carry"], torch.arange(4)) and read["plan"]["seen"].dtype == torch.bool
    assert read["lr"] == 0.1 and read["x"] is None and read["cursor"][1] == {}
    assert torch.equal(load_tensors(path, "model")["w"], torch.arange(6.0).view(2, 3).T)
    assert not [name for name in os.listdir(path) if not name.endswith((".json", ".safetensors"))]
    with pytest.raises(CheckpointError, match=r"has no plan_1\.safetensors"):
        load_tensors(path, "plan_1")


def test_pack_state_is_inverse_and_refuses_keys_that_json_would_change():
    value = {"a": [1, {"b": torch.ones(2)}]}
    plain, tensors = pack_state(value)
    back = unpack_state(json.loads(json.dumps(plain)), tensors)
    assert back["a"][0] == 1 and torch.equal(back["a"][1]["b"], torch.ones(2))
    with pytest.raises(CheckpointError, match="must be text"):
        pack_state({"plans": {3: 1}})


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_keeps_the_newest(tmp_path, world, keep):
    save(tmp_path, world, 1, 2, 3, 40, keep=keep)
    assert [checkpoint.step_of(p) for p in list_checkpoints(tmp_path)] == [1, 2, 3, 40][-keep:]
    assert len(names(tmp_path)) == keep


class Killed(BaseException):
    """Stands for kill -9: nothing in the code may catch it and tidy up."""


def kill_at(patch, number: int) -> None:
    """Die in the ``number``-th of all calls that change the disk."""
    calls = itertools.count()

    def guard(original):
        def guarded(*args, **kwargs):
            if next(calls) == number:
                raise Killed
            return original(*args, **kwargs)

        return guarded

    for module, name in [
        *((os, name) for name in ("fsync", "rename", "open")),
        *((checkpoint, name) for name in ("save_file", "_write_json")),
        *((Path, name) for name in ("unlink", "mkdir")),
        (checkpoint.shutil, "rmtree"),
    ]:
        patch.setattr(module, name, guard(getattr(module, name)))


@pytest.mark.parametrize("keep", [1, 2])
def test_killed_at_every_point_leaves_a_complete_checkpoint(tmp_path, world, monkeypatch, keep):
    killed = 0
    for number in range(100):
        directory = tmp_path / str(number)
        save(directory, world, 10, keep=keep)
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                save(directory, world, 20, keep=keep)
                break
            except Killed:
                killed += 1
        checkpointer = Checkpointer(directory, world, keep)
        found = checkpointer.find("auto")
        assert found is not None and verify(found)["step"] in (10, 20), number
        assert torch.equal(load_tensors(found, "model")["w"], torch.full((5, 3), float(load_state(found)["step"])))
        # The next save sweeps what the killed one left.
        save(directory, world, 30, keep=keep)
        assert len(names(directory)) == min(keep, 2) and verify(directory / "step_00000030")
    assert killed >= 10


def test_a_failed_write_is_an_error_and_leaves_the_older_one(tmp_path, world, monkeypatch):
    checkpointer = save(tmp_path, world, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left"):
            checkpointer.save(2, {"model": {"w": torch.ones(1)}}, {})
    assert names(tmp_path) == ["step_00000001"]
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match="MiB free"):
        checkpointer.save(2, {"model": {"w": torch.ones(100)}}, {})
    assert names(tmp_path) == ["step_00000001"]


def damage_by_flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGES = {
    "flip": (damage_by_flip, "damaged"),
    "truncate": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, the manifest says"),
    "delete": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_found_by_name_and_auto_falls_back(tmp_path, world, caplog, how, file):
    checkpointer = save(tmp_path, world, 5, 6)
    newest = tmp_path / "step_00000006"
    damage, message = DAMAGES[how]
    damage(newest / file)
    with caplog.at_level(logging.WARNING):
        assert checkpointer.find("auto") == tmp_path / "step_00000005"
    assert "DAMAGED" in caplog.text and file in caplog.text
    with pytest.raises(CheckpointError, match=f"{file}.*{message}"):
        checkpointer.find(str(newest))
    # Going on from 5 keeps the damaged 6 for the user, out of the way of the new 6.
    checkpointer.set_aside_after(5)
    assert names(tmp_path) == ["set_aside_0_step_00000006", "step_00000005"]


def test_damaged_manifest_and_other_formats(tmp_path, world):
    checkpointer = save(tmp_path, world, 5, 6)
    (tmp_path / "step_00000006" / "manifest.json").write_text("{")
    assert checkpointer.find("auto") == tmp_path / "step_00000005"
    path = tmp_path / "step_00000005" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match=r"every checkpoint.*damaged.*resume=never"):
        checkpointer.find("auto")
    with pytest.raises(CheckpointError, match="format 99"):
        checkpointer.find(str(path.parent))


def test_find_says_where_to_look(tmp_path, world):
    run = tmp_path / "run"
    checkpointer = save(run / "checkpoints", world, 5)
    assert checkpointer.find("never") is None
    assert Checkpointer(tmp_path / "empty", world, 1).find("auto") is None
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        checkpointer.find(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"did you mean .*step_00000005"):
        checkpointer.find(str(run))
    with pytest.raises(CheckpointError, match="keep must be at least 1"):
        Checkpointer(tmp_path, world, 0)


def small_model(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(7, width), "norm": nn.LayerNorm(width), "head": nn.Linear(width, 7, bias=False)}
    )
    model["head"].weight = model["embed"].weight
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    ids = torch.randint(7, (9,), generator=torch.Generator().manual_seed(seed))
    model["head"](model["norm"](model["embed"](ids))).logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return make_adamw(model, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def test_model_and_optimizer_resume_bitwise(tmp_path, world):
    model = small_model()
    optimizer = adamw(model)
    for seed in range(4):
        step(model, optimizer, seed)
        if seed == 1:
            tensors = {"model": model_tensors(model), "optimizer": optimizer_tensors(model, optimizer)}
            path = Checkpointer(tmp_path, world, 1).save(2, tensors, {})
    other = small_model()
    resumed = adamw(other)
    load_model_tensors(other, load_tensors(path, "model"))
    load_optimizer_tensors(other, resumed, load_tensors(path, "optimizer"))
    for seed in (2, 3):
        step(other, resumed, seed)
    assert list(model_tensors(model)) == ["embed.weight", "norm.weight", "norm.bias"]  # the tied head once
    for name, value in model_tensors(model).items():
        assert torch.equal(value, model_tensors(other)[name]), name
    assert other["head"].weight is other["embed"].weight


def test_foreign_models_are_refused_by_name():
    saved = model_tensors(small_model())
    with pytest.raises(CheckpointError, match=r"another model: 'embed.weight' has shape \[7, 4\] there, \[7, 6\] here"):
        load_model_tensors(small_model(6), saved)
    with pytest.raises(CheckpointError, match=r"it has 'extra', which this model does not"):
        load_model_tensors(small_model(), {**saved, "extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"it has no 'norm.bias' \(here \[4\]\)"):
        load_model_tensors(small_model(), {k: v for k, v in saved.items() if k != "norm.bias"})
    with pytest.raises(CheckpointError, match=r"config 'rope' is \{'theta': 1\} there, \{'theta': 2\} here"):
        require_same_config({"rope": {"theta": 2}, "a": 1}, {"rope": {"theta": 1}, "a": 1})
    model = small_model()
    with pytest.raises(CheckpointError, match="does not train a parameter 'gone'"):
        load_optimizer_tensors(model, adamw(model), {"exp_avg/gone": torch.ones(1)})
    with pytest.raises(CheckpointError, match="nothing for the trained parameter"):
        load_optimizer_tensors(model, adamw(model), {"exp_avg/norm.bias": torch.ones(4)})


def test_changed_keys():
    assert changed_keys({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 3}) == ["a.c", "d", "e"]
