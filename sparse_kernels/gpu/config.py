"""Tile shapes, warps and stages per kernel: a checked-in table, never tuned at run time.

Every row was compiled for sm_80, sm_86 or sm_90 without register spills (tests/triton_compile); none was chosen by a clock, because
a kernel tuned while it runs makes the times of steps, and the order of additions, differ from run to run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

HEAD_DIMS = (64, 96, 128, 256)  # 256 in 16 bits only: as three tf32 products every tile spills
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Partial sums of the column gradient stay within this many bytes: longer lists are computed in runs.
PARTIAL_BYTES = 1 << 28


@dataclass(frozen=True)
class Tile:
    """One launch shape: query rows m, key rows n, warps and software-pipeline stages of one program."""

    m: int
    n: int
    warps: int
    stages: int

    @property
    def spread(self) -> int:
        """Threads of a program for each key row of the tile."""
        return max(1, 32 * self.warps // self.n)

    def within(self, block: int) -> Tile:
        """The same shape cut so that a tile lies inside one pattern block."""
        return Tile(min(self.m, block), min(self.n, block), self.warps, self.stages)


# Whose rows a device uses: see `generation`. SMALL are those with about 99 KiB of shared memory: sm_86, sm_89, sm_120.
AMPERE, HOPPER, SMALL = 80, 90, 86
Key = tuple[int, int, int]  # generation, padded head_dim, bytes per element
# In 16 bits three stages wherever they fit: with two, a loop asks for a tile at the end of one step and awaits it at the start of
# the next (`resources.Resources.ahead`), so that nothing hides the way from memory.
_FORWARD: dict[Key, tuple[Tile, ...]] = {
    (AMPERE, 64, 2): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (AMPERE, 128, 2): (Tile(128, 32, 8, 3), Tile(64, 32, 4, 3)),
    (AMPERE, 256, 2): (Tile(64, 32, 8, 2),),
    (AMPERE, 64, 4): (Tile(32, 32, 8, 2),),
    (AMPERE, 128, 4): (Tile(32, 32, 8, 2),),
    (HOPPER, 64, 2): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (HOPPER, 128, 2): (Tile(128, 64, 8, 3), Tile(64, 32, 4, 3)),
    (HOPPER, 256, 2): (Tile(64, 32, 8, 2),),
    (HOPPER, 64, 4): (Tile(32, 32, 8, 2),),
    (HOPPER, 128, 4): (Tile(32, 32, 8, 2),),
}
_DQ: dict[Key, tuple[Tile, ...]] = {
    (AMPERE, 64, 2): (Tile(128, 32, 8, 3), Tile(64, 32, 8, 3)),
    (AMPERE, 128, 2): (Tile(128, 32, 8, 3), Tile(64, 32, 4, 3)),
    (AMPERE, 256, 2): (Tile(32, 32, 8, 1),),
    (AMPERE, 64, 4): (Tile(32, 32, 8, 2),),
    (AMPERE, 128, 4): (Tile(16, 32, 4, 1),),
    (HOPPER, 64, 2): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (HOPPER, 128, 2): (Tile(128, 64, 8, 3), Tile(64, 32, 4, 3)),
    (HOPPER, 256, 2): (Tile(32, 32, 8, 1),),
    (HOPPER, 64, 4): (Tile(32, 32, 8, 2),),
    (HOPPER, 128, 4): (Tile(16, 32, 4, 1),),
    (SMALL, 128, 2): (Tile(64, 32, 4, 3),),
}
_DKDV: dict[Key, tuple[Tile, ...]] = {
    (AMPERE, 64, 2): (Tile(32, 128, 8, 3),),
    (AMPERE, 128, 2): (Tile(64, 64, 8, 3),),
    (AMPERE, 256, 2): (Tile(32, 32, 8, 1),),
    (AMPERE, 64, 4): (Tile(32, 32, 8, 2),),
    (AMPERE, 128, 4): (Tile(32, 16, 8, 1),),
    (HOPPER, 64, 2): (Tile(64, 128, 8, 3),),
    (HOPPER, 128, 2): (Tile(32, 128, 8, 3),),
    (HOPPER, 256, 2): (Tile(32, 32, 8, 1),),
    (HOPPER, 64, 4): (Tile(32, 32, 8, 2),),
    (HOPPER, 128, 4): (Tile(32, 16, 8, 1),),
    (SMALL, 128, 2): (Tile(32, 64, 8, 3),),
}
_COLUMNS = {**_DKDV, (AMPERE, 64, 2): (Tile(32, 64, 8, 3),)}


Row = TypeVar("Row")


def with_small(rows: dict[Key, Row]) -> dict[Key, Row]:
    """The rows, and those of AMPERE for SMALL where it has none of its own."""
    shared = {(SMALL, head_dim, size): row for (kind, head_dim, size), row in rows.items() if kind == AMPERE}
    return {**shared, **rows}


# Per kernel and device the tiles to choose from: the first whose query rows fit the pattern block.
TABLE = {
    name: with_small(rows)
    for name, rows in (("forward", _FORWARD), ("dq", _DQ), ("dkdv", _DKDV), ("columns", _COLUMNS))
}


def padded_head_dim(head_dim: int) -> int:
    """The next power of two: what a tile holds of a head."""
    return 1 << (head_dim - 1).bit_length()


def generation(major: int, shared: int) -> int:
    """Whose rows a device of this compute capability (major) with so many bytes of shared memory per block uses: the newest
    that fit."""
    if major >= 9 and shared >= 224 * 1024:
        return HOPPER
    return AMPERE if shared >= 160 * 1024 else SMALL


def generation_of(device: torch.device) -> int:
    """The same of a device; the interpreter behaves like the newest."""
    if device.type == "cpu":
        return HOPPER
    found = torch.cuda.get_device_properties(device)
    # The name is CUDA's; where it is missing (ROCm) shared memory is small.
    return generation(found.major, getattr(found, "shared_memory_per_block_optin", 0))


def row_key(kind: int, head_dim: int, itemsize: int) -> Key:
    """Where a table has the row of this generation."""
    return kind, max(64, padded_head_dim(head_dim)), itemsize


def tile_for(kernel: str, kind: int, head_dim: int, itemsize: int, block: int) -> Tile:
    """The launch shape of a kernel on a device of this `generation`, for patterns of this block."""
    tiles = TABLE[kernel][row_key(kind, head_dim, itemsize)]
    return next((tile for tile in tiles if tile.m <= block), tiles[-1]).within(block)
