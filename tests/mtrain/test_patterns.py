"""Budgets, forced sinks and locals, static patterns, the plan of a run, recall."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from mtrain.comm import Ring, run_ranks
from mtrain.errors import CheckpointError, MtrainError
from mtrain.layout import RingLayout
from mtrain.patterns import (
    PATTERNS,
    Coverage,
    PatternPlan,
    TopK,
    a_shape_pattern,
    budget_of,
    estimate_vertical_slash,
    measure_recall,
    spaced_rows,
)
from mtrain.patterns.budget import largest, smallest_cover
from mtrain.patterns.index import index_lists, lower_distances
from mtrain.recipe.schema import AttentionRecipe, CoverageBudget, RefreshEvery, TopKBudget
from sparse_kernels import SparsePattern, reference_attention
from sparse_kernels.bits import pack_bits, unpack_bits


def random_qk(
    seq_len: int, heads: int = 4, kv_heads: int = 2, *, batch: int = 1, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, seq_len, heads, 8, generator=generator, dtype=torch.float64) * 2
    k = torch.randn(batch, seq_len, kv_heads, 8, generator=generator, dtype=torch.float64) * 2
    return q, k


def random_documents(batch: int, seq_len: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    begins = torch.rand(batch, seq_len, generator=generator) < 0.06
    begins[:, 0] = True
    return torch.where(begins, torch.arange(seq_len), 0).cummax(1).values


# --- budgets --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.01, 0.5, 0.9, 0.999, 1.0])
def test_coverage_reaches_p_with_the_smallest_set(p: float) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = (torch.rand(5, 97, generator=generator) ** 6 * 1e12).long()
    chosen = smallest_cover(scores, p)
    for row, mask in zip(scores.tolist(), chosen.tolist(), strict=True):
        inside = sorted((s for s, on in zip(row, mask, strict=True) if on), reverse=True)
        assert sum(inside) >= p * sum(row)
        assert sum(inside[:-1]) < p * sum(row)
        assert not inside or inside[-1] >= max((s for s, on in zip(row, mask, strict=True) if not on), default=0)


def test_a_single_heavy_key_is_kept_although_it_alone_passes_p() -> None:
    scores = torch.tensor([[1, 1000, 1]])
    assert smallest_cover(scores, 0.5).tolist() == [[False, True, False]]


def test_floor_cap_and_ties() -> None:
    scores = torch.tensor([[5, 7, 7, 5, 5, 0]])
    assert smallest_cover(scores, 0.1).nonzero()[:, 1].tolist() == [1]  # lower index of the two 7s
    assert smallest_cover(scores, 0.1, floor=3).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert smallest_cover(scores, 1.0).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 4]
    assert smallest_cover(scores, 1.0, cap=4).nonzero()[:, 1].tolist() == [0, 1, 2, 3]
    assert smallest_cover(torch.zeros_like(scores), 0.5, floor=2).nonzero()[:, 1].tolist() == [0, 1]
    assert largest(scores, torch.tensor([4])).nonzero()[:, 1].tolist() == [0, 1, 2, 3]
    assert largest(scores, torch.tensor([99])).all()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Coverage(0.0),
        lambda: Coverage(1.1),
        lambda: Coverage(float("nan")),
        lambda: Coverage(0.9, floor=-1),
        lambda: Coverage(0.9, cap=0),
        lambda: Coverage(0.9, floor=5, cap=4),
        lambda: TopK(-1, 0),
        lambda: TopK(3, [1, -2]),
        lambda: TopK([], 1),
        lambda: TopK(1.5, 1),
    ],
)
def test_impossible_budgets_are_refused(bad) -> None:
    with pytest.raises(MtrainError):
        bad()


# --- index ----------------------------------------------------------------------------------------------------------------


def test_index_lists_and_bits() -> None:
    chosen = torch.rand(2, 3, 37, generator=torch.Generator().manual_seed(2)) < 0.3
    chosen[0, 0] = False
    lists = index_lists(chosen, 37, fill=37)
    assert lists.dtype == torch.int32 and lists.shape[2] == int(chosen.sum(2).max())
    for b in range(2):
        for h in range(3):
            expected = [n for n in range(37) if chosen[b, h, n]]
            assert lists[b, h].tolist() == expected + [37] * (lists.shape[2] - len(expected))
    assert torch.equal(unpack_bits(pack_bits(chosen), 37), chosen)


def test_distances_are_lowered_to_both_blocks_they_touch() -> None:
    for distance, offsets in ((0, [0]), (1, [0, 1]), (7, [0, 1]), (8, [1]), (9, [1, 2]), (24, [3]), (26, [3])):
        distances = torch.zeros(27, dtype=torch.bool)  # blocks 0..3; distance 26 would also touch offset 4
        distances[distance] = True
        assert lower_distances(distances, 8).nonzero()[:, 0].tolist() == offsets
    assert torch.equal(lower_distances(torch.ones(5, dtype=torch.bool), 1), torch.ones(5, dtype=torch.bool))


# --- what every pattern promises -----------------------------------------------------------------------------------------


def check_mask(pattern: SparsePattern, doc_start: Tensor | None, sink: int, local: int) -> None:
    """No future key, no other document, no empty row; forced sinks and locals are there."""
    mask = pattern.to_dense(doc_start)
    size = pattern.seq_len
    i, j = torch.arange(size)[:, None], torch.arange(size)[None, :]
    start = torch.zeros(pattern.batch, size, dtype=torch.int64) if doc_start is None else doc_start
    allowed = ((j <= i) & (j >= start[:, :, None]))[:, None]
    assert not (mask & ~allowed).any()
    forced = allowed & ((j - start[:, :, None] < sink) | (i - j <= local))[:, None]
    assert mask.diagonal(dim1=2, dim2=3).all()
    assert not (forced & ~mask).any()


@pytest.mark.parametrize("seed", range(8))
def test_no_future_no_other_document_and_what_is_forced_is_there(seed: int) -> None:
    seq_len, block = (61, 128, 130, 199)[seed % 4], (1, 7, 16, 64)[seed // 2]
    q, k = random_qk(seq_len, batch=2, seed=seed)
    doc_start = random_documents(2, seq_len, seed) if seed % 3 else None
    sink, local = seed % 4, (0, 1, 16, 23)[seed % 4]
    options = {"block": block, "sink": sink, "local": local, "probe": 8}
    for budget in (Coverage(0.5), TopK(3, 2), TopK(0, 0)):
        check_mask(estimate_vertical_slash(q, k, budget=budget, doc_start=doc_start, **options), doc_start, sink, local)
    a_shape = a_shape_pattern(2, 4, seq_len, block, sink=sink, local=local, doc_start=doc_start)
    check_mask(a_shape, doc_start, sink, local)


def test_a_shape_is_sinks_and_band_and_nothing_else() -> None:
    pattern = a_shape_pattern(1, 2, 50, 8, sink=3, local=9)
    assert pattern.columns.tolist() == [[[0, 1, 2]] * 2]
    assert pattern.diagonals.tolist() == [[[0, 1, 2]] * 2]
    packed = a_shape_pattern(1, 1, 50, 8, sink=2, local=0, doc_start=torch.tensor([[0] * 20 + [20] + [21] * 29]))
    assert packed.columns.tolist() == [[[0, 1, 20, 21, 22]]]
    assert packed.diagonals.tolist() == [[[0]]]
    with pytest.raises(MtrainError, match="sink, local >= 0"):
        a_shape_pattern(1, 1, 50, 8, sink=-1, local=0)
    with pytest.raises(MtrainError, match="whole sequence"):
        a_shape_pattern(1, 1, 50, 8, sink=1, local=0, doc_start=torch.zeros(1, 49, dtype=torch.int64))


# --- recall ---------------------------------------------------------------------------------------------------------------


def test_recall_is_the_mass_that_the_mask_keeps() -> None:
    q, k = random_qk(75, batch=2, seed=4)
    doc_start = random_documents(2, 75, 4)
    blocks = torch.rand(2, 4, 10, 10, generator=torch.Generator().manual_seed(5)) < 0.2
    columns = torch.tensor([2, 30, 31, 70, 75], dtype=torch.int32).expand(2, 4, 5)
    pattern = SparsePattern(75, 8, columns=columns, blocks=blocks)
    recall = measure_recall(q, k, pattern, range(75), doc_start=doc_start)
    lse = [
        reference_attention(q, k, k, mask, scale=None)[1]
        for mask in (pattern.to_dense(doc_start), SparsePattern.dense(2, 4, 75, 8).to_dense(doc_start))
    ]
    torch.testing.assert_close(recall, (lse[0] - lse[1]).exp(), atol=1e-12, rtol=0)
    assert recall.max() <= 1 + 1e-12 and recall.min() < 0.9


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped", "balanced"])
def test_recall_of_a_ring_is_recall_of_one(kind: str) -> None:
    q, k = random_qk(75, seed=6)
    doc_start = random_documents(1, 75, 6)
    pattern = estimate_vertical_slash(q, k, budget=Coverage(0.4), block=8, doc_start=doc_start, probe=8)
    rows = [0, 3, 40, 74]
    whole = measure_recall(q, k, pattern, rows, doc_start=doc_start)
    layout = RingLayout.build(kind, 75, 3, 8)

    def measure(ring: Ring) -> Tensor:
        shards = [layout.shard(x, ring.rank, 1) for x in (q, k, doc_start)]
        return measure_recall(*shards[:2], pattern, rows, doc_start=shards[2], ring=ring, layout=layout)

    for recall in run_ranks(measure, inner=3):
        torch.testing.assert_close(recall, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
def test_recall_of_the_probe_rows_is_the_coverage_asked(p: float) -> None:
    q, k = random_qk(400, seed=7)
    probe = 50
    pattern = estimate_vertical_slash(q, k, budget=Coverage(p), block=1, probe=probe)
    rows = range(400 - probe, 400)
    both = measure_recall(q, k, pattern, rows).mean(2)
    columns = SparsePattern(400, 1, columns=pattern.columns)
    # Besides its columns a row keeps only itself (offset 0 of blocks of one token): 1 / S of the mass or little more.
    alone = measure_recall(q, k, columns, rows).mean(2)
    assert (alone >= p).all() and (alone <= p + 0.02).all()
    assert (both >= alone - 1e-12).all()


def test_recall_of_other_rows_is_the_coverage_asked_when_probes_speak_for_them() -> None:
    # Every query attends to keys by a weight of the key, so that the probe rows know the columns of all rows.
    generator = torch.Generator().manual_seed(8)
    k = torch.randn(1, 2000, 2, 8, generator=generator)
    q = torch.ones(1, 2000, 4, 8) * 1.5 + torch.randn(1, 2000, 4, 8, generator=generator) * 0.1
    pattern = estimate_vertical_slash(q, k, budget=Coverage(0.9), block=1)
    columns = SparsePattern(2000, 1, columns=pattern.columns)
    recall = measure_recall(q, k, columns, spaced_rows(2000, 40)[10:]).mean(2)
    assert ((recall - 0.9).abs() < 0.02).all()


def test_recall_rows() -> None:
    assert spaced_rows(10, 3) == [2, 5, 9]
    assert spaced_rows(2, 5) == [0, 1]
    q, k = random_qk(20)
    with pytest.raises(MtrainError, match="from 0 to 19"):
        measure_recall(q, k, SparsePattern.dense(1, 4, 20, 8), [20])


# --- the plan -------------------------------------------------------------------------------------------------------------


def recipe(**changes) -> AttentionRecipe:
    given = {"block": 8, "budget": CoverageBudget(p=0.6), "sink": 2, "local": 4, "probe": 8}
    return AttentionRecipe(**(given | changes))


def same(a: SparsePattern, b: SparsePattern) -> bool:
    return all(
        x.shape == y.shape and bool((x == y).all()) for x, y in ((a.columns, b.columns), (a.diagonals, b.diagonals))
    )


def estimated(q: Tensor, k: Tensor, doc_start: Tensor | None = None) -> SparsePattern:
    return estimate_vertical_slash(q, k, budget=Coverage(0.6), block=8, sink=2, local=4, probe=8, doc_start=doc_start)


def test_every_pattern_of_the_recipe_is_registered() -> None:
    field = next(f for f in dataclasses.fields(AttentionRecipe) if f.name == "pattern")
    assert all(name in str(field.type) for name in PATTERNS)
    assert budget_of(TopKBudget(3, 4)) == TopK(3, 4)
    assert budget_of(CoverageBudget(p=0.7, floor=2, cap=9)) == Coverage(0.7, 2, 9)


def test_plan_follows_layers_and_warm_up() -> None:
    q, k = random_qk(70)
    plan = PatternPlan(recipe(dense_first_layers=1, dense_last_layers=2, dense_warmup_steps=3), num_layers=5)
    for step in (0, 2, 3, 9):
        full = [plan.index(layer, q, k, step=step).full for layer in range(5)]
        assert full == ([True] * 5 if step < 3 else [True, False, False, True, True])
    assert same(plan.index(1, q, k, step=3), estimated(q, k))


@pytest.mark.parametrize("name", ["dense", "a_shape", "vertical_slash"])  # the others: test_block_patterns.py
def test_plan_gives_the_pattern_of_its_name_with_documents_and_in_a_ring(name: str) -> None:
    q, k = random_qk(90, batch=2, seed=3)
    doc_start = random_documents(2, 90, 3)
    expected = {
        "dense": SparsePattern.dense(2, 4, 90, 8),
        "a_shape": a_shape_pattern(2, 4, 90, 8, sink=2, local=4, doc_start=doc_start),
        "vertical_slash": estimated(q, k, doc_start),
    }[name]
    assert same(PatternPlan(recipe(pattern=name), 2).index(1, q, k, doc_start=doc_start), expected)
    layout = RingLayout.build("zigzag", 90, 3, 8)

    def both_layers(ring: Ring) -> tuple[list[SparsePattern], int]:
        plan = PatternPlan(recipe(pattern=name), 2)
        shards = [layout.shard(x, ring.rank, 1) for x in (q, k, doc_start)]
        where = {"doc_start": shards[2], "ring": ring, "layout": layout}
        patterns = [plan.index(layer, *shards[:2], **where) for layer in range(2)]
        return patterns, ring.traffic["all_gather"]

    for patterns, gathers in run_ranks(both_layers, inner=3):
        assert all(same(pattern, expected) for pattern in patterns)
        # Document starts travel once for all layers; an estimate gathers its choice for each.
        assert gathers == (3 if name == "vertical_slash" else 1)


def steps_that_estimate(refresh, steps: int, micro: int = 1, **changes) -> list[int]:
    plan = PatternPlan(recipe(refresh=refresh, **changes), 1)
    fresh = []
    for step in range(steps):
        for part in range(micro):
            q, k = random_qk(70, seed=100 * step + part)
            if same(plan.index(0, q, k, step=step), estimated(q, k)):
                fresh.append(step)
    return fresh


def test_refresh() -> None:
    assert steps_that_estimate("every_step", 5) == [0, 1, 2, 3, 4]
    assert steps_that_estimate(RefreshEvery(3), 8) == [0, 3, 6]
    assert steps_that_estimate("frozen", 6) == [0]
    assert steps_that_estimate("every_step", 2, micro=2) == [0, 0, 1, 1]
    assert steps_that_estimate(RefreshEvery(2), 4, micro=2) == [0, 2]
    assert steps_that_estimate("frozen", 5, dense_warmup_steps=2) == [2]


def test_a_kept_choice_gets_the_sinks_of_the_documents_at_hand() -> None:
    plan = PatternPlan(recipe(refresh="frozen"), 1)
    (q, k), (other_q, other_k) = random_qk(90, seed=1), random_qk(90, seed=2)
    first, second = random_documents(1, 90, 1), random_documents(1, 90, 2)
    made = plan.index(0, q, k, doc_start=first, step=0)
    again = plan.index(0, other_q, other_k, doc_start=second, step=1)
    check_mask(again, second, sink=2, local=4)
    bare = estimate_vertical_slash(q, k, budget=Coverage(0.6), block=8, probe=8, doc_start=first)
    kept = set(bare.columns[0, 0].tolist()) - {90}
    sinks = {j for j in range(90) if j - int(second[0, j]) < 2}
    assert set(again.columns[0, 0].tolist()) - {90} == kept | sinks
    assert torch.equal(made.diagonals, again.diagonals)


@pytest.mark.parametrize("refresh", ["every_step", RefreshEvery(3), "frozen"])
def test_resumed_plan_gives_the_same_patterns(refresh) -> None:
    def run(plan: PatternPlan, steps: range) -> list[SparsePattern]:
        found = []
        for step in steps:
            q, k = random_qk(70, batch=2, seed=step)
            found += [plan.index(layer, q, k, step=step) for layer in range(2)]
        return found

    straight, stopped = PatternPlan(recipe(refresh=refresh), 2), PatternPlan(recipe(refresh=refresh), 2)
    expected = run(straight, range(8))
    first = run(stopped, range(4))
    state = {name: tensor.clone() for name, tensor in stopped.state_dict().items()}
    assert bool(state) == (refresh != "every_step")
    resumed = PatternPlan(recipe(refresh=refresh), 2)
    resumed.load_state_dict(state)
    assert all(same(a, b) for a, b in zip(first + run(resumed, range(4, 8)), expected, strict=True))


def test_other_lengths_other_batches_and_evaluation_leave_what_is_kept_alone() -> None:
    plan = PatternPlan(recipe(refresh="frozen"), 1)
    q, k = random_qk(70, batch=2, seed=1)
    made = plan.index(0, q, k, step=0)
    plan.index(0, *random_qk(33, batch=2), step=1)
    assert same(plan.index(0, *random_qk(70, batch=2, seed=9), step=2), made)
    three = plan.index(0, *random_qk(70, batch=3, seed=9), step=2)
    for row, source in enumerate((0, 1, 0)):
        assert torch.equal(three.columns[row], made.columns[source])
    looking = PatternPlan(recipe(refresh="frozen"), 1)
    looking.index(0, q, k, keep=False)
    assert looking.state_dict() == {}


def test_a_plan_works_in_inference_mode() -> None:
    q, k = random_qk(70)
    with torch.inference_mode():
        doc_start = random_documents(1, 70, 1)
        plan = PatternPlan(recipe(), 2)
        assert all(same(plan.index(layer, q, k, doc_start=doc_start), estimated(q, k, doc_start)) for layer in range(2))
        other = random_documents(1, 70, 2)
        assert same(plan.index(0, q, k, doc_start=other), estimated(q, k, other))


def test_bad_plans_and_states() -> None:
    plan = PatternPlan(recipe(refresh="frozen"), 1)
    with pytest.raises(CheckpointError, match="expected LAYER"):
        plan.load_state_dict({"nonsense": torch.zeros(1)})
    plan.index(0, *random_qk(70))
    with pytest.raises(CheckpointError, match="for 4 heads; the model has 2"):
        plan.index(0, *random_qk(70, heads=2, kv_heads=1))
    broken = dataclasses.replace(recipe())
    object.__setattr__(broken, "pattern", "mobo")
    with pytest.raises(MtrainError, match="unknown pattern 'mobo'"):
        PatternPlan(broken, 1)


def test_a_copied_plan_keeps_its_choice_and_leaves_the_ring() -> None:
    layout = RingLayout.build("striped", 70, 2, 8)
    q, k = random_qk(70, seed=1)

    def copied(ring: Ring) -> bool:
        plan = PatternPlan(recipe(refresh="frozen"), 1)
        shards = [layout.shard(x, ring.rank, 1) for x in (q, k)]
        made = plan.index(0, *shards, ring=ring, layout=layout)
        twin = copy.deepcopy(plan)
        return same(made, twin.index(0, *(x * 2 for x in shards), ring=ring, layout=layout, step=1))

    assert run_ranks(copied, inner=2) == [True, True]
