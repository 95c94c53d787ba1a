"""What attention layers share: the ring, the layout, the pattern plan, and the index of the micro-batch under way."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mtrain.attention import ring_attention
from mtrain.comm import Ring
from mtrain.errors import ModelError
from mtrain.layout import RingLayout
from mtrain.models.statistics import statistics
from mtrain.patterns import PatternPlan, measure_recall, spaced_rows
from mtrain.recipe.schema import AttentionRecipe
from sparse_kernels import SparsePattern
from sparse_kernels.bits import upload

# Rows of each head whose recall is measured, spread over the sequence; each costs one dense query row per layer.
RECALL_ROWS = 64


@dataclass(eq=False)
class MicroBatch:
    """One forward pass and everything its backward pass and recompute must see again.

    Attributes:
        context: the ring and the plan.
        layout: who owns which tokens of this micro-batch (the context may already hold the next one).
        doc_start: int64 [B, local_len], this rank's shard of the document starts; None: one document.
        step: optimizer step, for refresh and warm-up.
        measure_recall: compare each layer with dense attention, on some rows.
        index: the pattern of every layer that has run.
        recall: per layer the mean recall over `RECALL_ROWS` rows of every head, a scalar, the same on all ranks.
        training: False in an evaluation, which uses a kept estimate but makes none for later steps.
    """

    context: RingContext
    layout: RingLayout
    doc_start: Tensor | None
    step: int
    measure_recall: bool = False
    training: bool = True
    index: dict[int, SparsePattern] = field(default_factory=dict)
    recall: dict[int, Tensor] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Sparse ring attention of one layer.

        The index is made in the first call of a layer and kept: an activation-checkpoint recompute must use the same
        mask, or its gradient would be that of another function.

        Args:
            layer: which layer.
            q: [B, n, H, D], this rank's rotated queries; n is layout.local_len (alone, also the unpadded length).
            k, v: [B, n, K, D].
            scale: of the scores; default D^-0.5.

        Returns:
            [B, n, H, D].
        """
        given = q.shape[1]
        missing = self.layout.local_len - given
        if missing:
            q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
        if layer not in self.index:
            self.index[layer] = self._make_index(layer, q, k, scale)
        out = ring_attention(
            q,
            k,
            v,
            self.index[layer],
            ring=self.context.ring,
            layout=self.layout,
            schedule=self.context.recipe.schedule,
            doc_start=self.doc_start,
            scale=scale,
            backend=self.context.recipe.backend,
        )
        assert isinstance(out, Tensor)
        return out[:, :given] if missing else out

    @torch.no_grad()
    def _make_index(self, layer: int, q: Tensor, k: Tensor, scale: float | None) -> SparsePattern:
        context = self.context
        where: dict[str, Any] = {
            "doc_start": self.doc_start,
            "ring": context.ring,
            "layout": self.layout,
            "scale": scale,
        }
        q, k = q.detach(), k.detach()
        pattern = context.plan.index(layer, q, k, step=self.step, keep=self.training, **where)
        if self.measure_recall:
            rows = spaced_rows(self.layout.seq_len, RECALL_ROWS)
            self.recall[layer] = measure_recall(q, k, pattern, rows, **where).mean()
        return pattern

    def whole_doc_start(self) -> Tensor | None:
        """int64 [B, S]: the document starts of the whole sequence. Every rank makes this call."""
        if self.doc_start is None:
            return None
        return self.layout.unshard(self.context.ring.all_gather(self.doc_start), 1)


