"""Which tiles and columns the query blocks of a view read: booleans per (batch row, head, query block)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels.view import ShardView


@dataclass(frozen=True)
class Geometry:
    """Sizes of one call: B, H, K, D, key rows R, local query blocks nq, tokens per block b, bytes per number."""

    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    key_rows: int
    num_q_blocks: int
    block: int
    itemsize: int

    @property
    def row_dtype(self) -> torch.dtype:
        """Of key rows: int32 halves the index, unless B * R * K does not fit."""
        return torch.int32 if self.batch * self.key_rows * self.kv_heads < 2**31 else torch.int64

    @property
    def token_budget(self) -> int:
        """Most list entries held at once: as many bytes as q has, so that the index stays O(S)."""
        return max(
            1 << 20, self.batch * self.heads * self.num_q_blocks * self.block * self.head_dim * self.itemsize // 4
        )

    def query_rows(self, items: Tensor) -> Tensor:
        """int64 [N * b]: rows of these items in q seen as [B * nq * b * H, D]."""
        block, pair = items % self.num_q_blocks, items // self.num_q_blocks
        first = (pair // self.heads * self.num_q_blocks + block) * (self.block * self.heads) + pair % self.heads
        return (first[:, None] + torch.arange(self.block) * self.heads).flatten()


@dataclass(frozen=True)
class DocumentBounds:
    """int64 [B, nq] each: the smallest and the largest document start among the real rows of each query block.

    Keys before ``first_open`` are closed to all rows of the block, keys from ``last_open`` on are open to all (causality apart).
    """

    first_open: Tensor
    last_open: Tensor


@dataclass(frozen=True)
class Selection:
    """What a range of n query blocks reads.

    tiles: bool [B, H, n, nk].
    columns: bool [B, H, n, C], never inside a tile of the query block.
    column_rows: int64 [B, H, C] local key row of each column.
    bounded: bool [B, H, n]: some key of the block is closed to some of its rows.
    """

    tiles: Tensor
    columns: Tensor
    column_rows: Tensor
    bounded: Tensor

    def lengths(self, block: int) -> Tensor:
        """int64 [B, H, n] keys read by each query block."""
        return self.tiles.sum(-1) * block + self.columns.sum(-1)


def document_bounds(view: ShardView, geometry: Geometry) -> DocumentBounds:
    """The document bounds of every local query block; zeros without documents."""
    g = geometry
    if view.doc_start is None:
        zero = torch.zeros(1, 1, dtype=torch.int64).expand(g.batch, g.num_q_blocks)
        return DocumentBounds(zero, zero)
    start = view.doc_start.view(g.batch, g.num_q_blocks, g.block)
    dead = (view.q_positions >= view.pattern.seq_len).view(g.num_q_blocks, g.block)
    return DocumentBounds(start.masked_fill(dead, view.pattern.seq_len).amin(2), start.masked_fill(dead, 0).amax(2))


def select(
    view: ShardView, geometry: Geometry, bounds: DocumentBounds, low: int, high: int, *, skip_diagonal: bool
) -> Selection:
    """Tiles and columns of the local query blocks low..high.

    skip_diagonal: leave out diagonal tiles in which no document starts (a causal call computes them).
    """
    block, q_ids = geometry.block, view.q_blocks[low:high]
    first, last = bounds.first_open[:, None, low:high, None], bounds.last_open[:, None, low:high, None]
    if view.k_blocks is None:
        cover = view.pattern.block_mask(q_ids, torch.arange(view.pattern.num_blocks))
        tiles, bounded = cover[..., :0], torch.zeros(cover.shape[:3], dtype=torch.bool)
    else:
        k_ids = view.k_blocks
        cover = view.pattern.block_mask(q_ids, k_ids)
        diagonal = q_ids[:, None] == k_ids
        tiles, edge = cover, diagonal
        if view.doc_start is not None:
            tiles = tiles & ((k_ids + 1) * block > first)
            edge = edge | (k_ids * block < last)
        if skip_diagonal:
            tiles = tiles & ~(diagonal & (k_ids * block >= last))
        bounded = (tiles & edge).any(-1)
    columns, column_rows = _select_columns(view, geometry, q_ids, cover, first)
    if view.doc_start is not None and columns.shape[3]:
        assert view.pattern.columns is not None
        bounded = bounded | (columns & (view.pattern.columns[:, :, None] < last)).any(-1)
    return Selection(tiles, columns, column_rows, bounded)


def _select_columns(
    view: ShardView, geometry: Geometry, q_ids: Tensor, cover: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """(bool [B, H, n, C], local key rows int64 [B, H, C]) of the columns that no tile in ``cover`` holds."""
    pattern, block = view.pattern, geometry.block
    assert pattern.columns is not None
    column = pattern.columns.long()
    if not column.shape[2] or (view.k_blocks is not None and not view.inline_columns):
        return cover.new_zeros(cover.shape[:3] + (0,)), column[:, :, :0]
    known = (column < pattern.seq_len) & (torch.nn.functional.pad(column, (1, 0), value=-1)[..., :-1] < column)
    home = (column // block).clamp(max=pattern.num_blocks - 1)
    if view.k_blocks is not None:
        slot = torch.full((pattern.num_blocks,), -1)
        real = view.k_blocks < pattern.num_blocks
        slot[view.k_blocks[real]] = torch.arange(len(view.k_blocks))[real]
        home = slot[home]
        rows, known = home * block + column % block, known & (home >= 0)
    else:
        rows, known = _find_columns(view, geometry, column, known)
    covered = cover.gather(3, home.clamp(min=0)[:, :, None].expand(-1, -1, len(q_ids), -1))
    # The query block's own tile is always a tile (offset 0), so columns count only before it.
    before = (column[:, :, None] < q_ids[:, None] * block) & (q_ids < pattern.num_blocks)[:, None]
    chosen = known[:, :, None] & before & ~covered
    return (chosen if view.doc_start is None else chosen & (column[:, :, None] >= first)), rows


def _find_columns(view: ShardView, geometry: Geometry, column: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Where each head's columns lie among the gathered rows of its key-value head, and whether they are there."""
    held = view.column_positions
    assert held is not None
    if not held.shape[2]:
        return torch.zeros_like(column), torch.zeros_like(known)
    held = held.repeat_interleave(geometry.heads // held.shape[1], 1).contiguous()
    rows = torch.searchsorted(held, column.contiguous()).clamp(max=held.shape[2] - 1)
    return rows, known & (held.gather(2, rows) == column)
