"""The balancer of a training run: what the last steps cost decides who owns which block in the next one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtrain.balance.forecast import Forecast
from mtrain.balance.solver import Plan, solve
from mtrain.errors import MtrainError
from mtrain.topology import RingTopology


class Balancer:
    """Running average of measured costs, and the assignment they call for.

    Every rank that feeds the same numbers (measure, then all-reduce) gets the same assignment. On hosts whose processors or
    numpy builds round differently, let one rank solve and broadcast the owners. Per optimizer step::

        total = sum(measure(pattern, doc_start) for each layer's pattern)      # all-reduced over data-parallel ranks
        balancer.update(total)
        assignment = balancer.assignment(topology, doc_start_of_the_next_batch)
        layout = RingLayout.build("balanced", seq_len, ranks, block, assignment=assignment)

    Args:
        seq_len, block: S and b of the run; a cost from other sizes is refused.
        decay: weight of the past in the exponential average, 0 (only the last step counts) <= decay < 1.
        effort: see `mtrain.balance.solver.solve`.
    """

    def __init__(self, seq_len: int, block: int, decay: float = 0.9, effort: float = 1.0) -> None:
        if min(seq_len, block) < 1:
            raise MtrainError(f"a balancer needs seq_len, block >= 1, got {seq_len}, {block}")
        if not 0.0 <= decay < 1.0:
            raise MtrainError(f"the balancer's decay must lie in [0, 1), got {decay}")
        self.seq_len, self.block, self.decay, self.effort = seq_len, block, decay, effort
        self.updates = 0
        self._sum = torch.zeros(3, -(-seq_len // block), dtype=torch.float64)
        self._weight = 0.0

    @property
    def average(self) -> Tensor | None:
        """float64 [3, NB], the averaged `measure`; None before the first update."""
        return self._sum / self._weight if self.updates else None

    def update(self, measured: Tensor) -> None:
        """Take in the cost of one step, float64 [3, NB] from `measure`, the same on every rank."""
        if measured.shape != self._sum.shape:
            raise MtrainError(
                f"a measured cost has shape {tuple(measured.shape)}; expected {tuple(self._sum.shape)} for "
                f"seq_len={self.seq_len}, block={self.block}"
            )
        values = measured.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(values).all()):
            raise MtrainError("a measured cost holds values that are not finite")
        self._sum = self.decay * self._sum + (1.0 - self.decay) * values
        self._weight = self.decay * self._weight + (1.0 - self.decay)
        self.updates += 1

    def plan(self, topology: RingTopology | int, doc_start: Tensor | None = None) -> Plan | None:
        """Assignment and predicted imbalances for the coming batch; None before the first update.

        Args:
            topology: the ring, or the number of ranks of a flat one.
            doc_start: int64 [B, S] of the coming batch, known before its step; None: one document.
        """
        average = self.average
        if average is None:
            return None
        ring = RingTopology(1, topology) if isinstance(topology, int) else topology
        return solve(Forecast.of(average, self.seq_len, self.block, doc_start), ring, self.effort)

    def assignment(self, topology: RingTopology | int, doc_start: Tensor | None = None) -> Tensor | None:
        """int64 [padded blocks], owner of every block, for `RingLayout.build`; None (striped) before the first update."""
        plan = self.plan(topology, doc_start)
        return None if plan is None else plan.owner

    def state_dict(self) -> dict[str, Any]:
        """Plain lists and numbers: goes into the JSON of a checkpoint. Restoring it restores the next assignments exactly."""
        return {
            "seq_len": self.seq_len,
            "block": self.block,
            "decay": self.decay,
            "updates": self.updates,
            "weight": self._weight,
            "sum": self._sum.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; the sizes must be those of this run, the decay may differ."""
        if (state["seq_len"], state["block"]) != (self.seq_len, self.block):
            raise MtrainError(
                f"the checkpoint's balancer is for seq_len={state['seq_len']}, block={state['block']}; "
                f"this run has seq_len={self.seq_len}, block={self.block}"
            )
        self.updates, self._weight = int(state["updates"]), float(state["weight"])
        self._sum = torch.tensor(state["sum"], dtype=torch.float64).reshape(self._sum.shape)
