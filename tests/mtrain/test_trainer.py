"""One process, end to end: it learns, resumes bitwise, stops when asked, and never updates on nonsense."""

import logging
import math
import os
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mtrain.checkpoint import list_checkpoints
from mtrain.comm import SingleRing
from mtrain.data.loader import Batch
from mtrain.errors import CheckpointError, DataError, MtrainError, RecipeError
from mtrain.layout import RingLayout
from mtrain.metrics import keep_lines_until, read_lines
from mtrain.optim import learning_rate, make_adamw
from mtrain.parallel import make_world
from mtrain.state import model_tensors
from mtrain.step import Stepper, shard_batch
from mtrain.trainer import Run, StopRequest, train
from tests.mtrain.tiny import tiny_recipe


def losses(directory, run="run") -> list[float]:
    return [line["loss"] for line in read_lines(directory / run / "run.jsonl")]


def files(directory, run="run") -> dict[str, bytes]:
    """Weights and optimizer of the newest checkpoint, byte for byte."""
    newest = list_checkpoints(directory / run / "checkpoints")[-1]
    return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}


# ------------------------------------------------------------------------------------------------ schedule and optimizer


def test_schedules():
    settings = {"peak": 2.0, "total_steps": 11, "warmup_steps": 4, "min_ratio": 0.25}
    for kind in ("constant", "linear", "cosine"):
        rates = [learning_rate(step, schedule=kind, **settings) for step in range(14)]
        assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0
        assert rates[10:] == pytest.approx([2.0 if kind == "constant" else 0.5] * 4)
        assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert learning_rate(7, schedule="linear", **settings) == pytest.approx(1.25)
    assert learning_rate(5, schedule="cosine", **settings) == pytest.approx(0.5 + 1.5 * (1 + math.cos(math.pi / 6)) / 2)
    assert learning_rate(0, peak=1.0, schedule="cosine", total_steps=1) == 1.0
    with pytest.raises(RecipeError, match="unknown train.schedule 'poly'; choose one of constant, linear, cosine"):
        learning_rate(9, schedule="poly", **settings)


