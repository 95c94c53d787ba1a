"""The plain causal mask as a pattern: for dense layers, dense warm-up steps and dense twins."""

from __future__ import annotations

from functools import lru_cache

import torch

from sparse_kernels import SparsePattern


@lru_cache(maxsize=8)
def dense_pattern(batch: int, heads: int, seq_len: int, block: int, device: torch.device) -> SparsePattern:
    """`SparsePattern.dense`, made once for all layers and steps of a shape."""
    return SparsePattern.dense(batch, heads, seq_len, block, device)
