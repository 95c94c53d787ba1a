"""A choice of single blocks: which key blocks each query block needs, for the patterns that choose blocks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtrain.patterns.documents import Documents
from mtrain.patterns.index import last_local_offset, pack_bits, unpack_bits
from mtrain.patterns.placement import Placement
from sparse_kernels import SparsePattern
from sparse_kernels.pattern import upload


@dataclass(frozen=True, eq=False)
class BlockChoice:
    """What an estimate of blocks chose, before sinks and locals are forced.

    Attributes:
        blocks: bool [B, H, NB, NB] (query block, key block).
    """

    blocks: Tensor

    def pack(self) -> Tensor:
        """uint8 [B, H, ceil(NB * NB / 8)]: one bit per pair of blocks."""
        return pack_bits(self.blocks.flatten(2))

    @classmethod
    def unpack(cls, packed: Tensor, seq_len: int, num_blocks: int) -> BlockChoice:
        """Inverse of `pack`."""
        return cls(unpack_bits(packed, cls.bits(seq_len, num_blocks)).unflatten(2, (num_blocks, num_blocks)))

    @staticmethod
    def bits(seq_len: int, num_blocks: int) -> int:
        """Bits of a head."""
        del seq_len
        return num_blocks**2

    def pattern(self, documents: Documents, block: int, *, sink: int, local: int) -> SparsePattern:
        """The pattern: the chosen blocks, the blocks that hold the first ``sink`` tokens of each document, and the diagonals
        of the token distances 0..``local``."""
        batch, heads, size, _ = self.blocks.shape
        device = self.blocks.device
        blocks = self.blocks
        if sink:
            blocks = blocks | sink_blocks(documents, block, sink, torch.arange(size), batch, device)[:, None]
        last = min(last_local_offset(local, block), size - 1)
        diagonals = torch.arange(last + 1, dtype=torch.int32, device=device).expand(batch, heads, last + 1)
        return SparsePattern(documents.seq_len, block, diagonals=diagonals.contiguous(), blocks=blocks)


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


def join_rows(mine: Tensor, placement: Placement) -> Tensor:
    """bool [B, H, NB, n] of all query blocks, from every rank's own [B, H, blocks held here, n]: one all-gather of bits."""
    if placement.layout is None:
        return mine
    packed = torch.cat(placement.ring.all_gather(pack_bits(mine)), 2)
    return unpack_bits(packed.index_select(2, upload(placement.order, packed.device)), mine.shape[-1])
