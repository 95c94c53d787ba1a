"""One optimizer step: rows into shards, micro-batches forward and backward, one exact loss, a check, an update."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtrain.data.loader import Batch
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout
from mtrain.models.context import RingContext
from mtrain.models.loss import IGNORE, scaled_loss
from mtrain.optim import set_learning_rate
from mtrain.parallel import World
from mtrain.rebalance import Rebalancer


@dataclass(frozen=True)
class Shard:
    """One micro-batch as one rank of the ring holds it, in layout order.

    Attributes:
        tokens: int64 [B, n].
        labels: int64 [B, n], shifted before sharding; -100 where nothing is to be predicted, padding included.
        positions: int64 [1, n] global positions for RoPE; padding repeats the last real one, which no real token ever sees.
        doc_start: int64 [B, n], or None when no row holds more than one document.
    """

    tokens: Tensor
    labels: Tensor
    positions: Tensor
    doc_start: Tensor | None


def shard_batch(batch: Batch, layout: RingLayout, rank: int, device: torch.device) -> Shard:
    """The rank's part of whole rows, on the device. The only place where tokens are permuted into the layout."""
    positions = layout.positions(rank)
    padding = positions >= layout.seq_len
    # Known from the whole rows, so all ranks of the ring decide alike.
    packed = bool(batch.doc_start.any())
    return Shard(
        tokens=layout.shard(batch.tokens, rank, 1).to(device, non_blocking=True),
        labels=layout.shard(batch.labels, rank, 1).masked_fill(padding, IGNORE).to(device, non_blocking=True),
        positions=positions.clamp(max=layout.seq_len - 1)[None].to(device, non_blocking=True),
        doc_start=layout.shard(batch.doc_start, rank, 1).to(device, non_blocking=True) if packed else None,
    )


@dataclass(frozen=True)
class StepResult:
    """What one step was, the same on every rank.

    Attributes:
        loss: mean over all valid target tokens of the step, in nats.
        targets: how many those were.
        tokens: tokens processed, over all rows.
        grad_norm: global norm before clipping.
        seconds: wall time of forward and backward by rank.
        stop: some rank was asked to stop.
    """

    loss: float
    targets: int
    tokens: int
    grad_norm: float
    seconds: list[float]
    stop: bool


