"""A choice of single blocks: which key blocks each query block needs, for the patterns that choose blocks.

A rank keeps the choices of its own query blocks. What spans them - imbalance, density, recall - is counted where the rows are and
added up, or looks at a few rows that are fetched (`with_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mtrain.comm import Ring
from mtrain.patterns.documents import Documents
from mtrain.patterns.index import last_local_offset
from mtrain.patterns.placement import Placement
from sparse_kernels import BlockRows, SparsePattern
from sparse_kernels.bits import upload


@dataclass(frozen=True, eq=False)
class BlockChoice:
    """What an estimate of blocks chose, before sinks and locals are forced.

    Attributes:
        blocks: of this rank's query blocks, or of all.
        name: of the bits in a checkpoint.
    """

    blocks: BlockRows
    name: ClassVar[str] = "block_bits"

    def pack(self, placement: Placement) -> Tensor:
        """uint8 [B, H, bytes]: the choices of all query blocks. Every rank makes this call.

        A later step may have another layout, so what is kept for it is kept whole: NB * (NB + 1) / 16 bytes per head.
        """
        return gather_rows(self.blocks, torch.arange(placement.num_blocks), placement.ring).bits

    @classmethod
    def unpack(cls, packed: Tensor, seq_len: int, num_blocks: int) -> BlockChoice:
        """Inverse of `pack`."""
        del seq_len
        return cls(BlockRows(num_blocks, torch.arange(num_blocks), packed))

    @staticmethod
    def bits(seq_len: int, num_blocks: int) -> int:
        """Bits of a head."""
        del seq_len
        full, rest = divmod(num_blocks, 8)  # eight rows of each number of bytes
        return 8 * (full + 1) * (4 * full + rest)

    def pattern(self, documents: Documents, placement: Placement, *, sink: int, local: int) -> SparsePattern:
        """The pattern of this rank's queries: the chosen blocks, the blocks that hold the first ``sink`` tokens of each document,
        and the diagonals of the token distances 0..``local``."""
        block, mine = placement.block, self.blocks.take(placement.blocks)
        (batch, heads, _), device = mine.bits.shape, mine.bits.device
        if sink:
            forced = sink_blocks(documents, block, sink, mine.rows, batch, device)[:, None]
            mine = mine.with_bits(mine.bits | BlockRows.of_table(forced, mine.rows).bits)
        last = min(last_local_offset(local, block), placement.num_blocks - 1)
        diagonals = torch.arange(last + 1, dtype=torch.int32, device=device).expand(batch, heads, last + 1)
        return SparsePattern(documents.seq_len, block, diagonals=diagonals.contiguous(), blocks=mine)


def gather_rows(blocks: BlockRows, rows: Tensor, ring: Ring) -> BlockRows:
    """The rows of these query blocks (int64 [n] on the CPU, the same on every rank) from the ranks that hold them, on every rank.

    One all-reduce of their bits. Every rank makes this call.
    """
    if ring.world_size == 1:
        return blocks.take(rows)
    found = blocks.take(rows, absent=True)
    return found.with_bits(ring.all_reduce(found.bits, "max"))


def with_rows(pattern: SparsePattern, rows: Tensor, ring: Ring) -> SparsePattern:
    """The pattern as it serves these query blocks (as in `gather_rows`), on every rank of the ring."""
    if pattern.block_rows is None:
        return pattern
    return replace(pattern, blocks=gather_rows(pattern.block_rows, rows, ring))


def first_visible(documents: Documents, block: int, rows: Tensor, batch: int, device: torch.device) -> Tensor:
    """int64 [B, n]: the first key that the first row of each query block ``rows`` [n] may see."""
    position = upload(rows, device).clamp(max=-(-documents.seq_len // block) - 1) * block
    return documents.starts_of(position.expand(batch, -1))


def sink_blocks(documents: Documents, block: int, sink: int, rows: Tensor, batch: int, device: torch.device) -> Tensor:
    """bool [B, n, NB]: does the key block hold one of the first ``sink`` tokens of the document in which the query block
    begins? A document that begins inside a query block has its sinks in that block or in later ones."""
    start = first_visible(documents, block, rows, batch, device)[..., None]
    key = torch.arange(-(-documents.seq_len // block), device=device)
    # max: without sinks the last one would stand before the first
    inside = (key >= start // block) & (key <= (start + max(sink, 1) - 1) // block)
    return inside & (key <= upload(rows, device)[:, None]) & (sink > 0)


def local_blocks(documents: Documents, block: int, local: int, rows: Tensor, device: torch.device) -> Tensor:
    """bool [n, NB]: is the key block on a diagonal of the token distances 0..``local``?"""
    offset = upload(rows, device)[:, None] - torch.arange(-(-documents.seq_len // block), device=device)
    return (offset >= 0) & (offset <= last_local_offset(local, block))
