"""Launch shapes of the general kernels, kept like those of the structured ones in `config`: checked in, never tuned at run time.

In 16 bits three stages, for the reason given in `config`. float32, as three tf32 products, takes many registers: small tiles.
tests/triton_compile holds the table to this.
"""

from __future__ import annotations

from sparse_kernels.gpu.config import AMPERE, HOPPER, SMALL, Key, Tile, row_key, with_small

_FORWARD: dict[Key, Tile] = {
    (AMPERE, 64, 2): Tile(128, 32, 8, 3),
    (AMPERE, 128, 2): Tile(128, 32, 8, 3),
    (AMPERE, 256, 2): Tile(64, 32, 8, 1),
    (AMPERE, 64, 4): Tile(16, 32, 8, 1),
    (AMPERE, 128, 4): Tile(16, 32, 8, 1),
    (HOPPER, 64, 2): Tile(128, 64, 8, 3),
    (HOPPER, 128, 2): Tile(128, 64, 8, 3),
    (HOPPER, 256, 2): Tile(64, 32, 8, 2),
    (HOPPER, 64, 4): Tile(16, 32, 8, 1),
    (HOPPER, 128, 4): Tile(16, 32, 8, 1),
}
_DQ: dict[Key, Tile] = {
    (AMPERE, 64, 2): Tile(64, 32, 8, 3),
    (AMPERE, 128, 2): Tile(64, 32, 8, 3),
    (AMPERE, 256, 2): Tile(32, 32, 8, 1),
    (AMPERE, 64, 4): Tile(16, 16, 8, 1),
    (AMPERE, 128, 4): Tile(16, 16, 8, 2),
    (HOPPER, 64, 2): Tile(64, 64, 8, 3),
    (HOPPER, 128, 2): Tile(64, 64, 8, 3),
    (HOPPER, 256, 2): Tile(32, 32, 8, 1),
    (HOPPER, 64, 4): Tile(16, 16, 8, 1),
    (HOPPER, 128, 4): Tile(16, 16, 8, 1),
}
_DKDV: dict[Key, Tile] = {
    (AMPERE, 64, 2): Tile(32, 32, 4, 3),
    (AMPERE, 128, 2): Tile(32, 64, 8, 3),
    (AMPERE, 256, 2): Tile(32, 32, 8, 1),
    (AMPERE, 64, 4): Tile(32, 16, 8, 1),
    (AMPERE, 128, 4): Tile(32, 16, 8, 1),
    (HOPPER, 64, 2): Tile(32, 64, 8, 3),
    (HOPPER, 128, 2): Tile(32, 64, 8, 3),
    (HOPPER, 256, 2): Tile(32, 32, 8, 1),
    (HOPPER, 64, 4): Tile(32, 16, 8, 1),
    (HOPPER, 128, 4): Tile(32, 16, 8, 1),
}
_COLUMNS: dict[Key, Tile] = {
    **_DKDV,
    (AMPERE, 64, 2): Tile(64, 32, 8, 3),
    (AMPERE, 128, 2): Tile(64, 64, 8, 3),
    (HOPPER, 64, 2): Tile(64, 64, 8, 3),
    (HOPPER, 128, 2): Tile(64, 64, 8, 3),
    (SMALL, 128, 2): Tile(32, 64, 8, 3),
}
TABLE = {
    name: with_small(rows)
    for name, rows in (("forward", _FORWARD), ("dq", _DQ), ("dkdv", _DKDV), ("columns", _COLUMNS))
}


def tile_of(kernel: str, kind: int, head_dim: int, itemsize: int, block: int) -> Tile:
    """The launch shape of "forward", "dq", "dkdv" or "columns" on a device of this `generation`, for patterns of this block."""
    return TABLE[kernel][row_key(kind, head_dim, itemsize)].within(block)
