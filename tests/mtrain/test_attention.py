"""Ring attention: exact for every combination of the axes, traffic as the closed form says, bad shards refused."""

from datetime import timedelta
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mtrain.attention import ring_attention
from mtrain.columns import union_columns
from mtrain.comm import ProcessRing, run_ranks
from mtrain.errors import MtrainError
from mtrain.layout import RingLayout
from mtrain.topology import RingTopology
from mtrain.verify.exactness import (
    LAYOUTS,
    PATTERNS,
    Case,
    check_case,
    covering_cases,
    errors_of,
    make_layout,
    make_problem,
    run_on,
)
from sparse_kernels import ShardView, SparsePattern, reference_attention


@pytest.mark.parametrize(("pattern", "layout"), list(product(PATTERNS, LAYOUTS)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exactness_matrix(pattern, layout, dtype):
    cases = [case for case in covering_cases(dtype) if (case.pattern, case.layout) == (pattern, layout)]
    assert len(cases) >= 28 and {case.backend for case in cases} == {"cpu", "reference"}
    for case in cases:
        errors = check_case(case)
        assert max(errors.values()) <= case.tolerance, (case, errors)


def _process(rank: int, path: str, topology: RingTopology, cases: list[Case], results) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(path, topology.world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=topology.world_size, timeout=timedelta(seconds=60)
    )
    ring = ProcessRing.create(topology)
    for index, case in enumerate(cases):
        problem = make_problem(case.pattern, case.packed, case.group, case.dtype)
        results[index, rank] = run_on(ring, case, problem, make_layout(case.layout, topology.world_size))
    dist.destroy_process_group()


@pytest.mark.parametrize("outer_inner", [(1, 2), (1, 3), (2, 2)])
def test_exact_over_real_processes(outer_inner, tmp_path):
    cases = [
        Case(pattern, layout, schedule, outer_inner, packed=schedule == "ring", group=4, backend="cpu")
        for pattern, layout, schedule in product(
            ("vertical_slash", "random"), ("striped", "zigzag"), ("ring", "gather")
        )
    ]
    topology = RingTopology(*outer_inner)
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "store"), topology, cases, results)
        mp.start_processes(_process, arguments, nprocs=topology.world_size, start_method="fork")
        for index, case in enumerate(cases):
            problem = make_problem(case.pattern, case.packed, case.group, case.dtype)
            shards = [results[index, rank] for rank in range(topology.world_size)]
            errors = errors_of(case, problem, make_layout(case.layout, topology.world_size), shards)
            assert max(errors.values()) <= case.tolerance, (case, errors)


@pytest.mark.parametrize(("outer", "inner"), [(1, 2), (1, 4), (2, 2), (3, 1), (2, 3)])
def test_ring_traffic_is_the_closed_form(outer, inner):
    case = Case("vertical_slash", "striped", "ring", (outer, inner), True, 4, "reference")
    problem = make_problem(case.pattern, case.packed, case.group, case.dtype)
    layout = make_layout(case.layout, outer * inner)

    def work(ring):
        run_on(ring, case, problem, layout)
        return dict(ring.traffic)

    batch, _, kv_heads, head_dim = problem.k.shape
    shard = 2 * batch * layout.local_len * kv_heads * head_dim * 8  # K and V of one rank, float64
    columns = 2 * batch * union_columns(problem.pattern, kv_heads).shape[2] * kv_heads * head_dim * 8
    expected = {"all_reduce": 2, "all_reduce_bytes": 2 * columns}
    calls = {
        "shift_inner_kv": 2 * outer * (inner - 1),  # forward and backward
        "shift_outer_kv": 2 * (outer - 1),
        "shift_inner_dkv": outer * inner if inner > 1 else 0,
        "shift_outer_dkv": outer if outer > 1 else 0,
    }
    for name, count in calls.items():
        if count:
            expected |= {name: count, f"{name}_bytes": count * shard}
    for traffic in run_ranks(work, outer, inner):
        assert traffic == expected, "a layer moves K, V, dK, dV and the columns' rows, and nothing else"


def test_gather_traffic_is_the_closed_form():
    case = Case("vertical_slash", "zigzag", "gather", (1, 3), False, 4, "reference")
    problem = make_problem(case.pattern, case.packed, case.group, case.dtype)
    layout = make_layout(case.layout, 3)

    def work(ring):
        run_on(ring, case, problem, layout)
        return dict(ring.traffic)

    batch, _, kv_heads, head_dim = problem.k.shape
    shard = 2 * batch * layout.local_len * kv_heads * head_dim * 8
    for traffic in run_ranks(work, inner=3):
        assert traffic == {
            "all_gather": 2,
            "all_gather_bytes": 2 * shard,
            "all_to_all": 1,
            "all_to_all_bytes": 3 * shard,
        }