class Stepper:
    """Runs optimizer steps on a prepared model.

    Args:
        model: wrapped by `World.prepare`; its forward answers ``shift_labels`` with the sum of token losses.
        context: the attached model's `RingContext`; its layout decides which rank of the ring holds what.
        optimizer: over the model's parameters.
        world: the processes.
        precision: "fp32" or "bf16" (autocast of forward; parameters stay as they are).
        clip: largest global gradient norm; 0: none.
        rebalancer: sets the layout before each step and measures it, for the layout "balanced".
    """

    def __init__(
        self,
        model: nn.Module,
        context: RingContext,
        optimizer: torch.optim.Optimizer,
        world: World,
        *,
        precision: str,
        clip: float,
        rebalancer: Rebalancer | None = None,
    ) -> None:
        self.model, self.context, self.optimizer, self.world = model, context, optimizer, world
        self.precision, self.clip, self.rebalancer = precision, clip, rebalancer

    def __call__(
        self, batches: Sequence[Batch], *, step: int, lr: float, measure_recall: bool = False, stop: bool = False
    ) -> StepResult:
        """One update from this dp rank's whole rows.

        Args:
            batches: the micro-batches of this step, the same number on every rank.
            step: 0 for the first update.
            lr: learning rate of this update.
            measure_recall: compare the attention of the last micro-batch with dense attention (one dense forward).
            stop: this rank has been asked to stop; told to all.

        Raises:
            MtrainError: a loss or the gradient norm is not finite. The parameters are those from before the step.
            LaunchError: a peer was lost.
        """
        started = time.perf_counter()
        if self.rebalancer is not None:
            self.rebalancer.before_step(batches)
        targets = self._count_targets(batches, step)
        share = self._accumulate(batches, targets, step, measure_recall)
        own = torch.tensor([share, float(stop), time.perf_counter() - started], dtype=torch.float64)
        reports = self.world.all_gather(own, what=f"the loss of step {step + 1}")
        self._require_finite_losses(reports[:, 0], batches, step)
        norm = self.world.grad_norm(self.model)
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            raise MtrainError(self._bad_gradient(grad_norm, step))
        if self.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.clip, norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.rebalancer is not None:
            self.rebalancer.after_step()
        return StepResult(
            loss=float(reports[:, 0].sum()),
            targets=targets,
            tokens=sum(batch.tokens.numel() for batch in batches) * self.world.dp,
            grad_norm=grad_norm,
            seconds=reports[:, 2].tolist(),
            stop=bool(reports[:, 1].any()),
        )

    def _count_targets(self, batches: Sequence[Batch], step: int) -> int:
        """Valid targets of the whole step. Every rank of a ring holds the same rows, so each is counted ring-size times."""
        mine = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        total = self.world.all_reduce(torch.tensor([mine]), what=f"the target count of step {step + 1}")
        return int(total) // self.world.ring.world_size

    def _accumulate(self, batches: Sequence[Batch], targets: int, step: int, measure_recall: bool) -> float:
        """Forward and backward of all micro-batches; returns this rank's share of the mean loss."""
        share = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for index, batch in enumerate(batches):
            shard = shard_batch(batch, self.context.layout, self.world.ring.rank, self.world.device)
            last = index == len(batches) - 1
            self.context.measure_recall = measure_recall and last
            self.context.begin(shard.doc_start, step=step)
            with contextlib.nullcontext() if last else self.world.no_sync(self.model):
                with self.world.waiting_for(f"the weights of step {step + 1}"):
                    loss_sum = self.forward(shard)
                with self.world.waiting_for(f"the gradients of step {step + 1}"):
                    self.world.backward(scaled_loss(loss_sum, targets, self.world.grad_divisor))
            if self.rebalancer is not None:
                self.rebalancer.after_micro_batch(batch)
            share += loss_sum.detach().double() / max(targets, 1)
        return float(share)

    def forward(self, shard: Shard) -> Tensor:
        """The sum of the token losses of this rank's part of a micro-batch that was announced to the context, a scalar."""
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            output = self.model(
                input_ids=shard.tokens,
                position_ids=shard.positions,
                shift_labels=shard.labels,
                use_cache=False,
            )
        loss: Tensor = output.loss
        return loss

    def _require_finite_losses(self, losses: Tensor, batches: Sequence[Batch], step: int) -> None:
        # Looked at before they are summed: afterwards nobody could tell where a NaN came from.
        bad = [rank for rank, loss in enumerate(losses.tolist()) if not math.isfinite(loss)]
        if bad:
            self.optimizer.zero_grad(set_to_none=True)
            own = [
                f"{source}:{row}" for batch in batches for source, row in zip(batch.sources, batch.rows, strict=True)
            ]
            fed = self.world.gather_json(own, what=f"the rows of step {step + 1}")
            raise MtrainError(
                f"step {step + 1}: the loss on rank(s) {bad} is {losses[bad[0]]:g}; nothing was updated. "
                f"Look at the rows it was fed ({', '.join(fed[bad[0]])}), lower train.lr, or lengthen train.warmup_steps"
            )

    def _bad_gradient(self, grad_norm: float, step: int) -> str:
        names = self.world.bad_gradients(self.model)
        self.optimizer.zero_grad(set_to_none=True)
        return (
            f"step {step + 1}: the gradient norm is {grad_norm:g} (all losses are finite; {len(names)} parameters are hit, first "
            f"{names[0] if names else 'none alone: the sum overflows'}); nothing was updated. Lower train.lr or train.clip"
        )