def test_only_matrices_decay():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
    model[2].weight.requires_grad_(False)
    groups = make_adamw(model, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1).param_groups
    assert [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [
        (0.1, [(2, 3)]),
        (0.0, [(2,), (2,), (2,), (2,)]),
    ]
    with pytest.raises(RecipeError, match="no trainable parameter"):
        make_adamw(model.requires_grad_(False), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


# --------------------------------------------------------------------------------------------------------- end to end


def test_a_run_learns_logs_and_exports(tmp_path):
    recipe = tiny_recipe(
        tmp_path, train__steps=40, train__lr=1e-2, checkpoint__every=0, log__every=10, log__tensorboard=True,
        log__recall_every=40,
    )  # fmt: skip
    summary = train(recipe)
    assert summary["step"] == 40 and summary["stopped"] is None and summary["resumed_from"] is None
    assert summary["tokens"] == 40 * 2 * 100
    lines = read_lines(tmp_path / "run" / "run.jsonl")
    assert [line["step"] for line in lines] == [1, 10, 20, 30, 40]
    assert lines[0]["loss"] > 5.5 and lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert 0 < lines[-1]["density"] < 1 and len(lines[-1]["density_layers"]) == 2
    assert 0 < lines[0]["recall"] <= 1 and "recall" not in lines[1]
    assert all(line["worker_imbalance"] == 1 and line["tokens_per_s"] > 0 for line in lines)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000040"]
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    model = AutoModelForCausalLM.from_pretrained(summary["export"])
    assert type(model.lm_head) is torch.nn.Linear and model.config._attn_implementation == "sdpa"
    ids = torch.tensor([AutoTokenizer.from_pretrained(summary["export"])("red green blue one")["input_ids"]])
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert loss < 4


def test_export_is_the_trained_model_with_its_extended_rope(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    recipe = tiny_recipe(tmp_path, train__steps=1, model__rope=rope, model__max_position_embeddings=1024)
    run = Run(recipe, make_world(recipe))
    with StopRequest() as stop:
        summary = run.loop(stop)
    run.log.close()
    model = AutoModelForCausalLM.from_pretrained(summary["export"], attn_implementation="eager")
    assert model.config.max_position_embeddings == 1024 and model.config.use_cache
    assert {**model.config.rope_parameters, **rope} == model.config.rope_parameters
    for name, tensor in model_tensors(run.model).items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert run.model.config._attn_implementation == "mtrain"  # exporting does not disturb the model in training


RESUMED = {
    "plain": {},
    "kept patterns": {"attention__refresh": {"every": 4}},
    "recompute, accumulation, bf16": {
        "train__activation_checkpointing": True, "train__batch_rows": 4, "train__precision": "bf16",
    },
    "balanced": {"attention__layout": "balanced"},
}  # fmt: skip


@pytest.mark.parametrize("changes", RESUMED.values(), ids=RESUMED)
def test_stopping_and_resuming_changes_nothing_at_all(tmp_path, changes):
    train(tiny_recipe(tmp_path, "whole", **changes))
    first = train(tiny_recipe(tmp_path, "halves", checkpoint__stop_after=3, **changes))
    assert first["stopped"] == "stop_after" and first["step"] == 3 and first["export"] is None
    second = train(tiny_recipe(tmp_path, "halves", **changes))
    assert second["resumed_from"] == 3 and second["step"] == 6
    assert second["tokens"] == 6 * 100 * changes.get("train__batch_rows", 2)
    whole = losses(tmp_path, "whole")
    assert losses(tmp_path, "halves") == whole and len(whole) == 6
    state = files(tmp_path, "whole")
    assert files(tmp_path, "halves") == state and {"model.safetensors", "optimizer.safetensors"} <= state.keys()
    # A finished run has nothing left to do.
    third = train(tiny_recipe(tmp_path, "halves", **changes))
    assert third["resumed_from"] == 6 and third["loss"] is None and losses(tmp_path, "halves") == whole


def test_every_step_is_in_the_record_also_when_the_run_is_stopped_between_two_lines(tmp_path):
    """The losses of lines that cover several steps, times their steps, add up to those of a run that logs every step."""
    train(tiny_recipe(tmp_path, "each"))
    train(tiny_recipe(tmp_path, checkpoint__stop_after=3, log__every=10))
    train(tiny_recipe(tmp_path, log__every=10))
    each, lines = losses(tmp_path, "each"), read_lines(tmp_path / "run" / "run.jsonl")
    assert [line["step"] for line in lines] == [1, 3, 6]
    targets = [line["targets"] for line in read_lines(tmp_path / "each" / "run.jsonl")]
    for line, first, last in zip(lines, (0, 1, 3), (1, 3, 6), strict=True):
        total = sum(loss * count for loss, count in zip(each[first:last], targets[first:last], strict=True))
        assert line["loss"] == pytest.approx(total / sum(targets[first:last]), rel=1e-5)


def test_a_position_limit_below_the_rows_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tiny_recipe(tmp_path, train__steps=1))
        assert "max_position_embeddings" not in caplog.text
        train(tiny_recipe(tmp_path, "short", train__steps=1, model__max_position_embeddings=99))
    assert "max_position_embeddings 99 is below train.seq_len 100" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_stops(tmp_path, monkeypatch, number):
    original = Stepper.__call__

    def signalled(self, *args, step, **kwargs):
        result = original(self, *args, step=step, **kwargs)
        if step == 2:
            os.kill(os.getpid(), number)
        return result

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "__call__", signalled)
        summary = train(tiny_recipe(tmp_path, checkpoint__every=0))
    assert summary["stopped"] == "signal" and summary["step"] == 4  # told to all ranks with the next step's losses
    assert summary["checkpoint"].endswith("step_00000004")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert train(tiny_recipe(tmp_path))["resumed_from"] == 4


def test_the_echo_of_a_signal_is_ignored_a_later_one_is_not():
    # A shell starts background jobs with SIGINT ignored; here it is what a terminal would find.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked
            stop.echo_s = -1.0
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                signal.sigtimedwait([], 1)  # handlers run between bytecodes
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_output_that_cannot_be_written_ends_the_run_before_it_starts(tmp_path):
    (tmp_path / "run").write_text("a file where a directory should be")
    with pytest.raises(CheckpointError, match="NotADirectoryError|FileExistsError"):
        train(tiny_recipe(tmp_path))


def test_resume_goes_around_damage_loudly(tmp_path, caplog):
    train(tiny_recipe(tmp_path, "whole"))
    train(tiny_recipe(tmp_path, checkpoint__stop_after=5))
    newest = tmp_path / "run" / "checkpoints" / "step_00000005"
    (newest / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step_00000005/model.safetensors is damaged: 0 bytes"):
        train(tiny_recipe(tmp_path, checkpoint__resume=str(newest)))
    with caplog.at_level(logging.WARNING):
        summary = train(tiny_recipe(tmp_path))
    assert summary["resumed_from"] == 4 and "DAMAGED CHECKPOINT" in caplog.text
    assert losses(tmp_path) == losses(tmp_path, "whole")
    assert (newest.parent / "set_aside_0_step_00000005").is_dir()


def test_never_resuming_keeps_the_earlier_run_out_of_the_way(tmp_path):
    train(tiny_recipe(tmp_path))
    summary = train(tiny_recipe(tmp_path, checkpoint__resume="never", checkpoint__stop_after=1))
    assert summary["resumed_from"] is None and len(losses(tmp_path)) == 1
    directory = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(directory)] == ["step_00000001"]
    assert {"set_aside_0_step_00000004", "set_aside_0_step_00000006"} <= {path.name for path in directory.iterdir()}


def test_checkpoints_of_other_models_and_data_are_refused(tmp_path, caplog):
    train(tiny_recipe(tmp_path, checkpoint__stop_after=2))
    with pytest.raises(
        CheckpointError, match=r"cannot resume from .*step_00000002: .*another model: config 'hidden_size' is 32 there"
    ):
        train(tiny_recipe(tmp_path, model__config__hidden_size=64))
    with pytest.raises(CheckpointError, match="config 'rope_parameters' is"):
        train(tiny_recipe(tmp_path, model__rope={"rope_type": "default", "rope_theta": 5e5}))
    with pytest.raises(DataError, match="seed 0, this run has 1"):
        train(tiny_recipe(tmp_path, seed=1))
    with caplog.at_level(logging.WARNING):
        train(tiny_recipe(tmp_path, train__lr=1e-4, attention__local=16, log__every=3))
    assert "other settings than it was trained with: attention.local, train.lr" in caplog.text


def test_a_failed_save_in_mid_run_is_a_warning_at_the_end_an_error(tmp_path, caplog, monkeypatch):
    from mtrain import checkpoint

    original, failing = checkpoint.save_file, [True]

    def full(*args, **kwargs):
        if failing[0]:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    monkeypatch.setattr(Run, "export", lambda self: None)
    with caplog.at_level(logging.WARNING), pytest.raises(CheckpointError, match="No space left"):
        train(tiny_recipe(tmp_path))
    assert "CHECKPOINT OF STEP 2 FAILED, training goes on" in caplog.text and "STEP 4 FAILED" in caplog.text
    failing[0] = False
    assert train(tiny_recipe(tmp_path))["checkpoint"].endswith("step_00000006")


# -------------------------------------------------------------------------------------------------------- single steps


@pytest.fixture
def run(tmp_path):
    recipe = tiny_recipe(tmp_path, train__batch_rows=4)
    made = Run(recipe, make_world(recipe))
    yield made
    made.log.close()


def snapshot(run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model_tensors(run.model).items()}


def test_a_loss_that_is_not_finite_updates_nothing(run):
    run.one_step()
    with torch.no_grad():
        run.model.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    before = snapshot(run)
    with pytest.raises(
        MtrainError, match=r"step 2: the loss on rank\(s\) \[0\] is nan; nothing was updated.*rows it was fed \(text"
    ):
        run.one_step()
    assert all(
        torch.equal(
            a,
            b,
        )
        or a.isnan().any()
        for a, b in zip(snapshot(run).values(), before.values(), strict=True)
    )
    assert all(p.grad is None for p in run.model.parameters())


def test_a_gradient_that_is_not_finite_is_named_and_updates_nothing(run):
    run.one_step()
    before = snapshot(run)
    run.model.model.layers[0].self_attn.q_proj.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(
        MtrainError, match=r"gradient norm is (nan|inf).*1 parameters are hit, first .*layers.0.self_attn.q_proj.weight"
    ):
        run.one_step()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(run).values(), before.values(), strict=True))


