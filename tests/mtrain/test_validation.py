"""Held-out loss during training: the right number on every mesh, and a training that does not notice being measured."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM

from mtrain.cli import main
from mtrain.data.loader import Batch, held_out_rows
from mtrain.data.tokenizer import load_tokenizer
from mtrain.errors import DataError, LaunchError
from mtrain.metrics import read_lines
from mtrain.parallel import make_world
from mtrain.patterns import estimate_vertical_slash, plan
from mtrain.patterns.budget import TopK
from mtrain.quickstart.report import describe_run
from mtrain.trainer import Run, train
from mtrain.validation import Validation, deal
from sparse_kernels import reference_attention
from tests.mtrain.processes import run_processes
from tests.mtrain.tiny import tiny_recipe

TIMES = {"tokens_per_s", "step_s", "time_imbalance", "memory_mb"}


def lines(directory: Path, run: str, key: str) -> list[dict]:
    """Lines of run.jsonl with a key, without what a clock or the memory says."""
    found = read_lines(directory / run / "run.jsonl", having=key)
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


# ------------------------------------------------------------------------------------------------------------ the number


def reference(export: str, rows: Batch, attention=None) -> float:
    """Mean token loss by plain transformers and `reference_attention`, a row at a time; dense without an attention recipe."""
    doc_start = torch.empty(0)

    def attend(module, query, key, value, _mask, scaling=None, **_):
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        position = torch.arange(q.shape[1])
        mask = ((position[:, None] >= position) & (doc_start[:, :, None] <= position))[:, None]
        if attention is not None:
            budget = TopK(attention.budget.columns, attention.budget.slashes)
            shape = {name: getattr(attention, name) for name in ("block", "sink", "local", "probe")}
            mask = estimate_vertical_slash(q, k, budget=budget, doc_start=doc_start, **shape).to_dense(doc_start)
        return reference_attention(q, k, v, mask, scale=scaling)[0], None

    AttentionInterface.register("reference", attend)
    model = AutoModelForCausalLM.from_pretrained(export, attn_implementation="reference")
    total, count = 0.0, 0
    for tokens, labels, doc_start in zip(rows.tokens, rows.labels, rows.doc_start, strict=True):
        doc_start = doc_start[None]
        with torch.no_grad():
            logits = model(input_ids=tokens[None], position_ids=torch.arange(len(tokens))[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits.double(), labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.parametrize("packing", [True, False])
def test_it_is_the_mean_that_the_reference_attention_gives_on_the_same_rows(tmp_path, monkeypatch, packing):
    monkeypatch.chdir(tmp_path)  # the order of documents hangs on their path
    little = {"attention__local": 0, "attention__budget": {"kind": "topk", "columns": 3, "slashes": 1}}
    rows = {"data__validation_rows": 5, "data__packing": packing, "train__micro_rows": 2, "log__validate_dense": True}
    recipe = tiny_recipe(Path(), train__steps=2, model__config__initializer_range=0.3, **little, **rows)
    summary = train(recipe)
    found = summary["validation"]
    rows = held_out_rows(recipe.data, load_tokenizer("bytes"), 5, 100)
    uneven = (rows.labels != -100).sum(1)
    assert bool(rows.doc_start.any()) and int(uneven.min()) < int(uneven.max())
    assert found["validation_targets"] == int(uneven.sum())
    sparse, dense = (reference(summary["export"], rows, attention) for attention in (recipe.attention, None))
    assert found["validation_loss"] == pytest.approx(sparse, rel=1e-5)
    assert found["validation_loss_dense"] == pytest.approx(dense, rel=1e-5)
    assert abs(sparse / dense - 1) > 1e-3, "or the two would prove the same"
    assert found["validation_perplexity"] == pytest.approx(math.exp(found["validation_loss"]))
    [line] = lines(tmp_path, "run", "validation_loss")
    assert line == pytest.approx({"step": 2, **found}, rel=1e-6)


def measured(directory: Path, mesh: dict, changes: dict) -> dict[str, float]:
    mesh = {f"parallel__{axis}": size for axis, size in mesh.items()}
    recipe = tiny_recipe(directory, train__batch_rows=4, log__validate_dense=True, **mesh, **changes)
    run = Run(recipe, make_world(recipe))
    run.one_step()
    run.validate()
    run.log.close()
    return run.validated


UNEVEN = {"data__validation_rows": 5, "train__micro_rows": 2}
FEW = {"data__validation_rows": 1, "attention__layout": "zigzag"}


@pytest.mark.parametrize(
    "mesh, changes",
    [
        ({"inner": 2}, UNEVEN),
        ({"dp": 2}, UNEVEN),
        ({"inner": 2, "outer": 2}, UNEVEN),
        ({"dp": 2, "inner": 2}, FEW),
        ({"dp": 2, "engine": "fsdp"}, UNEVEN),
        ({"inner": 3}, {**UNEVEN, "attention__refresh": "frozen", "attention__layout": "balanced"}),
    ],
    ids=["ring 2", "dp 2", "nodes 2 x ring 2", "a replica without rows", "fsdp", "kept patterns, balanced"],
)
def test_every_mesh_measures_the_same(tmp_path, mesh, changes):
    alone = measured(tmp_path, {}, changes)
    world_size = math.prod(size for axis, size in mesh.items() if axis != "engine")
    for found in run_processes(measured, world_size, tmp_path / "work", tmp_path, mesh, changes):
        assert found == pytest.approx(alone, rel=1e-5), found


@pytest.mark.parametrize("count, dp, micro", [(5, 2, 2), (1, 4, 1), (7, 3, 2), (4, 2, 2)])
def test_every_row_counts_once_and_replicas_run_the_same_shapes(count, dp, micro):
    tokens = torch.arange(count * 3).view(count, 3)
    parts = [deal(Batch(tokens, tokens + 1, tokens * 0), rank, dp, micro) for rank in range(dp)]
    assert len({tuple(len(batch.tokens) for batch in part) for part in parts}) == 1
    labels = torch.cat([batch.labels for part in parts for batch in part])
    assert sorted(labels[labels != -100].tolist()) == (tokens + 1).flatten().tolist()


# ----------------------------------------------------------------------------------------------- training does not notice

DISTURBED = {
    "every 2": {"attention__refresh": {"every": 2}},
    "frozen after a warm-up": {"attention__refresh": "frozen", "attention__dense_warmup_steps": 2},
    "recompute, dropout": {
        "train__activation_checkpointing": True,
        "log__recall_every": 2,
        "model__config__model_type": "phi3",
        "model__config__resid_pdrop": 0.2,
        "model__config__pad_token_id": 0,
    },
}


@pytest.mark.parametrize("changes", DISTURBED.values(), ids=DISTURBED)
def test_a_training_that_is_measured_is_bitwise_the_same(tmp_path, changes):
    compare(tmp_path, lambda run, changes: train(tiny_recipe(tmp_path, run, **changes)), changes)


@pytest.mark.parametrize("mesh", [{"inner": 2}, {"dp": 2}], ids=["balanced ring", "replicas"])
def test_a_training_on_two_processes_that_is_measured_is_bitwise_the_same(tmp_path, mesh):
    def start(run: str, changes: dict) -> None:
        mine = {f"parallel__{axis}": size for axis, size in mesh.items()} | changes
        for result in run_processes(quiet_train, 2, tmp_path / f"work {run}", tmp_path, run, mine):
            assert result["step"] == 4, result

    compare(tmp_path, start, {"attention__layout": "balanced", "attention__refresh": {"every": 2}})


def quiet_train(directory: Path, run: str, changes: dict) -> dict:
    return train(tiny_recipe(directory, run, **changes))


def compare(directory: Path, start, changes: dict) -> None:
    """Two runs that hold the same rows out, one measured at the end and one in every step, sparse and dense."""
    changes = {"train__steps": 4, "data__validation_rows": 3, **changes}
    start("quiet", changes)
    start("watched", {**changes, "log__validate_every": 1, "log__validate_dense": True})
    assert lines(directory, "watched", "loss") == lines(directory, "quiet", "loss")
    watched, quiet = (lines(directory, run, "validation_loss") for run in ("watched", "quiet"))
    assert [line["step"] for line in watched] == [1, 2, 3, 4] and [line["step"] for line in quiet] == [4]
    assert {name: watched[-1][name] for name in quiet[0]} == quiet[0]
    last = [directory / run / "checkpoints" / "step_00000004" for run in ("watched", "quiet")]
    assert {"model.safetensors", "optimizer.safetensors"} < {file.name for file in last[0].iterdir()}
    assert {file.name for file in last[0].iterdir()} == {file.name for file in last[1].iterdir()}
    for file in last[0].glob("*.safetensors"):
        assert file.read_bytes() == (last[1] / file.name).read_bytes(), file.name
    states = [json.loads((path / "state.json").read_text()) for path in last]
    assert states[0]["balancer"] == states[1]["balancer"] and states[0]["data"] == states[1]["data"]


def test_a_measurement_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    """Mode, context, windows and random numbers; and it is the same when it is made twice, without dropout."""
    changes = {"model__config__model_type": "phi3", "model__config__resid_pdrop": 0.5, "model__config__pad_token_id": 0}
    recipe = tiny_recipe(tmp_path, data__validation_rows=3, log__every=4, attention__refresh="frozen", **changes)
    run = Run(recipe, make_world(recipe))
    run.one_step(), run.one_step()
    run.model.model.layers[1].eval()  # a part that somebody froze on purpose

    def state():
        modes = [module.training for module in run.model.modules()]
        context = (id(run.model.mtrain_context), id(run.model.base_model.mtrain_context), id(run.context.latest))
        return modes, context, vars(run.window).copy(), torch.get_rng_state().tolist(), torch.is_grad_enabled()

    before = state()
    monkeypatch.setattr(plan, "select_vertical_slash", None)  # the frozen patterns are measured: none is estimated
    run.validate()
    first = run.validated
    run.validate()
    assert state() == before and run.validated == first
    assert all(p.grad is None for p in run.model.parameters())
    run.model.model.layers[0].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.validate()
    assert state() == before
    run.log.close()


def test_a_resumed_run_is_measured_on_the_same_rows_at_the_same_steps(tmp_path):
    changes = {"data__validation_rows": 3, "log__validate_every": 2, "attention__refresh": "frozen"}
    whole = train(tiny_recipe(tmp_path, "whole", **changes))
    assert train(tiny_recipe(tmp_path, "halves", checkpoint__stop_after=3, **changes))["stopped"] == "stop_after"
    assert train(tiny_recipe(tmp_path, "halves", **changes))["validation"] == whole["validation"]
    halves = lines(tmp_path, "halves", "validation_loss")
    assert halves == lines(tmp_path, "whole", "validation_loss") and [line["step"] for line in halves] == [2, 4, 6]
    assert train(tiny_recipe(tmp_path, "halves", **changes))["validation"] is None  # nothing was left to do
    assert lines(tmp_path, "halves", "validation_loss") == halves


@pytest.mark.parametrize("stop_after", [None, 4])
def test_a_run_that_is_killed_while_it_measures_does_so_when_it_resumes(tmp_path, monkeypatch, stop_after):
    changes = {"data__validation_rows": 3, "log__validate_every": 2}
    train(tiny_recipe(tmp_path, "whole", **changes))
    with monkeypatch.context() as killed:
        last, measure = stop_after or 6, Run.validate
        killed.setattr(Run, "validate", lambda run: 1 / 0 if run.step == last else measure(run))
        with pytest.raises(ZeroDivisionError):
            train(tiny_recipe(tmp_path, "killed", checkpoint__stop_after=stop_after, **changes))
    train(tiny_recipe(tmp_path, "killed", **changes))
    assert lines(tmp_path, "killed", "validation_loss") == lines(tmp_path, "whole", "validation_loss")
    assert lines(tmp_path, "killed", "loss") == lines(tmp_path, "whole", "loss")


# --------------------------------------------------------------------------------------------------------- what it tells


def test_it_is_said_and_shown_on_a_board_of_its_own(tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"data__validation_rows": 2, "log__validate_every": 1, "log__validate_dense": True}
    train(tiny_recipe(tmp_path, train__steps=2, log__tensorboard=True, **changes))
    last = lines(tmp_path, "run", "validation_loss")[-1]
    told = capsys.readouterr().err
    for name in ("validation_loss", "validation_loss_dense"):
        assert f"{last[name]:.4f}" in told
    assert "step 2: held-out loss " in told
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert {"train/loss", "validation/loss", "validation/perplexity", "validation/loss_dense"} <= set(
        board.Tags()["scalars"]
    )
    assert [event.step for event in board.Scalars("validation/loss")] == [1, 2]
    report = describe_run("title", tmp_path / "run", 1.0)
    assert any(line.endswith(f"{last['validation_loss']:.3f}") and "held-out loss" in line for line in report)


def test_a_dense_pattern_is_measured_once(tmp_path):
    changes = {"data__validation_rows": 2, "log__validate_dense": True, "attention__pattern": "dense"}
    summary = train(tiny_recipe(tmp_path, train__steps=1, **changes))
    assert set(summary["validation"]) == {"validation_loss", "validation_perplexity", "validation_targets"}


def test_the_attention_is_that_of_the_step_just_done(tmp_path):
    changes = {"data__validation_rows": 2, "log__validate_every": 1, "log__validate_dense": True}
    train(tiny_recipe(tmp_path, train__steps=2, attention__dense_warmup_steps=1, **changes))
    warm, sparse = lines(tmp_path, "run", "validation_loss")
    assert warm["validation_loss"] == warm["validation_loss_dense"]
    assert sparse["validation_loss"] != sparse["validation_loss_dense"]


@pytest.mark.parametrize("key", ["validate_every=5", "validate_dense=true"])
def test_measuring_rows_that_nobody_holds_out_is_an_error_that_says_what_to_type(key, capsys):
    zero = ["log.validate_every=0", "log.validate_dense=false", "data.validation_rows=0"]
    assert main(["inspect", "quickstart-extend", *zero, f"log.{key}"]) == 2
    assert "none are held out; set data.validation_rows too, for example data.validation_rows=4" in (
        capsys.readouterr().err
    )
    assert main(["inspect", "quickstart-extend", *zero, f"log.{key}", "data.validation_rows=4"]) == 0


def test_who_takes_the_held_out_rows_away_is_told_all_that_goes_with_them(capsys):
    """A recipe that measures cannot be un-written from the command line: the message says the values that turn it off."""
    assert main(["inspect", "quickstart-extend", "data.validation_rows=0"]) == 2
    typed = capsys.readouterr().err.rsplit(", or ", 1)[1].split()
    assert typed == ["log.validate_every=0", "log.validate_dense=false"]
    assert main(["inspect", "quickstart-extend", "data.validation_rows=0", *typed]) == 0


def test_inspect_says_what_is_held_out_and_when_it_is_measured(capsys):
    held = ["data.validation_rows=3", "log.validate_every=7", "log.validate_dense=true"]
    for words, said in (
        (["data.validation_rows=0", "log.validate_every=0", "log.validate_dense=false"], "nothing"),
        (held, "3 rows, measured every 7 steps and at the end, with dense attention too"),
        ([*held, "log.validate_every=0", "attention.pattern=dense"], "3 rows, measured at the end"),
    ):
        assert main(["inspect", "quickstart-extend", *words]) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# held out ")]
        assert line.removeprefix("# held out").strip() == said


def test_rows_without_a_target_and_ranks_with_other_rows_are_refused(tmp_path):
    rows = Batch(*(torch.full((2, 5), -100) for _ in range(3)))
    with pytest.raises(DataError, match="the 2 held-out rows hold no token to predict.*data.validation_rows=0"):
        Validation(rows, None, None, micro_rows=1, dense=False)
    for result in run_processes(other_rows, 2, tmp_path / "work", tmp_path):
        assert isinstance(result, LaunchError) and "held-out rows differs between processes" in str(result)


def other_rows(directory: Path) -> None:
    recipe = tiny_recipe(directory, parallel__inner=2)
    run = Run(recipe, make_world(recipe))
    run.log.close()
    rows = Batch(*(torch.full((2, 5), run.world.rank) for _ in range(3)))
    Validation(rows, run.model, run.stepper, micro_rows=1, dense=False)
