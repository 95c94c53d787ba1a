"""Ranks that hold the single blocks of their own queries only: every figure is the one of the whole, and little is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from mtrain.attention import _Call, ring_attention
from mtrain.balance.work import block_cost, measure, tile_density, work
from mtrain.comm import Ring, SingleRing, run_ranks
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout
from mtrain.models.statistics import mask_density
from mtrain.patterns import PatternPlan, measure_recall, reach_by_distance
from mtrain.patterns.blocks import with_rows
from mtrain.patterns.recall import blocks_of
from mtrain.recipe.schema import AttentionRecipe, RefreshEvery
from mtrain.topology import RingTopology
from mtrain.verify.exactness import documents, make_layout
from sparse_kernels import BlockRows, PatternError, SparsePattern, resolve_backend
from tests.mtrain.test_block_patterns import random_qk, recipe, ring_agrees, same
from tests.sparse_kernels.cpu_cases import random_pattern

SEQ_LEN, BLOCK = 149, 8
RINGS = ((1, 1), (1, 2), (1, 3), (2, 2))
LAYOUTS = ("contiguous", "zigzag", "striped", "random")


def random_whole(seed: int) -> SparsePattern:
    """Columns of several lengths, diagonals and single blocks; two batch rows, four heads."""
    return random_pattern(torch.Generator().manual_seed(seed), 2, 4, SEQ_LEN, BLOCK, 9, 2, True)


def by_ranks(whole: SparsePattern, layout: RingLayout, shape: tuple[int, int], ask: Callable[..., Any]) -> list[Any]:
    """What every rank answers that is given its own rows and the ring."""
    return run_ranks(lambda ring: ask(whole.for_queries(layout.blocks(ring.rank)), ring), *shape)


@pytest.mark.parametrize(("shape", "packed"), list(product(RINGS, (False, True))))
def test_counts_of_a_ring_are_those_of_the_whole(shape: tuple[int, int], packed: bool) -> None:
    whole, doc_start = random_whole(3 + packed), documents(2, True) if packed else None
    topology = RingTopology(*shape)
    for kind in LAYOUTS:
        layout = make_layout(kind, topology.world_size)

        def table(pattern: SparsePattern, ring: Ring | None, layout: RingLayout = layout) -> list[Tensor]:
            return [
                work(pattern, layout, topology, doc_start, ring=ring),
                block_cost(pattern, doc_start, ring=ring),
                measure(pattern, doc_start, ring=ring),
                torch.tensor([tile_density(pattern, doc_start, ring=ring), mask_density(pattern, doc_start, ring)]),
            ]

        alone = table(whole, None)
        for found in by_ranks(whole, layout, shape, table):
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True)), kind


@pytest.mark.parametrize(("kind", "packed"), list(product(LAYOUTS, (False, True))))
def test_recall_and_reach_of_a_ring_are_those_of_the_whole(kind: str, packed: bool) -> None:
    whole, doc_start = random_whole(5), documents(2, packed)
    q, k = random_qk(SEQ_LEN, dtype=torch.float64, seed=8)
    rows = [0, 3, 40, 41, 77, 148]
    recall = measure_recall(q, k, whole, rows, doc_start=doc_start)
    reach = reach_by_distance(whole, rows, doc_start=doc_start)
    layout = make_layout(kind, 3)

    def mine(pattern: SparsePattern, ring: Ring) -> tuple[Tensor, Tensor]:
        shards = [layout.shard(x, ring.rank, 1) for x in (q, k, doc_start)]
        found = measure_recall(*shards[:2], pattern, rows, doc_start=shards[2], ring=ring, layout=layout)
        fetched = with_rows(pattern, blocks_of(rows, BLOCK), ring)
        return found, reach_by_distance(fetched, rows, doc_start=doc_start)

    for found, reached in by_ranks(whole, layout, (1, 3), mine):
        torch.testing.assert_close(found, recall, atol=1e-12, rtol=0)
        torch.testing.assert_close(reached, reach, atol=0, rtol=0, equal_nan=True)


def test_counting_one_ranks_rows_for_all_is_refused() -> None:
    mine = random_whole(1).for_queries(torch.tensor([0, 4, 7]))
    with pytest.raises(MtrainError, match="give the ring too"):
        measure(mine)
    with pytest.raises(PatternError, match="query blocks, and not those of"):
        reach_by_distance(mine, [20])


def test_a_rank_without_the_rows_of_its_queries_is_refused() -> None:
    layout = RingLayout.build("striped", SEQ_LEN, 2, BLOCK)
    strangers = random_whole(1).for_queries(layout.blocks(1))
    q, k = (torch.randn(2, layout.local_len, heads, 8) for heads in (4, 2))

    def attend(ring: Ring) -> None:
        ring_attention(q, k, k, strangers, ring=ring, layout=layout)

    with pytest.raises(PatternError, match="asked for"):
        run_ranks(attend, inner=2)


def test_a_layer_keeps_its_ranks_rows_of_a_pattern_that_holds_all() -> None:
    whole, layout = random_whole(1), RingLayout.build("striped", SEQ_LEN, 2, BLOCK)
    q, k = (torch.randn(2, layout.local_len, heads, 8, requires_grad=True) for heads in (4, 2))

    def kept(ring: Ring) -> SparsePattern:
        out = ring_attention(q, k, k, whole, ring=ring, layout=layout)
        return out.grad_fn.call.pattern

    assert ring_agrees(run_ranks(kept, inner=2), whole, layout)


@pytest.mark.parametrize(("name", "refresh"), list(product(("xattention", "moba"), ("frozen", RefreshEvery(2)))))
def test_a_kept_choice_follows_its_blocks_to_other_layouts_and_rings(name: str, refresh: Any) -> None:
    asked = recipe(name, refresh=refresh)
    q, k = random_qk(SEQ_LEN, seed=2)
    later = random_qk(SEQ_LEN, seed=4)
    alone = PatternPlan(asked, 1)
    alone.index(0, q, k)
    whole = alone.index(0, *later, step=1)
    assert same(whole, PatternPlan(recipe(name), 1).index(0, q, k))  # what was kept, not what the later input calls for
    first, second = make_layout("striped", 3), make_layout("random", 3)

    def train(ring: Ring) -> tuple[SparsePattern, dict[str, Tensor]]:
        plan = PatternPlan(asked, 1)
        for step, (layout, inputs) in enumerate(((first, (q, k)), (second, later))):
            shards = [layout.shard(x, ring.rank, 1) for x in inputs]
            pattern = plan.index(0, *shards, ring=ring, layout=layout, step=step)
        return pattern, plan.state_dict()

    results = run_ranks(train, inner=3)
    assert ring_agrees([pattern for pattern, _ in results], whole, second)
    for _, state in results:
        kept = alone.state_dict()
        assert state.keys() == kept.keys() == {"0.149.block_bits", "0.149.made"}
        assert all(torch.equal(state[key], kept[key]) for key in kept)
    resumed, layout = PatternPlan(asked, 1), make_layout("zigzag", 2)

    def resume(ring: Ring) -> SparsePattern:
        plan = PatternPlan(asked, 1)
        plan.load_state_dict(results[1][1])
        return plan.index(0, *(layout.shard(x, ring.rank, 1) for x in later), ring=ring, layout=layout, step=1)

    assert ring_agrees(run_ranks(resume, inner=2), whole, layout)
    resumed.load_state_dict(results[2][1])
    assert same(resumed.index(0, *later, step=1), whole)


# --- what is kept ---------------------------------------------------------------------------------------------------------

TOKENS, RANKS, HEADS, KV_HEADS, HEAD_DIM = 512 << 10, 32, 32, 8, 128
KEYS_AND_VALUES = 2 * (TOKENS // RANKS) * KV_HEADS * HEAD_DIM * 2  # bytes of a rank in bfloat16: 64 MiB


def rank_pattern(layout: RingLayout, rank: int) -> SparsePattern:
    """A choice of nothing at 512K: of bits, what was chosen does not change the room."""
    rows = layout.blocks(rank)
    packed = torch.zeros(1, HEADS, len(rows), layout.num_blocks // 8, dtype=torch.uint8)
    return SparsePattern(TOKENS, layout.block, blocks=BlockRows.of_packed(packed, layout.num_blocks, rows))


@pytest.mark.parametrize(("kind", "share"), [("striped", 0.0632), ("zigzag", 0.0627), ("contiguous", 0.1232)])
def test_a_layer_keeps_a_bit_for_every_pair_of_its_rank_and_no_lists(kind: str, share: float) -> None:
    """At 512K tokens, 32 ranks, 32 query heads on 8: the busiest rank, as a share of its keys and values."""
    lists = pytest.importorskip("sparse_kernels.gpu.lists")
    layout = RingLayout.build(kind, TOKENS, RANKS, 64)
    pattern = rank_pattern(layout, RANKS - 1)
    assert pattern.block_rows is not None
    bits = pattern.block_rows.bits.numel()
    assert bits == HEADS * int((layout.blocks(RANKS - 1) // 8 + 1).sum())
    assert bits <= share * KEYS_AND_VALUES < 1.01 * bits

    # Everything else that the backward finds: one table of offsets per layer, and of every view of a ring a frame.
    ring = SingleRing()
    ring.rank, ring.topology = RANKS - 1, RingTopology(4, RANKS // 4)
    backend = resolve_backend("reference", torch.device("cpu"), torch.float32, HEAD_DIM, dense=False)
    call = _Call(pattern, ring, layout, None, 1.0, backend, gather=False)
    kept: dict[int, int] = {}
    for source in range(RANKS):
        index = lists.index_of(call.view_of(source), torch.device("cpu"))
        held = [index.offsets, index.q_ids, index.k_ids, index.bits_row, index.frame.rows, index.frame.cols]
        tensors = [x for x in held if isinstance(x, Tensor)]
        tensors += [x for frame in held[-2:] for x in (frame.diagonal, frame.start)]
        kept |= {x.data_ptr(): x.numel() * x.element_size() for x in tensors}
        assert index.columns is None
    assert sum(kept.values()) <= 0.01 * KEYS_AND_VALUES


def test_a_rank_receives_the_choices_of_its_own_queries_only() -> None:
    """xattention sends no choice at all, moba each head's rows once."""
    q, k = random_qk(512, heads=4, kv_heads=2, batch=1)
    layout = RingLayout.build("striped", 512, 4, BLOCK)

    def sent(ring: Ring, asked: AttentionRecipe) -> dict[str, int]:
        shards = [layout.shard(x, ring.rank, 1) for x in (q, k)]
        PatternPlan(asked, 1).index(0, *shards, ring=ring, layout=layout)
        return dict(ring.traffic)

    for traffic in run_ranks(lambda ring: sent(ring, recipe("xattention")), inner=4):
        assert traffic == {"all_gather": 1, "all_gather_bytes": 128 * 2 * 8 * 4}  # the keys
    for traffic in run_ranks(lambda ring: sent(ring, recipe("moba", chunk=None)), inner=4):
        assert traffic["all_to_all_bytes"] == 64 * 64 // 8  # one head's bits, a quarter to each rank
        assert traffic["all_gather_bytes"] == 16 * 6 * 8 * 4  # the sums of the blocks


def test_rows_fetched_for_a_recall_are_bits_of_these_rows() -> None:
    whole = random_whole(7)
    layout = RingLayout.build("zigzag", SEQ_LEN, 2, BLOCK)
    wanted = torch.tensor([2, 9, 18])

    def fetch(pattern: SparsePattern, ring: Ring) -> tuple[SparsePattern, int]:
        return with_rows(pattern, wanted, ring), ring.traffic["all_reduce_bytes"]

    for fetched, sent in by_ranks(whole, layout, (1, 2), fetch):
        assert same(fetched, whole.for_queries(wanted)) and sent == 2 * 4 * (1 + 2 + 3)
    assert same(with_rows(whole, wanted, SingleRing()), replace(whole, blocks=whole.block_rows.take(wanted)))