def test_gather_splits_heads_when_memory_is_short(monkeypatch):
    monkeypatch.setattr("mtrain.attention.GATHER_BYTES", 1)
    case = Case("random", "balanced", "gather", (1, 3), True, 4, "reference")
    errors = check_case(case)
    assert max(errors.values()) <= case.tolerance


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bfloat16_is_as_good_as_a_dense_bfloat16_run(backend):
    """Two rules at once (max <= 2x, mean <= 1.2x; 3x max for gradients) against a dense bf16 run under the same mask."""
    torch.manual_seed(3)
    batch, size, heads, kv_heads, head_dim, block = 1, 500, 4, 2, 32, 16
    columns = torch.rand(batch, heads, size).argsort(-1)[..., :60].sort(-1).values.int()
    diagonals = torch.tensor([0, 1, 3, 9], dtype=torch.int32).expand(batch, heads, 4).contiguous()
    pattern = SparsePattern(size, block, columns=columns, diagonals=diagonals)
    tensors = [torch.randn(batch, size, h, head_dim).bfloat16() for h in (heads, kv_heads, kv_heads, heads)]

    def dense(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in tensors[:3]]
        group = heads // kv_heads
        keys, values = (t.repeat_interleave(group, 2) for t in leaves[1:])
        scores = torch.einsum("bqhd,bkhd->bhqk", leaves[0], keys) * head_dim**-0.5
        probs = scores.masked_fill(~pattern.to_dense(), -torch.inf).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", probs, values)
        return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3].to(dtype))]

    truth, plain = dense(torch.float64), dense(torch.bfloat16)
    layout = RingLayout.build("striped", size, 3, block)

    def work(ring):
        q, k, v, dout = (layout.shard(t, ring.rank, 1) for t in tensors)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = ring_attention(*leaves, pattern, ring=ring, layout=layout, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout)]

    shards = run_ranks(work, inner=3)
    for index, name in enumerate(("out", "dq", "dk", "dv")):
        ours = layout.unshard([parts[index] for parts in shards], 1)
        assert ours.dtype == torch.bfloat16
        error, allowed = (ours.double() - truth[index]).abs(), (plain[index].double() - truth[index]).abs()
        assert error.max() <= (2 if name == "out" else 3) * allowed.max(), name
        assert error.mean() <= 1.2 * allowed.mean(), name


def test_the_matrix_is_about_sparse_patterns():
    """A pattern that selects nearly everything would prove nothing."""
    for pattern, packed in product(PATTERNS, (False, True)):
        problem = make_problem(pattern, packed, 4, torch.float64)
        offsets = problem.pattern.offset_table().float().mean()
        density = problem.pattern.density(problem.doc_start).max()
        assert (density == 1 and offsets == 1) if pattern == "dense" else (density < 0.9 and offsets < 0.5), pattern


