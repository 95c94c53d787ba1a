"""How much attention the probe rows give to every key and to every token distance, shared over the ranks by key ranges.

Every rank scores the key blocks it holds for all heads, then each rank collects the scores of some heads. Two rules
make the result bit for bit the same for any number of ranks and any layout:

* Dot products and exponentials are computed in tiles of one fixed shape, a number of whole blocks padded to aligned
  sizes, so that a block's numbers never depend on which other blocks happen to be held beside it.
* Everything that is summed is first cut to a fixed-point integer, because only integer sums are exact in any order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtrain.patterns.documents import Documents, Probes
from mtrain.patterns.fixed_point import exponential_unit, probability_factor
from mtrain.patterns.kernel_scores import KernelPass
from mtrain.patterns.placement import Placement
from sparse_kernels.bits import upload
from sparse_kernels.gpu.probe import unusable
from sparse_kernels.reference import accumulation_dtype

# Tokens per tile: cache-sized on a CPU, few launches on a GPU. Never derived from the number of ranks.
TILE_TOKENS = {"cpu": 1024}
TILE_TOKENS_ELSEWHERE = 16384
# Matrix sides are padded to this many elements: a BLAS may sum in another order when a block is not aligned.
ALIGN = 16
# Scores of the local keys are kept between the passes when they fit in this; otherwise they are computed again.
KEEP_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class Scores:
    """Fixed-point scores of some of the scored heads ("units": batch row major, head minor).

    Attributes:
        columns: int64 [u, S]: the attention that all probe rows together give to each key.
        slashes: int64 [u, S]: the same by distance between query and key.
        units: the unit of each row; B * heads of them in all, consecutive and shared out evenly by rank. Rows beyond
            the last unit are zero.
    """

    columns: Tensor
    slashes: Tensor
    units: range


def probe_scores(
    q: Tensor, k: Tensor, probes: Probes, documents: Documents, placement: Placement, *, share: bool, scale: float
) -> Scores:
    """Score all keys and distances by the probe rows' attention, and keep the heads this rank is to decide.

    Args:
        q: shard [B, n, H, D]; k: shard [B, n, K, D].
        share: add the scores of the query heads of one key-value head; units are then key-value heads.

    Communication with W ranks, in bytes handed over per rank: all-reduces of B*R*H*D*4 (probe rows), B*K*Rp*4 (row
    maxima) and B*K*Rp*8 (row sums), and one all-to-all of W*ceil(U/W) * n/b * (b + sum over windows of (b + m - 1)) *
    8, where R are the probe rows, Rp = G*R rounded up to 16, U = B * H (or B * K when shared) and m the rows of a
    window (float64 inputs: 8 for 4). On a GPU Triton kernels score (`mtrain.patterns.kernel_scores`): probe rows then travel in
    the dtype of q, maxima and sums as B*H*R*4 and B*H*R*8.
    """
    # The same choice on every rank: dtypes and shapes are, and a ring has devices of one kind.
    kernels = unusable(q.device, q.dtype, q.shape[3], placement.block) is None
    pass_ = (KernelPass if kernels else _Pass)(q, k, probes, documents, placement, scale)
    ring = placement.ring
    peak = ring.all_reduce(pass_.row_maxima(), "max") if ring.world_size > 1 else pass_.row_maxima()
    pass_.peak = peak.masked_fill(peak == -torch.inf, 0)
    sums = ring.all_reduce(pass_.row_sums()) if ring.world_size > 1 else pass_.row_sums()
    partial = pass_.partial_scores(sums, share)
    return _collect(partial, probes, placement, heads=partial.shape[1])


@dataclass(eq=False)
class _Pass:
    """One estimate's walk over tiles of (batch row, key-value head, run of key blocks)."""

    q: Tensor
    k: Tensor
    probes: Probes
    documents: Documents
    placement: Placement
    scale: float
    peak: Tensor | None = None  # [B, K, Rp] the largest logit of each row
    _kept: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)
    _mask_of: tuple[int, int] | None = None  # the heads of a tile share one mask
    _mask: Tensor | None = None

    def __post_init__(self) -> None:
        batch, _, heads, self.head_dim = self.q.shape
        self.kv_heads = self.k.shape[2]
        self.group = heads // self.kv_heads
        self.dtype = accumulation_dtype(self.q.dtype)
        self.rows = self.probes.rows.shape[1]
        self.block = self.placement.block
        device = self.q.device
        tokens = TILE_TOKENS.get(device.type, TILE_TOKENS_ELSEWHERE)
        self.tile_blocks = max(1, tokens // self.block)
        self.padded_rows, self.padded_block = _up(self.group * self.rows), _up(self.block)
        self.queries = self._queries()
        start = self.documents.starts_of(self.probes.rows)
        # Slots that name no row stand before every key and see nothing.
        last = self.probes.rows.masked_fill(~self.probes.valid, -1)
        self.first_key, self.last_key = self._by_row(start, 0), self._by_row(last, -1)
        size = batch * self.kv_heads * len(self._tiles()) * self.tile_blocks * self.padded_rows * self.padded_block
        self.keep = size * self.dtype.itemsize <= KEEP_BYTES

    def row_maxima(self) -> Tensor:
        """[B, K, Rp]: the largest logit of each probe row over the keys held here (-inf: sees none of them)."""
        peak = self.queries.new_full(self.queries.shape[:3], -torch.inf)
        for b, h, tile in self._walk():
            logits = self._logits(b, h, tile)
            peak[b, h] = torch.maximum(peak[b, h], logits.amax((0, 2)))
            if self.keep:
                self._kept[b, h, tile] = logits
        return peak

    def row_sums(self) -> Tensor:
        """int64 [B, K, Rp]: each row's sum of exp(logit - peak) over the keys held here, in fixed point."""
        sums = torch.zeros(self.queries.shape[:3], dtype=torch.int64, device=self.q.device)
        one = exponential_unit(self.placement.seq_len)
        for b, h, tile in self._walk():
            sums[b, h] += (self._exponentials(b, h, tile, first=True) * one).long().sum((0, 2))
        return sums

    def partial_scores(self, sums: Tensor, share: bool) -> Tensor:
        """int64 [B, heads, n / b, b + sum of (b + m - 1)]: per key block the column scores, then each window's scores
        by b + m - 1 distances (see `_distances`)."""
        summed = self.rows * (self.group if share else 1)  # rows whose scores end in one sum, each of mass 1
        factor = probability_factor(sums, self.placement.seq_len, summed).to(self.dtype)
        batch, b_len = self.q.shape[0], self.block
        heads = self.kv_heads if share else self.kv_heads * self.group
        width = b_len + sum(b_len + m - 1 for m in self.probes.sizes)
        blocks = self.placement.blocks.numel()
        scores = torch.zeros(batch, heads, blocks, width, dtype=torch.int64, device=self.q.device)
        shape = (self.tile_blocks, self.group)
        skewed = [torch.zeros(*shape, m, b_len + m, dtype=torch.int64, device=self.q.device) for m in self.probes.sizes]
        for b, h, tile in self._walk():
            weights = self._exponentials(b, h, tile, first=False).mul_(factor[b, h][:, None])
            weights = weights[:, : self.group * self.rows].view(*shape, self.rows, self.padded_block)[..., :b_len]
            found = _tile_scores(weights, skewed, self.probes.sizes)
            found = found.sum(1, keepdim=True) if share else found
            per = found.shape[1]
            place = slice(tile * self.tile_blocks, min((tile + 1) * self.tile_blocks, blocks))
            scores[b, h * per : (h + 1) * per, place] = found[: place.stop - place.start].transpose(0, 1)
        return scores

    def _tiles(self) -> range:
        return range(-(-self.placement.blocks.numel() // self.tile_blocks))

    def _walk(self) -> Iterator[tuple[int, int, int]]:
        for b in range(self.q.shape[0]):
            for tile in self._tiles():
                for h in range(self.kv_heads):
                    yield b, h, tile

    def _queries(self) -> Tensor:
        """[B, K, Rp, Dp]: the probe rows, grouped by key-value head, padded with zeros."""
        rows = self.placement.rows(self.q, self.probes.rows).to(self.dtype)
        rows = rows.unflatten(2, (self.kv_heads, self.group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        pad = (0, _up(self.head_dim) - self.head_dim, 0, self.padded_rows - rows.shape[2])
        return torch.nn.functional.pad(rows, pad).contiguous()

    def _by_row(self, values: Tensor, padding: int) -> Tensor:
        """int64 [B, R] repeated for the query heads of a group and padded: [B, Rp]."""
        values = values.repeat(1, self.group)
        return torch.nn.functional.pad(values, (0, self.padded_rows - values.shape[1]), value=padding)

    def _exponentials(self, b: int, h: int, tile: int, first: bool) -> Tensor:
        """exp(logit - peak), [tile_blocks, Rp, bp]."""
        assert self.peak is not None
        if self.keep and not first:
            return self._kept.pop((b, h, tile))
        logits = self._kept[b, h, tile] if self.keep else self._logits(b, h, tile)
        return logits.sub_(self.peak[b, h][:, None]).exp_()

    def _logits(self, b: int, h: int, tile: int) -> Tensor:
        """Scaled scores [tile_blocks, Rp, bp] of a run of key blocks; -inf where the probe row does not see the key."""
        count, b_len = self.tile_blocks, self.block
        first, device = tile * count, self.q.device
        source = self.k[b, first * b_len : (first + count) * b_len, h]
        keys = torch.zeros(count * b_len, _up(self.head_dim), dtype=self.dtype, device=device)
        keys[: source.shape[0], : self.head_dim] = source
        keys = torch.nn.functional.pad(keys.view(count, b_len, -1), (0, 0, 0, self.padded_block - b_len))
        queries = self.queries[b, h].expand(count, -1, -1)
        logits = torch.bmm(queries, keys.transpose(1, 2)).mul_(self.scale)
        return logits.masked_fill_(self._hidden(b, tile), -torch.inf)

    def _hidden(self, b: int, tile: int) -> Tensor:
        """bool [tile_blocks, Rp, bp]: the probe row does not see the key (future, other document, or one of them is
        padding)."""
        if self._mask_of != (b, tile):
            first, b_len, device = tile * self.tile_blocks, self.block, self.q.device
            ids = self.placement.blocks[first : first + self.tile_blocks]
            # A padding block or key stands behind every row.
            missing = self.tile_blocks - ids.numel()
            ids = upload(torch.nn.functional.pad(ids, (0, missing), value=self.placement.num_blocks + 1), device)
            inside = torch.arange(self.padded_block, device=device)
            position = torch.where(inside < b_len, ids[:, None] * b_len + inside, self.placement.seq_len)[:, None]
            last, start = self.last_key[b][:, None], self.first_key[b][:, None]
            self._mask_of, self._mask = (b, tile), (position > last) | (position < start)
        assert self._mask is not None
        return self._mask


def _tile_scores(weights: Tensor, skewed: list[Tensor], sizes: tuple[int, ...]) -> Tensor:
    """Sum weights [c, G, R, b] over rows and along equal distances: int64 [c, G, b + sum (b + m - 1)], fixed point.

    A window's rows run backwards from its last row e: row r is query e - r. So query - key is constant along r + key,
    and a sum over equal r + c (c: place of the key in its block) is a sum over a distance. Shifting row r by r places
    does it: the rows lie in a buffer that is m wider than the block, read with a row length one shorter.
    """
    columns: Tensor | None = None
    parts: list[Tensor] = []
    width, first = weights.shape[-1], 0
    for buffer, m in zip(skewed, sizes, strict=True):
        buffer[..., :width] = weights[:, :, first : first + m]
        first += m
        own = buffer[..., :width].sum(2)
        columns = own if columns is None else columns + own
        blocks, group, _, row = buffer.shape
        shifted = buffer.as_strided((blocks, group, m, row - 1), (group * m * row, m * row, row - 1, 1))
        parts.append(shifted.sum(2))
    assert columns is not None
    return torch.cat([columns, *parts], -1)


def _collect(partial: Tensor, probes: Probes, placement: Placement, heads: int) -> Scores:
    """Bring every block's partial scores to the rank that decides the head, and add them up."""
    ring, b = placement.ring, placement.block
    batch, _, blocks, width = partial.shape
    total, per = batch * heads, -(-batch * heads // ring.world_size)
    flat = partial.view(total, blocks, width)
    if ring.world_size > 1:
        flat = torch.nn.functional.pad(flat, (0, 0, 0, 0, 0, per * ring.world_size - total))
        flat = torch.cat(ring.all_to_all(list(flat.split(per))), 1)
    if placement.layout is not None:
        flat = flat.index_select(1, upload(placement.order, flat.device))
    size = placement.seq_len
    columns = flat[..., :b].flatten(1)[:, :size]
    units = range(ring.rank * per, (ring.rank + 1) * per)
    row_of = upload(torch.tensor([min(unit // heads, batch - 1) for unit in units]), flat.device)
    slashes = torch.zeros_like(columns)
    distance, first = torch.arange(size, device=flat.device), b
    for window, m in enumerate(probes.sizes):
        ends = probes.ends[row_of, window]
        slashes = slashes + _distances(flat[..., first : first + b + m - 1], b, ends[:, None] - distance)
        first += b + m - 1
    return Scores(columns, slashes, units)


def _distances(partial: Tensor, block: int, index: Tensor) -> Tensor:
    """One window's scores by distance, int64 [u, S], from its scores by key block [u, NB, b + m - 1].

    Slot t of block J holds r + c = t, that is query e - r and key J * b + c with query - key = e - (J * b + t).
    Neighbouring blocks overlap by m - 1 slots, which are added; ``index`` [u, S] is e - distance.
    """
    blocks, width = partial.shape[1:]
    steps = -(-width // block)
    pieces = torch.nn.functional.pad(partial, (0, steps * block - width)).unflatten(2, (steps, block))
    joined = partial.new_zeros(partial.shape[0], blocks + steps - 1, block)
    for step in range(steps):
        joined[:, step : step + blocks] += pieces[:, :, step]
    return joined.flatten(1).gather(1, index.clamp(min=0)).masked_fill(index < 0, 0)


def _up(n: int) -> int:
    return -(-n // ALIGN) * ALIGN
