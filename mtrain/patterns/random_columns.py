"""A control: as many columns and slashes as vertical_slash may keep, drawn at random instead of estimated.

It costs what vertical_slash costs. Where it does as well, the estimate is worth nothing.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from mtrain.errors import MtrainError
from mtrain.patterns.base import Choice, Site
from mtrain.patterns.budget import largest
from mtrain.patterns.index import Selection, lower_distances
from mtrain.recipe.schema import AttentionRecipe, TopKBudget
from sparse_kernels import SparsePattern

SEED = 0


class RandomColumnsPattern:
    """Random columns and slashes of a top-k budget, different for every head, the same in every layer, row and step and on
    every rank; sinks and locals as everywhere."""

    keeps = None

    def __init__(self, recipe: AttentionRecipe) -> None:
        if not isinstance(recipe.budget, TopKBudget):
            raise MtrainError("random_columns draws a fixed number of columns and slashes: give it a topk budget")
        self.recipe, self.budget = recipe, recipe.budget

    def index(self, q: Tensor, k: Tensor, site: Site, kept: Choice | None) -> tuple[SparsePattern, Choice | None]:
        """See `Pattern`."""
        del k, kept
        recipe, placement = self.recipe, site.placement
        counts = (self.budget.columns, self.budget.slashes)
        drawn = draw_columns(q.shape[2], placement.seq_len, placement.block, *counts)
        columns, offsets = (x.to(q.device).expand(q.shape[0], -1, -1) for x in (drawn.columns, drawn.offsets))
        pattern = Selection(columns, offsets).pattern(
            site.documents, placement.block, sink=recipe.sink, local=recipe.local, most_columns=counts[0]
        )
        return pattern, None


@lru_cache(maxsize=8)
def draw_columns(heads: int, seq_len: int, block: int, columns: int, slashes: int) -> Selection:
    """The draw on the CPU, a function of its arguments: ``columns`` keys and ``slashes`` token distances per head, with the
    distances lowered to block offsets; [1, H, ...]."""
    generator = torch.Generator().manual_seed(SEED)
    keys, distances = torch.randint(0, 2**40, (2, heads, seq_len), generator=generator)
    chosen = [largest(x, torch.full((heads,), n)) for x, n in ((keys, columns), (distances, slashes))]
    return Selection(chosen[0][None], lower_distances(chosen[1], block)[None])
