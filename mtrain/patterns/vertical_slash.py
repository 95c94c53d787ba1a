"""Vertical-slash estimation: which keys (columns) and distances (slashes) a head attends to, from a few probe rows.

The observation that long-context heads attend to a few key positions and a few diagonals, and that the last query rows
show which, is from MInference (Jiang et al., arXiv 2407.02490); using it online while training from MTraining (arXiv
2510.18830).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.comm import Ring
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout
from mtrain.patterns.budget import Budget
from mtrain.patterns.documents import Documents, Probes
from mtrain.patterns.index import Selection, lower_distances
from mtrain.patterns.placement import Placement
from mtrain.patterns.scores import probe_scores
from sparse_kernels import SparsePattern


def estimate_vertical_slash(
    q: Tensor,
    k: Tensor,
    *,
    budget: Budget,
    block: int,
    sink: int = 0,
    local: int = 0,
    probe: int = 64,
    probe_spread: int = 0,
    doc_start: Tensor | None = None,
    ring: Ring | None = None,
    layout: RingLayout | None = None,
    share: str | None = None,
    scale: float | None = None,
) -> SparsePattern:
    """The vertical-slash pattern of one layer, per batch row and query head. No gradient; float32 (float64 stays).

    With P the softmax of the probe rows over the keys they may see (causal, same document), a key's column score is the
    mean over probe rows of P[:, j], and a distance's slash score the mean of the mass at i - j = s. The budget picks
    columns and token distances separately; a distance s is lowered to the block offsets s // b and, when s % b != 0, s
    // b + 1. Then sinks and locals are forced. Equal scores: lower index first.

    Args:
        q, k: [B, S, H, D] and [B, S, K, D] after rotary embedding; with ring and layout this rank's shards.
        budget: `Coverage` or `TopK`.
        block: b, tokens per block.
        sink: the first so many keys of every document are always columns.
        local: the token distances 0..local are always seen.
        probe: the last so many rows of the sequence are probe rows; with documents see `Probes.place`.
        probe_spread: so many more groups of probe rows, placed evenly.
        doc_start: int64 [B, S] (or shard) first position of each token's document.
        ring, layout: who holds the rest; every rank of the ring makes this call and gets, bit for bit, the index that
            one process computes from the whole sequence. Communication is stated in
            `mtrain.patterns.scores.probe_scores`; then each rank all-gathers ceil(U / W) * ceil((S + NB) / 8) bytes of
            chosen bits.
        share: "kv_head": the query heads of a key-value head share one pattern, chosen by their averaged scores.
        scale: default D^-0.5.

    Raises:
        MtrainError: shapes or options that do not fit.
    """
    _check(q, k, block, probe, share)
    if min(sink, local, probe_spread) < 0:
        raise MtrainError(f"sink, local and probe_spread must be at least 0, got {sink}, {local}, {probe_spread}")
    placement = Placement.of(q.shape[1], block, ring, layout)
    documents = Documents.gather(doc_start, placement)
    selection = select_vertical_slash(
        q, k, documents, placement, budget=budget, probe=probe, probe_spread=probe_spread, share=share, scale=scale
    )
    return selection.pattern(documents, block, sink=sink, local=local, most_columns=budget.most_columns())


@torch.no_grad()
def select_vertical_slash(
    q: Tensor,
    k: Tensor,
    documents: Documents,
    placement: Placement,
    *,
    budget: Budget,
    probe: int,
    probe_spread: int = 0,
    share: str | None = None,
    scale: float | None = None,
) -> Selection:
    """`estimate_vertical_slash` before sinks and locals are forced; documents and placement are prepared once for all
    layers."""
    q, k = q.detach(), k.detach()
    batch, _, heads, head_dim = q.shape
    probes = Probes.place(documents, batch, probe, probe_spread, q.device)
    scored = k.shape[2] if share else heads
    budget.check(scored)
    scale = head_dim**-0.5 if scale is None else scale
    # Under a trainer's autocast the scores would silently be bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        scores = probe_scores(q, k, probes, documents, placement, share=share is not None, scale=scale)
    head_of = [unit % scored for unit in scores.units]
    offsets = lower_distances(budget.choose_slashes(scores.slashes, head_of), placement.block)
    mine = Selection(budget.choose_columns(scores.columns, head_of), offsets)
    if placement.ring.world_size > 1:
        packed = torch.cat(placement.ring.all_gather(mine.pack(placement)))
        mine = Selection.unpack(packed, placement.seq_len, placement.num_blocks)
    return Selection(*(_by_head(x, batch, scored, heads // scored) for x in (mine.columns, mine.offsets)))


def _by_head(chosen: Tensor, batch: int, scored: int, group: int) -> Tensor:
    """[units (and padding), n] -> [B, H, n]."""
    chosen = chosen[: batch * scored].unflatten(0, (batch, scored))
    return chosen if group == 1 else chosen.repeat_interleave(group, 1)


def _check(q: Tensor, k: Tensor, block: int, probe: int, share: str | None) -> None:
    if (
        q.dim() != 4
        or k.dim() != 4
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
        or q.shape[2] % k.shape[2]
    ):
        raise MtrainError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} must be [B, S, heads, D] and [B, S, num_kv_heads, D] with "
            "num_kv_heads dividing heads"
        )
    if block < 1 or probe < 1:
        raise MtrainError(f"block and probe must be at least 1, got block={block}, probe={probe}")
    if share not in (None, "kv_head"):
        raise MtrainError(f"unknown share {share!r}; give None or 'kv_head'")
