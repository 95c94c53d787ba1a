"""parallel.engine=fsdp gives what ddp gives, from shards: losses, weights, checkpoints, exports, errors."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from mtrain.checkpoint import list_checkpoints, load_tensors
from mtrain.errors import LaunchError
from mtrain.metrics import read_lines
from mtrain.parallel import make_accelerator, make_world
from mtrain.recipe import Recipe
from mtrain.state import model_tensors, optimizer_tensors
from mtrain.trainer import Run, train
from tests.mtrain.processes import run_processes
from tests.mtrain.small_models import FAMILIES, model_of, tokens
from tests.mtrain.tiny import tiny_recipe

UNTIED = {"model__config__tie_word_embeddings": False}
RECOMPUTE = {"train__activation_checkpointing": True}
PAIR, ALONE = {"parallel__inner": 2}, {"parallel__engine": "ddp"}


def sharded(directory: Path, run: str, changes: dict[str, Any]) -> Recipe:
    """Two micro-batches, and a clip that always acts. Adam's eps is far above rounding: where a gradient is nearly 0, the quotient
    would make a whole step of the rounding of its sum."""
    train = {"steps": 3, "seq_len": 60, "batch_rows": 2, "clip": 0.3, "eps": 1e-3, "lr": 1e-2}
    settings = {f"train__{key}": value for key, value in train.items()} | {"parallel__engine": "fsdp"}
    return tiny_recipe(directory, run, **{**settings, **changes})


def on_ranks(fn: Any, work: Path, directory: Path, changes: dict[str, Any], *args: Any) -> list[Any]:
    """``fn(directory, changes, *args)`` on the processes that the changed recipe asks for."""
    count = sharded(directory, "any", changes).parallel.world_size
    results = run_processes(fn, count, work, directory, changes, *args)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def trained(directory: Path, changes: dict[str, Any], run: str) -> list[float]:
    summary = train(sharded(directory, run, changes))
    return [line["loss"] for line in read_lines(Path(summary["output"], "run.jsonl"))]


def newest(directory: Path, run: str) -> Path:
    return list_checkpoints(directory / run / "checkpoints")[-1]


def files(directory: Path, run: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in newest(directory, run).glob("*.safetensors")}


# ----------------------------------------------------------------------------------------------------- equal to ddp


def stepped(directory: Path, changes: dict[str, Any], engine: str) -> dict[str, Any]:
    """Three steps, the second with targets on one rank of each ring only."""
    recipe = sharded(directory, engine, {**changes, "parallel__engine": engine})
    run = Run(recipe, make_world(recipe))
    results = []
    for step in range(3):
        batches = run.loader.next_step()
        for batch in batches if step == 1 else ():
            batch.labels[:, 8:] = -100
        results.append(run.stepper(batches, step=step, lr=1e-2))
    run.log.close()
    tensors = model_tensors(run.model) | optimizer_tensors(run.model, run.optimizer)
    return {
        "losses": [result.loss for result in results],
        "norms": [result.grad_norm for result in results],
        "targets": [result.targets for result in results],
        "tensors": {name: tensor.numpy() for name, tensor in run.world.gather_tensors(tensors).items()},
    }


def both_engines(directory: Path, changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [stepped(directory, changes, engine) for engine in ("ddp", "fsdp")]


MESHES = {
    "ring 2, recomputed": {**PAIR, **UNTIED, **RECOMPUTE},
    "dp 2 x ring 2, recomputed": {"parallel__dp": 2, **PAIR, **RECOMPUTE, "train__batch_rows": 4},
}
MORE_MESHES = {
    "ring 3, odd shards": {"parallel__inner": 3, **UNTIED},
    "nodes 2 x ring 2": {"parallel__outer": 2, **PAIR, "attention__layout": "zigzag"},
}


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(changes, id=name) for name, changes in MESHES.items()),
        *(pytest.param(changes, id=name, marks=pytest.mark.slow) for name, changes in MORE_MESHES.items()),
    ],
)
def test_shards_give_the_losses_weights_and_moments_of_whole_models(tmp_path, changes):
    """To the rounding of float32 sums (2 ** -24 each): the two engines add up gradients in different orders."""
    results = on_ranks(both_engines, tmp_path / "work", tmp_path, changes)
    for ddp, fsdp in results:
        assert fsdp["targets"] == ddp["targets"] and min(ddp["norms"]) > 0.3
        assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-6)
        assert fsdp["norms"] == pytest.approx(ddp["norms"], rel=2e-6)
    ddp, fsdp = (found["tensors"] for found in results[0])
    assert fsdp.keys() == ddp.keys() and len(ddp) > 80
    for name in ddp:
        wanted, got = torch.from_numpy(ddp[name]), torch.from_numpy(fsdp[name])
        error = (got - wanted).norm() / wanted.norm().clamp(min=1e-12)
        assert error <= 1e-5, f"{name}: {error:.2e}"


def held(directory: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """What a rank holds: elements of its own at rest, and which weights are whole while a layer runs."""
    recipe = sharded(directory, "run", changes)
    run = Run(recipe, make_world(recipe))
    whole: dict[str, set[str]] = {}

    def look(module: torch.nn.Module, *_: Any) -> None:
        names = {n for n, p in run.model.named_parameters() if not isinstance(p, DTensor)}
        whole.setdefault(f"layer {module.layer_idx}", set()).update(names)

    run.one_step()
    run.save(True)
    run.log.close()
    run = Run(recipe, run.world)  # resumed: its moments come from whole tensors
    for layer in run.model.model.layers:
        layer.self_attn.register_forward_pre_hook(look)
    run.one_step()
    run.model.eval()
    with torch.no_grad():  # nobody goes backward: nothing may stay whole after it
        n = run.context.layout.local_len
        run.context.begin(None, step=2)
        run.model(input_ids=torch.zeros(1, n, dtype=torch.int64), use_cache=False)
    own = list(run.model.parameters()) + [t for t in optimizer_tensors(run.model, run.optimizer).values() if t.dim()]
    run.log.close()
    return {
        "sharded": all(isinstance(tensor, DTensor) for tensor in own),
        "share": sum(t.to_local().untyped_storage().nbytes() for t in own) / sum(t.numel() * 4 for t in own),
        "whole": whole,
    }


@pytest.mark.parametrize("tied", [False, True])
def test_a_rank_holds_its_shard_and_the_layer_that_runs(tmp_path, tied):
    root = {"model.embed_tokens.weight", "model.norm.weight"} if tied else set()
    changes = {**PAIR, "model__config__tie_word_embeddings": tied}
    for result in on_ranks(held, tmp_path / "work", tmp_path, changes):
        assert result["sharded"] and 0.5 <= result["share"] < 0.51
        for index in range(2):
            seen = result["whole"][f"layer {index}"]
            layer = {name for name in seen if name.startswith(f"model.layers.{index}.")}
            assert len(layer) == 12 and seen - layer == root


def families(directory: Path, changes: dict[str, Any]) -> dict[str, tuple[bool, float]]:
    """By family: whether every weight is sharded, and how far the logits are from those of whole weights."""
    world, found = make_world(sharded(directory, "run", changes)), {}
    for family in FAMILIES:
        model = model_of(family)
        with torch.no_grad():
            wanted = model(tokens(1)).logits
            world.prepare(model)
            error = float((model(tokens(1)).logits - wanted).abs().max())
        found[family] = all(isinstance(p, DTensor) for p in model.parameters()), error
    return found


def test_every_supported_family_is_split_into_units(tmp_path):
    for found in on_ranks(families, tmp_path / "work", tmp_path, {"parallel__dp": 2}):
        assert found == dict.fromkeys(FAMILIES, (True, 0.0))


def half_precision(directory: Path, changes: dict[str, Any], engine: str) -> tuple[list[float], dict[str, str]]:
    recipe = sharded(directory, engine, {**changes, "parallel__engine": engine})
    run = Run(recipe, make_world(recipe))
    dtypes: dict[str, str] = {}

    def look(norm: Any, args: tuple[Tensor, ...]) -> None:
        dtypes.update(stream=str(args[0].dtype), weight=str(norm.weight.dtype))

    run.model.model.layers[1].input_layernorm.register_forward_pre_hook(look)
    run.model.lm_head.register_forward_pre_hook(lambda head, *_: dtypes.update(head=str(head.weight.dtype)))
    run.optimizer.register_step_pre_hook(
        lambda optimizer, *_: dtypes.update(gradient=str(optimizer.param_groups[0]["params"][-1].grad.dtype))
    )
    losses = [run.one_step().loss for _ in range(3)]
    run.log.close()
    return losses, dtypes


def both_in_half(directory: Path, changes: dict[str, Any]) -> list[tuple[list[float], dict[str, str]]]:
    return [half_precision(directory, changes, engine) for engine in ("ddp", "fsdp")]


def test_bf16_is_near_and_keeps_the_residual_stream_in_float32(tmp_path):
    """Near, not equal: gains of norms are rounded to 8 bits before they are gathered (2 ** -9 of 1)."""
    changes = {**PAIR, **UNTIED, "train__precision": "bf16"}
    (wanted, whole), (losses, dtypes) = on_ranks(both_in_half, tmp_path / "work", tmp_path, changes)[0]
    assert losses == pytest.approx(wanted, rel=2e-3)
    assert set(whole.values()) == {"torch.float32"}
    assert dtypes == {
        "stream": "torch.float32", "weight": "torch.bfloat16", "head": "torch.bfloat16", "gradient": "torch.float32",
    }  # fmt: skip


# ------------------------------------------------------------------------------------------- checkpoints and exports


def test_resuming_is_bitwise_and_the_export_is_the_plain_model(tmp_path):
    changes = {**PAIR, **UNTIED, "attention__layout": "balanced"}
    whole = on_ranks(trained, tmp_path / "1", tmp_path, changes, "whole")[0]
    on_ranks(trained, tmp_path / "2", tmp_path, {**changes, "checkpoint__stop_after": 1}, "halves")
    halves = on_ranks(trained, tmp_path / "3", tmp_path, changes, "halves")[0]
    assert halves == whole and len(whole) == 3
    state = files(tmp_path, "whole")
    assert files(tmp_path, "halves") == state and {"model.safetensors", "optimizer.safetensors"} <= state.keys()
    exported, saved = load_export(tmp_path, "halves"), load_tensors(newest(tmp_path, "whole"), "model")
    assert exported.config.architectures == ["Qwen2ForCausalLM"] and type(exported.lm_head) is torch.nn.Linear
    assert exported.state_dict().keys() == saved.keys()
    assert all(torch.equal(weight, saved[name]) for name, weight in exported.state_dict().items())


def load_export(directory: Path, run: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory / run / "export")


def exported_logits(directory: Path, run: str) -> list[float]:
    model = load_export(directory, run)
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits[0, -1].tolist()


@pytest.mark.slow
def test_a_run_goes_on_with_the_other_engine_and_other_ranks(tmp_path):
    """ddp on one process, fsdp on two, fsdp on four, ddp on one again: the losses and the model of one process all the way."""
    plan = {"train__steps": 4, "train__batch_rows": 4}
    alone = trained(tmp_path, {**ALONE, **plan}, "alone")
    stages = [ALONE, PAIR, {"parallel__dp": 2, **PAIR}, ALONE]
    for step, changes in enumerate(stages, 1):
        stop = {"checkpoint__stop_after": step} if step < 4 else {}
        losses = on_ranks(trained, tmp_path / f"{step}", tmp_path, {**changes, **plan, **stop}, "moving")[0]
    assert losses == pytest.approx(alone, rel=1e-5) and len(losses) == 4
    assert exported_logits(tmp_path, "moving") == pytest.approx(exported_logits(tmp_path, "alone"), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------ errors


def poisoned(directory: Path, changes: dict[str, Any]) -> list[str]:
    """A NaN in a loss, then one in a gradient only, both on rank 1."""
    recipe = sharded(directory, "run", changes)
    run = Run(recipe, make_world(recipe))
    run.one_step()
    mlp, rank, messages = run.model.model.layers[1].mlp, run.world.rank, []

    def spoil_gradient(weight: DTensor) -> None:
        if rank == 1:
            weight.grad.to_local().fill_(torch.nan)

    before = [p.detach().to_local().clone() for p in run.model.parameters()]
    for register, hook in (
        (mlp.register_forward_hook, lambda module, args, output: output * (torch.nan if rank == 1 else 1.0)),
        (mlp.up_proj.weight.register_post_accumulate_grad_hook, spoil_gradient),
    ):
        handle = register(hook)
        try:
            run.one_step()
        except ValueError as error:
            messages.append(str(error))
        handle.remove()
    after = [p.detach().to_local() for p in run.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    run.one_step()  # what failed left nothing behind
    run.log.close()
    return messages


def test_a_nan_is_named_on_every_rank_and_changes_no_shard(tmp_path):
    for messages in on_ranks(poisoned, tmp_path / "work", tmp_path, {**PAIR, **UNTIED}):
        loss, gradient = messages
        assert "step 2: the loss on rank(s) [" in loss and "is nan; nothing was updated" in loss
        assert "the gradient norm is nan (all losses are finite" in gradient
        assert "1 parameters are hit, first model.layers.1.mlp.up_proj.weight" in gradient


def killed(directory: Path, changes: dict[str, Any], point: str) -> None:
    """A run whose rank 1 dies in its second step."""
    recipe = sharded(directory, "run", {**changes, "parallel__timeout_s": 4})
    run = Run(recipe, make_world(recipe))

    def die(*_: Any) -> None:
        if run.world.rank == 1 and run.step == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    layer = run.model.model.layers[1]
    if point == "forward":
        layer.mlp.register_forward_pre_hook(die)
    elif point == "backward":
        layer.mlp.register_full_backward_pre_hook(die)
    run.one_step()
    if point == "save":
        run.step = 1
        die()
        run.save(False)
    run.one_step()


@pytest.mark.parametrize("point", ["forward", "backward", "save"])
def test_a_killed_peer_ends_all_with_a_message(tmp_path, point):
    results = run_processes(killed, 2, tmp_path / "work", tmp_path, {"parallel__dp": 2, **UNTIED}, point)
    assert results[1] is None
    assert isinstance(results[0], LaunchError), results[0]
    waits = {
        "forward": "the weights of step 2",
        "backward": "the gradients of step 2",
        "save": "the shards of all ranks",
    }
    assert f"rank 0 lost a peer while waiting for {waits[point]}" in str(results[0])


@pytest.mark.parametrize(
    "variable, name",
    [("DEEPSPEED", "DEEPSPEED"), ("FSDP", "FSDP"), ("PARALLELISM_CONFIG", "a parallelism_config")],
)
def test_a_launch_file_with_an_engine_of_its_own_is_refused(tmp_path, monkeypatch, variable, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    with pytest.raises(LaunchError, match=f"asks Accelerate for {name},.* MULTI_GPU .* parallel.engine=fsdp"):
        make_accelerator(sharded(tmp_path, "run", {}))
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "false")
    make_accelerator(sharded(tmp_path, "run", {}))


def test_one_process_alone_has_nobody_to_share_with(tmp_path):
    run = Run(sharded(tmp_path, "run", {}), make_world(sharded(tmp_path, "run", {})))
    run.one_step()
    run.log.close()
    assert not run.world.sharded and not any(isinstance(p, DTensor) for p in run.model.parameters())
