"""From chosen keys and offsets to the index lists of a pattern: static shapes, no host synchronisation on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtrain.patterns.documents import Documents
from mtrain.patterns.placement import Placement
from sparse_kernels import SparsePattern
from sparse_kernels.bits import pack_bits, unpack_bits


@dataclass(frozen=True, eq=False)
class Selection:
    """What an estimate chose, before sinks and locals are forced.

    Attributes:
        columns: bool [B, H, S].
        offsets: bool [B, H, NB], block offsets.
        name: of the bits in a checkpoint.
    """

    columns: Tensor
    offsets: Tensor
    name: ClassVar[str] = "bits"

    def pack(self, placement: Placement) -> Tensor:
        """uint8 [B, H, ceil((S + NB) / 8)]: one bit per key and offset."""
        del placement  # every rank has it all
        return pack_bits(torch.cat([self.columns, self.offsets], -1))

    @classmethod
    def unpack(cls, packed: Tensor, seq_len: int, num_blocks: int) -> Selection:
        """Inverse of `pack`."""
        bits = unpack_bits(packed, cls.bits(seq_len, num_blocks))
        return cls(bits[..., :seq_len], bits[..., seq_len:])

    @staticmethod
    def bits(seq_len: int, num_blocks: int) -> int:
        """Bits of a head."""
        return seq_len + num_blocks

    def pattern(
        self, documents: Documents, block: int, *, sink: int, local: int, most_columns: int | None = None
    ) -> SparsePattern:
        """The pattern, with the first ``sink`` keys of each document and the distances 0..``local`` forced in.

        Args:
            most_columns: an upper bound of the columns chosen here, if one is known: it bounds the list on a GPU, where
                counting would wait for the device. On a CPU the lists are as long as the longest head needs.
        """
        size, device = documents.seq_len, self.columns.device
        columns = self.columns | documents.sinks(sink, device)[:, None] if sink else self.columns
        offsets = self.offsets | (
            torch.arange(self.offsets.shape[-1], device=device) <= last_local_offset(local, block)
        )
        slots = size
        if most_columns is not None:
            slots = min(size, most_columns + documents.most_sinks(sink))
        return SparsePattern(
            size,
            block,
            columns=index_lists(columns, slots, fill=size),
            diagonals=index_lists(offsets, offsets.shape[-1], fill=-1),
        )


def last_local_offset(local: int, block: int) -> int:
    """The largest block offset that the token distances 0..``local`` lower to."""
    return -(-local // block)


def lower_distances(distances: Tensor, block: int) -> Tensor:
    """bool [..., NB] block offsets of token distances bool [..., S]: s // b and, when s % b != 0, also s // b + 1."""
    size = distances.shape[-1]
    padded = torch.nn.functional.pad(distances, (0, -size % block)).unflatten(-1, (-1, block))
    here, beyond = padded.any(-1), padded[..., 1:].any(-1)
    return here | torch.nn.functional.pad(beyond[..., :-1], (1, 0))


def index_lists(chosen: Tensor, slots: int, fill: int) -> Tensor:
    """int32 [..., slots] ascending positions of the True entries of bool [..., n], padded at the end with ``fill``.

    ``slots`` must be enough; on a CPU it is lowered to the longest list.
    """
    if chosen.device.type == "cpu":
        slots = min(slots, int(chosen.sum(-1).max()))
    count = chosen.cumsum(-1)
    slot = torch.where(chosen, count - 1, slots).clamp_(max=slots)  # the spare last slot takes the rest
    positions = torch.arange(chosen.shape[-1], dtype=torch.int32, device=chosen.device).expand_as(slot)
    lists = torch.full((*chosen.shape[:-1], slots + 1), fill, dtype=torch.int32, device=chosen.device)
    return lists.scatter_(-1, slot, positions)[..., :slots].contiguous()
