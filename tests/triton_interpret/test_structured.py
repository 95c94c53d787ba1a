"""The structured kernels in the interpreter: out, lse, dq, dk, dv against the dense truth, for every kind of view."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_kernels import ShardView, SparsePattern, sparse_attention
from sparse_kernels.backends import resolve_backend
from sparse_kernels.gpu import TritonBackend, general, launch
from sparse_kernels.gpu import index as index_module
from sparse_kernels.gpu.config import Tile
from sparse_kernels.gpu.index import DeviceIndex
from sparse_kernels.reference_backend import ReferenceBackend
from sparse_kernels.view import block_positions
from tests.sparse_kernels import test_cpu_backend as shared
from tests.sparse_kernels.test_cpu_backend import Case, gather_columns, make_case, truth_of

pytestmark = pytest.mark.usefixtures("poisoned_empty")

TRITON, TRUTH = TritonBackend(), ReferenceBackend()
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step costs the interpreter the same whatever the tile; the tests that cut blocks into tiles choose their own."""
    monkeypatch.setattr(launch, "tile_for", lambda kernel, major, head_dim, itemsize, block: Tile(block, block, 4, 2))


class InFloat64(TritonBackend):
    """Takes and returns float64, computes in float32, for helpers that collect in the dtype of the case."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(q.float(), k.float(), v.float(), *rest)
        return out.double(), lse.double()

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = super().backward(dout.float(), q.float(), k.float(), v.float(), *rest)
        return dq.double(), dk.double(), dv.double()


def run(case: Case, view: ShardView | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """[out, lse, dq, dk, dv] of the kernels on one view (default: everything)."""
    q, k, v, dout = (t.to(dtype) for t in (case.q, case.k, case.v, case.dout))
    view = case.whole() if view is None else view
    out, lse = TRITON.forward(q, k, v, view, case.scale)
    return [out, lse, *TRITON.backward(dout, q, k, v, out, lse, view, case.scale)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float = 4e-6) -> None:
    """Equal within ``tolerance`` times the largest wanted value (at least 1), and -inf at the same places."""
    for name, a, b in zip(NAMES, found, wanted, strict=True):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} has NaN"
        empty = b == -torch.inf
        assert torch.equal(a == -torch.inf, empty), f"{name}: other rows are empty"
        a, b = a.double().masked_fill(empty, 0), b.double().masked_fill(empty, 0)
        error = float((a - b).abs().max())
        assert error <= tolerance * max(1.0, float(b.abs().max())), f"{name} is off by {error:.2e}"


@pytest.mark.parametrize(
    ("seq_len", "block", "options"),
    [
        (1, 16, {"columns": 1, "diagonals": 0}),
        (97, 16, {"columns": 0}),
        (97, 32, {"columns": 1, "diagonals": 0, "group": 4, "kv_heads": 1}),
        (200, 64, {"columns": 63, "kv_heads": 1, "group": 2, "head_dim": 64}),
        (200, 64, {"columns": 64, "kv_heads": 1, "group": 4, "head_dim": 128}),
        (200, 64, {"columns": 65, "kv_heads": 1, "group": 7}),
        (300, 128, {"columns": 65, "kv_heads": 1, "group": 2, "head_dim": 96}),
        (203, 32, {"columns": 40, "batch": 2, "kv_heads": 1, "documents": 0.03, "diagonals": 4}),
        (150, 32, {"columns": 20, "documents": 0.3, "group": 4, "kv_heads": 1}),
        (65, 16, {"columns": 30, "documents": 1.0}),
        (203, 64, {"columns": 50, "sharpness": 30.0}),
        (203, 64, {"columns": 50, "sharpness": 30.0, "documents": 0.03}),
        (130, 32, {"full": True, "group": 2, "kv_heads": 1}),
        (130, 32, {"full": True, "documents": 0.05}),
        (60, 32, {"columns": 9, "group": 2, "kv_heads": 1, "head_dim": 256}),
    ],
    ids=lambda x: "-".join(f"{k[:4]}{v}" for k, v in x.items()) if isinstance(x, dict) else str(x),
)
def test_whole_sequence_matches_the_truth(seq_len: int, block: int, options: dict) -> None:
    case = make_case(seq_len + block, seq_len, block, **{"head_dim": 16, **options})
    assert_same(run(case), truth_of(case), 3e-5 if "sharpness" in options else 4e-6)


@pytest.mark.parametrize("tile", [(16, 32), (32, 16), (64, 16)], ids=str)
@pytest.mark.parametrize("documents", [0.0, 0.02], ids=["one", "documents"])
def test_blocks_cut_into_tiles(tile: tuple[int, int], documents: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "tile_for", lambda *_: Tile(*tile, 4, 2))
    case = make_case(10, 190, 64, columns=35, kv_heads=1, group=2, documents=documents, head_dim=16)
    assert_same(run(case), truth_of(case))


@pytest.mark.parametrize(
    ("placement", "documents", "with_columns"),
    [
        ("striped", 0.0, False),
        ("striped", 0.05, True),
        ("zigzag", 0.0, True),
        ("zigzag", 0.05, False),
        ("random", 0.05, True),
        ("random", 0.05, False),
        ("uneven", 0.0, True),
        ("uneven", 0.05, False),
    ],
)
def test_disjoint_views_add_up(
    placement: str, documents: float, with_columns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like a ring: state carried from shard to shard, padding blocks with junk, progressions and arbitrary placements."""
    case = make_case(11, 300, 32, columns=30, kv_heads=1, group=2, documents=documents, diagonals=4, head_dim=16)
    ids = torch.arange(12)
    if placement == "striped":
        shards = [ids[r::3] for r in range(3)]
    elif placement == "zigzag":
        runs = ids.chunk(6)
        shards = [torch.cat([runs[r], runs[5 - r]]) for r in range(3)]
    elif placement == "random":
        shards = list(ids[torch.randperm(12, generator=torch.Generator().manual_seed(0))].chunk(3))
    else:
        shards = [ids[:1], ids[1:8].flip(0), ids[8:]]
    monkeypatch.setattr(shared, "CPU", InFloat64())
    assert_same(shared.sharded(case, shards, with_columns), truth_of(case))


