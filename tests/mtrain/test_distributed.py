"""Whole models over real processes: any mesh gives the loss and the gradients of one process; a killed peer ends the run."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from mtrain.errors import LaunchError
from mtrain.metrics import read_lines
from mtrain.parallel import make_world
from mtrain.step import Stepper
from mtrain.trainer import Run, train
from tests.mtrain.processes import run_processes
from tests.mtrain.tiny import tiny_recipe

ROOT = Path(__file__).resolve().parents[2]
MESHES = {
    "ring 2": {"inner": 2},
    "ring 3": {"inner": 3},
    "ring 4": {"inner": 4},
    "nodes 2 x ring 2": {"outer": 2, "inner": 2},
    "dp 2 x ring 2": {"dp": 2, "inner": 2},
    "dp 2": {"dp": 2},
}


def mesh_recipe(directory: Path, mesh: dict[str, int], run: str = "run", **changes):
    changes = {f"parallel__{axis}": size for axis, size in mesh.items()} | changes
    return tiny_recipe(directory, run, train__batch_rows=4, **changes)


def ranks(mesh: dict[str, int]) -> int:
    return mesh.get("dp", 1) * mesh.get("outer", 1) * mesh.get("inner", 1)


def first_step(directory: Path, mesh: dict[str, int], changes: dict) -> dict:
    """Loss and every gradient of the first step, targets made uneven over rows and positions."""
    recipe = mesh_recipe(directory, mesh, **changes)
    run = Run(recipe, make_world(recipe))
    batches = run.loader.next_step()
    for batch in batches:
        for row, labels in zip(batch.rows, batch.labels, strict=True):
            labels[: (0, 33, 99, 100)[row]] = -100  # the last row of the step has no target at all
    run.optimizer.step = lambda: None
    kept: dict[str, torch.Tensor] = {}
    run.optimizer.zero_grad = lambda set_to_none=True: kept.update(
        {name: p.grad.clone().numpy() for name, p in run.model.named_parameters()}
    )
    result = run.stepper(batches, step=0, lr=0.0)
    run.log.close()
    return {"loss": result.loss, "targets": result.targets, "norm": result.grad_norm, "gradients": kept}


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """What one process computes, by name of the setting."""
    directory = tmp_path_factory.mktemp("truth")
    return {name: first_step(directory, {}, changes) for name, changes in SETTINGS.items()}, directory


SETTINGS = {
    "striped": {"train__clip": 0.0},
    "recompute": {"train__clip": 0.0, "train__activation_checkpointing": True, "attention__layout": "zigzag"},
    "gather": {"train__clip": 0.0, "attention__schedule": "gather", "attention__layout": "contiguous"},
}


@pytest.mark.parametrize(
    "name, setting",
    [
        *((name, "striped") for name in MESHES),
        *((name, "recompute") for name in ("ring 3", "dp 2 x ring 2")),
        *((name, "gather") for name in ("ring 4", "nodes 2 x ring 2")),
    ],
)
def test_loss_and_every_gradient_equal_those_of_one_process(tmp_path, truth, name, setting):
    mesh = MESHES[name]
    expected, directory = truth[0][setting], truth[1]
    for result in run_processes(first_step, ranks(mesh), tmp_path, directory, mesh, SETTINGS[setting]):
        if isinstance(result, Exception):
            raise result
        assert result["targets"] == expected["targets"]
        assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert result["norm"] == pytest.approx(expected["norm"], rel=1e-5)
        assert result["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in result["gradients"].items():
            wanted = torch.from_numpy(expected["gradients"][name])
            error = (torch.from_numpy(gradient) - wanted).norm() / wanted.norm().clamp(min=1e-12)
            assert error <= 1e-5, f"{name}: {error:.2e}"


def run_and_read(directory: Path, mesh: dict[str, int], run: str, changes: dict) -> list[float]:
    summary = train(mesh_recipe(directory, mesh, run, **changes))
    return [line["loss"] for line in read_lines(Path(summary["output"], "run.jsonl"))]


TWENTY = {"train__steps": 20, "checkpoint__every": 0, "attention__refresh": {"every": 3}}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["striped", "balanced"])
def test_twenty_steps_have_the_same_losses(tmp_path, layout):
    changes = {**TWENTY, "attention__layout": layout}
    alone = run_and_read(tmp_path, {}, "alone", changes)
    assert len(alone) == 20 and alone[-1] < alone[0] - 1
    together = run_processes(run_and_read, 2, tmp_path / "work", tmp_path, {"inner": 2}, "ring", changes)
    assert together[0] == together[1] == pytest.approx(alone, rel=1e-4)


def balanced_run(directory: Path, mesh: dict[str, int], run: str) -> tuple[list[float], list[list[list[int]]]]:
    """Losses and the owner table of each step."""
    recipe = mesh_recipe(directory, mesh, run, attention__layout="balanced", train__seq_len=230, train__steps=5)
    made = Run(recipe, make_world(recipe))
    losses, tables = [], []
    for _ in range(5):
        losses.append(made.one_step().loss)
        tables.append(made.context.layout.table.tolist())
    made.log.close()
    return losses, tables


def test_balanced_blocks_move_alike_on_a_ring_and_change_no_loss(tmp_path):
    alone, _ = balanced_run(tmp_path, {}, "alone")
    results = run_processes(balanced_run, 4, tmp_path / "work", tmp_path, {"dp": 2, "inner": 2}, "together")
    for losses, tables in results:
        assert losses == pytest.approx(alone, rel=1e-4)
        assert tables[0] == [list(range(0, 30, 2)), list(range(1, 30, 2))]  # striped, before anything was measured
        assert all(sorted(sum(table, [])) == list(range(30)) for table in tables)
        assert any(table != tables[0] for table in tables[1:])
    assert results[0] == results[1] and results[2] == results[3]


def test_two_processes_resume_bitwise(tmp_path):
    mesh, changes = {"inner": 2}, {"attention__refresh": "frozen", "attention__layout": "balanced"}
    whole = run_processes(run_and_read, 2, tmp_path / "1", tmp_path, mesh, "whole", changes)[0]
    run_processes(run_and_read, 2, tmp_path / "2", tmp_path, mesh, "halves", {**changes, "checkpoint__stop_after": 3})
    halves = run_processes(run_and_read, 2, tmp_path / "3", tmp_path, mesh, "halves", changes)[0]
    assert halves == whole and len(whole) == 6


def killed_run(directory: Path, victim: int, point: str, how: int) -> None:
    """A run in which one rank is killed in its third step: before it begins, or in its backward pass."""
    recipe = mesh_recipe(directory, {"inner": 3}, parallel__timeout_s=4, checkpoint__every=1)
    world = make_world(recipe)
    run = Run(recipe, world)

    def die(*_):
        if world.rank == victim and run.step == 2:
            os.kill(os.getpid(), how)

    if point == "forward":
        run.model.model.layers[1].register_forward_pre_hook(die)
    elif point == "backward":
        run.model.model.layers[1].self_attn.o_proj.weight.register_hook(die)
    elif point == "save":
        run.checkpointer._start = die if world.rank == victim else run.checkpointer._start
    for _ in range(4):
        run.one_step()
        run.save(False)


@pytest.mark.parametrize("victim, point", [(2, "forward"), (1, "backward"), (0, "save")])
def test_a_killed_peer_ends_all_with_a_message(tmp_path, victim, point):
    started = time.monotonic()
    results = run_processes(killed_run, 3, tmp_path / "work", tmp_path, victim, point, signal.SIGKILL)
    assert time.monotonic() - started < 20
    for rank, result in enumerate(results):
        if rank == victim:
            assert result is None
            continue
        assert isinstance(result, LaunchError), result
        assert "waiting for" in str(result) and f"{rank}" in str(result)
    # What was saved before is complete and goes on.
    again = run_processes(run_and_read, 3, tmp_path / "again", tmp_path, {"inner": 3}, "run", {})
    assert len(again[0]) == 6


def test_a_peer_that_hangs_is_given_up_after_the_timeout(tmp_path):
    started = time.monotonic()
    results = run_processes(hanging_run, 2, tmp_path / "work", tmp_path, timeout=2)
    assert isinstance(results[0], LaunchError) and "waiting for" in str(results[0])
    assert 1.5 < results[0].seconds and time.monotonic() - started < 25


def hanging_run(directory: Path) -> None:
    recipe = mesh_recipe(directory, {"inner": 2}, parallel__timeout_s=2)
    world = make_world(recipe)
    run = Run(recipe, world)
    run.one_step()
    if world.rank == 1:
        time.sleep(6)
        os._exit(0)
    run.one_step()


def signalled_run(directory: Path) -> dict:
    recipe = mesh_recipe(directory, {"inner": 2}, checkpoint__every=0)
    original = Stepper.__call__

    def signalled(self, *args, step, **kwargs):
        result = original(self, *args, step=step, **kwargs)
        if step == 2 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    Stepper.__call__ = signalled
    return train(recipe)


def test_a_signal_to_one_rank_stops_all_with_one_checkpoint(tmp_path):
    results = run_processes(signalled_run, 2, tmp_path / "work", tmp_path)
    for result in results:
        assert result["stopped"] == "signal" and result["step"] == 4 and result["checkpoint"].endswith("step_00000004")


def poisoned_run(directory: Path) -> str:
    recipe = mesh_recipe(directory, {"dp": 2})
    run = Run(recipe, make_world(recipe))
    run.one_step()
    before = [p.detach().clone() for p in run.model.parameters()]
    if run.world.rank == 1:  # only this rank's rows overflow
        run.model.model.layers[0].register_forward_hook(lambda module, args, output: output * float("inf"))
    try:
        run.one_step()
    except ValueError as error:
        assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
        return str(error)
    return "no error"


def test_a_nan_names_its_rank_on_every_rank(tmp_path):
    for message in run_processes(poisoned_run, 2, tmp_path / "work", tmp_path):
        assert "step 2: the loss on rank(s) [1] is nan; nothing was updated" in str(message)


def environment(**variables: str) -> dict[str, str]:
    """This process's, without what a launcher would have set."""
    left = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    return {**left, "OMP_NUM_THREADS": "1", **variables}


LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def recipe_file(directory: Path, **changes) -> str:
    file = directory / "launched.yaml"
    file.write_text(yaml.safe_dump(mesh_recipe(directory, {"inner": 2}, **changes).to_dict()))
    return str(file)


@pytest.mark.slow
def test_accelerate_launch_end_to_end(tmp_path):
    command = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "recipes/accelerate/cpu_2.yaml")]
    command += ["-m", "mtrain", "train", recipe_file(tmp_path, train__steps=3)]
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    alone = run_and_read(tmp_path, {}, "alone", {"train__steps": 3})
    assert [line["loss"] for line in read_lines(tmp_path / "run" / "run.jsonl")] == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_a_wrong_number_of_processes_is_one_line_before_anything_starts(tmp_path):
    words = [sys.executable, "-m", "mtrain", "train", recipe_file(tmp_path), "parallel.inner=3"]
    wrong = subprocess.run(
        words, cwd=ROOT, env=environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0"), capture_output=True, text=True, timeout=100
    )  # fmt: skip
    assert wrong.returncode == 2 and "dp 1 x outer 1 x inner 3 = 3 processes, but 2 are running" in wrong.stderr
    assert wrong.stderr.count("\n") == 1


@pytest.mark.slow
def test_survivors_of_a_killed_process_exit_by_themselves(tmp_path):
    """Without a launcher that would end them: real interpreters, from start to exit code."""
    port = free_port()
    words = [
        sys.executable,
        "-m",
        "mtrain",
        "train",
        recipe_file(tmp_path, train__steps=100000, parallel__timeout_s=20),
    ]
    rank = lambda r: {"WORLD_SIZE": "2", "RANK": r, "LOCAL_RANK": r, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # noqa: E731
    processes = [
        subprocess.Popen(words, cwd=ROOT, env=environment(**rank(str(r))), stderr=subprocess.PIPE, text=True)
        for r in (0, 1)
    ]
    try:
        record = tmp_path / "run" / "run.jsonl"
        deadline = time.monotonic() + 100
        while not (record.exists() and record.read_text().count("\n") > 3):
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes), "the run did not start"
            time.sleep(0.1)
        processes[1].kill()
        _, told = processes[0].communicate(timeout=40)
        assert processes[0].returncode == 2
        assert "mtrain: error: " in told and "waiting for" in told
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
