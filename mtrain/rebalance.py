"""`layout: balanced` in a running training: measure each step, lay out the next one. Tokens are permuted once, in the data path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtrain.balance import Balancer, measure
from mtrain.data.loader import Batch
from mtrain.layout import RingLayout
from mtrain.models.context import RingContext
from mtrain.parallel import World


class Rebalancer:
    """Feeds the balancer what each step cost and gives the ring its layout for the next.

    All ranks of a ring hold the same rows and the same columns and diagonals, so each measures these by itself; single blocks are
    counted by the rank that holds them and added up. Data-parallel replicas, which saw other rows, add up their measurements. The
    assignment of the ring's first rank counts (8 bytes per block).

    Args:
        balancer: the running average; its state belongs into checkpoints.
        context: of the attached model; its layout is replaced.
        world: the processes.
    """

    def __init__(self, balancer: Balancer, context: RingContext, world: World) -> None:
        self.balancer, self.context, self.world = balancer, context, world
        self._measured: Tensor | None = None

    def before_step(self, batches: Sequence[Batch]) -> None:
        """Lay out the coming step for the rows it will see."""
        doc_start = torch.cat([batch.doc_start for batch in batches])
        packed = bool(doc_start.any())
        assignment = self.balancer.assignment(self.context.ring.topology, doc_start if packed else None)
        if assignment is not None:
            # One rank decides: floating-point libraries may break a tie differently on another machine, and ranks that disagree
            # would each train on tokens that are not theirs, without an error.
            assignment = self.world.ring.broadcast(assignment, 0)
            old = self.context.layout
            self.context.layout = RingLayout.build("balanced", old.seq_len, old.ranks, old.block, assignment)

    def after_micro_batch(self, batch: Batch) -> None:
        """Add what the newest micro-batch cost, over all layers."""
        doc_start = batch.doc_start if bool(batch.doc_start.any()) else None
        for pattern in self.context.latest.index.values():
            starts = None if doc_start is None else doc_start.to(pattern.device)
            cost = measure(pattern, starts, ring=self.world.ring)
            self._measured = cost if self._measured is None else self._measured + cost

    def after_step(self) -> None:
        """Let the balancer know."""
        if self._measured is None:
            return
        measured, self._measured = self._measured.cpu(), None
        if self.world.dp > 1:
            measured = self.world.all_reduce(measured, what="the cost of blocks") / self.world.ring.world_size
        self.balancer.update(measured)

    def state_dict(self) -> dict[str, Any]:
        """The balancer's."""
        return self.balancer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.balancer.load_state_dict(state)


def make_rebalancer(kind: str, context: RingContext, world: World) -> Rebalancer | None:
    """A rebalancer for the layout "balanced" on a ring of several ranks; otherwise there is nothing to balance."""
    if kind != "balanced" or world.ring.world_size == 1:
        return None
    return Rebalancer(Balancer(context.layout.seq_len, context.layout.block), context, world)
