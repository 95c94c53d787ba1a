"""The part of a pattern that one kernel call computes: some query blocks against some keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels.bits import upload
from sparse_kernels.pattern import SparsePattern


@dataclass(frozen=True, eq=False)
class ShardView:
    """A rectangle of the global mask: local query blocks against either key blocks or gathered column rows.

    Every pair of the global mask must be computed exactly once over all views of a query, so a view knows *global* block ids
    and positions, and a column that the block part already covers for a query block belongs to the block part only.

    Args:
        pattern: the global pattern.
        q_blocks: int64 [nq] on the CPU, global block ids of the local query blocks, in local order. Ids >= NB are padding.
        k_blocks: int64 [nk] on the CPU, global block ids of the local key blocks: k and v are [B, nk * b, K, D].
            None when the keys are gathered columns.
        inline_columns: with ``k_blocks``: also compute the columns whose rows lie in these key blocks.
        column_positions: without ``k_blocks``: int64 [B, K, U] ascending global positions (padded with ``seq_len``) of the key
            rows held per key-value head: k and v are [B, U, K, D]. Only the column part is computed.
        doc_start: int64 [B, nq * b], document starts of the local query rows; None: one document.
    """

    pattern: SparsePattern
    q_blocks: Tensor
    k_blocks: Tensor | None = None
    inline_columns: bool = False
    column_positions: Tensor | None = None
    doc_start: Tensor | None = None

    def __post_init__(self) -> None:
        assert (self.k_blocks is None) != (self.column_positions is None), "keys are either blocks or gathered columns"

    @property
    def q_positions(self) -> Tensor:
        """int64 [nq * b] global positions of the local query rows (>= seq_len: padding)."""
        return upload(block_positions(self.q_blocks, self.pattern.block), self.pattern.device)

    def mask(self) -> Tensor:
        """The plain truth of the view: bool [B, H, nq * b, keys]. Memory is the full rectangle; for tests and small cases."""
        pattern, b = self.pattern, self.pattern.block
        assert pattern.columns is not None
        query = self.q_positions
        if self.k_blocks is not None:
            key = upload(block_positions(self.k_blocks, b), pattern.device).expand(pattern.batch, pattern.heads, -1)
            tiles = pattern.block_mask(self.q_blocks, self.k_blocks)
            near = tiles.repeat_interleave(b, 2).repeat_interleave(b, 3)
            chosen = near | self._is_column(key)[:, :, None] if self.inline_columns else near
        else:
            assert self.column_positions is not None
            group = pattern.heads // self.column_positions.shape[1]
            key = self.column_positions.repeat_interleave(group, 1)
            every = torch.arange(pattern.num_blocks)
            tiles = pattern.block_mask(self.q_blocks, every)
            home = (key // b).clamp(max=pattern.num_blocks - 1)
            covered = tiles.gather(3, home[:, :, None].expand(-1, -1, tiles.shape[2], -1)).repeat_interleave(b, 2)
            chosen = self._is_column(key)[:, :, None] & ~covered
        visible = (key[:, :, None] <= query[:, None]) & (query[:, None] < pattern.seq_len)
        if self.doc_start is not None:
            visible = visible & (key[:, :, None] >= self.doc_start[:, None, :, None])
        return chosen & visible

    def _is_column(self, key: Tensor) -> Tensor:
        """bool like ``key`` [B, H, n]: is this position one of the head's columns?"""
        pattern = self.pattern
        assert pattern.columns is not None
        table = torch.zeros(pattern.batch, pattern.heads, pattern.seq_len + 1, dtype=torch.bool, device=pattern.device)
        table.scatter_(2, pattern.columns.long().clamp(max=pattern.seq_len), True)
        table[:, :, pattern.seq_len] = False
        return table.gather(2, key.clamp(max=pattern.seq_len))


def block_positions(blocks: Tensor, block: int) -> Tensor:
    """int64 [n * block] global token positions of whole blocks, in the order given."""
    return (blocks[:, None] * block + torch.arange(block, device=blocks.device)).flatten()
