"""Launch shapes of the general kernels, kept like those of the structured ones in `config`: checked in, never tuned at run time.

64 x 64 tiles of dk and dv would spill a few bytes on sm_80 (head_dim 64) or sm_90 (head_dim 128), and of forward and dq on sm_80
with Triton 3.4 to 3.6. float32, as three tf32 products, takes many registers: dq of head_dim 128 spills 40 bytes on sm_80,
104 on sm_86 and 56 on sm_90, and some with every small tile that was tried. tests/triton_compile holds the table to this.
"""

from __future__ import annotations

from sparse_kernels.gpu.config import Tile, row_key

# kernel -> (generation, padded head_dim, bytes per element) -> tile.
TABLE: dict[str, dict[tuple[int, int, int], Tile]] = {
    "forward": {
        (8, 64, 2): Tile(128, 32, 8, 2),
        (8, 128, 2): Tile(128, 32, 8, 2),
        (9, 64, 2): Tile(128, 64, 8, 3),
        (9, 128, 2): Tile(128, 64, 8, 3),
        (8, 64, 4): Tile(16, 32, 8, 1),
        (8, 128, 4): Tile(16, 32, 8, 1),
        (9, 64, 4): Tile(16, 32, 8, 1),
        (9, 128, 4): Tile(16, 32, 8, 1),
        (8, 256, 2): Tile(64, 32, 8, 1),
        (9, 256, 2): Tile(64, 32, 8, 2),
    },
    "dq": {
        (8, 64, 2): Tile(64, 32, 8, 2),
        (8, 128, 2): Tile(64, 32, 8, 2),
        (9, 64, 2): Tile(64, 64, 8, 2),
        (9, 128, 2): Tile(64, 64, 8, 2),
        (8, 64, 4): Tile(16, 16, 8, 1),
        (8, 128, 4): Tile(16, 16, 8, 2),
        (9, 64, 4): Tile(16, 16, 8, 1),
        (9, 128, 4): Tile(16, 16, 8, 1),
        (8, 256, 2): Tile(32, 32, 8, 1),
        (9, 256, 2): Tile(32, 32, 8, 1),
    },
    "dkdv": {
        (8, 64, 2): Tile(32, 64, 8, 2),
        (8, 128, 2): Tile(64, 64, 8, 2),
        (9, 64, 2): Tile(64, 64, 8, 2),
        (9, 128, 2): Tile(32, 64, 8, 2),
        (8, 64, 4): Tile(32, 16, 8, 1),
        (8, 128, 4): Tile(32, 16, 8, 1),
        (9, 64, 4): Tile(32, 16, 8, 1),
        (9, 128, 4): Tile(32, 16, 8, 1),
        (8, 256, 2): Tile(32, 32, 8, 1),
        (9, 256, 2): Tile(32, 32, 8, 1),
    },
    "columns": {
        (8, 64, 2): Tile(64, 32, 8, 2),
        (8, 128, 2): Tile(64, 64, 8, 2),
        (9, 64, 2): Tile(64, 64, 8, 2),
        (9, 128, 2): Tile(64, 64, 8, 2),
        (8, 64, 4): Tile(32, 16, 8, 1),
        (8, 128, 4): Tile(32, 16, 8, 1),
        (9, 64, 4): Tile(32, 16, 8, 1),
        (9, 128, 4): Tile(32, 16, 8, 1),
        (8, 256, 2): Tile(32, 32, 8, 1),
        (9, 256, 2): Tile(32, 32, 8, 1),
    },
}


def tile_of(kernel: str, kind: int, head_dim: int, itemsize: int, block: int) -> Tile:
    """The launch shape of "forward", "dq", "dkdv" or "columns" on a device of this `generation`, for patterns of this block."""
    return TABLE[kernel][row_key(kind, head_dim, itemsize)].within(block)
