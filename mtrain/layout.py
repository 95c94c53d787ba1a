"""Which rank owns which block of tokens. Applied once, in the data path: no layer ever moves q, k or v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtrain.errors import MtrainError
from sparse_kernels.bits import upload

LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")


@dataclass(frozen=True, eq=False)
class RingLayout:
    """An assignment of whole blocks to ranks, the same number to each; made by `RingLayout.build`.

    A block id at or beyond ``num_blocks``, or a position at or beyond ``seq_len``, is padding.

    Attributes:
        kind: contiguous, zigzag, striped or balanced.
        seq_len: S, tokens of the sequence.
        ranks: W, ranks of the ring.
        block: b, tokens per block.
        table: int64 [W, blocks_per_rank] global block ids by rank, in local order.
    """

    kind: str
    seq_len: int
    ranks: int
    block: int
    table: Tensor

    @classmethod
    def build(
        cls, kind: str, seq_len: int, ranks: int, block: int, assignment: Tensor | Sequence[int] | None = None
    ) -> RingLayout:
        """Lay out ``seq_len`` tokens over ``ranks``.

        Args:
            kind: contiguous: rank r owns one run of blocks. zigzag: 2W runs, rank r owns runs r and 2W-1-r. striped: block n
                goes to rank n mod W. balanced: ``assignment`` decides (without one it starts as striped).
            seq_len: any length >= 1; the layout pads it to whole blocks, the same number per rank.
            assignment: balanced only: owner rank of every block, padding blocks included (`padded_blocks` of them).

        Raises:
            MtrainError: unknown kind, impossible sizes, or an assignment that does not give every rank the same number.
        """
        if kind not in LAYOUTS:
            raise MtrainError(f"unknown layout {kind!r}; choose one of {', '.join(LAYOUTS)}")
        if min(seq_len, ranks, block) < 1:
            raise MtrainError(f"a layout needs seq_len, ranks, block >= 1, got {seq_len}, {ranks}, {block}")
        if assignment is not None and kind != "balanced":
            raise MtrainError(f"layout {kind!r} fixes the owners itself; an assignment goes with layout 'balanced'")
        total = padded_blocks(kind, seq_len, ranks, block)
        ids = torch.arange(total)
        if kind == "contiguous":
            table = ids.view(ranks, -1)
        elif kind == "zigzag":
            runs = ids.view(2 * ranks, -1)
            table = torch.cat([runs[:ranks], runs[ranks:].flip(0)], 1)
        elif assignment is None:
            table = ids.view(-1, ranks).T.contiguous()
        else:
            table = _table_of(torch.as_tensor(assignment, dtype=torch.int64), total, ranks)
        return cls(kind, seq_len, ranks, block, table)

    @property
    def num_blocks(self) -> int:
        """Blocks that hold at least one real token."""
        return -(-self.seq_len // self.block)

    @property
    def blocks_per_rank(self) -> int:
        """Blocks each rank owns, padding included."""
        return self.table.shape[1]

    @property
    def local_len(self) -> int:
        """Tokens each rank holds, padding included."""
        return self.blocks_per_rank * self.block

    @property
    def padded_len(self) -> int:
        """Tokens over all ranks, padding included."""
        return self.ranks * self.local_len

    @property
    def owner(self) -> Tensor:
        """int64 [ranks * blocks_per_rank]: the rank that owns each block."""
        owner = torch.empty(self.table.numel(), dtype=torch.int64)
        owner[self.table.flatten()] = torch.arange(self.ranks).repeat_interleave(self.blocks_per_rank)
        return owner

    @property
    def slot(self) -> Tensor:
        """int64 [ranks * blocks_per_rank]: each block's place in its owner's local order."""
        slot = torch.empty(self.table.numel(), dtype=torch.int64)
        slot[self.table.flatten()] = torch.arange(self.blocks_per_rank).repeat(self.ranks)
        return slot

    def blocks(self, rank: int) -> Tensor:
        """int64 [blocks_per_rank] global block ids of a rank, in local order."""
        return self.table[rank]

    def positions(self, rank: int) -> Tensor:
        """int64 [local_len] global token positions of a rank, in local order (>= seq_len: padding)."""
        return (self.blocks(rank)[:, None] * self.block + torch.arange(self.block)).flatten()

    def shard(self, x: Tensor, rank: int, dim: int) -> Tensor:
        """The rank's part of a whole tensor with ``seq_len`` entries along ``dim``; padding is filled with zeros."""
        if x.shape[dim] != self.seq_len:
            raise MtrainError(
                f"cannot shard {x.shape[dim]} entries along dim {dim}: this layout is for {self.seq_len} tokens"
            )
        positions = upload(self.positions(rank), x.device)
        part = x.index_select(dim, positions.clamp(max=self.seq_len - 1))
        shape = [1] * x.dim()
        shape[dim] = -1
        return part.masked_fill((positions >= self.seq_len).view(shape), 0)

    def unshard(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole tensor from all ranks' parts (in rank order), padding dropped. Inverse of `shard`."""
        if len(parts) != self.ranks:
            raise MtrainError(f"unshard needs one part per rank: got {len(parts)}, expected {self.ranks}")
        joined = torch.cat(list(parts), dim)
        positions = torch.cat([self.positions(rank) for rank in range(self.ranks)])
        source = torch.empty_like(positions)
        source[positions] = torch.arange(positions.numel())
        return joined.index_select(dim, upload(source[: self.seq_len], joined.device))


def padded_blocks(kind: str, seq_len: int, ranks: int, block: int) -> int:
    """Blocks of a layout, padding included: whole blocks, the same number per rank (two equal runs each for zigzag)."""
    unit = 2 * ranks if kind == "zigzag" else ranks
    return -(-(-(-seq_len // block)) // unit) * unit


def _table_of(assignment: Tensor, total: int, ranks: int) -> Tensor:
    if assignment.shape != (total,):
        raise MtrainError(
            f"the assignment names {tuple(assignment.shape)} blocks; this layout has {total}, padding included"
        )
    counts = torch.bincount(assignment.clamp(min=0), minlength=ranks)
    if int(assignment.min()) < 0 or counts.numel() != ranks or bool((counts != total // ranks).any()):
        raise MtrainError(
            f"the assignment gives the ranks {counts.tolist()} blocks; each of {ranks} ranks must own exactly {total // ranks}"
        )
    return torch.sort(assignment, stable=True).indices.view(ranks, -1)
