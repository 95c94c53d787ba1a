"""The loop: recipe in, checkpoints and a plain Hugging Face model out. One file to read to know what a run does."""

from __future__ import annotations

import functools
import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, cast

from accelerate.utils import set_seed
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from mtrain.checkpoint import Checkpointer, load_state, load_tensors
from mtrain.data.loader import make_loader
from mtrain.data.tokenizer import load_tokenizer
from mtrain.errors import CheckpointError, MtrainError
from mtrain.export import export_model
from mtrain.layout import RingLayout
from mtrain.metrics import MetricsLog, Window, density_summary, peak_memory_mb, read_lines
from mtrain.models.attach import attach
from mtrain.models.build import adopt_special_tokens, load_model
from mtrain.models.context import RingContext
from mtrain.models.loss import install_loss_head
from mtrain.optim import learning_rate, make_adamw
from mtrain.parallel import World, fingerprint, make_world
from mtrain.rebalance import make_rebalancer
from mtrain.recipe import Recipe
from mtrain.state import (
    changed_keys,
    config_fingerprint,
    load_model_tensors,
    load_optimizer_tensors,
    model_tensors,
    optimizer_tensors,
    require_same_config,
)
from mtrain.step import Stepper, StepResult
from mtrain.validation import make_validation

logger = logging.getLogger(__name__)

# Recipe keys that may change between a checkpoint and its resumption without a word: what is computed stays the same.
_FREE_KEYS = ("checkpoint.", "log.", "output", "name", "parallel.", "train.activation_checkpointing", "model.path")