def gradients(run, batches) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of one step, before any update."""
    run.optimizer.zero_grad(set_to_none=True)
    targets = run.stepper._count_targets(batches, 0)
    loss = run.stepper._accumulate(batches, targets, 0, False)
    return loss, {name: p.grad.clone() for name, p in run.model.named_parameters()}


def joined(batches) -> list[Batch]:
    return [Batch(*(torch.cat([getattr(b, key) for b in batches]) for key in ("tokens", "labels", "doc_start")))]


def test_accumulation_is_one_large_batch_also_when_targets_are_uneven(run):
    batches = run.loader.next_step()
    assert len(batches) == 4
    batches[1].labels[:, 5:] = -100
    batches[2].labels[:] = -100
    loss, grads = gradients(run, batches)
    whole_loss, whole = gradients(run, joined(batches))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name, grad in grads.items():
        assert torch.allclose(grad, whole[name], rtol=1e-4, atol=1e-6 * float(whole[name].abs().max())), name


def test_a_step_without_targets_is_zero_not_nan(run):
    batches = run.loader.next_step()
    for batch in batches:
        batch.labels[:] = -100
    loss, grads = gradients(run, batches)
    assert loss == 0.0 and all(float(grad.abs().max()) == 0.0 for grad in grads.values())
    result = run.stepper(batches, step=0, lr=0.0)
    assert result.loss == 0.0 and result.targets == 0 and result.grad_norm == 0.0


def test_the_loss_is_that_of_plain_transformers_on_one_document(run):
    """Dense pattern, one document: labels, shifting, scaling and RoPE positions agree with the ordinary training call."""
    run.context.plan.recipe = run.recipe.attention.__class__(pattern="dense", block=8)
    ids = torch.randint(0, 256, (1, 100), generator=torch.Generator().manual_seed(3))
    labels = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    loss, _ = gradients(run, [Batch(ids, labels, torch.zeros_like(ids))])
    plain = AutoModelForCausalLM.from_config(run.model.config, attn_implementation="sdpa")
    plain.load_state_dict(run.model.state_dict())
    assert loss == pytest.approx(float(plain(ids, labels=ids).loss.detach()), rel=1e-5)


def test_clipping_scales_by_the_global_norm(run, monkeypatch):
    batches = run.loader.next_step()
    _, grads = gradients(run, batches)
    norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads.values()))
    seen = {}
    record = lambda: seen.update({name: p.grad.clone() for name, p in run.model.named_parameters()})  # noqa: E731
    monkeypatch.setattr(run.optimizer, "step", record)
    run.optimizer.zero_grad()
    for clip, scale in ((norm / 10, 0.1), (norm * 10, 1.0), (0.0, 1.0)):
        run.stepper.clip = clip
        assert run.stepper(batches, step=0, lr=0.0).grad_norm == pytest.approx(norm, rel=1e-5)
        for name, grad in grads.items():
            assert torch.allclose(seen[name], grad * scale, rtol=1e-4, atol=1e-9), name


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
def test_shards_hold_every_token_once_and_padding_predicts_nothing(kind):
    seq_len, ranks = 37, 3
    layout = RingLayout.build(kind, seq_len, ranks, 4)
    tokens = torch.arange(1, seq_len + 1)[None]
    batch = Batch(tokens, tokens + 100, torch.zeros_like(tokens))
    shards = [shard_batch(batch, layout, rank, torch.device("cpu")) for rank in range(ranks)]
    assert all(shard.doc_start is None and int(shard.positions.max()) < seq_len for shard in shards)
    labels = torch.cat([shard.labels[0] for shard in shards])
    assert sorted(labels[labels != -100].tolist()) == list(range(101, 101 + seq_len))
    for shard in shards:
        real = shard.labels[0] != -100
        assert torch.equal(shard.positions[0][real], shard.tokens[0][real] - 1)
    batch.doc_start[0, 9:] = 9
    packed = [shard_batch(batch, layout, rank, torch.device("cpu")).doc_start for rank in range(ranks)]
    assert torch.equal(layout.unshard(packed, 1), batch.doc_start)


# --------------------------------------------------------------------------------------------------------------- record


def test_run_file_forgets_an_abandoned_future_and_half_a_line(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + '{"step": 5, "lo')
    keep_lines_until(path, 3)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 3]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(MtrainError, match="run.jsonl:2: not JSON"):
        read_lines(path)


def test_single_process_ring_sends_nothing(run):
    run.one_step()
    assert isinstance(run.world.ring, SingleRing) and not run.world.ring.traffic["shift_inner_kv"]
