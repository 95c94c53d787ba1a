"""xattention and moba against their definitions, written out pair by pair; and the control of random columns."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtrain.balance import Balancer, measure, work
from mtrain.balance.work import block_cost
from mtrain.comm import Ring, run_ranks
from mtrain.errors import CheckpointError, RecipeError
from mtrain.layout import RingLayout
from mtrain.metrics import read_lines
from mtrain.models.statistics import mask_density
from mtrain.patterns import PatternPlan
from mtrain.patterns.random_columns import draw_columns
from mtrain.recipe.schema import AttentionRecipe, RefreshEvery, TopKBudget
from mtrain.topology import RingTopology
from mtrain.trainer import train
from mtrain.verify.exactness import LAYOUTS as EXACTNESS_LAYOUTS
from mtrain.verify.exactness import SCHEDULES, SEQ_LEN, Case, Problem, errors_of, make_layout, run_on
from sparse_kernels import SparsePattern, reference_attention
from tests.mtrain.processes import run_processes
from tests.mtrain.tiny import tiny_recipe

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


def test_moba_sorts_a_few_lines_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = random_qk(149)
    whole = PatternPlan(recipe("moba"), 1).index(0, q, k)
    for scores in (1, 35):  # of 10 chunks: a line, and three
        monkeypatch.setattr("mtrain.patterns.moba.SORTED_SCORES", scores)
        assert same(PatternPlan(recipe("moba"), 1).index(0, q, k), whole)


# --- every rank, every layout ---------------------------------------------------------------------------------------------


def same(a: SparsePattern, b: SparsePattern) -> bool:
    parts = [(a.columns, b.columns), (a.diagonals, b.diagonals)]
    if a.block_rows is not None:
        parts += [(a.block_rows.bits, b.block_rows.bits), (a.block_rows.rows, b.block_rows.rows)]
    return all(torch.equal(x, y) for x, y in parts) and (a.block_rows is None) == (b.block_rows is None)


def ring_agrees(patterns: list[SparsePattern], whole: SparsePattern, layout: RingLayout) -> bool:
    """Does every rank hold the part of the whole that its queries need?"""
    return all(same(found, whole.for_queries(layout.blocks(rank))) for rank, found in enumerate(patterns))


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

        assert ring_agrees(run_ranks(mine, inner=ranks), whole, layout), (ranks, kind)


def test_no_rank_needs_a_whole_tile_or_chunk() -> None:
    """More ranks than blocks, one block alone, a last block of one token, a chunk longer than the sequence."""
    for name, seq_len in product(EVERY, (17, 5)):
        q, k = random_qk(seq_len, heads=2, kv_heads=1, batch=1)
        layout = RingLayout.build("striped", seq_len, 4, 8)
        asked = recipe(name, chunk=64, sink=0)
        whole = PatternPlan(asked, 1).index(0, q, k)

        def mine(ring: Ring, asked: AttentionRecipe = asked, q=q, k=k, layout=layout) -> SparsePattern:
            shards = [layout.shard(x, ring.rank, 1) for x in (q, k)]
            return PatternPlan(asked, 1).index(0, *shards, ring=ring, layout=layout)

        assert ring_agrees(run_ranks(mine, inner=4), whole, layout)


@pytest.mark.parametrize("name", BLOCK_PATTERNS)
def test_attention_under_the_choice_is_exact_with_gradients(name: str) -> None:
    q, k = random_qk(SEQ_LEN, heads=8, dtype=torch.float64, seed=3)
    v, dout = random_qk(SEQ_LEN, heads=2, kv_heads=8, dtype=torch.float64, seed=4)
    doc_start = documents(SEQ_LEN)
    pattern = PatternPlan(recipe(name), 1).index(0, q, k, doc_start=doc_start)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = reference_attention(*leaves, pattern.to_dense(doc_start))
    truth = (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout))
    problem = Problem(q, k, v, dout, doc_start, pattern, truth)
    cases = zip(product(SCHEDULES, ((1, 1), (1, 3), (2, 2))), (*EXACTNESS_LAYOUTS, "striped"), strict=True)
    for (schedule, topology), kind in cases:
        for backend in ("cpu", "reference"):
            case = Case(name, kind, schedule, topology, True, 4, backend)
            layout = make_layout(kind, topology[0] * topology[1])
            shards = run_ranks(lambda ring, case=case, layout=layout: run_on(ring, case, problem, layout), *topology)
            assert max(errors_of(case, problem, layout, shards).values()) <= case.tolerance, case


# --- refresh, precision, refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "refresh"), list(product(BLOCK_PATTERNS, ["frozen", RefreshEvery(3)])))
def test_a_resumed_plan_uses_the_blocks_it_kept(name: str, refresh) -> None:
    def run(plan: PatternPlan, steps: range) -> list[SparsePattern]:
        return [plan.index(0, *random_qk(70, seed=step), doc_start=documents(70), step=step) for step in steps]

    straight, stopped = PatternPlan(recipe(name, refresh=refresh), 1), PatternPlan(recipe(name, refresh=refresh), 1)
    expected = run(straight, range(7))
    first = run(stopped, range(2))
    resumed = PatternPlan(recipe(name, refresh=refresh), 1)
    resumed.load_state_dict({key: tensor.clone() for key, tensor in stopped.state_dict().items()})
    assert all(same(a, b) for a, b in zip(first + run(resumed, range(2, 7)), expected, strict=True))
    fresh = [
        same(pattern, run(PatternPlan(recipe(name), 1), range(step, step + 1))[0])
        for step, pattern in enumerate(expected)
    ]
    assert fresh == [step % 3 == 0 if refresh != "frozen" else step == 0 for step in range(7)]


def test_kept_choices_of_another_pattern_are_refused() -> None:
    q, k = random_qk(70)
    columns, blocks = (PatternPlan(recipe(name, refresh="frozen"), 1) for name in ("vertical_slash", "moba"))
    columns.index(0, q, k)
    blocks.load_state_dict(columns.state_dict())
    with pytest.raises(CheckpointError, match="made by another attention.pattern"):
        blocks.index(0, q, k, step=1)


@pytest.mark.parametrize("name", BLOCK_PATTERNS)
def test_half_precision_autocast_and_inference_mode_choose_alike(name: str) -> None:
    q, k = (x.bfloat16() for x in random_qk(70))
    plain = PatternPlan(recipe(name), 1).index(0, q.float(), k.float())
    assert same(PatternPlan(recipe(name), 1).index(0, q, k), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert same(PatternPlan(recipe(name), 1).index(0, q, k), plain)
    with torch.inference_mode():
        assert same(PatternPlan(recipe(name), 1).index(0, q.clone(), k.clone(), doc_start=documents(70) * 0), plain)


def test_a_threshold_says_how_much_is_kept() -> None:
    q, k = random_qk(256)
    dense = [
        float(PatternPlan(recipe("xattention", threshold=p, local=0, sink=0), 1).index(0, q, k).density().mean())
        for p in (0.05, 0.3, 0.6, 0.9, 1.0)
    ]
    assert dense == sorted(dense) and dense[0] < 0.15 and dense[3] < 0.95 and dense[4] == 1


def test_random_columns_are_as_many_as_asked_and_say_nothing_of_the_input() -> None:
    asked = recipe("random_columns", sink=0, local=0, budget=TopKBudget(9, 3))
    pattern = PatternPlan(asked, 1).index(0, *random_qk(149, seed=1))
    assert same(pattern, PatternPlan(asked, 1).index(0, *random_qk(149, seed=2)))
    assert ((pattern.columns < 149).sum(2) == 9).all() and torch.equal(pattern.columns[0], pattern.columns[1])
    assert len({tuple(head) for head in pattern.columns[0].tolist()}) == 4  # every head has its own
    offsets = pattern.offset_table()[0].sum(1)
    assert ((offsets >= 3) & (offsets <= 7)).all()
    spread = draw_columns(64, 512, 8, 64, 8).columns[0].float().mean(0)
    assert spread[:256].mean().item() == pytest.approx(1 / 8, abs=0.02) and spread.max() < 0.35


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "xattention", "stride": 3}, "stride: must divide block 8"),
        ({"pattern": "xattention", "stride": 0}, "stride: must be at least 1"),
        ({"pattern": "xattention", "stride": 4, "threshold": 0.0}, "threshold: is a share"),
        ({"pattern": "xattention", "stride": 4, "threshold": float("nan")}, "threshold: is a share"),
        ({"pattern": "moba", "chunk": 12}, "chunk: must be a multiple of block 8 for moba, got 12; try 16"),
        ({"pattern": "moba", "top_k": 0}, "top_k: must be at least 1"),
        ({"pattern": "moba", "share": "kv_head"}, "share: belongs to vertical_slash"),
        ({"pattern": "random_columns"}, "budget: must be of kind topk"),
    ],
)
def test_what_does_not_fit_a_pattern_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        AttentionRecipe(block=8, **changes)
    AttentionRecipe(block=8, pattern="dense", stride=3, chunk=12)  # keys of a pattern that is not used stay quiet


# --- in a run -------------------------------------------------------------------------------------------------------------


def run_of(directory: Path, mesh: dict[str, int], run: str, **changes) -> list[float]:
    changes |= {f"parallel__{axis}": size for axis, size in mesh.items()}
    given = {"attention__stride": 4, "attention__top_k": 2, "train__steps": 3, "train__seq_len": 230}
    recipe = tiny_recipe(directory, run, train__batch_rows=4, log__recall_every=2, **(given | changes))
    train(recipe)
    return [line["loss"] for line in read_lines(Path(recipe.output) / "run.jsonl")]


def run_ring(directory: Path, changes: dict) -> list[float]:
    return run_of(directory, {"inner": 2}, "ring", **changes)


@pytest.mark.parametrize("name", BLOCK_PATTERNS)
def test_a_balanced_ring_trains_as_one_process(name: str, tmp_path: Path) -> None:
    changes = {"attention__pattern": name, "attention__layout": "balanced"}
    alone = run_of(tmp_path, {}, "alone", **changes)
    results = run_processes(run_ring, 2, tmp_path / "work", tmp_path, changes)
    assert not [result for result in results if not isinstance(result, list)], results
    for losses in results:
        assert losses == pytest.approx(alone, rel=1e-5)
    lines = read_lines(tmp_path / "ring" / "run.jsonl")
    one = read_lines(tmp_path / "alone" / "run.jsonl")
    for line, other in zip(lines, one, strict=True):
        assert line["density"] == pytest.approx(other["density"], rel=1e-5) and 1 <= line["worker_imbalance"] < 2
        reach, expected = ([x for x in entry.get("reach", []) if x is not None] for entry in (line, other))
        assert reach == pytest.approx(expected, rel=1e-5)
    assert 0 < lines[0]["recall"] <= 1 and lines[0]["density"] < 1


@pytest.mark.parametrize("name", BLOCK_PATTERNS)
def test_density_and_work_of_blocks_are_counted_from_the_mask(name: str) -> None:
    doc_start = documents(149)
    pattern = PatternPlan(recipe(name), 1).index(0, *random_qk(149), doc_start=doc_start)
    mask, i = pattern.to_dense(doc_start), torch.arange(149)
    causal = (i - doc_start + 1).sum(1)
    assert mask_density(pattern, doc_start) == pytest.approx(
        float((mask.sum((2, 3)) / causal[:, None]).mean()), rel=1e-6
    )
    # A tile counts whole if any of its pairs is inside and it is not left of the document of its first row.
    tiles = torch.nn.functional.pad(mask, (0, 3, 0, 3)).unflatten(3, (19, 8)).unflatten(2, (19, 8)).any(5).any(3)
    seen = torch.arange(19) >= doc_start[:, ::8, None] // 8
    area = 64 * float((tiles & seen[:, None]).sum())
    topology = RingTopology(1, 3)
    for kind in LAYOUTS:
        layout = RingLayout.build(kind, 149, 3, 8)
        assert float(work(pattern, layout, topology, doc_start).sum()) == area
    assert float(block_cost(pattern, doc_start).sum()) == area
    coming = Balancer(149, 8)
    coming.update(measure(pattern, doc_start))
    assert coming.assignment(topology, doc_start).bincount().tolist() == [7, 7, 7]