def test_placements_use_the_index_that_fits() -> None:
    """Progressions share one list of offsets; only other placements pay for lists per block."""
    case = make_case(12, 203, 16, head_dim=16)
    stripes, mixed = torch.arange(1, 13, 3), torch.tensor([1, 5, 2, 9])
    for keys, listed in ((stripes, False), (stripes - 1, False), (torch.arange(4), True), (mixed, True)):
        index = DeviceIndex(ShardView(case.pattern, stripes, k_blocks=keys), torch.device("cpu"))
        assert all(index.tiles(by_key=by_key).listed == listed for by_key in (False, True))


@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_a_view_and_its_index_die_with_the_last_reference(backend: str) -> None:
    """A cycle would keep the index of every layer and ring step on the device until the garbage collector runs."""
    case = make_case(12, 64, 16, head_dim=64)
    view = case.whole()
    q, k, v = (t.float() for t in (case.q, case.k, case.v))
    alive = weakref.ref(view)
    gc.disable()
    try:
        resolve_backend(backend, "cpu", q.dtype, q.shape[3]).forward(q, k, v, view, case.scale)
        del view
        assert alive() is None
    finally:
        gc.enable()


def test_index_holds_every_tile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiles of both directions are exactly those of the pattern, documents included; none is visited for nothing."""
    monkeypatch.setattr(index_module, "TILE_SCAN", 4)  # several looks at the diagonals of a head
    case = make_case(13, 300, 16, columns=0, diagonals=7, documents=0.02, batch=2, head_dim=16)
    every = case.every
    shuffled = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))]
    for q_ids, k_ids in ((every, every), (every[2::3], every[1::3]), (shuffled, every), (shuffled, shuffled.flip(0))):
        doc_start = case.doc_start[:, block_positions(q_ids, 16)]
        view = ShardView(case.pattern, q_ids, k_blocks=k_ids, doc_start=doc_start)
        mask = view.mask().unflatten(2, (-1, 16)).unflatten(4, (-1, 16))
        some, whole = mask.any(5).any(3), mask.all(5).all(3)
        index = DeviceIndex(view, torch.device("cpu"))
        for sign, swap in ((-1, False), (1, True)):
            tiles = index.tiles(by_key=swap)
            visited, unmasked = torch.zeros_like(some), torch.zeros_like(some)
            for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in tiles.bounds.shape[:3])).tolist():
                low, diagonal_end, clean_end, high = tiles.bounds[b, h, i].tolist()
                for place in range(low, high):
                    entry = int(tiles.entries[b, h, i, place] if tiles.listed else tiles.entries[b, h, place])
                    other = entry if tiles.listed else i + sign * entry
                    where = (b, h, other, i) if swap else (b, h, i, other)
                    assert not visited[where]
                    visited[where] = True
                    unmasked[where] = diagonal_end <= place < clean_end
                    one, two = (k_ids[i], q_ids[other]) if swap else (q_ids[i], k_ids[other])
                    assert (place < diagonal_end) == bool(one == two)
            real = (q_ids < case.pattern.num_blocks)[:, None]
            assert torch.equal(visited & real, some)
            # The last block is cut by the end of the sequence, so its rows never all see a tile.
            assert bool((~unmasked | whole | (q_ids[:, None] == case.pattern.num_blocks - 1)).all())


def test_a_view_without_any_pair_changes_nothing() -> None:
    case = make_case(14, 64, 16, columns=0, diagonals=0, head_dim=16)
    view = ShardView(case.pattern, torch.tensor([0, 1]), k_blocks=torch.tensor([2, 3]), inline_columns=True)
    q, k = case.q[:, :32].float(), case.k[:, 32:].float()
    carry = torch.randn(q.shape), torch.randn(1, 2, 32)
    kept = carry[0].clone(), carry[1].clone()
    out, lse = TRITON.forward(q, k, k, view, 1.0, carry)
    assert torch.equal(out, kept[0]) and torch.equal(lse, kept[1])
    assert torch.equal(carry[0], kept[0]) and out.data_ptr() != carry[0].data_ptr()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in TRITON.backward(q, q, k, k, out, lse, view, 1.0))


@pytest.mark.parametrize("empty", ["queries", "keys", "columns"])
def test_empty_shards(empty: str) -> None:
    """A shard without blocks, or a store without columns: nothing changes, shapes are kept."""
    case = make_case(14, 64, 16, columns=3, head_dim=16)
    nothing, some = torch.arange(0), torch.arange(2)
    q_blocks = nothing if empty == "queries" else some
    if empty == "columns":
        view = ShardView(case.pattern, q_blocks, column_positions=torch.zeros(1, 2, 0, dtype=torch.int64))
    else:
        view = ShardView(case.pattern, q_blocks, k_blocks=some if empty == "queries" else nothing, inline_columns=True)
    q, k = case.q[:, : len(q_blocks) * 16].float(), case.k[:, : 32 if empty == "queries" else 0].float()
    out, lse = TRITON.forward(q, k, k, view, 1.0)
    assert out.shape == q.shape and bool((out == 0).all()) and bool((lse == -torch.inf).all())
    carried = TRITON.forward(q, k, k, view, 1.0, (q, torch.ones_like(lse)))
    assert torch.equal(carried[0], q) and bool((carried[1] == 1).all())
    dq, dk, dv = TRITON.backward(q, q, k, k, out, lse, view, 1.0)
    assert dq.shape == q.shape and dk.shape == dv.shape == k.shape and not dq.any() and not dk.any() and not dv.any()


def test_the_index_never_reads_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built on the meta device, where there is nothing to read."""
    monkeypatch.setattr(index_module, "start", lambda *_, **__: None)
    pattern = make_case(13, 300, 16, columns=40, diagonals=7, head_dim=16).pattern.to("meta")
    stripes, mixed = torch.arange(1, 19, 3), torch.tensor([1, 5, 2, 9, 30, 0])
    start, held = (
        torch.zeros(1, 96, dtype=torch.int64, device="meta"),
        torch.zeros(1, 2, 50, dtype=torch.int64, device="meta"),
    )
    for keys in ({"k_blocks": stripes}, {"k_blocks": mixed}, {"column_positions": held}):
        for doc_start in (None, start):
            view = ShardView(pattern, stripes, **keys, inline_columns="k_blocks" in keys, doc_start=doc_start)
            index = DeviceIndex.of(view, torch.device("meta"))
            assert index.columns.ranges.is_meta and index.column_tile_ranges(64).shape == (1, 2, 1, 2)
            if "k_blocks" in keys:
                assert all(index.tiles(by_key=by_key).bounds.shape == (1, 2, 6, 4) for by_key in (False, True))


