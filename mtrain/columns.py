"""Columns outside the ring: the selected key and value rows are gathered once per layer and used by every rank locally.

A column is wanted by every later query, so in the ring the rank that holds a popular column (the sinks) would be the straggler of
every step. The columns of all heads are known before the ring starts; their rows are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtrain.comm import Ring
from mtrain.layout import RingLayout
from sparse_kernels import SparsePattern
from sparse_kernels.bits import upload


@dataclass(frozen=True, eq=False)
class ColumnStore:
    """Which key rows are gathered, and where the rank's own ones lie.

    Attributes:
        positions: int64 [B, K, U] ascending global positions per key-value head (the union over its query heads), padded
            with seq_len.
        local: int64 [B, U, K] row of this rank's shard that holds the position; ``local_len`` where another rank does.
    """

    positions: Tensor
    local: Tensor

    @classmethod
    def build(cls, pattern: SparsePattern, num_kv_heads: int, ring: Ring, layout: RingLayout) -> ColumnStore | None:
        """The store of a pattern; None when the pattern has no column slots."""
        assert pattern.columns is not None
        if pattern.columns.shape[2] == 0:
            return None
        positions = union_columns(pattern, num_kv_heads)
        b = layout.block
        blocks = (positions // b).clamp(max=layout.table.numel() - 1)
        owner, slot = upload(layout.owner, positions.device), upload(layout.slot, positions.device)
        mine = (owner[blocks] == ring.rank) & (positions < pattern.seq_len)
        local = torch.where(mine, slot[blocks] * b + positions % b, layout.local_len)
        return cls(positions, local.transpose(1, 2).contiguous())

    def gather(self, k: Tensor, v: Tensor, ring: Ring) -> tuple[Tensor, Tensor]:
        """K and V rows of the columns, [B, U, K, D] each, from the shards [B, n, K, D] of all ranks.

        One all-reduce of B * U * K * 2 * D elements in which exactly one rank contributes each row, so nothing is rounded.
        """
        rows = torch.stack([self._pick(k), self._pick(v)])
        both = ring.all_reduce(rows) if ring.world_size > 1 else rows
        return both[0], both[1]

    def scatter(self, dk: Tensor, dv: Tensor, dk_rows: Tensor, dv_rows: Tensor, ring: Ring) -> None:
        """Add the gradients of the gathered rows, summed over ranks, to this rank's dk and dv [B, n, K, D] in place."""
        both = torch.stack([dk_rows, dv_rows])
        both = ring.all_reduce(both) if ring.world_size > 1 else both
        for shard, rows in ((dk, both[0]), (dv, both[1])):
            spare = torch.nn.functional.pad(shard, (0, 0, 0, 0, 0, 1))
            index = self.local[..., None].expand_as(rows)
            # Own rows are hit once each; only the spare row collects the rest.
            spare.scatter_add_(1, index, rows.masked_fill(index == shard.shape[1], 0))
            shard.copy_(spare[:, :-1])

    def _pick(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        index = self.local[..., None].expand(-1, -1, -1, x.shape[3])
        return x.gather(1, index.clamp(max=n - 1)).masked_fill(index == n, 0)


def union_columns(pattern: SparsePattern, num_kv_heads: int) -> Tensor:
    """int64 [B, K, U]: ascending columns wanted by any query head of each key-value head, padded with seq_len."""
    assert pattern.columns is not None
    size = pattern.seq_len
    columns = pattern.columns.long().clamp(max=size)
    batch, heads, slots = columns.shape
    group = heads // num_kv_heads
    wanted = torch.zeros(batch, num_kv_heads, size + 1, dtype=torch.bool, device=columns.device)
    wanted.scatter_(2, columns.reshape(batch, num_kv_heads, group * slots), True)
    wanted[..., size] = False
    width = min(group * slots, size)
    if columns.device.type == "cpu":
        # On a CPU the true width costs nothing to know; on a GPU asking would stall the stream.
        width = int(wanted.sum(-1).max())
    ordered = torch.where(wanted, torch.arange(size + 1, device=columns.device), size).sort(-1).values
    return ordered[..., :width].contiguous()