class RingContext:
    """The state behind an attached model (`model.mtrain_context`).

    A trainer calls `begin` before each forward; without it the forward pre-hook of `attach` does.

    Attributes:
        recipe: pattern, budget, schedule, backend.
        ring: the ranks that share a sequence.
        layout: who owns which tokens from the next micro-batch on; may be replaced between micro-batches.
        plan: makes the index of a layer.
        step: optimizer step of the newest micro-batch; counts training forwards when nobody sets it.
        measure_recall: micro-batches begun while it is True measure the recall of every layer.
    """

    def __init__(self, recipe: AttentionRecipe, ring: Ring, layout: RingLayout, num_layers: int) -> None:
        self.recipe, self.ring, self.layout, self.num_layers = recipe, ring, layout, num_layers
        self.plan = PatternPlan(recipe, num_layers)
        self.step = 0
        self.measure_recall = False
        self._waiting: MicroBatch | None = None
        self._latest: MicroBatch | None = None
        self._by_hand = False
        self._forwards = 0
        self._held_positions: tuple[RingLayout, Tensor] | None = None
        self._checked_positions = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RingContext:
        # A copied model (an average of weights, a twin) talks over the same ring: process groups cannot be copied.
        twin = RingContext(self.recipe, self.ring, self.layout, self.num_layers)
        twin.plan, twin.step = copy.deepcopy(self.plan, memo), self.step
        return twin

    def begin(self, doc_start: Tensor | None = None, *, step: int | None = None) -> MicroBatch:
        """Announce the next micro-batch; the next forward belongs to it.

        Args:
            doc_start: int64 [B, local_len], this rank's shard of the document starts in layout order; None: one
                document.
            step: optimizer step; None: the step of the micro-batch before.
        """
        self._by_hand = True
        self.step = self.step if step is None else step
        self._waiting = MicroBatch(self, self.layout, doc_start, self.step, self.measure_recall)
        return self._waiting

    def take(self, batch: int, length: int, doc_start: Tensor | None, training: bool) -> MicroBatch:
        """The micro-batch of a forward that has just been called with ``length`` tokens per row on this rank."""
        current = self._waiting
        self._waiting = None
        if current is None:
            if self._by_hand and doc_start is None and (training or self.ring.world_size > 1):
                raise ModelError(
                    "the model ran again without a new begin(): call model.mtrain_context.begin(doc_start, step=...) "
                    "before every forward, or pass doc_start=... to the model"
                )
            if training and not self._by_hand:
                self.step = self._forwards
                self._forwards += 1
            current = MicroBatch(self, self.layout, doc_start, self.step, self.measure_recall)
        elif doc_start is not None:
            raise ModelError("documents were given twice: to begin() and as doc_start of the model; give them once")
        current.training = training
        self._fit(current, batch, length)
        self._latest = current
        return current

    def _fit(self, current: MicroBatch, batch: int, length: int) -> None:
        """Check lengths. Alone, any length is a whole sequence in its natural order; in a ring only shards fit."""
        layout = current.layout
        if length != layout.local_len:
            if self.ring.world_size > 1:
                raise ModelError(
                    f"the model got {length} tokens per row on rank {self.ring.rank}; layout {layout.kind!r} of "
                    f"{layout.seq_len} tokens gives each of {layout.ranks} ranks {layout.local_len}: pass "
                    "layout.shard(tokens, rank, dim=1)"
                )
            current.layout = RingLayout.build("contiguous", length, 1, layout.block)
        if current.doc_start is None:
            return
        if tuple(current.doc_start.shape) != (batch, length):
            raise ModelError(
                f"doc_start is {tuple(current.doc_start.shape)}; expected [{batch}, {length}]: for every token of this "
                "rank the first position of its document in the whole sequence"
            )
        missing = current.layout.local_len - length
        current.doc_start = torch.nn.functional.pad(current.doc_start, (0, missing)) if missing else current.doc_start

    def positions(self, layout: RingLayout, device: torch.device) -> Tensor:
        """int64 [local_len] global positions of this rank's tokens, kept on the device as long as the layout stays."""
        held = self._held_positions
        if held is None or held[0] is not layout or held[1].device != device:
            held = (layout, upload(layout.positions(self.ring.rank), device))
            self._held_positions = held
            self._checked_positions = False
        return held[1]

    def check_positions(self, layout: RingLayout, given: Tensor) -> None:
        """Once per layout: positions that a caller gives without documents must be the layout's.

        Positions that start again at 0 mean packed documents; a pattern that is not told of them would look across.
        """
        expected = self.positions(layout, given.device)[: given.shape[-1]]
        if not self._checked_positions and not bool(((given == expected) | (expected >= layout.seq_len)).all()):
            raise ModelError(
                "position_ids are not those of the layout: leave them out (they are filled in), or, for packed "
                "documents, say where each token's document begins with doc_start="
            )
        self._checked_positions = True

    def statistics(self) -> dict[str, Any]:
        """What the newest micro-batch computed. Every rank of the ring makes this call: documents are gathered.

        Returns:
            ``density``: mean over layers, heads and rows; ``density_per_layer``: list. ``tile_density``: computed tile
            area over causal area. ``work``: float64 [W, steps + 1] as in `mtrain.balance.work.work`, summed over
            layers, with its ``worker_imbalance`` and ``step_imbalance``. If recall was measured: ``recall`` and
            ``recall_per_layer``, and ``reach`` and ``reach_any_head``, lists by distance (see
            `mtrain.patterns.reach_by_distance`), means over layers.
        """
        return statistics(self.latest)

    @property
    def latest(self) -> MicroBatch:
        """The micro-batch of the newest forward."""
        if self._latest is None:
            raise ModelError("no forward has run yet, so there is no pattern to look at")
        return self._latest
