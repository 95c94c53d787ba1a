"""Booleans as bits, and small tables on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """uint8 [..., ceil(n / 8)] of bool [..., n], first bit lowest."""
    padded = torch.nn.functional.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_bits`: bool [..., count]."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (bits & 1).flatten(-2)[..., :count].bool()


def upload(index: Tensor, device: torch.device) -> Tensor:
    """A CPU index on ``device``. An ordinary copy would make the host wait until the device has done all its earlier work."""
    return index.to(device, non_blocking=True)
