"""Vertical-slash estimation against an oracle written with plain loops, and distributed against single."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtrain.comm import ProcessRing, Ring, run_ranks
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout, padded_blocks
from mtrain.patterns import Coverage, TopK, estimate_vertical_slash, measure_recall
from mtrain.patterns import scores as scores_module
from mtrain.patterns.budget import smallest_cover
from mtrain.patterns.documents import Documents, Probes
from mtrain.patterns.placement import Placement
from mtrain.patterns.scores import probe_scores
from mtrain.topology import RingTopology
from sparse_kernels import SparsePattern
from tests.mtrain.processes import run_processes

Q_K = tuple[Tensor, Tensor]


def make(
    seq_len: int, heads: int, kv_heads: int, *, batch: int = 1, dim: int = 8, seed: int = 0, dtype=torch.float64
) -> Q_K:
    """Queries and keys with heavy keys and smooth neighbourhoods, so that columns and slashes stand out."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(batch, seq_len, kv_heads, dim, generator=generator, dtype=torch.float64)
    q = torch.randn(batch, seq_len, heads, dim, generator=generator, dtype=torch.float64)
    heavy = torch.rand(batch, seq_len, kv_heads, generator=generator) < 0.05
    k[..., 0] += heavy * 6.0
    q[..., 0] += 2.0
    phase = torch.arange(seq_len, dtype=torch.float64)[None, :, None] * 0.37
    for x in (q, k):
        x[..., 1] += 4 * torch.cos(phase)
        x[..., 2] += 4 * torch.sin(phase)
    return q.to(dtype), k.to(dtype)


def pack(seq_len: int, starts: list[int]) -> Tensor:
    doc_start = torch.zeros(1, seq_len, dtype=torch.int64)
    for first in starts:
        doc_start[0, first:] = first
    return doc_start


# --- the oracle -----------------------------------------------------------------------------------------------------------


def oracle_rows(doc_start: list[int] | None, seq_len: int, probe: int, spread: int) -> set[int]:
    probe = min(probe, seq_len)
    rows: set[int] = set()
    if doc_start is None:
        rows |= set(range(seq_len - probe, seq_len))
    else:
        documents = []
        for first in sorted(set(doc_start)):
            length = doc_start.count(first)
            documents.append((-length, first, first + length - 1))
        windows = min(4, probe)
        ends = [last for _, _, last in sorted(documents)[:windows]]
        for window in range(windows):
            size = len(range(window, probe, windows))
            which = window % min(len(ends), windows)
            rows |= set(range(ends[which] - size + 1, ends[which] + 1))
            ends[which] -= size
    for group in range(1, spread + 1):
        end = seq_len * group // (spread + 1) - 1
        rows |= set(range(end - probe + 1, end + 1))
    return {row for row in rows if row >= 0}


def oracle_scores(q: Tensor, k: Tensor, rows: set[int], start: list[int]) -> tuple[list[float], list[float]]:
    """Column and slash scores of one head: q, k [S, D]."""
    size = q.shape[0]
    columns, slashes = [0.0] * size, [0.0] * size
    for i in sorted(rows):
        keys = range(start[i], i + 1)
        weights = torch.softmax((k[start[i] : i + 1] @ q[i]) / q.shape[1] ** 0.5, 0).tolist()
        for j, weight in zip(keys, weights, strict=True):
            columns[j] += weight / len(rows)
            slashes[i - j] += weight / len(rows)
    return columns, slashes


def oracle_choice(scores: list[float], budget: Coverage | TopK, count: int) -> set[int]:
    order = sorted(range(len(scores)), key=lambda n: (-scores[n], n))
    if isinstance(budget, TopK):
        return set(order[:count])
    chosen: set[int] = set()
    mass = 0.0
    for n in order:
        if (mass >= budget.p * sum(scores) and len(chosen) >= budget.floor) or len(chosen) == budget.cap:
            break
        chosen.add(n)
        mass += scores[n]
    return chosen


