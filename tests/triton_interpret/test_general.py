"""The general block-sparse kernels in the interpreter: out, lse, dq, dk, dv against the dense truth, and their lists."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from sparse_kernels import ShardView, SparsePattern, reference_attention
from sparse_kernels.gpu import general
from sparse_kernels.gpu.config import Tile
from sparse_kernels.gpu.lists import index_of
from sparse_kernels.pattern import pad_doc_start
from sparse_kernels.reference_backend import ReferenceBackend
from sparse_kernels.view import block_positions
from tests.sparse_kernels.test_cpu_backend import Case, make_case, truth_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TRUTH = ReferenceBackend()
NAMES = ("out", "lse", "dq", "dk", "dv")


def run(case: Case, view: ShardView | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """[out, lse, dq, dk, dv] of the general kernels on one view (default: everything)."""
    q, k, v, dout = (t.to(dtype) for t in (case.q, case.k, case.v, case.dout))
    view = case.whole() if view is None else view
    out, lse = general.forward(q, k, v, view, case.scale)
    return [out, lse, *general.backward(dout, q, k, v, out, lse, view, case.scale)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    """Equal within ``tolerance`` times the largest wanted value (at least 1), and -inf at the same places."""
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        assert a.dtype == torch.float32 and a.shape == b.shape, name
        empty = b == -torch.inf
        assert torch.equal(a == -torch.inf, empty), f"{name}: other rows are empty"
        a, b = a.double().masked_fill(empty, 0), b.double().masked_fill(empty, 0)
        error = float((a - b).abs().max()) if a.numel() else 0.0
        assert error <= tolerance * max(1.0, float(b.abs().max()) if b.numel() else 0.0), f"{name}: {error}"


@pytest.mark.parametrize(
    ("seq_len", "block", "options"),
    [
        (150, 32, {"blocks": True}),
        (150, 32, {"blocks": True, "columns": 65, "documents": 0.05, "kv_heads": 1, "group": 4}),
        (60, 16, {"blocks": True, "columns": 1, "kv_heads": 1, "group": 7, "head_dim": 16}),
        (130, 64, {"blocks": True, "columns": 63, "batch": 2, "kv_heads": 1, "documents": 0.3, "head_dim": 64}),
        (300, 128, {"blocks": True, "columns": 64, "kv_heads": 1, "head_dim": 96}),
        (200, 64, {"blocks": True, "columns": 0, "sharpness": 30.0, "documents": 0.02, "head_dim": 128}),
        (150, 32, {"blocks": True, "columns": 20, "sharpness": 30.0}),
        (160, 32, {"columns": 33, "diagonals": 3}),
        (5, 16, {"columns": 2, "diagonals": 0}),
        (100, 32, {"full": True}),
    ],
)  # fmt: skip
def test_agrees_with_the_truth(seq_len: int, block: int, options: dict) -> None:
    case = make_case(seq_len + block, seq_len, block, **{"head_dim": 32, **options})
    assert_same(run(case), truth_of(case), 2e-5 if options.get("sharpness") else 4e-6)


@pytest.mark.parametrize(("rows", "keys"), [(16, 32), (32, 16)])
def test_tiles_that_are_not_square(rows: int, keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs get: several tiles per block, fewer query rows than keys or the other way round."""
    monkeypatch.setattr(general, "INTERPRETER_TILE", Tile(rows, keys, 4, 1))
    case = make_case(7, 120, 32, blocks=True, columns=20, documents=0.03, kv_heads=1, group=2, head_dim=16)
    assert_same(run(case), truth_of(case), 4e-6)


def test_long_lists_of_columns_are_computed_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general, "INTERPRETER_TILE", Tile(32, 16, 4, 1))
    monkeypatch.setattr(general, "PARTIAL_BYTES", 20 * 2 * 2 * 16 * 4)  # 20 columns of two heads: one tile of 16
    case = make_case(7, 120, 32, blocks=True, columns=45, kv_heads=1, group=2, head_dim=16)
    assert_same(run(case), truth_of(case), 4e-6)


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_inputs_lose_no_more_than_their_rounding(dtype: torch.dtype, epsilon: float) -> None:
    case = make_case(3, 170, 64, blocks=True, columns=40, group=2, kv_heads=1, head_dim=64)
    for name in ("q", "k", "v", "dout"):
        setattr(case, name, getattr(case, name).to(dtype).double())  # what is left are the roundings inside
    assert_same(run(case, dtype=dtype), truth_of(case), 4 * epsilon)


def test_head_stride_layout_is_read_in_place() -> None:
    """Models hand over [B, heads, S, D] seen as [B, S, heads, D]."""
    case = make_case(5, 64, 32, blocks=True, columns=9, group=2, kv_heads=1, head_dim=32, batch=2)
    plain = run(case)
    for name in ("q", "k", "v", "dout"):
        setattr(case, name, getattr(case, name).transpose(1, 2).contiguous().transpose(1, 2))
    assert all(torch.equal(a, b) for a, b in zip(run(case), plain, strict=True))


def shard(case: Case, blocks: Tensor) -> Tensor:
    """Rows of whole blocks; ids beyond the sequence are padding and read any row."""
    return block_positions(blocks, case.pattern.block).clamp(max=case.q.shape[1] - 1)


def documents_of(case: Case, rows: Tensor) -> Tensor | None:
    return None if case.doc_start is None else case.doc_start[:, rows]


def gathered_positions(case: Case) -> Tensor:
    """int64 [B, K, U]: per key-value head the columns of its query heads, each once, padded with seq_len."""
    pattern, kv_heads = case.pattern, case.k.shape[2]
    table = torch.zeros(pattern.batch, kv_heads, pattern.seq_len + 1, dtype=torch.bool)
    table.scatter_(2, pattern.columns.long().view(pattern.batch, kv_heads, -1), True)
    width = int(table[..., :-1].sum(2).max())
    every = torch.arange(pattern.seq_len).expand(pattern.batch, kv_heads, -1)
    return torch.where(table[..., :-1], every, pattern.seq_len).sort(2).values[..., :width]


@pytest.mark.parametrize("documents", [0.0, 0.04])
def test_any_placement_and_carry_add_up(documents: float) -> None:
    """Shuffled query blocks, padding blocks, three shuffled key shards and gathered columns, of a pattern that holds the single
    blocks of these queries only: together the exact answer."""
    case = make_case(11, 250, 32, blocks=True, columns=30, group=1, kv_heads=2, head_dim=32, documents=documents)
    generator = torch.Generator().manual_seed(4)
    number = case.pattern.num_blocks
    queries = torch.cat([torch.randperm(number, generator=generator)[:5], torch.tensor([number, number + 3])])
    keys = torch.randperm(number + 2, generator=generator).chunk(3)
    rows = shard(case, queries)
    q, dout = case.q[:, rows].float(), case.dout[:, rows].float()
    positions = gathered_positions(case)
    at = positions.clamp(max=case.pattern.seq_len - 1).transpose(1, 2)[..., None].expand(-1, -1, -1, 32)
    doc_start = documents_of(case, rows)
    mine = case.pattern.for_queries(queries)
    views = [ShardView(mine, queries, column_positions=positions, doc_start=doc_start)]
    inputs = [(case.k.gather(1, at).float(), case.v.gather(1, at).float())]
    for blocks in keys:
        views.append(ShardView(mine, queries, k_blocks=blocks, doc_start=doc_start))
        inputs.append((case.k[:, shard(case, blocks)].float(), case.v[:, shard(case, blocks)].float()))
    state = None
    for view, (k, v) in zip(views, inputs, strict=True):
        state = general.forward(q, k, v, view, case.scale, state)
    out, lse = state
    every = ShardView(case.pattern, queries, k_blocks=case.every, inline_columns=True, doc_start=doc_start)
    truth = reference_attention(q.double(), case.k, case.v, every.mask(), scale=case.scale)
    wanted = TRUTH.backward(dout.double(), q.double(), case.k, case.v, *truth, every, case.scale)
    parts = [
        general.backward(dout, q, k, v, out, lse, view, case.scale) for view, (k, v) in zip(views, inputs, strict=True)
    ]
    dk, dv = torch.zeros(case.k.shape), torch.zeros(case.v.shape)
    dk.scatter_add_(1, at, parts[0][1]), dv.scatter_add_(1, at, parts[0][2])
    for blocks, part in zip(keys, parts[1:], strict=True):
        real = (blocks < number).repeat_interleave(32)
        assert not part[1][:, ~real].any() and not part[2][:, ~real].any()
        dk[:, shard(case, blocks)[real]] += part[1][:, real]
        dv[:, shard(case, blocks)[real]] += part[2][:, real]
    assert_same([out, lse, sum(p[0] for p in parts), dk, dv], [*truth, *wanted], 1e-5)


def test_a_shard_without_keys_changes_nothing() -> None:
    case = make_case(2, 128, 32, blocks=True, columns=8, head_dim=32)
    q, k, v = (case.q[:, :64].float(), case.k[:, 64:].float(), case.v[:, 64:].float())
    view = ShardView(case.pattern, torch.tensor([0, 1]), k_blocks=torch.tensor([2, 3]), inline_columns=True)
    out, lse = general.forward(q, k, v, view, case.scale)
    assert not out.any() and bool((lse == -torch.inf).all())
    carry = (torch.randn(q.shape), torch.randn(lse.shape))
    kept = general.forward(q, k, v, view, case.scale, carry)
    assert torch.equal(kept[0], carry[0]) and torch.allclose(kept[1], carry[1], rtol=1e-6, atol=1e-6)
    assert not any(part.any() for part in general.backward(case.dout[:, :64].float(), q, k, v, *kept, view, case.scale))


@pytest.mark.parametrize("documents", [0.0, 0.02])
def test_lists_hold_the_tiles_of_the_mask(documents: float) -> None:
    case = make_case(8, 400, 16, blocks=True, columns=3, diagonals=4, batch=2, group=2, documents=documents)
    generator = torch.Generator().manual_seed(1)
    number = case.pattern.num_blocks
    queries, keys = (torch.randperm(number + 4, generator=generator)[:15] for _ in range(2))
    held = torch.cat(
        [queries.flip(0), torch.arange(number + 4, number + 6)]
    )  # the rows in another order than the queries
    mine = case.pattern.for_queries(held)
    view = ShardView(mine, queries, k_blocks=keys, doc_start=documents_of(case, shard(case, queries)))
    index = index_of(view, torch.device("cpu"))
    rows, cols = index.tiles(by_column=False), index.tiles(by_column=True)
    mask = view.mask().unflatten(2, (-1, 16)).unflatten(4, (-1, 16)).any(5).any(3)  # tiles that hold a pair
    chosen = case.pattern.block_mask(queries, keys)
    for lists, needed, allowed in ((rows, mask, chosen), (cols, mask.mT, chosen.mT)):
        for b in range(2):
            for h in range(case.pattern.heads):
                for own in range(15):
                    start, count = int(lists.start[own]), int(lists.count[b, h, own])
                    entries = lists.entries[b, h, start : start + count].tolist()
                    assert entries == sorted(set(entries))
                    diagonal = int(lists.diagonal[own])
                    found = {*entries, diagonal} - {-1}
                    assert set(needed[b, h, own].nonzero().flatten().tolist()) <= found
                    if not documents:
                        assert found == set(allowed[b, h, own].nonzero().flatten().tolist())
                    assert diagonal not in entries


def test_rows_far_apart_in_memory_are_addressed_with_64_bits() -> None:
    """Row 128 lies 2^31 elements behind row 0, as at 524,288 tokens of 4096 numbers."""
    case = make_case(6, 160, 64, blocks=True, columns=6, kv_heads=1, head_dim=16)
    wanted = run(case, dtype=torch.float16)
    for name in ("q", "k", "v", "dout"):
        tensor = getattr(case, name).half()
        room = torch.from_numpy(numpy.zeros(192 << 24, dtype=numpy.float16))  # pages nobody touches take no memory
        far = room.as_strided(tensor.shape, (0, 1 << 24, 16, 1))
        far.copy_(tensor)
        setattr(case, name, far)
    assert all(torch.equal(a, b) for a, b in zip(run(case, dtype=torch.float16), wanted, strict=True))


def test_bad_input_is_named() -> None:
    case = make_case(1, 64, 32, head_dim=16)
    with pytest.raises(ValueError, match="positive scale"):
        general.forward(case.q, case.k, case.v, case.whole(), -1.0)
    with pytest.raises(ValueError, match="whole blocks"):
        general.forward(case.q[:, :40], case.k, case.v, case.whole(), 1.0)
    odd = SparsePattern.dense(1, 2, 60, 20)
    view = ShardView(odd, torch.arange(3), k_blocks=torch.arange(3), doc_start=pad_doc_start(None, odd))
    with pytest.raises(ValueError, match="power of two"):
        general.forward(case.q[:, :60], case.k[:, :60], case.v[:, :60], view, 1.0)
