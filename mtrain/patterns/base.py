"""What a pattern is to a run: the registry's protocol, and what it is told about a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mtrain.patterns.blocks import BlockChoice
from mtrain.patterns.documents import Documents
from mtrain.patterns.index import Selection
from mtrain.patterns.placement import Placement
from sparse_kernels import SparsePattern

# What an estimate may leave for later steps.
Choice = Selection | BlockChoice


@dataclass(frozen=True, eq=False)
class Site:
    """One micro-batch as seen from this rank, the same object for all its layers (scale None: D^-0.5)."""

    documents: Documents
    placement: Placement
    scale: float | None = None


class Pattern(Protocol):
    """A member of the registry."""

    @property
    def keeps(self) -> type[Selection] | type[BlockChoice] | None:
        """The kind of choice it makes, which ``refresh`` may keep over steps; None: nothing is estimated."""

    def index(self, q: Tensor, k: Tensor, site: Site, kept: Choice | None) -> tuple[SparsePattern, Choice | None]:
        """The pattern of this rank's queries in one layer, and what may be kept for later steps (None: nothing was estimated).

        Args:
            q, k: this rank's shards [B, n, H, D] and [B, n, K, D] after rotary embedding.
            kept: an earlier answer to use instead of a new estimate.
        """