def oracle_pattern(q: Tensor, k: Tensor, doc_start: Tensor | None, share: bool, **options) -> tuple[list, list]:
    """Columns and diagonals as nested lists [B][H] of sorted positions."""
    batch, size, heads, _ = q.shape
    group, block, budget = heads // k.shape[2], options["block"], options["budget"]
    all_columns, all_diagonals = [], []
    for b in range(batch):
        given = None if doc_start is None else doc_start[b].tolist()
        start = given or [0] * size
        rows = oracle_rows(given, size, options.get("probe", 64), options.get("probe_spread", 0))
        found = [oracle_scores(q[b, :, h], k[b, :, h // group], rows, start) for h in range(heads)]
        if share:
            groups = [found[h // group * group : h // group * group + group] for h in range(heads)]
            found = [
                tuple([sum(part[side][n] for part in members) / group for n in range(size)] for side in (0, 1))
                for members in groups
            ]
        row_columns, row_diagonals = [], []
        for columns, slashes in found:
            chosen = oracle_choice(columns, budget, getattr(budget, "columns", 0))
            chosen |= {j for j in range(size) if j - start[j] < options.get("sink", 0)}
            offsets = {0}
            distances = oracle_choice(slashes, budget, getattr(budget, "slashes", 0))
            for s in distances | set(range(options.get("local", 0) + 1)):
                offsets |= {s // block} | ({s // block + 1} if s % block else set())
            row_columns.append(sorted(chosen))
            row_diagonals.append(sorted(d for d in offsets if d <= (size - 1) // block))
        all_columns.append(row_columns)
        all_diagonals.append(row_diagonals)
    return all_columns, all_diagonals


def as_lists(pattern: SparsePattern) -> tuple[list, list]:
    columns = [[[c for c in head if c < pattern.seq_len] for head in row] for row in pattern.columns.tolist()]
    diagonals = [[[d for d in head if d >= 0] for head in row] for row in pattern.diagonals.tolist()]
    return columns, diagonals


CASES = {
    "plain": {"budget": Coverage(0.9), "block": 8, "sink": 3, "local": 11, "probe": 16},
    "low coverage": {"budget": Coverage(0.3), "block": 5, "probe": 7},
    "floor and cap": {"budget": Coverage(0.95, floor=4, cap=9), "block": 8, "sink": 1, "probe": 16},
    "topk": {"budget": TopK(7, 5), "block": 16, "local": 1, "probe": 64},
    "spread": {"budget": Coverage(0.8), "block": 8, "probe": 9, "probe_spread": 3, "sink": 2},
    "more probes than rows": {"budget": Coverage(0.8), "block": 8, "probe": 500, "probe_spread": 1},
    "one probe row": {"budget": Coverage(0.9), "block": 7, "probe": 1, "local": 3},
    "block 1": {"budget": Coverage(0.7), "block": 1, "probe": 10, "local": 2},
    "one block": {"budget": Coverage(0.7), "block": 256, "probe": 10},
}
DOCUMENTS = {
    "one": None,
    "packed": [40, 41, 42, 97, 110],
    "many short": list(range(1, 149, 3)),
    "two": [130],
    "ends with a token": [100, 148],
}


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("case", CASES)
def test_estimate_is_the_oracle(case: str, documents: str) -> None:
    q, k = make(149, 4, 2, seed=3)
    doc_start = None if DOCUMENTS[documents] is None else pack(149, DOCUMENTS[documents])
    pattern = estimate_vertical_slash(q, k, doc_start=doc_start, **CASES[case])
    assert as_lists(pattern) == oracle_pattern(q, k, doc_start, share=False, **CASES[case])


@pytest.mark.parametrize("kv_heads", [1, 2, 7])
def test_shared_patterns_average_the_group(kv_heads: int) -> None:
    q, k = make(101, 14, kv_heads, seed=kv_heads)
    options = {"budget": Coverage(0.85), "block": 8, "probe": 16, "sink": 1}
    pattern = estimate_vertical_slash(q, k, share="kv_head", **options)
    assert as_lists(pattern) == oracle_pattern(q, k, None, share=True, **options)


def test_rows_of_a_batch_have_their_own_documents_and_probes() -> None:
    q, k = make(90, 2, 1, batch=3, seed=5)
    doc_start = torch.cat([pack(90, []), pack(90, [13, 70]), pack(90, [1, 2, 3, 4, 89])])
    options = {"budget": Coverage(0.8), "block": 8, "probe": 12, "probe_spread": 1, "sink": 2, "local": 4}
    pattern = estimate_vertical_slash(q, k, doc_start=doc_start, **options)
    assert as_lists(pattern) == oracle_pattern(q, k, doc_start, share=False, **options)


@pytest.mark.parametrize("probe", [1, 2, 3, 10, 64])
def test_a_single_document_is_no_packing(probe: int) -> None:
    q, k = make(77, 2, 1, seed=probe)
    options = {"budget": Coverage(0.8), "block": 8, "probe": probe}
    plain = estimate_vertical_slash(q, k, **options)
    packed = estimate_vertical_slash(q, k, doc_start=pack(77, []), **options)
    assert as_lists(plain) == as_lists(packed)


@pytest.mark.parametrize("seq_len", [1, 2, 7, 8, 9, 1030])
def test_odd_lengths(seq_len: int) -> None:
    q, k = make(seq_len, 2, 1, seed=seq_len)
    options = {"budget": Coverage(0.9), "block": 8, "probe": 8, "sink": 2, "local": 9}
    assert as_lists(estimate_vertical_slash(q, k, **options)) == oracle_pattern(q, k, None, share=False, **options)


def test_counts_may_differ_by_head() -> None:
    q, k = make(64, 3, 3)
    pattern = estimate_vertical_slash(q, k, budget=TopK([0, 5, 64], [1, 2, 3]), block=4)
    assert [len(head) for head in as_lists(pattern)[0][0]] == [0, 5, 64]
    with pytest.raises(MtrainError, match="columns names 2 heads, but 3 are scored"):
        estimate_vertical_slash(q, k, budget=TopK([1, 2], 1), block=4)
    with pytest.raises(MtrainError, match="slashes names 4 heads, but 2 are scored"):
        estimate_vertical_slash(*make(64, 4, 2), budget=TopK(1, [1] * 4), block=4, share="kv_head")


def test_large_logits_and_half_precision_stay_finite() -> None:
    q, k = make(200, 4, 1, seed=9)
    for scaled in (q * 30, (q * 30).bfloat16()):
        pattern = estimate_vertical_slash(scaled, k.to(scaled.dtype), budget=Coverage(0.9), block=16, probe=32)
        columns, _ = as_lists(pattern)
        assert all(1 <= len(head) < 200 for head in columns[0])


def test_autocast_does_not_round_the_scores() -> None:
    q, k = make(300, 4, 1, seed=9, dtype=torch.float32)
    options = {"budget": Coverage(0.9), "block": 16}
    plain = estimate_vertical_slash(q, k, **options)
    with torch.autocast("cpu", torch.bfloat16):
        inside = estimate_vertical_slash(q, k, **options)
        recall = measure_recall(q, k, inside, [100, 299])
    assert as_lists(inside) == as_lists(plain)
    assert torch.equal(recall, measure_recall(q, k, plain, [100, 299]))


def test_scores_do_not_enter_the_graph() -> None:
    q, k = make(40, 2, 1)
    q.requires_grad_(), k.requires_grad_()
    pattern = estimate_vertical_slash(q, k, budget=Coverage(0.9), block=8)
    assert not pattern.columns.requires_grad and q.grad is None


def test_scale_changes_the_choice() -> None:
    q, k = make(120, 2, 1)
    flat = estimate_vertical_slash(q, k, budget=Coverage(0.9), block=8, scale=1e-3)
    sharp = estimate_vertical_slash(q, k, budget=Coverage(0.9), block=8, scale=3.0)
    assert sharp.columns.shape[2] < flat.columns.shape[2]


# --- distributed ----------------------------------------------------------------------------------------------------------


def layouts(seq_len: int, ranks: int, block: int) -> list[RingLayout]:
    kinds = [RingLayout.build(kind, seq_len, ranks, block) for kind in ("contiguous", "zigzag", "striped")]
    total = padded_blocks("balanced", seq_len, ranks, block)
    shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(ranks)) % ranks
    return [*kinds, RingLayout.build("balanced", seq_len, ranks, block, shuffled)]


def assert_same_everywhere(q: Tensor, k: Tensor, doc_start: Tensor | None, outer: int, inner: int, **options) -> None:
    whole = estimate_vertical_slash(q, k, doc_start=doc_start, **options)
    for layout in layouts(q.shape[1], outer * inner, options["block"]):

        def estimate(ring: Ring, layout: RingLayout = layout) -> SparsePattern:
            shards = [layout.shard(x, ring.rank, 1) for x in (q, k)]
            documents = None if doc_start is None else layout.shard(doc_start, ring.rank, 1)
            return estimate_vertical_slash(*shards, doc_start=documents, ring=ring, layout=layout, **options)

        for pattern in run_ranks(estimate, outer, inner):
            assert torch.equal(pattern.columns, whole.columns), layout.kind
            assert torch.equal(pattern.diagonals, whole.diagonals), layout.kind


@pytest.mark.parametrize("topology", [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (3, 2)])
@pytest.mark.parametrize("documents", ["one", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distributed_is_single(topology: tuple[int, int], documents: str, dtype: torch.dtype) -> None:
    doc_start = None if documents == "one" else pack(149, DOCUMENTS[documents])
    q, k = make(149, 4, 2, seed=11, dtype=dtype)
    options = {"budget": Coverage(0.9), "block": 8, "sink": 3, "local": 11, "probe": 16}
    assert_same_everywhere(q, k, doc_start, *topology, **options)


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("share", [None, "kv_head"])
def test_distributed_is_single_for_groups_of_heads(group: int, share: str | None) -> None:
    # Fewer scored heads than ranks, and numbers of heads that ranks do not divide.
    q, k = make(203, group, 1, seed=group, dim=12, dtype=torch.float32)
    options = {"budget": Coverage(0.8, cap=40), "block": 16, "probe": 20, "probe_spread": 2, "share": share}
    assert_same_everywhere(q, k, None, 1, 3, **options)


@pytest.mark.parametrize("seed", range(12))
def test_distributed_is_single_at_random_sizes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    seq_len, group, kv_heads = draw(1, 1500), draw(1, 5), draw(1, 4)
    dtype = (torch.float32, torch.float64)[seed % 2]
    q, k = make(seq_len, group * kv_heads, kv_heads, batch=draw(1, 3), dim=draw(3, 40), seed=seed, dtype=dtype)
    starts = sorted({draw(0, seq_len) for _ in range(draw(0, 9))})
    doc_start = pack(seq_len, starts).expand(q.shape[0], -1) if starts else None
    options = {
        "budget": Coverage(0.5 + 0.049 * draw(0, 10)),
        "block": draw(1, 70),
        "sink": draw(0, 5),
        "probe": draw(1, 80),
    }
    assert_same_everywhere(q, k, doc_start, 1 + seed % 2, draw(1, 4), **options)


def estimate_in_a_process() -> SparsePattern:
    ring = ProcessRing.create(RingTopology(1, 3))
    q, k = make(149, 5, 1, seed=2, dtype=torch.float32)
    layout = RingLayout.build("zigzag", 149, 3, 8)
    shards = [layout.shard(x, ring.rank, 1) for x in (q, k, pack(149, [40, 41, 110]))]
    options = {"budget": Coverage(0.9), "block": 8, "sink": 2, "probe": 16}
    return estimate_vertical_slash(*shards[:2], doc_start=shards[2], ring=ring, layout=layout, **options)


def test_processes_find_the_index_of_one(tmp_path: Path) -> None:
    q, k = make(149, 5, 1, seed=2, dtype=torch.float32)
    options = {"budget": Coverage(0.9), "block": 8, "sink": 2, "probe": 16}
    whole = estimate_vertical_slash(q, k, doc_start=pack(149, [40, 41, 110]), **options)
    for pattern in run_processes(estimate_in_a_process, 3, tmp_path):
        assert torch.equal(pattern.columns, whole.columns)
        assert torch.equal(pattern.diagonals, whole.diagonals)


def test_scores_that_are_not_kept_are_computed_again_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = make(1500, 4, 2, dtype=torch.float32)
    options = {"budget": Coverage(0.97), "block": 64}
    kept = estimate_vertical_slash(q, k, **options)
    monkeypatch.setattr(scores_module, "KEEP_BYTES", 0)
    assert as_lists(estimate_vertical_slash(q, k, **options)) == as_lists(kept)


def test_traffic_is_the_closed_form_and_shared_evenly() -> None:
    seq_len, block, ranks, heads, kv_heads, dim, probe = 512, 16, 4, 6, 2, 8, 24
    q, k = make(seq_len, heads, kv_heads, dtype=torch.float32)
    doc_start = pack(seq_len, [100])
    layout = RingLayout.build("striped", seq_len, ranks, block)

    def traffic(ring: Ring) -> dict[str, int]:
        shards = [layout.shard(x, ring.rank, 1) for x in (q, k, doc_start)]
        options = {"budget": Coverage(0.9), "block": block, "probe": probe, "ring": ring, "layout": layout}
        estimate_vertical_slash(*shards[:2], doc_start=shards[2], **options)
        return dict(ring.traffic)

    units = -(-heads // ranks)
    rows = 80  # 3 query heads per key-value head x 24 probe rows = 72, rounded up to 16
    windows = 4 * (block + probe // 4 - 1)
    expected = {
        "all_gather": 2,
        "all_gather_bytes": layout.local_len * 4 + units * ((seq_len + seq_len // block) // 8),
        "all_reduce": 3,
        "all_reduce_bytes": probe * heads * dim * 4 + kv_heads * rows * (4 + 8),
        "all_to_all": 1,
        "all_to_all_bytes": ranks * units * layout.blocks_per_rank * (block + windows) * 8,
    }
    assert run_ranks(traffic, inner=ranks) == [expected] * ranks


# --- errors ---------------------------------------------------------------------------------------------------------------


def test_bad_calls_say_what_is_wrong() -> None:
    q, k = make(32, 4, 2)
    good = {"budget": Coverage(0.9), "block": 8}
    for options, words in (
        (good | {"block": 0}, "block and probe"),
        (good | {"probe": 0}, "block and probe"),
        (good | {"sink": -1}, "sink, local"),
        (good | {"share": "head"}, "unknown share"),
        (good | {"doc_start": torch.zeros(1, 31, dtype=torch.int64)}, "doc_start has shape"),
        (good | {"layout": RingLayout.build("striped", 32, 2, 8)}, "needs the ring"),
        (good | {"layout": RingLayout.build("striped", 64, 1, 8)}, "shards of 64"),
    ):
        with pytest.raises(MtrainError, match=words):
            estimate_vertical_slash(q, k, **options)
    with pytest.raises(MtrainError, match="num_kv_heads dividing heads"):
        estimate_vertical_slash(q[:, :, :3], k, **good)


@pytest.mark.parametrize("share", [False, True])
def test_sums_of_scores_stay_exact_in_float64(share: bool) -> None:
    """Seven heads of 127 probe rows each: full coverage keeps every key that has a score and no other."""
    q, k = make(200, 7, 1, seed=1)
    q, k = q * 3, k * 3
    placement, documents = Placement.of(200, 8, None, None), Documents(200)
    probes = Probes.place(documents, 1, 127, 0, q.device)
    scores = probe_scores(q, k, probes, documents, placement, share=share, scale=8**-0.5)
    for found in (scores.columns, scores.slashes):
        assert int(found.sum(-1).max()) <= 2**53
        assert torch.equal(smallest_cover(found, 1.0), found > 0)
        assert not bool((found > 0).all())
