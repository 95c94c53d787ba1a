"""The scoring kernels: against softmax in float64, against the plain oracle of estimation, and shared out against alone."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mtrain.comm import Ring, run_ranks
from mtrain.layout import RingLayout
from mtrain.patterns import Coverage, TopK, estimate_vertical_slash
from mtrain.patterns import scores as scores_module
from mtrain.patterns.fixed_point import exponential_unit
from mtrain.patterns.kernel_scores import KernelPass
from sparse_kernels.gpu import probe
from sparse_kernels.gpu.probe import ProbeScorer
from tests.mtrain.test_estimation import as_lists, make, oracle_pattern, pack

assert triton.knobs.runtime.interpret
UNIT = 2.0**40


def scorer(
    sizes: tuple[int, ...], *, heads: int = 2, kv_heads: int = 1, block: int = 16, tokens: int = 96, dim: int = 16,
    dtype: torch.dtype = torch.float32, seed: int = 0, gain: float = 1.0,
) -> ProbeScorer:  # fmt: skip
    """Windows that end at different rows; two batch rows, the second with a document that starts at 21."""
    g = torch.Generator().manual_seed(seed)
    q = (torch.randn(2, sum(sizes), heads, dim, generator=g) * gain).to(dtype)
    k = torch.randn(2, tokens, kv_heads, dim, generator=g).to(dtype)
    ends = [tokens - 1 - 13 * window for window in range(len(sizes))]
    rows = torch.cat([end - torch.arange(m) for end, m in zip(ends, sizes, strict=True)]).expand(2, -1)
    first = torch.where((rows >= 21) & (torch.arange(2)[:, None] == 1), 21, 0)
    ids = torch.arange(-(-tokens // block), dtype=torch.int32)
    return ProbeScorer(q, k, first.int(), rows.int().contiguous(), ids, sizes, block, 0.5)


def truth(s: ProbeScorer) -> tuple[Tensor, Tensor]:
    """float64: probabilities [B, H, R, n] and the scores [B, H, blocks, width] by plain loops over rows."""
    keys = s.k.double().repeat_interleave(s.q.shape[2] // s.k.shape[2], 2)
    logits = torch.einsum("brhd,bkhd->bhrk", s.q.double(), keys) * s.scale
    position = torch.arange(s.k.shape[1])
    seen = (position >= s.first_key[:, None, :, None]) & (position <= s.last_key[:, None, :, None])
    p = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    blocks = s.block_ids.numel()
    padded = torch.nn.functional.pad(p, (0, blocks * s.block - p.shape[-1])).unflatten(-1, (blocks, s.block))
    found = torch.zeros(*p.shape[:2], blocks, s.width, dtype=torch.float64)
    found[..., : s.block] = padded.sum(2)
    row, place = 0, s.block
    for m in s.sizes:
        for r in range(m):
            found[..., place + r : place + r + s.block] += padded[:, :, row + r]
        row, place = row + m, place + s.block + m - 1
    return p, found


def score(s: ProbeScorer, per: int = 1) -> tuple[Tensor, Tensor]:
    """(each row's sum of exponentials, fixed-point scores), the tiles joined as an estimate does."""
    maxima, sums = s.statistics()
    peak = maxima.amax(2).nan_to_num(neginf=0.0)
    total = (sums * torch.exp2(maxima - peak[:, :, None])).sum(2)
    return total, s.scores(peak, torch.where(total > 0, UNIT / total, 0.0), per)


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1,), {"dim": 8}),
        ((16,), {"heads": 7, "tokens": 49}),
        ((64,), {"block": 64, "tokens": 130, "dim": 64, "heads": 4, "kv_heads": 2}),
        ((63,), {"block": 128, "tokens": 200, "dim": 96}),
        ((70,), {"block": 32, "tokens": 101}),
        ((5, 4, 4, 3), {"heads": 4, "kv_heads": 4, "tokens": 70}),
        ((20,), {"gain": 30.0}),
        ((20,), {"dtype": torch.float16}),
        ((20, 7), {"dtype": torch.bfloat16, "dim": 40}),
    ],
)
def test_scores_are_those_of_softmax(sizes: tuple[int, ...], options: dict[str, Any]) -> None:
    s = scorer(sizes, **options)
    total, found = score(s)
    assert bool((total > 0).all())
    _, wanted = truth(s)
    torch.testing.assert_close(found.double() / UNIT, wanted, rtol=0, atol=2e-5 * max(1.0, options.get("gain", 1.0)))
    # What nobody may see is exactly nothing.
    assert not found[wanted == 0].any()


def test_rows_that_see_nothing_and_padding_blocks_count_nothing() -> None:
    s = scorer((6,), tokens=64)
    s.last_key[:, 2] = -1
    s.block_ids[3] = 9  # stands behind every row
    total, found = score(s)
    assert not total[:, :, 2].any() and bool((total[:, :, :2] > 0).all())
    assert not found[:, :, 3].any()
    assert abs(float(found[0, 0, :, :16].sum()) / UNIT - 5) < 1e-4


