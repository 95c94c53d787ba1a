"""The model of Qwen2.5-0.5B's shape, the attentions that take turns in it, and one step of mtrain's own step code."""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from mtrain.balance.work import tile_density
from mtrain.data.loader import Batch
from mtrain.layout import RingLayout
from mtrain.metrics import peak_memory_mb
from mtrain.models import attach, install_loss_head
from mtrain.models.build import load_model
from mtrain.models.context import MicroBatch, RingContext
from mtrain.models.hf_attention import mask, sparse_ring_attention
from mtrain.models.statistics import mask_density
from mtrain.optim import make_adamw
from mtrain.parallel import World, make_world
from mtrain.recipe import AttentionRecipe, DataRecipe, ModelRecipe, Recipe, SourceRecipe, TrainRecipe
from mtrain.step import Stepper, StepResult
from mtrain.trainer import enable_activation_checkpointing
from scripts.step_bench import laps as parts
from scripts.step_bench.laps import Laps

NAME = "mtrain_step_bench"
# https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json; positions up to 1M, so that no length is refused.
QWEN_05B: dict[str, Any] = {
    "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 1 << 20, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True,
}  # fmt: skip
TINY: dict[str, Any] = {
    **QWEN_05B, "vocab_size": 512, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """What is the same for all attentions."""

    config: dict[str, Any]
    device: torch.device
    precision: str
    block: int
    sink: int
    local: int
    loss_chunk: int = 1024
    # Standard deviation of the biases of q and k. With transformers' own weights attention is uniform: there is nothing to find,
    # and no coverage budget gives a density below 1. A constant in q and k makes a score that depends on the distance (RoPE) and
    # one that depends on the key: slashes and columns, as in the trained models of this family, whose biases are large.
    bias: float = 2.0

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.config["hidden_size"]) // int(self.config["num_attention_heads"])

    def attention(self, **keys: Any) -> AttentionRecipe:
        """A recipe of these sizes. Backends by name: never another one in silence."""
        backend = "triton" if self.device.type == "cuda" else "cpu"
        sizes = {"block": self.block, "sink": self.sink, "local": self.local, "backend": backend}
        return AttentionRecipe(**{**sizes, **keys})


@dataclass(frozen=True)
class Contestant:
    """One attention. ``attend`` (q, k, v [B, S, heads, D] -> out) takes the place of mtrain's own for dense kernels of others."""

    name: str
    recipe: AttentionRecipe
    kind: str = "dense"
    wanted: float = 1.0
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


@dataclass(frozen=True)
class TimedWorld(World):
    """From the norm of the gradients to the end of the step it is the optimizer's time."""

    laps: Laps | None = None

    def grad_norm(self, model: nn.Module) -> Tensor:
        """See `World.grad_norm`."""
        assert self.laps is not None
        self.laps.mark(parts.OPTIMIZER)
        return super().grad_norm(model)


@dataclass(frozen=True)
class Step:
    """One measured step: wall seconds, seconds of each part, peak memory in MiB, what the stepper said."""

    seconds: float
    parts: dict[str, float]
    peak_mb: float
    result: StepResult


class Bench:
    """One model, one optimizer, one process; attentions are exchanged between steps."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.laps = settings, Laps(settings.device)
        model_recipe = ModelRecipe(config=settings.config)
        train = TrainRecipe(steps=1, seq_len=settings.block, lr=1e-4, precision="bf16")
        recipe = Recipe(model_recipe, DataRecipe((SourceRecipe("induction"),)), train)
        self.world = TimedWorld(**vars(make_world(recipe)), laps=self.laps)
        if self.world.device.type != settings.device.type:
            raise RuntimeError(f"asked for {settings.device}, but Accelerate chose {self.world.device}")
        self.model: Any = load_model(model_recipe)
        _widen(self.model, settings.bias)
        install_loss_head(self.model, settings.loss_chunk)
        enable_activation_checkpointing(self.model)
        self.world.prepare(self.model)
        self._time_loss_head()
        self.new_optimizer()

    def new_optimizer(self) -> None:
        """Forget moments."""
        self.optimizer = make_adamw(self.model, lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def _time_loss_head(self) -> None:
        head, laps = self.model.get_output_embeddings(), self.laps

        def before(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            laps.mark(parts.LOSS)
            return parts.enter(laps, *args)

        def after(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            laps.mark(parts.REST)
            return parts.leave(laps, parts.LOSS, out)

        head.register_forward_pre_hook(before)
        head.register_forward_hook(after)

    def install(self, contestant: Contestant, length: int) -> RingContext:
        """Give the model an attention; everything of the one before is gone."""
        recipe = contestant.recipe
        attach(self.model, recipe, self.world.ring, RingLayout.build(recipe.layout, length, 1, recipe.block))
        self.model.set_attn_implementation(NAME)
        context: RingContext = self.model.mtrain_context
        context.bench = (self.laps, contestant.attend)  # type: ignore[attr-defined]
        context.plan.index = self.laps.timed(parts.ESTIMATION, context.plan.index)  # type: ignore[method-assign]
        return context

    def _stepper(self, contestant: Contestant, length: int) -> Stepper:
        context, precision = self.install(contestant, length), self.settings.precision
        return Stepper(self.model, context, self.optimizer, self.world, precision=precision, clip=1.0)

    def step(self, contestant: Contestant, batch: Batch, lr: float) -> Step:
        """One whole training step, measured."""
        stepper = self._stepper(contestant, batch.tokens.shape[1])
        self._synchronize()
        if self.settings.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        self.laps.start()
        try:
            result = stepper([batch], step=0, lr=lr)
            spent = self.laps.stop()
        finally:
            self.laps.cancel()
        return Step(time.perf_counter() - begin, spent, peak_memory_mb(self.settings.device), result)

    def waits(self, contestant: Contestant, batch: Batch) -> list[int] | None:
        """How often a step waits for the device [without marks, with marks]: equal, or the stopwatch disturbs. None on the CPU."""
        if self.settings.device.type != "cuda":
            return None
        counts = []
        for marks in (False, True):
            stepper = self._stepper(contestant, batch.tokens.shape[1])
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    if marks:
                        self.laps.start()
                    stepper([batch], step=0, lr=0.0)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    self.laps.cancel()
            counts.append(sum("called a synchronizing" in str(warning.message) for warning in said))
        return counts

    def look(self, contestant: Contestant, batch: Batch) -> float:
        """The density of an attention, from a forward through the decoder without the head."""
        context = self.install(contestant, batch.tokens.shape[1])
        context.begin(None, step=0)
        device = self.world.device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            self.model.base_model(input_ids=batch.tokens.to(device), use_cache=False)
        return self.densities()[0]

    def densities(self) -> tuple[float, float]:
        """Of the newest forward, means over layers: (allowed pairs, computed tile area) over the causal ones."""
        context = self.model.mtrain_context
        patterns = list(context.latest.index.values())
        if not patterns or patterns[0].full:
            return 1.0, 1.0
        found = [(mask_density(p, ring=context.ring), tile_density(p, ring=context.ring)) for p in patterns]
        return tuple(sum(column) / len(column) for column in zip(*found, strict=True))  # type: ignore[return-value]

    def recover(self) -> None:
        """After an out-of-memory, outside of its handler (whose traceback holds tensors): give everything back."""
        self.optimizer.zero_grad(set_to_none=True)
        self.install(Contestant("none", self.settings.attention(pattern="dense")), self.settings.block)
        gc.collect()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()

    def _synchronize(self) -> None:
        if self.settings.device.type == "cuda":
            torch.cuda.synchronize()

    def batch(self, length: int) -> Batch:
        """One row of random tokens, one document."""
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(self.settings.config["vocab_size"], (1, length + 1), generator=generator)
        return Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros(1, length, dtype=torch.int64), 0, (0,), ("random",))


def with_budget(contestant: Contestant, settings: Settings, budget: Any) -> Contestant:
    """The same contestant with another budget."""
    return replace(contestant, recipe=settings.attention(budget=budget))


def _widen(model: Any, deviation: float) -> None:
    """Random biases of q and k, see `Settings.bias`."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.base_model.layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                projection.bias.copy_(torch.randn(projection.bias.shape, generator=generator) * deviation)


def timed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    mtrain_batch: MicroBatch,
    **keys: Any,
) -> tuple[Tensor, None]:
    """The attention function of the model: mtrain's, or that of another kernel, between two marks."""
    laps, attend = mtrain_batch.context.bench  # type: ignore[attr-defined]
    with laps.part(parts.FORWARD):
        query, key, value = parts.enter(laps, query, key, value)
        if attend is None:
            out, _ = sparse_ring_attention(module, query, key, value, attention_mask, mtrain_batch=mtrain_batch, **keys)
        else:
            q, k, v = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
            out = attend(q, k, v)
        return parts.leave(laps, parts.BACKWARD, out), None


AttentionInterface.register(NAME, timed_attention)
AttentionMaskInterface.register(NAME, mask)