def index_bytes(index: DeviceIndex) -> tuple[int, int]:
    """(held between kernels, made for one kernel), the pattern's own tensors excepted."""
    largest = 0
    for by_key in (False, True):
        tiles = index.tiles(by_key=by_key)
        made = [tiles.bounds] + ([tiles.entries] if tiles.listed else [])
        largest = max(largest, sum(t.numel() * t.element_size() for t in made))
    own = [*vars(index).values(), *index._slot_of.values()]
    held = {id(t): t for t in own if isinstance(t, Tensor) and t.is_meta and t is not index.pattern.diagonals}
    return sum(t.numel() * t.element_size() for t in held.values()), largest


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize("placement", ["striped", "zigzag", "balanced", "gathered"])
@pytest.mark.parametrize("ranks", [8, 32])
@pytest.mark.parametrize("seq_len", [1 << 17, 1 << 19])
def test_the_index_of_a_ring_step_is_small(
    seq_len: int, ranks: int, placement: str, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against K and V of a shard (bf16, 8 heads of 128; 32 query heads of 200 diagonals, blocks of 64): what a view keeps until the
    backward, and what lives only while one kernel runs."""
    monkeypatch.setattr(index_module, "start", lambda *_, **__: None)
    number = seq_len // 64
    ids = torch.arange(number)
    shards = [ids[r::ranks] for r in range(ranks)]
    if placement == "gathered":
        shards[0] = torch.cat(shards)
    elif placement == "zigzag":
        runs = ids.chunk(2 * ranks)
        shards = [torch.cat([runs[r], runs[2 * ranks - 1 - r]]) for r in range(ranks)]
    elif placement == "balanced":
        shards = list(torch.randperm(number, generator=torch.Generator().manual_seed(0)).chunk(ranks))
    diagonals = torch.zeros(1, 32, 200, dtype=torch.int32, device="meta")
    doc_start = torch.zeros(1, seq_len // ranks, dtype=torch.int64, device="meta") if documents else None
    view = ShardView(
        SparsePattern(seq_len, 64, diagonals=diagonals), shards[1], k_blocks=shards[0], doc_start=doc_start
    )
    held, transient = index_bytes(DeviceIndex.of(view, torch.device("meta")))
    keys = 2 * 2 * len(shards[0]) * 64 * 8 * 128
    assert held <= 0.01 * keys
    assert transient <= (0.002 if placement == "striped" else 0.051) * keys


def test_rows_without_keys_anywhere() -> None:
    """Columns only, with documents: some rows have no key at all. Out 0, lse -inf, gradients exactly 0."""
    case = make_case(15, 100, 16, columns=30, documents=0.04, head_dim=16)
    positions, k, v = gather_columns(case)
    view = ShardView(case.pattern, case.every, column_positions=positions, doc_start=case.doc_start)
    q, k, v, dout = (t.float() for t in (case.q, k, v, case.dout))
    out, lse = TRITON.forward(q, k, v, view, case.scale)
    found = [out, lse, *TRITON.backward(dout, q, k, v, out, lse, view, case.scale)]
    empty = ~view.mask().any(-1)
    assert bool(empty.any()) and not bool(empty.all())
    assert bool((out.transpose(1, 2)[empty] == 0).all()) and bool((found[2].transpose(1, 2)[empty] == 0).all())
    wanted = TRUTH.forward(case.q, k.double(), v.double(), view, case.scale)
    gradients = TRUTH.backward(case.dout, case.q, k.double(), v.double(), *wanted, view, case.scale)
    assert_same(found, [*wanted, *gradients])


def test_keys_outside_the_pattern_are_not_read() -> None:
    """NaN in keys that no query selects, and in the padding of the keys, stays there."""
    case = make_case(16, 150, 16, columns=3, diagonals=2, head_dim=16)
    unread = ~case.whole().mask().any(2)  # one query head per key-value head
    assert bool(unread[:, :, 150:].all())
    wanted = run(case)
    # A tile is read as a whole, so only rows of blocks that nobody visits can hold anything.
    tiles = case.pattern.block_mask(torch.tensor([9]), case.every).any(2)
    view = ShardView(case.pattern, torch.tensor([9]), k_blocks=case.every, inline_columns=True)
    column = torch.zeros(1, 2, 161, dtype=torch.bool).scatter_(2, case.pattern.columns.long(), True)[..., :160]
    unread = ~(tiles.repeat_interleave(16, 2) | column)
    unread[:, :, 150:] = True
    q, dout = case.q[:, 144:].float(), case.dout[:, 144:].float()
    k, v = (t.masked_fill(unread.transpose(1, 2)[..., None], torch.nan).float() for t in (case.k, case.v))
    out, lse = TRITON.forward(q, k, v, view, case.scale)
    assert_same(
        [out[:, :6], lse[:, :, :6]] + wanted[2:], [wanted[0][:, 144:150], wanted[1][:, :, 144:150]] + wanted[2:]
    )
    assert not any(g.isnan().any() for g in TRITON.backward(dout, q, k, v, out, lse, view, case.scale))


@pytest.mark.parametrize("kernels", ["structured", "general"])
@pytest.mark.parametrize("documents", [0.0, 0.05], ids=["one", "documents"])
@pytest.mark.filterwarnings("ignore:All-NaN")  # the interpreter's maximum over a row of padding
def test_padding_may_hold_anything(kernels: str, documents: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN behind the end of the sequence and in blocks of padding: the same bits everywhere, and zeros in the padding."""
    run = TRITON if kernels == "structured" else general
    monkeypatch.setattr(launch, "tile_for", lambda *_: Tile(16, 16, 4, 2))
    case = make_case(9, 51, 32, columns=12, diagonals=1, kv_heads=1, documents=documents, head_dim=16)
    # The whole sequence, and its blocks in another order with two blocks of padding among them.
    for ids in (case.every, torch.tensor([1, 3, 0])):
        rows = block_positions(ids, 32)
        dead = rows >= 51
        tensors = [t[:, rows.clamp(max=63)].float() for t in (case.q, case.k, case.v, case.dout)]
        doc_start = None if case.doc_start is None else case.doc_start[:, rows.clamp(max=63)]
        view = ShardView(case.pattern, ids, k_blocks=ids, inline_columns=True, doc_start=doc_start)
        results = []
        for junk in (0.0, torch.nan):
            q, k, v, dout = (t.masked_fill(dead[:, None, None], junk) for t in tensors)
            out, lse = run.forward(q, k, v, view, case.scale)
            carried = run.forward(q, k, v, view, case.scale, (out, lse))
            results.append([out, lse, *carried, *run.backward(dout, q, k, v, out, lse, view, case.scale)])
        for i, (clean, found) in enumerate(zip(*results, strict=True)):
            assert torch.equal(clean, found), i
            assert found.dim() == 3 or not found[:, dead].any(), i


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Against the truth on the same rounded inputs. bfloat16 is upcast before products here, float16 is rounded as on a GPU."""
    case = make_case(17, 150, 32, columns=20, group=4, kv_heads=1, head_dim=64)
    rounded = [t.to(dtype) for t in (case.q, case.k, case.v, case.dout)]
    case.q, case.k, case.v, case.dout = (t.double() for t in rounded)
    found = run(case, dtype=dtype)
    assert all(t.dtype == torch.float32 for t in found)
    assert_same(found, truth_of(case), 4e-6 if dtype == torch.bfloat16 else 2e-3)


def test_two_runs_are_bitwise_equal() -> None:
    case = make_case(18, 150, 32, columns=40, group=4, kv_heads=1, head_dim=16, documents=0.02)
    assert all(torch.equal(a, b) for a, b in zip(run(case), run(case), strict=True))


@pytest.mark.parametrize("splits", [1, 3, 13])
def test_splits_of_the_column_gradient(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the queries are split, empty runs included."""
    case = make_case(19, 150, 16, columns=20, head_dim=16)
    monkeypatch.setattr(launch, "column_splits", lambda *_: splits)
    assert_same(run(case), truth_of(case))


def test_long_lists_of_columns_are_computed_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The partial sums stay within their bound, whatever the length of the lists."""
    case = make_case(19, 150, 16, columns=45, head_dim=16, group=2, kv_heads=1)
    limit = 20 * 2 * 2 * 16 * 4  # 20 columns of two heads: one tile of 16
    largest = []
    original = launch.start

    def watched(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> None:
        if "part_k" in arguments:
            largest.append(sum(arguments[name].numel() * 4 for name in ("part_k", "part_v")))
        original(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "start", watched)
    monkeypatch.setattr(launch, "PARTIAL_BYTES", limit)
    assert_same(run(case), truth_of(case))
    assert len(largest) == 3 * 3 and max(largest) <= limit


def test_delta_is_computed_once_per_ring_and_anew_when_its_inputs_change(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(23, 64, 32, head_dim=16)
    q, k, v, dout = (t.float() for t in (case.q, case.k, case.v, case.dout))
    names: list[str] = []
    original = launch.start

    def counted(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        original(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "start", counted)
    view = case.whole()
    out, lse = TRITON.forward(q, k, v, view, case.scale)
    first = TRITON.backward(dout, q, k, v, out, lse, view, case.scale)
    again = TRITON.backward(dout, q, k, v, out, lse, view, case.scale)
    assert names.count("delta_kernel") == 1
    dout.mul_(2)
    doubled = TRITON.backward(dout, q, k, v, out, lse, view, case.scale)
    assert names.count("delta_kernel") == 2
    for a, b, c in zip(first, again, doubled, strict=True):
        assert torch.equal(a, b) and torch.equal(2 * a, c)
    assert len(launch._DELTAS) == 1
    del out
    assert len(launch._DELTAS) == 0  # it lives no longer than the out it was made from


def test_rows_too_far_apart_for_32_bits_are_copied() -> None:
    """Offsets within a block are 32-bit numbers, so how far apart its rows may lie depends on how many there are."""
    far = torch.empty(256 << 23, device="meta").as_strided((1, 256, 1, 16), (0, 1 << 23, 16, 1))
    assert launch._rows_last(far, 128) is far and launch._rows_last(far, 256).is_contiguous()


def test_strided_inputs() -> None:
    """Slices of heads and rows, as the ring passes them, and a layout whose numbers of a head are not neighbours."""
    case = make_case(20, 100, 32, columns=10, group=2, head_dim=16)
    wanted = run(case)
    wide = [torch.cat([t, t], 2)[:, :, : t.shape[2]].float() for t in (case.q, case.k, case.v, case.dout)]
    view = case.whole()
    out, lse = TRITON.forward(wide[0], wide[1], wide[2], view, case.scale)
    flipped = wide[3].permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2)
    found = [out, lse, *TRITON.backward(flipped, *wide[:3], out, lse, view, case.scale)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_through_autograd_with_the_public_function() -> None:
    case = make_case(21, 150, 32, columns=20, group=2, head_dim=64)
    results = []
    for backend in ("triton", "reference"):
        leaves = [t[:, :150].float().requires_grad_() for t in (case.q, case.k, case.v)]
        out = sparse_attention(*leaves, case.pattern, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaves, case.dout[:, :150].float())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_bad_input_is_an_error_for_people() -> None:
    case = make_case(22, 64, 16, head_dim=64)
    q, k = case.q.float(), case.k.float()
    with pytest.raises(ValueError, match="pad q to whole blocks"):
        TRITON.forward(q[:, :50], k, k, case.whole(), 1.0)
    with pytest.raises(ValueError, match="pad k to whole blocks"):
        TRITON.forward(q, k[:, :50], k[:, :50], case.whole(), 1.0)
    for pattern in (case.pattern, SparsePattern(64, 16, blocks=torch.zeros(1, 2, 4, 4, dtype=torch.bool))):
        elsewhere = ShardView(pattern.to("meta"), case.every, k_blocks=case.every)
        with pytest.raises(ValueError, match=r"the pattern is on meta and q on cpu; use \.to\('cpu'\)"):
            TRITON.forward(q, k, k, elsewhere, 1.0)
        start = torch.zeros(1, 64, dtype=torch.int64, device="meta")
        elsewhere = ShardView(pattern, case.every, k_blocks=case.every, doc_start=start)
        with pytest.raises(ValueError, match="doc_start is on meta and q on cpu"):
            TRITON.backward(q, q, k, k, q, q[..., 0], elsewhere, 1.0)
    with pytest.raises(ValueError, match="positive scale, got -1"):
        TRITON.forward(q, k, k, case.whole(), -1.0)
    odd = SparsePattern.dense(1, 2, 60, 12)
    with pytest.raises(ValueError, match="power of two.*got 12"):
        sparse_attention(q[:, :60], k[:, :60], k[:, :60], odd, backend="triton")
    with pytest.raises(ValueError, match="head_dim 40 is not one of 64, 96, 128, 256"):
        sparse_attention(q[..., :40], k[..., :40], k[..., :40], case.pattern, backend="triton")
    with pytest.raises(ValueError, match="float64 is not bfloat16, float16 or float32"):
        sparse_attention(case.q, case.k, case.k, case.pattern, backend="triton")
