"""The same mask told in two ways: diagonals as a table of single blocks."""

from __future__ import annotations

import torch

from sparse_kernels import SparsePattern


def as_blocks(pattern: SparsePattern) -> SparsePattern:
    """The pattern with every diagonal but the first one written out as single blocks; columns stay columns."""
    every = torch.arange(pattern.num_blocks)
    return SparsePattern(pattern.seq_len, pattern.block, pattern.columns, None, pattern.block_mask(every, every))