def train(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe to its end, to ``checkpoint.stop_after``, or until SIGTERM.

    Called by every process of the launch (one without a launcher). Resumes as ``checkpoint.resume`` says; N steps in one go and
    N/2 + N/2 over a resume give bitwise the same losses on the same mesh.

    Returns:
        step, tokens, loss (of the last step; None when there was nothing to do), stopped (None, "stop_after" or "signal"),
        resumed_from (step or None), validation (the last measurement of the held-out loss, as in run.jsonl, or None), checkpoint
        and export (paths or None), output.

    Raises:
        MtrainError: anything a user can mend: a launch that does not fit the recipe, data, model, checkpoint, a lost peer, a loss
            that is not finite.
    """
    world = make_world(recipe)
    summary = _run(recipe, world)
    # The gradient engine must be gone before the process group: if it held the last reference to a group, that would be
    # destroyed under the interpreter lock while a transport thread waits for the same lock (seen as a hang at the end).
    gc.collect()
    world.close()
    return summary


def _run(recipe: Recipe, world: World) -> dict[str, Any]:
    run = Run(recipe, world)
    try:
        with StopRequest() as stop:
            return run.loop(stop)
    finally:
        run.log.close()


class StopRequest:
    """SIGTERM or SIGINT asks the run to stop after the step it is in; another one, some seconds later, ends it at once."""

    # A launcher passes on the Ctrl-C that the terminal has already delivered: that echo is not a second request.
    echo_s = 3.0

    def __init__(self) -> None:
        self.asked = False
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows signal handlers in the main thread only; elsewhere (a notebook's worker) signals stay as they are.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._when = True, now
        elif now - self._when > self.echo_s:
            self._restore()
            os.kill(os.getpid(), number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Run:
    """Everything a run consists of, built from its recipe and, if there is one, its checkpoint."""

    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe, self.world = recipe, world
        self.output = Path(recipe.output)
        train = recipe.train
        set_seed(recipe.seed)
        self.tokenizer = load_tokenizer(_tokenizer_name(recipe))
        self.loader = make_loader(
            recipe, self.tokenizer, dp_rank=world.dp_rank, dp_size=world.dp, progress=world.is_main
        )
        self._build_model()
        self.validation = make_validation(recipe, self.tokenizer, self.model, self.stepper)
        self.validated: dict[str, float] | None = None
        self.rate = functools.partial(
            learning_rate,
            peak=train.lr,
            schedule=train.schedule,
            total_steps=train.steps,
            warmup_steps=train.warmup_steps,
            min_ratio=train.min_lr_ratio,
        )
        self.step, self.tokens = 0, 0
        self.checkpointer = Checkpointer(self.output / "checkpoints", world, recipe.checkpoint.keep)
        self.saved: Path | None = None
        self.resumed_from = self._resume()
        self.log = MetricsLog(
            self.output,
            enabled=world.is_main,
            start_step=self.step,
            total_steps=train.steps,
            tensorboard=recipe.log.tensorboard,
        )
        if self.resumed_from is not None:
            self.log.say(f"resuming after step {self.step} from {self.saved}")
        self.window, self.shown = Window(), dict[str, str]()

    def _build_model(self) -> None:
        recipe, ring = self.recipe, self.world.ring
        if not (self.world.is_main and sys.stderr.isatty()):
            disable_progress_bar()  # one bar for a person is enough; ranks and log files need none
        train, attention = recipe.train, recipe.attention
        model = load_model(recipe.model, seed=recipe.seed, world_size=ring.world_size, vocab_size=len(self.tokenizer))
        if recipe.model.config is not None:
            adopt_special_tokens(model, self.tokenizer, recipe.model.config)
        limit = model.config.max_position_embeddings
        if limit < train.seq_len and self.world.is_main:
            logger.warning(
                "the model's max_position_embeddings %d is below train.seq_len %d, and its export would tell others not to use "
                "more: set model.max_position_embeddings=%d, and model.rope where its positions should be stretched",
                *(limit, train.seq_len, train.seq_len),
            )
        install_loss_head(model, train.loss_chunk)
        layout = RingLayout.build(attention.layout, train.seq_len, ring.world_size, attention.block)
        self.model: Any = attach(model, attention, ring, layout)
        self.context = cast(RingContext, self.model.mtrain_context)
        if train.activation_checkpointing:
            enable_activation_checkpointing(self.model)
        prepared = self.world.prepare(self.model, train.precision)
        self.optimizer = make_adamw(
            self.model, lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=train.weight_decay
        )
        self.rebalancer = make_rebalancer(attention.layout, self.context, self.world)
        self.stepper = Stepper(
            prepared,
            self.context,
            self.optimizer,
            self.world,
            precision=train.precision,
            clip=train.clip,
            rebalancer=self.rebalancer,
        )

    # ------------------------------------------------------------------------------------------------------- the loop

    def loop(self, stop: StopRequest) -> dict[str, Any]:
        """Step until the end or a reason to stop; save; export when the recipe is done."""
        recipe, result = self.recipe, None
        stopped: str | None = None
        if self.resumed_from and self._validates() and not self._is_measured():
            self.validate()
        while self.step < recipe.train.steps and stopped is None:
            result = self.one_step(stop.asked)
            if self.step < recipe.train.steps:
                stopped = (
                    "signal" if result.stop else "stop_after" if self.step == recipe.checkpoint.stop_after else None
                )
            last = stopped is not None or self.step == recipe.train.steps
            if last or (recipe.checkpoint.every and self.step % recipe.checkpoint.every == 0):
                self.save(last)
            if self._validates():  # after the save: a process that dies in it resumes there, and measures first
                self.validate()
        export = None if stopped else self.export()
        if stopped:
            self.log.say(f"stopped after step {self.step} ({stopped}); the same command goes on from {self.saved}")
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": None if result is None else result.loss,
            "stopped": stopped,
            "resumed_from": self.resumed_from,
            "validation": self.validated,
            "checkpoint": None if self.saved is None else str(self.saved),
            "export": None if export is None else str(export),
            "output": str(self.output),
        }

    def one_step(self, asked_to_stop: bool = False) -> StepResult:
        """Data, forward, backward, update, record."""
        started = time.perf_counter()
        # From (seed, step, rank) and never from the past: nothing random needs saving, and dropout resumes exactly.
        set_seed(int(fingerprint(f"{self.recipe.seed} {self.step} {self.world.rank}")[:8], 16))
        batches = self.loader.next_step()
        if self.step == (self.resumed_from or 0):
            rows = [t.numpy().tobytes() for b in batches for t in (b.tokens, b.labels, b.doc_start)]
            self.world.require_same_in_ring("the first batch", b"".join(rows))
        lr, measure_recall = self.rate(self.step), self._measures_recall(self.step)
        result = self.stepper(batches, step=self.step, lr=lr, measure_recall=measure_recall, stop=asked_to_stop)
        self.step += 1
        self.record(result, lr, time.perf_counter() - started)
        return result

    def record(self, result: StepResult, lr: float, seconds: float) -> None:
        """Progress bar every step; a line of run.jsonl every `log.every` steps, at both ends, at a stop, and with recall."""
        self.tokens += result.tokens
        self.window.add(result.loss, result.targets, result.tokens, seconds)
        # A stop counts as an end: what the window holds is not saved, and would be missing from the record.
        ends = (1, self.recipe.train.steps, self.recipe.checkpoint.stop_after)
        due = self.step % self.recipe.log.every == 0 or self.step in ends or result.stop
        if due or self._measures_recall(self.step - 1):
            self.shown = self._write_line(result, lr)
            self.window.reset()
        self.log.advance({"loss": f"{result.loss:.3f}", **self.shown})

    def _write_line(self, result: StepResult, lr: float) -> dict[str, str]:
        line: dict[str, Any] = {"step": self.step, **self.window.rates(), "lr": lr, "grad_norm": result.grad_norm}
        line |= {"tokens": self.tokens, "targets": result.targets, "memory_mb": peak_memory_mb(self.world.device)}
        line["time_imbalance"] = max(result.seconds) * len(result.seconds) / sum(result.seconds)
        shown = {"tok/s": f"{line['tokens_per_s']:,.0f}"}
        if self.world.dp_rank == 0:  # one ring speaks for all: the others hold other rows of the same mixture
            statistics = self.context.statistics()
            line |= density_summary(statistics["density_per_layer"])
            for key in ("tile_density", "recall", "reach", "reach_any_head", "worker_imbalance", "step_imbalance"):
                line[key] = statistics.get(key)
            shown["density"] = f"{line['density']:.3f}"
        self.log.write(line)
        return shown

    def _measures_recall(self, step: int) -> bool:
        every = self.recipe.log.recall_every
        return every > 0 and step % every == 0

    def _validates(self) -> bool:
        every = self.recipe.log.validate_every
        due = self.step == self.recipe.train.steps or (every > 0 and self.step % every == 0)
        return self.validation is not None and due

    def _is_measured(self) -> bool:
        """Whether run.jsonl has the held-out loss of this step; a run that was killed while it measured has saved the step."""

        def found() -> bool:
            lines = read_lines(self.log.path, having="validation_loss") if self.world.is_main else []
            return any(line["step"] == self.step for line in lines)

        return any(self.world.together("the main process to read its record", found))

    def validate(self) -> None:
        """Measure the loss on the held-out rows: a line of run.jsonl of its own, and one that is said."""
        assert self.validation is not None
        # With the attention of the step just done: at the end of a warm-up, none that was never trained.
        self.validated = found = self.validation(self.step - 1)
        self.log.write({"step": self.step, **found})
        told = f"held-out loss {found['validation_loss']:.4f}, perplexity {found['validation_perplexity']:.4g}"
        dense = f", with dense attention {found['validation_loss_dense']:.4f}" if self.validation.dense else ""
        self.log.say(f"step {self.step}: {told}{dense}")

    # ------------------------------------------------------------------------------------------- saving and resuming

    def save(self, last: bool) -> None:
        """Write a checkpoint. One that fails in mid-run is a warning: the older ones are intact and the next may succeed."""
        world, tensors = self.world, {}
        # Patterns that are kept over steps belong to the rows of one ring, so each ring's first rank brings its own.
        if world.ring.rank == 0 and (kept := self.context.plan.state_dict()):
            tensors[f"patterns_{world.dp_rank}"] = kept
        model = world.gather_tensors(model_tensors(self.model))
        optimizer = world.gather_tensors(optimizer_tensors(self.model, self.optimizer))
        if world.is_main:
            tensors |= {"model": model, "optimizer": optimizer}
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "data": self.loader.state_dict(),
            "balancer": None if self.rebalancer is None else self.rebalancer.state_dict(),
            "recipe": self.recipe.to_dict(),
            "config": config_fingerprint(self.model.config),
        }
        try:
            self.saved = self.checkpointer.save(self.step, tensors, state)
        except CheckpointError as error:
            if last:
                raise
            if world.is_main:
                logger.warning("CHECKPOINT OF STEP %d FAILED, training goes on: %s", self.step, error)

    def _resume(self) -> int | None:
        path = self.checkpointer.find(self.recipe.checkpoint.resume)
        if path is None:
            self.checkpointer.set_aside_after(-1)
            return None
        state = load_state(path)
        try:
            require_same_config(config_fingerprint(self.model.config), state["config"])
            load_model_tensors(self.model, load_tensors(path, "model"), self.world.as_held)
            load_optimizer_tensors(self.model, self.optimizer, load_tensors(path, "optimizer"), self.world.as_held)
        except CheckpointError as error:
            raise CheckpointError(f"cannot resume from {path}: {error}") from None
        changed = [
            key for key in changed_keys(self.recipe.to_dict(), state["recipe"]) if not key.startswith(_FREE_KEYS)
        ]
        if changed and self.world.is_main:
            logger.warning("resuming %s with other settings than it was trained with: %s", path, ", ".join(changed))
        patterns = f"patterns_{self.world.dp_rank}"
        if (path / f"{patterns}.safetensors").exists():
            self.context.plan.load_state_dict(load_tensors(path, patterns))
        if self.rebalancer is not None and state["balancer"] is not None:
            self.rebalancer.load_state_dict(state["balancer"])
        self.loader.load_state_dict(state["data"])
        self.step, self.tokens, self.saved = state["step"], state["tokens"], path
        self.checkpointer.set_aside_after(self.step)
        return self.step

    def export(self) -> Path:
        """The model as a plain Hugging Face directory, <output>/export; on every rank when it is there."""
        directory = self.output / "export"
        tensors = self.world.gather_tensors(model_tensors(self.model))
        self.world.together(
            "the main process to export the model", lambda: self._export(directory, tensors), error=CheckpointError
        )
        self.log.say(f"finished {self.step} steps; the model is in {directory}")
        return directory

    def _export(self, directory: Path, tensors: dict[str, Tensor]) -> None:
        if self.world.is_main:
            training = {"step": self.step, "tokens": self.tokens, "recipe": self.recipe.to_dict()}
            export_model(self.model, self.tokenizer, directory, training=training, tensors=tensors)


def enable_activation_checkpointing(model: Any) -> None:
    """Recompute each decoder layer in the backward pass (transformers 5.21 and later call the switch by another name)."""
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch()


def _tokenizer_name(recipe: Recipe) -> str:
    if recipe.tokenizer != "model":
        return recipe.tokenizer
    if recipe.model.path is None:
        raise MtrainError(
            "tokenizer: model needs model.path; a model from a config has no tokenizer of its own (use bytes)"
        )
    return recipe.model.path
