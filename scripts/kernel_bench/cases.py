"""Shapes, realistic vertical-slash patterns of a wanted density, and how much work they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sparse_kernels import SparsePattern

SINK, LOCAL_BLOCKS = 16, 2
FLOP_FORMULA = (
    "FLOP = 4 x D x cells forward, 10 x D x cells backward, summed over query heads; cells = b^2 per selected block below the "
    "diagonal, b (b + 1) / 2 per block on it, and b per (query block, column) that no selected block holds. Dense: S (S + 1) / 2."
)


@dataclass(frozen=True)
class Shape:
    """Heads and block of a case; batch 1."""

    heads: int
    kv_heads: int
    head_dim: int
    block: int

    def __str__(self) -> str:
        return f"H={self.heads}, K={self.kv_heads}, D={self.head_dim}"


def causal_cells(shape: Shape, length: int) -> int:
    """Cells of the dense causal mask, all heads."""
    return shape.heads * length * (length + 1) // 2


def head_cells(columns: Tensor, diagonals: Tensor, length: int, block: int) -> int:
    """Cells of one head: columns [C] and block offsets [E], both ascending and without padding; length in whole blocks."""
    number = length // block
    chosen = torch.zeros(number, dtype=torch.int64)
    chosen[diagonals] = 1
    tiles = int(((number - diagonals) * block * block).sum()) - number * (block * (block - 1) // 2)
    behind = number - 1 - columns // block  # query blocks behind the column's own
    held = chosen.cumsum(0)[behind] - 1  # of those, how many hold it in a selected block (offset 0 is its own)
    return tiles + int(((behind - held) * block).sum())


@lru_cache(maxsize=8)
def vertical_slash(shape: Shape, length: int, density: float, seed: int = 0) -> tuple[SparsePattern, int]:
    """(pattern on the CPU, its cells over all heads): sinks, a local band, random slashes and columns up to the density wanted.

    Heads differ in how much of the rest is slashes and how much is columns. Where sinks and locals alone are more than the
    density asks, they stay; the cells say what it really is.
    """
    if density >= 1:
        return SparsePattern.dense(1, shape.heads, length, shape.block), causal_cells(shape, length)
    generator = torch.Generator().manual_seed(seed)
    wanted = density * length * (length + 1) / 2
    number = length // shape.block
    heads, total = [], 0
    for _ in range(shape.heads):
        far = torch.randperm(max(number - LOCAL_BLOCKS, 0), generator=generator) + LOCAL_BLOCKS
        others = torch.randperm(length - SINK, generator=generator) + SINK
        slashes = 0.2 + 0.6 * float(torch.rand((), generator=generator))
        low, high = 0.0, 1.0
        for _ in range(16):
            amount = (low + high) / 2
            kept = _keep(far, others, amount * slashes, amount * (1 - slashes), number)
            if head_cells(*kept, length, shape.block) < wanted:
                low = amount
            else:
                high = amount
        kept = _keep(far, others, low * slashes, low * (1 - slashes), number)
        total += head_cells(*kept, length, shape.block)
        heads.append(kept)
    columns = torch.nn.utils.rnn.pad_sequence([c for c, _ in heads], batch_first=True, padding_value=length)
    diagonals = torch.nn.utils.rnn.pad_sequence([d for _, d in heads], batch_first=True, padding_value=-1)
    return SparsePattern(length, shape.block, columns[None].int(), diagonals[None].int()), total


def _keep(far: Tensor, others: Tensor, slashes: float, columns: float, number: int) -> tuple[Tensor, Tensor]:
    """(columns, diagonals) of one head: the forced ones and a share of the candidates."""
    near = torch.arange(min(LOCAL_BLOCKS, number))
    diagonals = torch.cat([near, far[: round(slashes * len(far))]]).sort().values
    return torch.cat([torch.arange(SINK), others[: round(columns * len(others))]]).sort().values, diagonals


def inputs(shape: Shape, length: int, device: torch.device, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v (leaves) and dout in bfloat16, [1, S, heads, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    numbers = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    q, k, v, dout = (
        torch.randn(1, length, n, shape.head_dim, device=device, dtype=torch.bfloat16, generator=generator)
        for n in numbers
    )
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout
