"""The CPU backend against the plain truth: out, lse, dq, dk, dv, over randomised patterns, views and dtypes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from sparse_kernels import ShardView, SparsePattern, sparse_attention
from sparse_kernels.cpu import CpuBackend, dense, flash, lists, selection
from sparse_kernels.reference_backend import ReferenceBackend
from sparse_kernels.view import block_positions
from tests.sparse_kernels.cpu_cases import (
    CPU,
    Case,
    assert_same,
    make_case,
    run_whole,
    truth_of,
)

TRUTH = ReferenceBackend()

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@pytest.fixture(params=["operator", "plain"])
def flash_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to compute a dense piece: torch's private operator, and plain torch where it is missing."""
    if request.param == "operator" and not flash.has_flash_operator():
        pytest.skip("this torch has no CPU flash operator that we can use")
    monkeypatch.setattr(flash, "has_flash_operator", lambda: request.param == "operator")
    return str(request.param)


CASES = [
    {"seq_len": 1, "block": 16},
    {"seq_len": 2, "block": 1, "columns": 1},
    {"seq_len": 97, "block": 16, "columns": 0},
    {"seq_len": 97, "block": 16, "columns": 1, "diagonals": 0},
    {"seq_len": 203, "block": 16, "columns": 63, "blocks": True},
    {"seq_len": 203, "block": 8, "columns": 64, "group": 4, "batch": 2},
    {"seq_len": 131, "block": 16, "columns": 65, "group": 7, "kv_heads": 1, "head_dim": 5},
    {"seq_len": 301, "block": 32, "columns": 40, "diagonals": 5, "blocks": True, "group": 4, "head_dim": 20},
    {"seq_len": 301, "block": 32, "full": True, "group": 4},
    {"seq_len": 96, "block": 16, "full": True, "batch": 2},
    {"seq_len": 150, "block": 16, "columns": 20, "documents": 0.03, "batch": 2},
    {"seq_len": 150, "block": 16, "columns": 20, "documents": 0.3, "group": 4, "blocks": True},
    {"seq_len": 65, "block": 16, "columns": 30, "documents": 1.0},
    {"seq_len": 150, "block": 8, "full": True, "documents": 0.05, "group": 7},
    {"seq_len": 150, "block": 64, "columns": 64, "documents": 0.02, "blocks": True},
]


@pytest.mark.parametrize("sizes", CASES, ids=lambda s: "-".join(f"{k[:4]}{v}" for k, v in s.items()))
def test_whole_sequence_matches_the_truth(sizes: dict, flash_path: str) -> None:
    case = make_case(3, **sizes)
    wanted = truth_of(case)
    assert_same(run_whole(case), wanted, 1e-10)
    assert_same(run_whole(case, torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_random_sizes(seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)

    def pick(*choices: int) -> int:
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    case = make_case(
        seed, seq_len=pick(1, 17, 63, 64, 65, 130, 255), block=pick(1, 4, 16, 64), batch=pick(1, 2), kv_heads=pick(1, 2, 3),
        group=pick(1, 4, 7), head_dim=pick(1, 3, 16), columns=pick(0, 1, 7, 63), diagonals=pick(0, 1, 3), blocks=bool(pick(0, 1)),
        documents=pick(0, 0, 1) * 0.1,
    )  # fmt: skip
    assert_same(run_whole(case), truth_of(case), 1e-10)


@pytest.mark.parametrize("documents", [0.0, 0.05])
def test_sharp_logits(documents: float, flash_path: str) -> None:
    case = make_case(5, 190, 16, columns=30, group=4, sharpness=30.0, documents=documents)
    wanted = truth_of(case)
    assert_same(run_whole(case), wanted, 1e-10)
    assert_same(run_whole(case, torch.float32), wanted, 5e-5)


@pytest.mark.parametrize("documents", [0.0, 0.05])
def test_several_panels_and_many_chunks(monkeypatch: pytest.MonkeyPatch, documents: float) -> None:
    """Limits so small that every way of cutting the work happens."""
    case = make_case(6, 230, 8, columns=40, group=4, blocks=True, documents=documents)
    wanted = truth_of(case)
    monkeypatch.setattr(lists, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(lists, "CALL_MACS", 0)
    monkeypatch.setattr(lists, "SELECTION_ENTRIES", 3000)
    monkeypatch.setattr(selection.Geometry, "token_budget", 500)
    assert_same(run_whole(case), wanted, 1e-10)


def sharded(case: Case, shards: list[Tensor], with_columns: bool) -> list[Tensor]:
    """[out, lse, dq, dk, dv] from views over shards of block ids, key shards carried one after the other, like a ring.

    ``with_columns``: the columns are gathered into views of their own, deduplicated per key-value head.
    """
    block = case.pattern.block
    found = [
        torch.zeros_like(case.q),
        None,
        torch.zeros_like(case.q),
        torch.zeros_like(case.k),
        torch.zeros_like(case.v),
    ]
    found[1] = torch.full((case.q.shape[0], case.q.shape[2], case.q.shape[1]), -torch.inf, dtype=torch.float64)
    total = case.q.shape[1]
    gathered = gather_columns(case)
    for q_blocks in shards:
        rows = block_positions(q_blocks, block)
        real = rows < total
        q, dout = (pad_rows(t, rows) for t in (case.q, case.dout))
        doc_start = None if case.doc_start is None else pad_rows(case.doc_start, rows)
        state, steps = None, []
        for k_blocks in shards:
            keys = block_positions(k_blocks, block)
            view = ShardView(
                case.pattern, q_blocks, k_blocks=k_blocks, inline_columns=not with_columns, doc_start=doc_start
            )
            steps.append((pad_rows(case.k, keys), pad_rows(case.v, keys), view, keys))
        if with_columns:
            view = ShardView(case.pattern, q_blocks, column_positions=gathered[0], doc_start=doc_start)
            steps.append((gathered[1], gathered[2], view, None))
        for k, v, view, _ in steps:
            state = CPU.forward(q, k, v, view, case.scale, state)
        assert state is not None
        found[0][:, rows[real]], found[1][:, :, rows[real]] = state[0][:, real], state[1][:, :, real]
        assert bool((state[0][:, ~real] == 0).all()) and bool((state[1][:, :, ~real] == -torch.inf).all())
        for k, v, view, keys in steps:
            dq, dk, dv = CPU.backward(dout, q, k, v, *state, view, case.scale)
            assert bool((dq[:, ~real] == 0).all())
            found[2][:, rows[real]] += dq[:, real]
            for total_grad, part in ((found[3], dk), (found[4], dv)):
                if keys is None:
                    scatter_columns(total_grad, part, gathered[0], case.pattern.seq_len)
                else:
                    inside = keys < total
                    assert bool((part[:, ~inside] == 0).all())
                    total_grad[:, keys[inside]] += part[:, inside]
    return found


def pad_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of x [B, S, ...]; rows beyond S hold junk, which must not matter."""
    junk = torch.full_like(x[:, :1], 7)
    return torch.cat([x, junk], 1)[:, rows.clamp(max=x.shape[1])]


def gather_columns(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """(positions [B, K, U], keys, values [B, U, K, D]): union of the columns of each key-value head, padded with seq_len."""
    batch, _, kv_heads, _ = case.k.shape
    size = case.pattern.seq_len
    assert case.pattern.columns is not None
    columns = case.pattern.columns.view(batch, kv_heads, -1).long()
    unions = [[columns[b, h].unique() for h in range(kv_heads)] for b in range(batch)]
    unions = [[u[u < size] for u in row] for row in unions]
    width = max(len(u) for row in unions for u in row) + 1
    padded = [[torch.nn.functional.pad(u, (0, width - len(u)), value=size) for u in row] for row in unions]
    positions = torch.stack([torch.stack(row) for row in padded])
    index = positions.clamp(max=size - 1).transpose(1, 2)[..., None].expand(-1, -1, -1, case.k.shape[3])
    return positions, case.k.gather(1, index), case.v.gather(1, index)


def scatter_columns(total: Tensor, part: Tensor, positions: Tensor, size: int) -> None:
    """Add the gradients of gathered column rows back to their places; padding rows must have none."""
    padding = (positions == size).transpose(1, 2)
    assert bool((part[padding] == 0).all())
    index = positions.clamp(max=size - 1).transpose(1, 2)[..., None].expand_as(part)
    total.scatter_add_(1, index, part)


SHARDED = [
    {"seq_len": 203, "block": 16, "columns": 30, "blocks": True},
    {"seq_len": 203, "block": 16, "columns": 30, "batch": 2, "group": 4, "documents": 0.05, "blocks": True},
    {"seq_len": 111, "block": 8, "columns": 0, "group": 7, "kv_heads": 1},
    {"seq_len": 111, "block": 8, "full": True, "group": 4},
    {"seq_len": 111, "block": 8, "full": True, "documents": 0.05},
]


@pytest.mark.parametrize("with_columns", [False, True], ids=["inline", "gathered"])
@pytest.mark.parametrize("placement", ["striped", "zigzag", "random", "uneven"])
@pytest.mark.parametrize("sizes", SHARDED, ids=lambda s: "-".join(f"{k[:4]}{v}" for k, v in s.items()))
def test_disjoint_views_add_up(sizes: dict, placement: str, with_columns: bool) -> None:
    """Any placement of blocks, padding ids included, any order of the key shards: the same answer as the whole."""
    case = make_case(11, **sizes)
    number = case.pattern.num_blocks
    ids = torch.arange(-(-number // 6) * 6)
    if placement == "striped":
        shards = [ids[r::3] for r in range(3)]
    elif placement == "zigzag":
        runs = ids.chunk(6)
        shards = [torch.cat([runs[r], runs[5 - r]]) for r in range(3)]
    elif placement == "random":
        shards = list(ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))].chunk(3))
    else:
        shards = [ids[:1], ids[1 : number - 1].flip(0), ids[number - 1 :]]
    assert_same(sharded(case, shards, with_columns), truth_of(case), 1e-10)


def test_keys_that_only_partly_overlap_the_queries() -> None:
    """A diagonal tile at another local place is listed with a causal bound instead of the causal call."""
    case = make_case(12, 90, 8, columns=20, blocks=True)
    q_blocks, k_blocks = torch.tensor([7, 2, 9]), torch.tensor([2, 7, 5, 1])
    rows, keys = block_positions(q_blocks, 8), block_positions(k_blocks, 8)
    view = ShardView(case.pattern, q_blocks, k_blocks=k_blocks, inline_columns=True)
    q, k, v, dout = case.q[:, rows], case.k[:, keys], case.v[:, keys], case.dout[:, rows]
    out, lse = TRUTH.forward(q, k, v, view, case.scale)
    wanted = [out, lse, *TRUTH.backward(dout, q, k, v, out, lse, view, case.scale)]
    out, lse = CPU.forward(q, k, v, view, case.scale)
    assert_same([out, lse, *CPU.backward(dout, q, k, v, out, lse, view, case.scale)], wanted, 1e-10)


def test_a_view_without_any_pair_changes_nothing() -> None:
    case = make_case(13, 64, 8, columns=0, diagonals=0)
    view = ShardView(case.pattern, torch.tensor([0, 1]), k_blocks=torch.tensor([4, 5]), inline_columns=True)
    q, k = case.q[:, :16], case.k[:, 32:48]
    carry = torch.randn(q.shape, dtype=torch.float64), torch.zeros(1, 2, 16, dtype=torch.float64)
    kept = carry[0].clone(), carry[1].clone()
    out, lse = CPU.forward(q, k, k, view, 1.0, carry)
    assert torch.equal(out, kept[0]) and torch.equal(lse, kept[1])
    assert torch.equal(carry[0], kept[0]) and out.data_ptr() != carry[0].data_ptr()
    grads = CPU.backward(q, q, k, k, out, lse, view, 1.0)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("against_itself", [True, False])
def test_a_shard_of_nothing_but_padding(full: bool, against_itself: bool) -> None:
    """A short sequence on many ranks leaves some of them without a real block (torch's operator would divide by zero)."""
    pattern = SparsePattern.dense(1, 2, 20, 8)
    if not full:
        pattern = SparsePattern(20, 8, diagonals=pattern.diagonals)
    view = ShardView(pattern, torch.tensor([4, 5]), k_blocks=torch.tensor([4, 5] if against_itself else [0, 1]))
    q, k, v, dout = torch.randn(4, 1, 16, 2, 8, dtype=torch.float64)
    out, lse = CpuBackend().forward(q, k, v, view, 0.3)
    assert not out.any() and bool((lse == -torch.inf).all())
    assert not any(grad.any() for grad in CpuBackend().backward(dout, q, k, v, out, lse, view, 0.3))


def test_rows_without_keys_anywhere() -> None:
    """No carry, no keys: out 0, lse -inf, and gradients exactly zero when that lse comes back."""
    case = make_case(14, 64, 8, columns=12, documents=0.2)
    view = ShardView(case.pattern, case.every, column_positions=gather_columns(case)[0], doc_start=case.doc_start)
    _, k, v = gather_columns(case)
    out, lse = CPU.forward(case.q, k, v, view, case.scale)
    empty = ~view.mask().any(-1)
    assert bool(empty.any()) and not bool(empty.all())
    assert torch.equal(lse == -torch.inf, empty)
    assert bool((out.transpose(1, 2)[empty] == 0).all())
    dq, _, _ = CPU.backward(case.dout, case.q, k, v, out, lse, view, case.scale)
    assert bool((dq.transpose(1, 2)[empty] == 0).all()) and not bool(dq.isnan().any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_accumulate_in_float32(dtype: torch.dtype) -> None:
    case = make_case(15, 203, 16, columns=30, group=4)
    rounded = [t.to(dtype) for t in (case.q, case.k, case.v, case.dout)]
    view = case.whole()
    out, lse = CPU.forward(*rounded[:3], view, case.scale)
    assert out.dtype == lse.dtype == torch.float32
    grads = CPU.backward(rounded[3], *rounded[:3], out, lse, view, case.scale)
    case.q, case.k, case.v, case.dout = (t.double() for t in rounded)
    # Against the truth on the same rounded inputs only float32 rounding is left.
    assert_same([out, lse, *grads], truth_of(case), 1e-5)


@pytest.mark.parametrize("sizes", [CASES[5], CASES[11], CASES[8]], ids=["columns", "documents", "full"])
def test_two_runs_are_bitwise_equal(sizes: dict) -> None:
    case = make_case(16, **sizes)
    first, second = run_whole(case, torch.float32), run_whole(case, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_keys_outside_the_pattern_are_not_read() -> None:
    """NaN in keys and values that no query selects stays there: the lists skip them instead of multiplying by zero."""
    case = make_case(17, 160, 16, columns=3, diagonals=2)
    view = ShardView(case.pattern, torch.tensor([9]), k_blocks=case.every, inline_columns=True)
    unread = ~view.mask().any(2)  # [B, H, keys], one query head per key-value head
    assert bool(unread.any(-1).all())
    q, dout = case.q[:, 144:], case.dout[:, 144:]
    wanted = CPU.forward(q, case.k, case.v, view, case.scale)
    grads = CPU.backward(dout, q, case.k, case.v, *wanted, view, case.scale)
    k, v = (t.masked_fill(unread.transpose(1, 2)[..., None], torch.nan) for t in (case.k, case.v))
    found = CPU.forward(q, k, v, view, case.scale)
    again = CPU.backward(dout, q, k, v, *found, view, case.scale)
    assert all(torch.equal(a, b) for a, b in zip((*found, *again), (*wanted, *grads), strict=True))


def list_lengths(plan: lists.ListPlan) -> int:
    """Entries of all lists, padding left out."""
    return sum(c.rows.numel() if c.lengths is None else int(c.lengths.sum()) for c in plan.chunks())


@pytest.mark.parametrize("documents", [False, True])
def test_work_follows_the_pattern(documents: bool) -> None:
    """The lists hold exactly the keys that the last query of each block selects before the block; padding is cheaper
    than a call."""
    case = make_case(18, 2000, 16, columns=100, diagonals=6, group=4)
    starts = torch.arange(2000).div(496, rounding_mode="floor").mul(496).expand(1, -1) if documents else None
    view = ShardView(case.pattern, case.every, k_blocks=case.every, inline_columns=True, doc_start=starts)
    plan = lists.ListPlan(view, selection.Geometry(1, 8, 2, 64, 2000, 125, 16, 4))
    ends = torch.arange(15, 2000, 16)
    before = torch.arange(2000) < ends[:, None] - 15
    selected = int((view.mask()[:, :, ends] & before).sum())
    assert list_lengths(plan) == selected
    for chunk in plan.chunks():
        padding = 0 if chunk.lengths is None else int((chunk.rows.shape[1] - chunk.lengths).sum())
        assert padding * 16 * 64 <= lists.CALL_MACS


def test_backward_reuses_the_lists_of_the_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(19, 203, 16, columns=30)
    view = case.whole()
    calls = []
    original = lists.select

    def counted(*args: object, **kwargs: object) -> selection.Selection:
        calls.append(args)
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(lists, "select", counted)
    out, lse = CPU.forward(case.q, case.k, case.v, view, case.scale)
    CPU.backward(case.dout, case.q, case.k, case.v, out, lse, view, case.scale)
    assert len(calls) == 1
    # Lists of another geometry are not mistaken for these.
    CPU.forward(case.q.float(), case.k.float(), case.v.float(), view, case.scale)
    assert len(calls) == 2


def test_lists_die_with_their_view() -> None:
    """No reference cycle: the index is freed when the autograd graph lets the view go."""
    case = make_case(19, 203, 16, columns=30)
    view = case.whole()
    CPU.forward(case.q, case.k, case.v, view, case.scale)
    watched = weakref.ref(view.__dict__["_cpu_chunks"][1][0].rows)
    gc.disable()
    try:
        del view
        assert watched() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("visible", "start"),
    [([0, 0, 0], 0), ([3, 3, 3], 0), ([0, 1, 2, 3, 4], 0), ([1, 1, 4, 9], 0), ([5], 0), ([2, 2, 7], 1)],
)
def test_rectangles_cover_each_pair_once(visible: list[int], start: int) -> None:
    seen = torch.zeros(len(visible), max(visible) + 1, dtype=torch.int64)
    for low, high, first, last in dense.rectangles(visible, 0, len(visible), start):
        seen[low:high, first:last] += 1
    key = torch.arange(max(visible) + 1)
    assert torch.equal(seen, ((key >= start) & (key < torch.tensor(visible)[:, None])).long())


def test_full_pattern_is_one_causal_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = dense.flash_forward

    def counted(*args: object) -> tuple[Tensor, Tensor]:
        calls.append(args[4])
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(dense, "flash_forward", counted)
    case = make_case(20, 203, 16, full=True)
    CPU.forward(case.q, case.k, case.v, case.whole(), case.scale)
    assert calls == [True]
    calls.clear()
    rows = case.q[:, 64:96]
    view = ShardView(case.pattern, torch.tensor([4, 5]), k_blocks=torch.tensor([0, 1, 3]))
    CPU.forward(rows, case.k[:, :48], case.v[:, :48], view, case.scale)
    assert calls == [False]
    calls.clear()
    case = make_case(21, 203, 16, full=True, documents=0.02)
    assert case.doc_start is not None
    CPU.forward(case.q, case.k, case.v, case.whole(), case.scale)
    assert calls == [True] * int(case.doc_start[0, :203].unique().numel()), "a triangle per document, nothing gathered"


def test_flash_paths_agree_on_final_statistics(flash_path: str) -> None:
    """The piecewise gradient identity that rings rely on: halves of the keys with the final out and lse add up."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 3, 150, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    scores = leaves[0] @ leaves[1].transpose(2, 3) * 0.3
    out, lse = torch.softmax(scores, -1) @ leaves[2], torch.logsumexp(scores, -1)
    wanted = torch.autograd.grad(out, leaves, dout)
    final = out.detach(), lse.detach()
    halves = [
        flash.flash_backward(dout, q, k[:, :, s], v[:, :, s], *final, None, False, 0.3)
        for s in (slice(70), slice(70, 150))
    ]
    found = (halves[0][0] + halves[1][0], *(torch.cat(pair, 2) for pair in zip(*(h[1:] for h in halves), strict=True)))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_autograd(dtype: torch.dtype) -> None:
    """`sparse_attention` gives gradients in the dtype of its inputs, equal to the reference backend's."""
    case = make_case(21, 150, 16, columns=20, group=4, documents=0.03)
    size = case.pattern.seq_len
    doc_start = None if case.doc_start is None else case.doc_start[:, :size]
    results = []
    for backend in ("cpu", "reference"):
        leaves = [t[:, :size].to(dtype).requires_grad_() for t in (case.q, case.k, case.v)]
        out = sparse_attention(*leaves, case.pattern, doc_start=doc_start, backend=backend)
        assert isinstance(out, Tensor) and out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, leaves, case.dout[:, :size].to(dtype))])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip(*results, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_unusable_says_why() -> None:
    assert CPU.unusable(torch.device("cpu"), torch.float32, 64) is None
    assert "cuda" in str(CPU.unusable(torch.device("cuda"), torch.float32, 64))
    assert "int32" in str(CPU.unusable(torch.device("cpu"), torch.int32, 64))


def test_wrong_length_is_an_error_for_people() -> None:
    case = make_case(22, 64, 16)
    with pytest.raises(ValueError, match="pad q to whole blocks"):
        CPU.forward(case.q[:, :50], case.k, case.v, case.whole(), 1.0)
