"""Processes: the right number, the same recipe, the same rows in a ring, and an error that names what was waited for."""

import os

import pytest
import torch
from torch import nn

from mtrain.errors import LaunchError
from mtrain.parallel import check_world_size, make_world
from mtrain.recipe import ParallelRecipe, recipe_from_dict
from tests.mtrain.processes import run_processes


def recipe(dp: int = 1, outer: int = 1, inner: int = 1, **train):
    return recipe_from_dict(
        {
            "model": {"path": "none"},
            "data": {"sources": [{"kind": "python-stdlib"}]},
            "train": {"steps": 1, "seq_len": 64, "lr": 1e-3, "batch_rows": dp, **train},
            "parallel": {"dp": dp, "outer": outer, "inner": inner, "timeout_s": 20},
        }
    )


@pytest.mark.parametrize(
    "mesh, running, advice",
    [
        ((2, 1, 2), 8, "8 are running: launch 4 .* or set parallel.dp=4"),
        ((2, 1, 2), 6, "6 are running: launch 4 .* or set parallel.dp=3"),
        ((2, 1, 4), 6, "6 are running: launch 8 .* or set parallel.inner=3"),
        ((3, 1, 2), 5, "5 are running: launch 6 .* or set parallel.dp=1 parallel.outer=1 parallel.inner=5"),
        ((1, 1, 2), 1, "1 is running: launch 2 .*MULTI_CPU files start one process only"),
    ],
)
def test_wrong_number_of_processes(mesh, running, advice):
    with pytest.raises(
        LaunchError, match=f"dp {mesh[0]} x outer {mesh[1]} x inner {mesh[2]} = .*{advice.replace('are', '(are)')}"
    ):
        check_world_size(ParallelRecipe(*mesh), running)
    check_world_size(ParallelRecipe(*mesh), mesh[0] * mesh[1] * mesh[2])


def _talk():
    world = make_world(recipe(dp=2, inner=2))
    rank = world.rank
    world.require_same_in_ring("the first batch", f"rows of {world.dp_rank}")
    found = {
        "place": (rank, world.dp_rank, world.ring.rank, world.ring.world_size, world.is_main),
        "json": world.gather_json({"rank": rank, "text": "x" * rank}),
        "gather": world.all_gather(torch.tensor([float(rank)])).flatten().tolist(),
        "sum": world.all_reduce(torch.tensor([rank])).item(),
        "max": world.all_reduce(torch.tensor([rank]), "max").item(),
        "ring": world.ring.all_reduce(torch.tensor([10**rank])).item(),
    }
    errors = []
    for check, value in ((world.require_same, f"recipe {rank == 3}"), (world.require_same_in_ring, f"sample {rank}")):
        try:
            check("it", value)
        except LaunchError as error:
            errors.append(str(error))
    return {**found, "errors": errors}


def test_four_processes_agree_on_places_values_and_errors(tmp_path):
    results = run_processes(_talk, 4, tmp_path)
    assert [r["place"] for r in results] == [
        (0, 0, 0, 2, True),
        (1, 0, 1, 2, False),
        (2, 1, 0, 2, False),
        (3, 1, 1, 2, False),
    ]
    for rank, result in enumerate(results):
        assert result["json"] == [{"rank": r, "text": "x" * r} for r in range(4)]
        assert result["gather"] == [0.0, 1.0, 2.0, 3.0] and result["sum"] == 6 and result["max"] == 3
        assert result["ring"] == (11 if rank < 2 else 1100)
        assert len(result["errors"]) == 2
        assert "rank(s) [3] do not agree with rank 0" in result["errors"][0]
        assert "inside ring 0: rank(s) [1] do not hold what rank 0 holds" in result["errors"][1]


def _different_recipes(directory):
    make_world(recipe(dp=2, batch_rows=2 * (int(os.environ["RANK"]) + 1)))


def test_processes_with_different_recipes_are_refused(tmp_path):
    for error in run_processes(_different_recipes, 2, tmp_path, None):
        assert isinstance(error, LaunchError) and "the recipe differs between processes: rank(s) [1]" in str(error)


def _lose_rank_1_in_backward():
    world = make_world(recipe(dp=3))
    torch.manual_seed(0)
    model = world.prepare(nn.Linear(3, 2))
    loss = model(torch.ones(1, 3)).sum()
    if world.rank == 1:
        os._exit(9)
    with world.waiting_for("the gradients of step 5"):
        world.backward(loss)


def test_a_lost_peer_is_named_with_what_was_waited_for(tmp_path):
    results = run_processes(_lose_rank_1_in_backward, 3, tmp_path)
    assert results[1] is None
    for rank in (0, 2):
        error = results[rank]
        assert isinstance(error, LaunchError), error
        assert f"rank {rank} lost a peer while waiting for the gradients of step 5" in str(error)
        assert error.seconds < 20


def test_ordinary_errors_pass_unchanged():
    world = make_world(recipe())
    assert world.ring.world_size == 1 and world.world_size == 1
    assert world.gather_json([1, "a"]) == [[1, "a"]] and world.all_gather(torch.ones(2)).shape == (1, 2)
    with pytest.raises(RuntimeError, match="shape mismatch"), world.waiting_for("anything"):
        raise RuntimeError("shape mismatch")
