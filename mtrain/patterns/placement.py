"""Which key blocks this process holds and how to see the whole sequence from it: alone, or as one rank of a ring."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtrain.comm import Ring, SingleRing
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout
from sparse_kernels.bits import upload


@dataclass(frozen=True, eq=False)
class Placement:
    """One view of a whole sequence and of a sharded one: the estimators have a single code path.

    Attributes:
        ring: the ranks that hold the other blocks.
        layout: who holds which block; None: everything is here, in order.
        seq_len: S.
        block: b.
        blocks: int64 [n] CPU, global ids of the blocks held here, in local order (ids >= NB are padding).
        order: int64 [NB] CPU, where each real block lies when the ranks' blocks are joined in rank order.
    """

    ring: Ring
    layout: RingLayout | None
    seq_len: int
    block: int
    blocks: Tensor
    order: Tensor

    @classmethod
    def of(cls, local_len: int, block: int, ring: Ring | None, layout: RingLayout | None) -> Placement:
        """The placement of shards of ``local_len`` tokens (the whole sequence without ring and layout).

        Raises:
            MtrainError: a ring without a layout or the reverse, or shards that do not fit the layout.
        """
        if layout is None:
            if ring is not None and ring.world_size > 1:
                raise MtrainError(f"a ring of {ring.world_size} ranks needs the layout that says who owns which tokens")
            blocks = torch.arange(-(-local_len // block))
            return cls(ring or SingleRing(), None, local_len, block, blocks, blocks)
        if ring is None and layout.ranks > 1:
            raise MtrainError(f"a layout over {layout.ranks} ranks needs the ring that joins them")
        ring = ring or SingleRing()
        if (layout.ranks, layout.block, layout.local_len) != (ring.world_size, block, local_len):
            raise MtrainError(
                f"the layout is for {layout.ranks} ranks, blocks of {layout.block} and shards of {layout.local_len} "
                f"tokens; got {ring.world_size} ranks, blocks of {block} and shards of {local_len} tokens"
            )
        order = (layout.owner * layout.blocks_per_rank + layout.slot)[: layout.num_blocks]
        return cls(ring, layout, layout.seq_len, block, layout.blocks(ring.rank), order)

    @property
    def num_blocks(self) -> int:
        """NB, blocks that hold at least one real token."""
        return -(-self.seq_len // self.block)

    @property
    def local_len(self) -> int:
        """Tokens held here, padding included."""
        return self.seq_len if self.layout is None else self.layout.local_len

    def whole(self, x: Tensor, dim: int) -> Tensor:
        """The whole tensor of every rank's shard along ``dim``."""
        return x if self.layout is None else self.layout.unshard(self.ring.all_gather(x), dim)

    def rows(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows [B, R, ...] of a sharded x [B, n, ...] at global positions ``rows`` [B, R], on every rank.

        One all-reduce of the result, to which exactly one rank contributes each row, so that nothing is rounded.
        Positions outside the sequence give some row of it.
        """
        rows = rows.clamp(0, self.seq_len - 1)
        if self.layout is None:
            return _pick(x, rows)
        home = rows // self.block
        owner, slot = upload(self.layout.owner, rows.device), upload(self.layout.slot, rows.device)
        picked = _pick(x, slot[home] * self.block + rows % self.block)
        mine = (owner[home] == self.ring.rank).view(*rows.shape, *[1] * (x.dim() - 2))
        return self.ring.all_reduce(picked.masked_fill(~mine, 0))


def _pick(x: Tensor, rows: Tensor) -> Tensor:
    index = rows.view(*rows.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)