def test_heads_of_a_group_are_added() -> None:
    s = scorer((9,), heads=6, kv_heads=2, tokens=50)
    apart, joined = score(s)[1], score(s, per=3)[1]
    assert torch.equal(apart.unflatten(1, (2, 3)).sum(2), joined)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """To the bit: the rule that makes an estimate the same for every number of ranks."""
    s = scorer((16, 3), tokens=112, dtype=dtype, dim=24)
    maxima, sums = s.statistics()
    peak = maxima.amax(2)
    factor = torch.full_like(peak, UNIT)
    whole = s.scores(peak, factor, 1)
    held = torch.tensor([5, 0, 3])
    keys = s.k.unflatten(1, (7, 16))[:, held].flatten(1, 2)
    part = ProbeScorer(s.q, keys, s.first_key, s.last_key, held.int(), s.sizes, 16, s.scale)
    for a, b in zip(part.statistics(), (maxima, sums), strict=True):
        assert torch.equal(a, b[:, :, held])
    assert torch.equal(part.scores(peak, factor, 1), whole[:, :, held])


@pytest.mark.parametrize(
    ("documents", "options"),
    [
        (None, {"budget": Coverage(0.9), "sink": 3, "local": 11, "probe": 16}),
        ([40, 41, 42, 97], {"budget": Coverage(0.8, floor=2, cap=30), "probe": 9, "probe_spread": 1}),
        (None, {"budget": TopK(7, 5), "probe": 20, "share": "kv_head"}),
    ],
)
def test_estimates_are_the_oracle(
    documents: list[int] | None, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores_module, "_Pass", None)  # the kernels or nothing
    q, k = make(117, 4, 2, seed=3, dtype=torch.float32)
    doc_start = None if documents is None else pack(117, documents)
    pattern = estimate_vertical_slash(q, k, doc_start=doc_start, block=16, **options)
    share = options.pop("share", None) is not None
    assert as_lists(pattern) == oracle_pattern(q, k, doc_start, share=share, block=16, **options)


def test_every_rank_finds_the_index_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = threading.Lock()  # Triton's interpreter runs one kernel at a time
    passes = []

    class Locked(KernelPass):
        def row_maxima(self) -> Tensor:
            passes.append(1)
            with lock:
                return super().row_maxima()

        def partial_scores(self, sums: Tensor, share: bool) -> Tensor:
            with lock:
                return super().partial_scores(sums, share)

    monkeypatch.setattr(scores_module, "KernelPass", Locked)
    q, k = make(119, 3, 1, seed=2, dtype=torch.float32, dim=12)
    doc_start = pack(119, [40, 41, 97])
    options: dict[str, Any] = {"budget": Coverage(0.85, cap=60), "block": 16, "probe": 12, "sink": 1}
    whole = estimate_vertical_slash(q, k, doc_start=doc_start, **options)
    layout = RingLayout.build("zigzag", 119, 2, 16)

    def estimate(ring: Ring) -> Any:
        shards = [layout.shard(x, ring.rank, 1) for x in (q, k, doc_start)]
        return estimate_vertical_slash(*shards[:2], doc_start=shards[2], ring=ring, layout=layout, **options)

    for pattern in run_ranks(estimate, inner=2):
        assert torch.equal(pattern.columns, whole.columns) and torch.equal(pattern.diagonals, whole.diagonals)
    assert len(passes) == 3


def test_what_the_kernels_cannot_score_has_a_reason() -> None:
    here = torch.device("cpu")
    assert probe.unusable(here, torch.bfloat16, 128, 64) is None
    for dtype, dim, block, word in (
        (torch.float64, 64, 64, "float64"),
        (torch.bfloat16, 512, 64, "512"),
        (torch.bfloat16, 64, 48, "power of two"),
        (torch.bfloat16, 64, 8, "power of two"),
    ):
        assert word in str(probe.unusable(here, dtype, dim, block))
    assert "meta" in str(probe.unusable(torch.device("meta"), torch.float32, 64, 64))


class LargestIntegers(TorchDispatchMode):
    """Elements of the largest int64 tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.int64:
            self.largest = max(self.largest, made.numel())
        return made


def test_statistics_become_integers_head_by_head() -> None:
    """The fixed-point sums of all heads at once would take twice the room of the statistics themselves."""
    g = torch.Generator().manual_seed(0)
    maxima, sums = torch.randn(2, 8, 50, 16, generator=g), torch.rand(2, 8, 50, 16, generator=g)
    peak = maxima.amax(2)
    wanted = (sums * (maxima - peak[:, :, None]).exp2() * exponential_unit(800)).long().sum(2)
    scores = object.__new__(KernelPass)
    scores.maxima, scores.sums, scores.peak, scores.placement = maxima, sums, peak, SimpleNamespace(seq_len=800)
    with LargestIntegers() as made:
        found = scores.row_sums()
    assert torch.equal(found, wanted) and found.dtype == torch.int64
    assert made.largest == 2 * 50 * 16
