"""xattention and moba against their definitions, written out pair by pair; and the control of random columns."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from mtrain.comm import Ring, run_ranks
from mtrain.layout import RingLayout
from mtrain.patterns import PatternPlan
from mtrain.recipe.schema import AttentionRecipe, TopKBudget
from sparse_kernels import SparsePattern

BLOCK_PATTERNS = ("xattention", "moba")
EVERY = (*BLOCK_PATTERNS, "random_columns")
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced")


def recipe(pattern: str, **changes) -> AttentionRecipe:
    given = {"block": 8, "sink": 2, "local": 5, "stride": 4, "threshold": 0.6, "chunk": 16, "top_k": 3}
    given |= {"budget": TopKBudget(9, 3)}
    return AttentionRecipe(pattern=pattern, **(given | changes))


def random_qk(seq_len: int, heads: int = 4, kv_heads: int = 2, *, seed: int = 0, dtype=torch.float32, batch: int = 2):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(batch, seq_len, n, 8, generator=generator, dtype=dtype) * 2 for n in (heads, kv_heads)]
    return draw[0], draw[1]


def documents(seq_len: int, batch: int = 2) -> Tensor:
    starts = torch.zeros(batch, seq_len, dtype=torch.int64)
    for row, first in product(range(batch), (13, 14, 77, 120)):
        starts[row, min(first + row, seq_len) :] = min(first + row, seq_len - 1)
    return starts


# --- the definitions, by hand ---------------------------------------------------------------------------------------------


def forced_by_hand(m: int, n: int, start: int, recipe: AttentionRecipe) -> bool:
    """Diagonal, locals, and the blocks of the sinks of the document in which the query block begins."""
    b = recipe.block
    near = any((m * b + i) - j <= recipe.local for i in range(b) for j in range(n * b, n * b + b) if j <= m * b + i)
    return n == m or near or any(j // b == n for j in range(start, start + recipe.sink))


def xattention_by_hand(q: Tensor, k: Tensor, start: list[int], recipe: AttentionRecipe) -> list[set[int]]:
    """One head, q and k float64 [S, D]: per query block the key blocks it holds."""
    size, b, s = len(q), recipe.block, recipe.stride
    count, blocks = -(-size // s), -(-size // b)

    def antidiagonal(g: int, h: int) -> float:
        pairs = [(g * s + s - 1 - t, h * s + t) for t in range(s)]
        return sum(float(q[i] @ k[j]) for i, j in pairs if max(i, j) < size) / s / q.shape[1] ** 0.5

    chosen = []
    for m in range(blocks):
        mass = [0.0] * blocks
        for g in range(m * b // s, min((m + 1) * b // s, count)):
            seen = [h for h in range(g + 1) if min((h + 1) * s, size) - 1 >= start[g * s]]
            weights = torch.softmax(torch.tensor([antidiagonal(g, h) for h in seen], dtype=torch.float64), 0)
            for h, weight in zip(seen, weights.tolist(), strict=True):
                mass[h * s // b] += weight
        kept = {n for n in range(m + 1) if forced_by_hand(m, n, start[m * b], recipe)}
        held = sum(mass[n] for n in kept)
        for n in sorted(set(range(m + 1)) - kept, key=lambda n: (-mass[n], n)):
            if held >= recipe.threshold * sum(mass):
                break
            kept.add(n)
            held += mass[n]
        chosen.append(kept)
    return chosen


def moba_by_hand(q: Tensor, k: Tensor, start: list[int], recipe: AttentionRecipe) -> list[set[int]]:
    size, b, chunk = len(q), recipe.block, recipe.chunk
    means = [k[c : c + chunk].mean(0) for c in range(0, size, chunk)]
    chosen = []
    for m in range(-(-size // b)):
        own = m * b // chunk
        gates = {c: float(sum(row @ means[c] for row in q[m * b : (m + 1) * b])) for c in range(own)}
        seen = [c for c in gates if (c + 1) * chunk - 1 >= start[m * b]]
        best = sorted(seen, key=lambda c: -gates[c])[: recipe.top_k - 1]
        kept = {n for n in range(m + 1) if n * b // chunk in {own, *best}}
        chosen.append(kept | {n for n in range(m + 1) if forced_by_hand(m, n, start[m * b], recipe)})
    return chosen


BY_HAND = {"xattention": xattention_by_hand, "moba": moba_by_hand}


@pytest.mark.parametrize(
    ("changes", "seq_len", "packed"),
    [
        ({}, 149, True),
        ({}, 128, False),
        ({"block": 16, "stride": 16, "chunk": 32, "threshold": 0.9, "sink": 20, "top_k": 2}, 149, True),
        ({"block": 4, "stride": 1, "chunk": 4, "threshold": 0.3, "sink": 0, "local": 0, "top_k": 1}, 61, True),
        ({"block": 8, "stride": 2, "chunk": None, "threshold": 1.0, "sink": 1, "local": 0, "top_k": 99}, 61, False),
    ],
)
@pytest.mark.parametrize("name", BLOCK_PATTERNS)
def test_the_choice_is_the_definition(name: str, changes: dict, seq_len: int, packed: bool) -> None:
    asked = recipe(name, **changes)
    q, k = random_qk(seq_len, seed=seq_len, dtype=torch.float64)
    doc_start = documents(seq_len) if packed else torch.zeros(2, seq_len, dtype=torch.int64)
    pattern = PatternPlan(asked, 1).index(0, q, k, doc_start=doc_start if packed else None)
    every = torch.arange(pattern.num_blocks)
    tiles = pattern.block_mask(every, every)
    by_hand = recipe(name, **(changes | {"chunk": changes.get("chunk", 16) or changes.get("block", 8)}))
    for row, head in product(range(2), range(4)):
        found = [set(line.nonzero()[:, 0].tolist()) for line in tiles[row, head]]
        truth = BY_HAND[name](q[row, :, head], k[row, :, head // 2], doc_start[row].tolist(), by_hand)
        assert found == truth, (row, head)
    assert pattern.columns.shape[2] == 0


# --- every rank, every layout ---------------------------------------------------------------------------------------------


def same(a: SparsePattern, b: SparsePattern) -> bool:
    parts = [(a.columns, b.columns), (a.diagonals, b.diagonals)]
    parts += [] if a.blocks is None and b.blocks is None else [(a.blocks, b.blocks)]
    return all(torch.equal(x, y) for x, y in parts)


@pytest.mark.parametrize(("name", "packed"), list(product(EVERY, (False, True))))
def test_a_ring_chooses_what_one_process_chooses_bit_for_bit(name: str, packed: bool) -> None:
    q, k = random_qk(149, heads=8, seed=5)
    doc_start = documents(149) if packed else None
    whole = PatternPlan(recipe(name), 1).index(0, q, k, doc_start=doc_start)
    for ranks, kind in product((1, 2, 4), LAYOUTS):
        layout = RingLayout.build(kind, 149, ranks, 8)

        def mine(ring: Ring, layout: RingLayout = layout) -> SparsePattern:
            shards = [None if x is None else layout.shard(x, ring.rank, 1) for x in (q, k, doc_start)]
            plan = PatternPlan(recipe(name), 1)
            return plan.index(0, shards[0], shards[1], doc_start=shards[2], ring=ring, layout=layout)

        assert all(same(pattern, whole) for pattern in run_ranks(mine, inner=ranks)), (ranks, kind)
