"""Held-out loss during training: the same rows each time, with the attention that training uses and, if asked, densely.

Nothing of it reaches the training. Forwards run without gradient and dropout, outside the windows of the log, and belong to a
`RingContext` of their own: kept patterns are used but none is made or replaced, and neither the balancer nor the statistics of
the run hear of them.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from mtrain.data.loader import Batch, held_out_rows
from mtrain.errors import DataError
from mtrain.models.attach import borrowed
from mtrain.models.context import RingContext
from mtrain.models.loss import IGNORE
from mtrain.recipe import Recipe
from mtrain.step import Stepper, shard_batch


class Validation:
    """The mean loss per target token over all held-out rows, the same number on every rank.

    Args:
        rows: all of them, the same on every rank; at least one token is a target.
        model: the attached model, as it was before `World.prepare`.
        stepper: runs it.
        micro_rows: rows per forward.
        dense: measure the same rows with dense attention too.

    Raises:
        DataError: rows without a target.
        LaunchError: ranks hold different rows.
    """

    def __init__(self, rows: Batch, model: Any, stepper: Stepper, *, micro_rows: int, dense: bool) -> None:
        self.model, self.stepper, self.dense = model, stepper, dense
        self.targets = int((rows.labels != IGNORE).sum())
        if not self.targets:
            raise DataError(
                f"data: the {len(rows.tokens)} held-out rows hold no token to predict: every held-out document is a single token; "
                "add longer documents, or set data.validation_rows=0 log.validate_every=0 log.validate_dense=false"
            )
        world = stepper.world
        content = b"".join(x.numpy().tobytes() for x in (rows.tokens, rows.labels, rows.doc_start))
        world.require_same("the held-out rows", content)
        self.batches = deal(rows, world.dp_rank, world.dp, micro_rows)

    def __call__(self, step: int) -> dict[str, float]:
        """Measure the model as it is. Every rank makes this call.

        Args:
            step: the optimizer step (from 0) whose attention is used: dense layers, dense warm-up.

        Returns:
            validation_loss in nats, validation_perplexity, validation_targets, and, if asked for, validation_loss_dense.

        Raises:
            LaunchError: a peer was lost.
        """
        trained = self.stepper.context
        loss = self._mean(copy.deepcopy(trained), step)
        perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())  # inf where math.exp would be an error
        result = {"validation_loss": loss, "validation_perplexity": perplexity, "validation_targets": self.targets}
        if self.dense:
            recipe = dataclasses.replace(trained.recipe, pattern="dense")
            twin = RingContext(recipe, trained.ring, trained.layout, trained.num_layers)
            result["validation_loss_dense"] = self._mean(twin, step)
        return result

    @torch.no_grad()
    def _mean(self, context: RingContext, step: int) -> float:
        stepper, world = self.stepper, self.stepper.world
        total = torch.zeros((), dtype=torch.float64, device=world.device)
        modes = [(module, module.training) for module in stepper.model.modules()]
        stepper.model.eval()
        try:
            with borrowed(self.model, context), world.waiting_for(f"the held-out loss after step {step + 1}"):
                for batch in self.batches:
                    shard = shard_batch(batch, context.layout, world.ring.rank, world.device)
                    context.begin(shard.doc_start, step=step)
                    total += stepper.forward(shard)
        finally:
            for module, training in modes:
                module.training = training
        return float(world.all_reduce(total.cpu(), what=f"the held-out loss after step {step + 1}")) / self.targets


def deal(rows: Batch, dp_rank: int, dp: int, micro_rows: int) -> list[Batch]:
    """One replica's part of the rows, ``micro_rows`` at a time: as many forwards of the same shapes in every replica.

    A replica that is short of a row gets one without targets, because a sharded engine gathers weights in every forward: a rank
    that ran fewer would leave the others waiting.
    """
    mine = torch.arange(dp_rank, len(rows.tokens) + -len(rows.tokens) % dp, dp)
    spare = mine >= len(rows.tokens)
    mine[spare] = 0
    labels = rows.labels[mine].masked_fill(spare[:, None], IGNORE)
    parts = (x.split(micro_rows) for x in (rows.tokens[mine], labels, rows.doc_start[mine]))
    return [Batch(*tensors) for tensors in zip(*parts, strict=True)]


def make_validation(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, model: Any, stepper: Stepper
) -> Validation | None:
    """What a recipe asks for; None when no rows are held out. Densely too only where the pattern is not dense anyway."""
    if not recipe.data.validation_rows:
        return None
    rows = held_out_rows(
        recipe.data,
        tokenizer,
        recipe.data.validation_rows,
        recipe.train.seq_len,
        cache_dir=Path(recipe.output) / "tokens",
        progress=stepper.world.is_main,
    )
    dense = recipe.log.validate_dense and recipe.attention.pattern != "dense"
    return Validation(rows, model, stepper, micro_rows=recipe.train.micro_rows, dense=dense)
