"""The scoring pass by Triton kernels, for GPUs: the contract of the pass in `mtrain.patterns.scores`, nothing of size rows x keys.

The same two rules make it independent of ranks and layout: a tile of keys is computed by one program whose numbers depend on
nothing else, and everything that is summed is a fixed-point integer first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtrain.patterns.documents import Documents, Probes
from mtrain.patterns.fixed_point import exponential_unit, probability_factor
from mtrain.patterns.placement import Placement
from sparse_kernels.bits import upload
from sparse_kernels.gpu.probe import ProbeScorer


@dataclass(eq=False)
class KernelPass:
    """One estimate's passes over the key blocks held here. Rows are [B, H, R], logits in base 2."""

    q: Tensor
    k: Tensor
    probes: Probes
    documents: Documents
    placement: Placement
    scale: float
    peak: Tensor | None = None  # [B, H, R] the largest logit of each row, over all ranks

    def __post_init__(self) -> None:
        rows, device = self.probes.rows, self.q.device
        # Slots that name no row stand before every key and see nothing.
        last = rows.masked_fill(~self.probes.valid, -1)
        self.scorer = ProbeScorer(
            q=self.placement.rows(self.q, rows).contiguous(),
            k=self.k if self.k.stride(3) == 1 else self.k.contiguous(),
            first_key=self.documents.starts_of(rows).int().contiguous(),
            last_key=last.int().contiguous(),
            block_ids=upload(self.placement.blocks.int(), device),
            sizes=self.probes.sizes,
            block=self.placement.block,
            scale=self.scale,
        )

    def row_maxima(self) -> Tensor:
        """[B, H, R]: the largest logit of each probe row over the keys held here (-inf: sees none of them)."""
        self.maxima, self.sums = self.scorer.statistics()
        return self.maxima.amax(2)

    def row_sums(self) -> Tensor:
        """int64 [B, H, R]: each row's sum of 2^(logit - peak) over the keys held here, in fixed point."""
        assert self.peak is not None
        sums = self.sums.mul_(self.maxima.sub_(self.peak[:, :, None]).exp2_())
        sums = sums.mul_(exponential_unit(self.placement.seq_len))
        # Head by head: integers of all heads would take twice the room of the statistics.
        return torch.stack([sums[:, head].long().sum(1) for head in range(sums.shape[1])], 1)

    def partial_scores(self, sums: Tensor, share: bool) -> Tensor:
        """int64 [B, heads, n / b, b + sum of (b + m - 1)]: per key block the column scores, then each window's scores
        by b + m - 1 distances."""
        assert self.peak is not None
        del self.maxima, self.sums
        group = self.q.shape[2] // self.k.shape[2] if share else 1
        summed = self.probes.rows.shape[1] * group
        factor = probability_factor(sums, self.placement.seq_len, summed).float()
        return self.scorer.scores(self.peak, factor, group)
