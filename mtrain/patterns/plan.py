"""What a run asks for: the pattern of a layer at a step, following the recipe's dense layers, warm-up and refresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtrain.comm import Ring
from mtrain.errors import CheckpointError, MtrainError
from mtrain.layout import RingLayout
from mtrain.patterns.a_shape import a_shape_of
from mtrain.patterns.base import Choice, Pattern, Site
from mtrain.patterns.blocks import BlockChoice
from mtrain.patterns.budget import Budget, Coverage, TopK
from mtrain.patterns.dense import dense_pattern
from mtrain.patterns.documents import Documents
from mtrain.patterns.index import Selection
from mtrain.patterns.moba import MobaPattern
from mtrain.patterns.placement import Placement
from mtrain.patterns.random_columns import RandomColumnsPattern
from mtrain.patterns.vertical_slash import select_vertical_slash
from mtrain.patterns.xattention import XAttentionPattern
from mtrain.recipe.schema import AttentionRecipe, CoverageBudget, TopKBudget
from sparse_kernels import SparsePattern


class DensePattern:
    """Every causal pair."""

    keeps = None

    def __init__(self, recipe: AttentionRecipe) -> None:
        del recipe

    def index(self, q: Tensor, k: Tensor, site: Site, kept: Choice | None) -> tuple[SparsePattern, Choice | None]:
        """See `Pattern`."""
        placement = site.placement
        return dense_pattern(q.shape[0], q.shape[2], placement.seq_len, placement.block, q.device), None


class AShapePattern:
    """Sinks of each document and a local band; made once per micro-batch."""

    keeps = None

    def __init__(self, recipe: AttentionRecipe) -> None:
        self.recipe = recipe
        self._made: tuple[Site, tuple[int, int], SparsePattern] | None = None

    def index(self, q: Tensor, k: Tensor, site: Site, kept: Choice | None) -> tuple[SparsePattern, Choice | None]:
        """See `Pattern`."""
        shape, recipe = (q.shape[0], q.shape[2]), self.recipe
        if self._made is None or self._made[0] is not site or self._made[1] != shape:
            block = site.placement.block
            made = a_shape_of(site.documents, *shape, block, sink=recipe.sink, local=recipe.local, device=q.device)
            self._made = (site, shape, made)
        return self._made[2], None


class VerticalSlashPattern:
    """Estimated columns and slashes.

    A kept choice is a set of key positions and block offsets, without the forced ones. Used again, it gets the sinks of
    the *current* documents and the locals; offsets carry over as they are, columns stay at their positions and are
    masked by causality and the current documents like any other, so the pattern is always valid, whatever was packed
    into the row since.
    """

    keeps = Selection

    def __init__(self, recipe: AttentionRecipe) -> None:
        self.recipe = recipe
        self.budget = budget_of(recipe.budget)

    def index(self, q: Tensor, k: Tensor, site: Site, kept: Choice | None) -> tuple[SparsePattern, Choice | None]:
        """See `Pattern`."""
        recipe = self.recipe
        if kept is None:
            kept = select_vertical_slash(
                q,
                k,
                site.documents,
                site.placement,
                budget=self.budget,
                probe=recipe.probe,
                probe_spread=recipe.probe_spread,
                share=recipe.share,
                scale=site.scale,
            )
        assert isinstance(kept, Selection)
        pattern = kept.pattern(
            site.documents,
            site.placement.block,
            sink=recipe.sink,
            local=recipe.local,
            most_columns=self.budget.most_columns(),
        )
        return pattern, kept


# One line per pattern.
PATTERNS: dict[str, Callable[[AttentionRecipe], Pattern]] = {
    "vertical_slash": VerticalSlashPattern,
    "a_shape": AShapePattern,
    "xattention": XAttentionPattern,
    "moba": MobaPattern,
    "random_columns": RandomColumnsPattern,
    "dense": DensePattern,
}


def budget_of(recipe: CoverageBudget | TopKBudget) -> Budget:
    """The budget that a recipe describes."""
    if isinstance(recipe, CoverageBudget):
        return Coverage(recipe.p, recipe.floor, recipe.cap)
    return TopK(recipe.columns, recipe.slashes)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A choice made at ``step``: packed bits uint8 [B, H, bytes], ``name``d after their kind."""

    step: int
    block: int
    name: str
    bits: Tensor