@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_autocast_changes_nothing_and_second_derivatives_are_refused(schedule):
    problem = make_problem("random", True, 4, torch.float32)
    layout = RingLayout.build("striped", problem.pattern.seq_len, 2, problem.pattern.block)

    def work(ring):
        leaves = [layout.shard(t, ring.rank, 1).float().requires_grad_() for t in (problem.q, problem.k, problem.v)]
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                out = ring_attention(
                    *leaves, problem.pattern, ring=ring, layout=layout, schedule=schedule, backend="reference"
                )
                slopes = torch.autograd.grad(out.square().sum(), leaves, create_graph=enabled)
                results.append([out.detach(), *(t.detach() for t in slopes)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        with pytest.raises(RuntimeError, match="differentiate twice"):
            slopes[0].sum().backward()

    run_ranks(work, inner=2)


@pytest.mark.parametrize("schedule", ["ring", "gather"])
def test_the_backward_gets_the_views_of_the_forward(schedule, monkeypatch):
    """Backends keep prepared index lists on a view, so a new one in the backward would prepare them again."""
    made = []
    monkeypatch.setattr("mtrain.attention.ShardView", lambda *args, **keys: made.append(1) or ShardView(*args, **keys))
    check_case(Case("random", "striped", schedule, (1, 2), True, 4, "cpu"))
    per_rank = 3 if schedule == "ring" else 1  # two shards and the columns, or everything at once
    assert len(made) == 2 * per_rank


def test_no_document_sees_another_one():
    """Changing one token of document A changes no output and no gradient of document B, bit for bit."""
    problem = make_problem("vertical_slash", True, 4, torch.float64)
    layout = RingLayout.build("zigzag", problem.pattern.seq_len, 2, problem.pattern.block)
    document_b = problem.doc_start[0] == 77

    def outputs(change: float) -> list[torch.Tensor]:
        k = problem.k.clone()
        k[:, 20] += change

        def work(ring):
            leaves = [layout.shard(t, ring.rank, 1).requires_grad_() for t in (problem.q, k, problem.v)]
            starts = layout.shard(problem.doc_start, ring.rank, 1)
            out = ring_attention(*leaves, problem.pattern, ring=ring, layout=layout, doc_start=starts)
            return [out.detach(), *torch.autograd.grad(out, leaves, layout.shard(problem.dout, ring.rank, 1))]

        shards = run_ranks(work, inner=2)
        return [layout.unshard([parts[i] for parts in shards], 1)[0] for i in range(4)]

    before, after = outputs(0.0), outputs(9.0)
    assert not torch.equal(before[0], after[0]), "the probe must change its own document"
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[document_b], b[document_b])


def test_padding_rows_are_zero_and_get_no_gradient():
    torch.manual_seed(0)
    pattern = SparsePattern.dense(1, 2, 21, 8)
    layout = RingLayout.build("striped", 21, 2, 8)
    q, k, v = (torch.randn(1, 21, 2, 4, dtype=torch.float64) for _ in range(3))

    def work(ring):
        leaves = [layout.shard(t, ring.rank, 1) + 1 for t in (q, k, v)]  # padding is not zero here
        leaves = [t.requires_grad_() for t in leaves]
        out = ring_attention(*leaves, pattern, ring=ring, layout=layout)
        padding = layout.positions(ring.rank) >= 21
        grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        return [x[:, padding] for x in (out, *grads)]

    pads = run_ranks(work, inner=2)
    assert sum(x.numel() for x in pads[0] + pads[1]) > 0
    assert all(not x.any() for parts in pads for x in parts)


def test_one_rank_stays_sparse():
    problem = make_problem("random", False, 1, torch.float64)
    layout = RingLayout.build("contiguous", problem.pattern.seq_len, 1, problem.pattern.block)
    q, k, v = (layout.shard(t, 0, 1) for t in (problem.q, problem.k, problem.v))
    [out] = run_ranks(lambda ring: ring_attention(q, k, v, problem.pattern, ring=ring, layout=layout))
    dense, _ = reference_attention(problem.q, problem.k, problem.v, torch.ones(149, 149, dtype=torch.bool).tril())
    assert (out[:, :149] - dense).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "rings"}, "unknown schedule 'rings'; choose one of ring, gather"),
        ({"layout": RingLayout.build("striped", 149, 2, 8)}, "the layout is for 2 ranks but the ring has 1"),
        ({"layout": RingLayout.build("striped", 150, 1, 8)}, "build both from the same seq_len and block"),
        ({"q": torch.zeros(2, 149, 4, 8)}, "gives each rank 152"),
        ({"q": torch.zeros(2, 152, 3, 8)}, "q has batch 2, heads 3"),
        ({"k": torch.zeros(2, 152, 3, 8), "v": torch.zeros(2, 152, 3, 8)}, "num_kv_heads dividing 4"),
        ({"doc_start": torch.zeros(2, 149, dtype=torch.int64)}, r"expected this rank's shard \[2, 152\]"),
        ({"backend": "warp"}, "unknown attention backend 'warp'"),
        ({"q": torch.zeros(152, 4, 8)}, "q, k, v have 3, 4, 4 dimensions"),
        ({"scale": 0.0}, "scale .* must be above 0"),
    ],
)
def test_bad_calls_are_refused(change, message):
    layout = RingLayout.build("striped", 149, 1, 8)
    arguments = {"q": torch.zeros(2, 152, 4, 8), "k": torch.zeros(2, 152, 2, 8), "v": torch.zeros(2, 152, 2, 8)}
    arguments |= {"pattern": SparsePattern.dense(2, 4, 149, 8), "layout": layout} | change
    assert issubclass(MtrainError, ValueError)
    with pytest.raises(ValueError, match=message):
        run_ranks(lambda ring: ring_attention(ring=ring, **arguments))
