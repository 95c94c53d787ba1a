"""Exact work accounting: what every rank computes in every ring step, counted from a pattern without running it.

**Computed tile area.** A kernel computes whole tiles, so the account does too:

- a tile (query block m, key block n) of the block part is computed iff n <= m, the pattern selects it for the head, and its last
  key is not before the document of the first row of m; it counts b * b pairs, the diagonal tile (n = m) included;
- a column j is computed for query block m iff it lies in an earlier block that the block part does not cover for m and head, and
  not before the document of the first row of m; it counts b pairs (all rows of the block against one key).

Single blocks are counted by the rank that holds their query block, and added up where a ring is given.

Everything is summed over batch rows and query heads. A row of padding at the end of the last block counts like a real row;
blocks of padding count nothing. Along a diagonal nothing depends on the row except where the document begins, so nothing here
builds an NB x NB mask unless the pattern holds single ``blocks``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtrain.balance.convolve import visible_convolution
from mtrain.comm import Ring
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout
from mtrain.topology import RingTopology
from sparse_kernels.bits import upload
from sparse_kernels.pattern import SparsePattern, pad_doc_start


@dataclass(frozen=True)
class Visible:
    """What the document mask leaves of each query block: bounds, one row of blocks per batch row.

    Attributes:
        start: int64 [B, NB], first position that the first row of the block may see.
        first: int64 [B, NB], the block of that position: the first key block whose tile is computed.
    """

    start: Tensor
    first: Tensor

    @classmethod
    def of(cls, doc_start: Tensor | None, batch: int, seq_len: int, block: int) -> Visible:
        """From doc_start int64 [B, S]; None: one document from position 0."""
        num_blocks = -(-seq_len // block)
        start = torch.zeros(batch, num_blocks, dtype=torch.int64)
        if doc_start is not None:
            start = doc_start[:, ::block].cpu().long()
        return cls(start, start // block)


def work(
    pattern: SparsePattern,
    layout: RingLayout,
    topology: RingTopology,
    doc_start: Tensor | None = None,
    *,
    ring: Ring | None = None,
) -> Tensor:
    """Computed tile area of every rank in every ring step.

    Args:
        pattern: the global pattern; with ``ring`` its single blocks may be those of this rank's queries only.
        layout: who owns which block.
        topology: which shard a rank works on in which step.
        doc_start: int64 [B, S] of the whole sequence; None: one document.
        ring: the ranks that hold the other rows of single blocks; every one of them makes this call.

    Returns:
        float64 [W, outer * inner + 1]: entry (r, s * inner + t) is the block part of rank r on the shard it holds in outer step s,
        inner step t; the last column is the column part of rank r, computed outside the ring.

    Raises:
        MtrainError: layout, topology and pattern do not fit each other.
    """
    if layout.ranks != topology.world_size:
        raise MtrainError(f"the layout is for {layout.ranks} ranks, the topology for {topology.world_size}")
    if (layout.seq_len, layout.block) != (pattern.seq_len, pattern.block):
        raise MtrainError(
            f"the layout is for {layout.seq_len} tokens in blocks of {layout.block}, "
            f"the pattern for {pattern.seq_len} in blocks of {pattern.block}"
        )
    visible = _visible(pattern, doc_start)
    owner = layout.owner[: pattern.num_blocks].to(pattern.device)
    pairs = by_owner(_tiles_by_shard(pattern, visible, owner, layout.ranks, ring), owner, layout.ranks)
    columns = by_owner(_columns(pattern, visible, ring).sum(0)[:, None], owner, layout.ranks)
    steps = pairs.gather(1, shard_table(topology).to(pairs.device))
    return torch.cat([steps * pattern.block**2, columns * pattern.block], 1).cpu()


def imbalance(work: Tensor) -> tuple[float, float]:
    """(worker, step) imbalance of a work table [W, steps], both >= 1.

    worker = max_r sum_t / mean_r sum_t: what a ring without any waiting inside would lose. step = sum_t max_r / mean_r sum_t:
    what a ring loses in which every step waits for its slowest rank. The column part is one more (local) step: it adds to the
    sum of its rank in the first and contributes its own maximum to the second. A table without work is balanced: (1, 1).
    """
    mean = float(work.sum()) / work.shape[0]
    if mean == 0:
        return 1.0, 1.0
    return float(work.sum(1).max()) / mean, float(work.max(0).values.sum()) / mean


def block_cost(pattern: SparsePattern, doc_start: Tensor | None = None, *, ring: Ring | None = None) -> Tensor:
    """float64 [NB] on the pattern's device: computed area of each query block, summed over batch rows and heads.

    The sums of `work` over the blocks of a rank, whatever the layout; ``ring`` as there.
    """
    visible = _visible(pattern, doc_start)
    area = pattern.block**2 * _tile_rows(pattern, visible, ring)
    return area + pattern.block * _columns(pattern, visible, ring).sum(0)


def tile_density(pattern: SparsePattern, doc_start: Tensor | None = None, *, ring: Ring | None = None) -> float:
    """Computed area over causal pairs of the same documents. Never below the density of the mask; above 1 for short dense rows.

    ``ring`` as in `work`.
    """
    padded = pad_doc_start(doc_start, pattern)
    row = torch.arange(1, pattern.seq_len + 1, dtype=torch.float64)
    causal = pattern.batch * row.sum()
    if padded is not None:
        causal = causal - padded[:, : pattern.seq_len].sum(dtype=torch.float64).cpu()
    return float(block_cost(pattern, doc_start, ring=ring).sum().cpu() / (causal * pattern.heads))


def measure(pattern: SparsePattern, doc_start: Tensor | None = None, *, ring: Ring | None = None) -> Tensor:
    """What the balancer averages, float64 [3, NB] on the pattern's device; sums over layers and ranks of the data are meaningful.

    Row 0: tile area per block at each block offset (batch rows and heads that hold the diagonal, times b * b), documents apart.
    Row 1: tile area per query block from single ``blocks`` that lie on no diagonal, per visible key block.
    Row 2: column area per query block, per visible key block.
    Rows 1 and 2 are rates, so that another batch with other documents can be predicted: visible key blocks of block m are
    those from the start of its document to m. ``ring`` as in `work`.
    """
    visible = _visible(pattern, doc_start)
    area = pattern.block**2
    rate = pattern.batch / (visible_blocks(visible.first).sum(0)).to(pattern.device)
    tiles = torch.stack([_offsets(pattern).sum(0), torch.zeros_like(rate), _columns(pattern, visible, ring).sum(0)])
    if pattern.blocks is not None:
        on_diagonals = SparsePattern(pattern.seq_len, pattern.block, diagonals=pattern.diagonals)
        tiles[1] = _tile_rows(pattern, visible, ring) - _tile_rows(on_diagonals, visible, None)
    return tiles * torch.stack([area * torch.ones_like(rate), area * rate, pattern.block * rate])


def visible_blocks(first: Tensor) -> Tensor:
    """float64 [B, NB]: key blocks each query block can see, itself included, from ``first`` int64 [B, NB]."""
    return (torch.arange(first.shape[-1]) - first + 1).double()


def shard_table(topology: RingTopology) -> Tensor:
    """int64 [W, outer * inner]: the rank whose shard each rank holds in each step."""
    return torch.tensor(
        [
            [topology.owner(rank, s, t) for s in range(topology.outer) for t in range(topology.inner)]
            for rank in range(topology.world_size)
        ]
    )


def by_owner(rows: Tensor, owner: Tensor, ranks: int) -> Tensor:
    """Sum rows [NB, n] over the blocks of each rank: [W, n]."""
    return torch.zeros(ranks, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add_(0, owner, rows)


def _visible(pattern: SparsePattern, doc_start: Tensor | None) -> Visible:
    pad_doc_start(doc_start, pattern)  # the shape check with its message
    return Visible.of(doc_start, pattern.batch, pattern.seq_len, pattern.block)


def _offsets(pattern: SparsePattern) -> Tensor:
    """float64 [B, NB]: heads that hold each block offset."""
    return pattern.offset_table().sum(1, dtype=torch.float64)


def _tile_rows(pattern: SparsePattern, visible: Visible, ring: Ring | None) -> Tensor:
    """float64 [NB]: tiles computed for each query block."""
    if pattern.blocks is not None:
        nobody = torch.zeros(pattern.num_blocks, dtype=torch.int64, device=pattern.device)
        return _tiles_by_shard(pattern, visible, nobody, 1, ring)[:, 0]
    span = torch.arange(pattern.num_blocks) - visible.first
    return _offsets(pattern).cumsum(1).gather(1, span.to(pattern.device)).sum(0)


def _held_chunks(pattern: SparsePattern) -> tuple[Tensor, ...]:
    """The query blocks held here, as many at a time as bound the memory of their rows."""
    held = pattern.held[pattern.held < pattern.num_blocks]
    return held.split(max(1, 2**22 // (pattern.batch * pattern.heads * pattern.num_blocks)))


def _of_all(rows: Tensor, pattern: SparsePattern, ring: Ring | None) -> Tensor:
    """Counts by query block, 0 for those that other ranks hold, made those of all."""
    if pattern.block_rows is None or pattern.block_rows.whole:
        return rows
    if ring is None:
        raise MtrainError(
            "this pattern holds the single blocks of one rank's queries: give the ring too, on every rank, to add the counts up"
        )
    return ring.all_reduce(rows)


def _tiles_by_shard(pattern: SparsePattern, visible: Visible, owner: Tensor, ranks: int, ring: Ring | None) -> Tensor:
    """float64 [NB, W]: tiles of each query block whose keys belong to each rank."""
    size = pattern.num_blocks
    shards = torch.zeros(ranks, size, dtype=torch.float64, device=pattern.device)
    shards.scatter_(0, owner[None], 1.0)
    if pattern.blocks is None:
        offsets = _offsets(pattern)
        rows = [
            visible_convolution(offsets[i][None, None], shards[:, None], visible.first[i]) for i in range(pattern.batch)
        ]
        return torch.stack(rows).sum(0).T
    every = torch.arange(size, device=pattern.device)
    first = visible.first.to(pattern.device)
    found = torch.zeros(size, ranks, dtype=torch.float64, device=pattern.device)
    for chunk in _held_chunks(pattern):
        here = upload(chunk, pattern.device)
        open_ = every >= first[:, here, None]
        tiles = (pattern.block_mask(chunk, every) & open_[:, None]).sum((0, 1), dtype=torch.float64)
        found[here] = tiles @ shards.T
    return _of_all(found, pattern, ring)


def _columns(pattern: SparsePattern, visible: Visible, ring: Ring | None) -> Tensor:
    """float64 [B, NB]: columns computed for each query block, summed over heads."""
    assert pattern.columns is not None
    size, b = pattern.num_blocks, pattern.block
    if pattern.columns.shape[2] == 0:
        return torch.zeros(pattern.batch, size, dtype=torch.float64, device=pattern.device)
    if pattern.blocks is not None:
        return _columns_beside_blocks(pattern, visible, ring)
    columns = pattern.columns.long().contiguous()
    first, start = visible.first.to(pattern.device), visible.start.to(pattern.device)
    row = torch.arange(size, device=pattern.device)

    def before(position: Tensor) -> Tensor:  # columns before a position, [B, H, NB]
        return torch.searchsorted(columns, position[:, None].expand(-1, pattern.heads, -1).contiguous())

    hidden = before(start)
    seen = (before((row * b).expand_as(start)) - hidden).sum(1).double()
    held = torch.zeros(pattern.batch, pattern.heads, size + 1, dtype=torch.float64, device=pattern.device)
    home = columns // b + (columns >= pattern.seq_len) * size
    held.scatter_add_(2, home.clamp(max=size), torch.ones_like(home, dtype=torch.float64))
    table = pattern.offset_table()
    table[:, :, 0] = False  # `seen` ends before the query block itself
    near = table.double()
    covered = [
        visible_convolution(near[i][None], held[i, :, :size][None], visible.first[i]) for i in range(pattern.batch)
    ]
    # The first visible block counts whole above; its columns before the document were never in `seen`.
    early = (hidden - before(first * b)) * table.gather(2, (row - first)[:, None].expand(-1, pattern.heads, -1))
    return seen - torch.cat(covered) + early.sum(1)


def _columns_beside_blocks(pattern: SparsePattern, visible: Visible, ring: Ring | None) -> Tensor:
    assert pattern.columns is not None
    every = torch.arange(pattern.num_blocks)
    column = pattern.columns.long()[:, :, None]
    home = (column // pattern.block).clamp(max=pattern.num_blocks - 1)
    start = visible.start.to(pattern.device)
    found = torch.zeros(pattern.batch, pattern.num_blocks, dtype=torch.float64, device=pattern.device)
    for chunk in _held_chunks(pattern):
        tiles = pattern.block_mask(chunk, every)
        rows = upload(chunk, pattern.device)
        seen = (column < rows[:, None] * pattern.block) & (column >= start[:, None, rows, None])
        free = seen & ~tiles.gather(3, home.expand(-1, -1, chunk.numel(), -1))
        found[:, rows] = free.sum((1, 3), dtype=torch.float64)
    return _of_all(found, pattern, ring)
