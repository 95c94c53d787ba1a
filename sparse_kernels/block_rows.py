"""Single blocks of a pattern, one bit each: which key blocks the query blocks held here chose.

A table of bool [NB, NB] per head is 64 MiB at 512K tokens in blocks of 64. Of the bits here a rank needs only the rows of its own
query blocks, and no row has bits for the future, so that its share is about NB^2 / 16 bytes per head over the number of ranks. That
is no more than lists of 16-bit block numbers take from a density of 1 / 16 on, and it is known before anything has been chosen: the
length of such lists would have to be asked of the device.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparse_kernels.bits import pack_bits, upload
from sparse_kernels.errors import PatternError


@dataclass(frozen=True, eq=False)
class BlockRows:
    """The chosen (query block, key block) pairs of some query blocks, future key blocks left out.

    Attributes:
        num_blocks: NB.
        rows: int64 [n] on the CPU, the query blocks held, each once; ids from NB on (padding of a layout) hold nothing.
        bits: uint8 [B, H, bytes], row after row: of query block m, m // 8 + 1 bytes, in which bit n % 8 of byte n // 8 says
            whether key block n is chosen. Bits of the future are 0, so equal choices are equal bits.
        whole: are these all query blocks, in order (padding apart)?

    Raises:
        PatternError: bits of another type or number than the rows take; kernels would read past their end.
    """

    num_blocks: int
    rows: Tensor
    bits: Tensor
    whole: bool = field(init=False)

    def __post_init__(self) -> None:
        size = int(_sizes(self.rows, self.num_blocks).sum())  # a CPU tensor
        if self.bits.dim() != 3 or self.bits.shape[2] != size or self.bits.dtype != torch.uint8:
            raise PatternError(
                f"bits are {self.bits.dtype} {tuple(self.bits.shape)}; the rows of these {len(self.rows)} query blocks take uint8 "
                f"[B, H, {size}]: make them with BlockRows.of_table"
            )
        object.__setattr__(
            self, "whole", torch.equal(self.rows[self.rows < self.num_blocks], torch.arange(self.num_blocks))
        )

    @classmethod
    def of_table(cls, table: Tensor, rows: Tensor | None = None) -> BlockRows:
        """From bool [B, H, n, NB], a row for each of the query blocks ``rows`` (None: all, n = NB)."""
        rows = torch.arange(table.shape[3]) if rows is None else rows
        return cls.of_packed(pack_bits(table), table.shape[3], rows)

    @classmethod
    def of_packed(cls, packed: Tensor, num_blocks: int, rows: Tensor) -> BlockRows:
        """From `pack_bits` of such a table, uint8 [B, H, n, ceil(NB / 8)]."""
        slot, byte = _bytes_of(rows, num_blocks, packed.device)
        picked = packed.flatten(2).index_select(2, slot * packed.shape[3] + byte)
        # Bits of each byte that are not in the future.
        past = (upload(rows, packed.device)[slot] + 1 - 8 * byte).clamp(max=8)
        return cls(num_blocks, rows, picked & ((1 << past) - 1).to(torch.uint8))

    def take(self, rows: Tensor, *, absent: bool = False) -> BlockRows:
        """The rows of these query blocks (int64 [n] on the CPU). ``absent``: those that are not here come out empty instead of
        raising PatternError."""
        if torch.equal(rows, self.rows):
            return self
        start = self._find(rows) if absent else self.starts(rows)
        there = start >= 0
        slot, byte = _bytes_of(rows, self.num_blocks, self.bits.device)
        if not self.bits.shape[2]:
            return BlockRows(self.num_blocks, rows, self.bits.new_zeros(*self.bits.shape[:2], len(slot)))
        start, there = upload(start.clamp(min=0), self.bits.device)[slot], upload(there, self.bits.device)[slot]
        picked = self.bits.index_select(2, torch.where(there, start + byte, 0))
        return BlockRows(self.num_blocks, rows, picked * there)

    def starts(self, q_blocks: Tensor) -> Tensor:
        """int64 [n] on the CPU: the byte at which the row of each of these query blocks begins (padding: 0).

        Raises:
            PatternError: one of them is not held here.
        """
        start = self._find(q_blocks)
        if bool((start < 0).any()):
            missing = q_blocks[start < 0]
            raise PatternError(
                f"this pattern holds the single blocks of {len(self.rows)} query blocks, and not those of {len(missing)} that are "
                f"asked for (the first: {int(missing[0])}); a pattern made on one rank serves that rank's queries: gather the rows "
                "first (mtrain.patterns.blocks.with_rows)"
            )
        return start

    def mask(self, q_blocks: Tensor, k_blocks: Tensor) -> Tensor:
        """bool [B, H, nq, nk]: is the pair chosen? ``q_blocks`` on the CPU; the future and padding never are."""
        device = self.bits.device
        start, q_ids = upload(self.starts(q_blocks), device)[:, None], upload(q_blocks, device)[:, None]
        k_ids = upload(k_blocks, device)[None, :]
        inside = (k_ids <= q_ids) & (q_ids < self.num_blocks)
        if not self.bits.shape[2]:
            return inside.new_zeros(*self.bits.shape[:2], *inside.shape)
        found = self.bits[:, :, torch.where(inside, start + k_ids // 8, 0)] >> (k_ids % 8).to(torch.uint8)
        return (found & 1).bool() & inside

    def table(self) -> Tensor:
        """bool [B, H, n, NB] of the rows held here."""
        return self.mask(self.rows, torch.arange(self.num_blocks))

    def with_bits(self, bits: Tensor) -> BlockRows:
        """The same rows with other bits."""
        return replace(self, bits=bits)

    def _find(self, q_blocks: Tensor) -> Tensor:
        """Like `starts`, -1 for what is not here."""
        size = _sizes(self.rows, self.num_blocks)
        if q_blocks is self.rows:
            return torch.where(size > 0, size.cumsum(0) - size, 0)
        place = torch.full((self.num_blocks,), -1)
        real = self.rows < self.num_blocks
        place[self.rows[real]] = (size.cumsum(0) - size)[real]
        return torch.where(q_blocks < self.num_blocks, place[q_blocks.clamp(max=self.num_blocks - 1)], 0)


def _sizes(rows: Tensor, num_blocks: int) -> Tensor:
    """int64 [n]: bytes of each row."""
    return torch.where(rows < num_blocks, rows // 8 + 1, 0)


def _bytes_of(rows: Tensor, num_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [bytes] each, on the device: the place in ``rows`` that a byte belongs to, and its number in that row."""
    size = _sizes(rows, num_blocks)
    total = int(size.sum())  # a CPU tensor
    slot = torch.repeat_interleave(torch.arange(len(rows), device=device), upload(size, device), output_size=total)
    return slot, torch.arange(total, device=device) - upload(size.cumsum(0) - size, device)[slot]