class PatternPlan:
    """The patterns of a run on one rank: which layer is dense when, and when an estimate is made anew.

    Args:
        recipe: the attention part of a recipe.
        num_layers: attention layers of the model.

    With ``refresh: every_step`` every micro-batch is estimated for itself. Otherwise the first micro-batch of a step in
    which an estimate is due makes it, and all later ones, of this step too, use it until the next is due. What is kept
    belongs to a sequence length; it differs between data-parallel replicas (each has its own data) and is the same on
    all ranks of a ring.
    """

    def __init__(self, recipe: AttentionRecipe, num_layers: int) -> None:
        if recipe.pattern not in PATTERNS:
            raise MtrainError(f"unknown pattern {recipe.pattern!r}; choose one of {', '.join(PATTERNS)}")
        self.recipe = recipe
        self.num_layers = num_layers
        self.pattern = PATTERNS[recipe.pattern](recipe)
        self._dense = DensePattern(recipe)
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._site: tuple[tuple[object, ...], tuple[object, ...], Site] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> PatternPlan:
        # What is remembered of a micro-batch names the ring, and a ring cannot be copied.
        twin = PatternPlan(self.recipe, self.num_layers)
        twin._kept = dict(self._kept)
        return twin

    def is_dense(self, layer: int, step: int) -> bool:
        """Is this layer dense at this step?"""
        recipe = self.recipe
        edge = layer < recipe.dense_first_layers or layer >= self.num_layers - recipe.dense_last_layers
        return edge or step < recipe.dense_warmup_steps or recipe.pattern == "dense"

    @torch.no_grad()
    def index(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        *,
        doc_start: Tensor | None = None,
        ring: Ring | None = None,
        layout: RingLayout | None = None,
        step: int = 0,
        scale: float | None = None,
        keep: bool = True,
    ) -> SparsePattern:
        """The pattern of a layer: columns and diagonals are identical on every rank of the ring, single blocks are those of this
        rank's query blocks.

        Args:
            q, k: this rank's shards [B, n, H, D] and [B, n, K, D] after rotary embedding (the whole sequence without
                layout).
            doc_start: this rank's shard int64 [B, n]. Pass the same tensor to all layers: it is gathered once.
            step: optimizer step, counted from 0.
            scale: of the scores; default D^-0.5.
            keep: False in an evaluation: a kept estimate is used, but none is made for training to use.
        """
        site = self._site_of(q.shape[1], doc_start, ring, layout, scale)
        if self.is_dense(layer, step):
            return self._dense.index(q, k, site, None)[0]
        key = (layer, site.placement.seq_len)
        kept = self._usable(key, q, site.placement, step if keep else None)
        pattern, selection = self.pattern.index(q, k, site, kept)
        if keep and kept is None and selection is not None and self.recipe.refresh_every != 1:
            self._kept[key] = _Kept(step, site.placement.block, selection.name, selection.pack(site.placement))
        return pattern

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept between steps: per layer and length the packed choice and int64 [step, block], the same on every rank
        of the ring. Empty for every_step."""
        state: dict[str, Tensor] = {}
        for (layer, seq_len), kept in sorted(self._kept.items()):
            state[f"{layer}.{seq_len}.{kept.name}"] = kept.bits.cpu()
            state[f"{layer}.{seq_len}.made"] = torch.tensor([kept.step, kept.block])
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`; a resumed run then uses the same patterns as one that was never stopped."""
        self._kept = {}
        for name, bits in state.items():
            head, _, what = name.rpartition(".")
            if what == "made":
                continue
            layer, _, seq_len = head.partition(".")
            known = what in (Selection.name, BlockChoice.name) and f"{head}.made" in state
            if not (known and layer.isdigit() and seq_len.isdigit()):
                raise CheckpointError(
                    f"the kept patterns hold {name!r}; expected LAYER.LENGTH.bits or .block_bits with LAYER.LENGTH.made"
                )
            step, block = (int(x) for x in state[f"{head}.made"])
            self._kept[int(layer), int(seq_len)] = _Kept(step, block, what, bits)

    def _usable(self, key: tuple[int, int], q: Tensor, placement: Placement, step: int | None) -> Choice | None:
        """What is kept for this layer, unless a new estimate is due; None as a step is never due."""
        kept, every, keeps = self._kept.get(key), self.recipe.refresh_every, self.pattern.keeps
        if kept is None or keeps is None or kept.block != placement.block or every == 1:
            return None
        if step is not None and every and not kept.step <= step < kept.step + every:
            return None
        if kept.bits.shape[1] != q.shape[2]:
            raise CheckpointError(f"the kept patterns are for {kept.bits.shape[1]} heads; the model has {q.shape[2]}")
        expected = -(-keeps.bits(placement.seq_len, placement.num_blocks) // 8)
        if kept.name != keeps.name or kept.bits.shape[2] != expected:
            raise CheckpointError(
                f"the kept patterns hold {kept.bits.shape[2]} bytes of {kept.name} per head, those of {self.recipe.pattern} at "
                f"{placement.seq_len} tokens {expected} of {keeps.name}: they were made by another attention.pattern or an "
                "earlier build; set attention.refresh=every_step, or go on with the pattern that made them"
            )
        # A batch of another size re-uses the rows in turn.
        rows = [row % kept.bits.shape[0] for row in range(q.shape[0])]
        bits = kept.bits.to(q.device)
        if rows != list(range(kept.bits.shape[0])):
            bits = torch.stack([bits[row] for row in rows])
        return keeps.unpack(bits, placement.seq_len, placement.num_blocks)

    def _site_of(
        self, length: int, doc_start: Tensor | None, ring: Ring | None, layout: RingLayout | None, scale: float | None
    ) -> Site:
        """The site of this micro-batch, made when the first layer asks."""
        same = (doc_start, ring, layout)
        # A tensor made in inference mode has no version.
        version = None if doc_start is None or doc_start.is_inference() else doc_start._version
        values = (version, length, scale)
        known = self._site
        if known is None or any(a is not b for a, b in zip(known[0], same, strict=True)) or known[1] != values:
            placement = Placement.of(length, self.recipe.block, ring, layout)
            known = (same, values, Site(Documents.gather(doc_start, placement), placement, scale))
            self._site = known
        return known[2]
