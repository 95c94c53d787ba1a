"""The flash backend on the CPU: the same calls of a dense kernel, answered by torch's CPU flash operator."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mtrain.layout import RingLayout
from sparse_kernels import ShardView, SparsePattern, backends, reference_attention, resolve_backend, sparse_attention
from sparse_kernels.backends import _FACTORIES, _instance
from sparse_kernels.cpu.flash import flash_backward, flash_forward
from sparse_kernels.flash import FlashAttention, FlashBackend, TorchFlash


class OnTheCpu:
    """An engine with the shapes and dtypes of the real ones; it counts the query-key pairs that it computes."""

    pairs = 0

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        assert not causal or q.shape[1] == k.shape[1]
        self.pairs += q.shape[1] * (q.shape[1] + 1) // 2 if causal else q.shape[1] * k.shape[1]
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        out, lse = flash_forward(*(x.transpose(1, 2) for x in (q, k, v)), None, causal, scale)
        return out.transpose(1, 2), lse

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert {x.dtype for x in (dout, k, v, out)} == {q.dtype}
        shape, group = k.shape, q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        grads = flash_backward(*(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse, None, causal, scale)
        dq, dk, dv = (x.transpose(1, 2) for x in grads)
        return dq, *(x.unflatten(2, (shape[2], group)).sum(3) for x in (dk, dv))


def inputs(seq_len: int, heads: int = 4, kv_heads: int = 2, batch: int = 2, dim: int = 8) -> list[Tensor]:
    g = torch.Generator().manual_seed(seq_len)
    return [
        torch.randn(batch, seq_len, n, dim, generator=g, dtype=torch.float64)
        for n in (heads, kv_heads, kv_heads, heads)
    ]


def reference(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = reference_attention(*leaves, torch.ones(q.shape[1], q.shape[1]).tril().bool())
    return out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (7, 1)])
@pytest.mark.parametrize("seq_len", [1, 16, 29])
def test_the_whole_sequence(seq_len: int, heads: int, kv_heads: int, engine: OnTheCpu) -> None:
    q, k, v, dout = inputs(seq_len, heads, kv_heads)
    wanted = reference(q, k, v, dout)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    pattern = SparsePattern.dense(2, heads, seq_len, 8)
    out, lse = sparse_attention(*leaves, pattern, backend="flash", return_lse=True)
    found = out.detach(), lse, *torch.autograd.grad(out, leaves, dout)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    padded = -(-seq_len // 8) * 8
    assert engine.pairs == padded * (padded + 1) // 2


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize(("ranks", "seq_len"), [(2, 61), (3, 100), (4, 40)])
def test_shards_of_a_ring_add_up(ranks: int, seq_len: int, kind: str, gathered: bool) -> None:
    """Ring steps (one shard at a time, with a carried state) and the gather schedule (all shards in rank order)."""
    block = 8
    q, k, v, dout = inputs(seq_len)
    wanted = reference(q, k, v, dout)
    pattern = SparsePattern.dense(2, 4, seq_len, block)
    layout = RingLayout.build(kind, seq_len, ranks, block)
    backend, scale = FlashBackend(OnTheCpu()), 8**-0.5
    shards = [[layout.shard(x, rank, 1) for x in (q, k, v, dout)] for rank in range(ranks)]
    sources: list[list[int]] = [list(range(ranks))] if gathered else [[rank] for rank in range(ranks)]
    outs, sums = [], []
    dqs = []
    dkv = [[torch.zeros_like(shards[rank][1]) for _ in range(2)] for rank in range(ranks)]
    for rank in range(ranks):
        ours, _, _, grad = shards[rank]

        def view(source: list[int], rank: int = rank) -> ShardView:
            return ShardView(
                pattern, layout.blocks(rank), torch.cat([layout.blocks(s) for s in source]), inline_columns=gathered
            )

        def keys(source: list[int], which: int) -> Tensor:
            return torch.cat([shards[s][which] for s in source], 1)

        state = None
        for source in sources:
            assert backend.refuses(view(source)) is None
            state = backend.forward(ours, keys(source, 1), keys(source, 2), view(source), scale, state)
        assert state is not None
        dq = torch.zeros_like(ours)
        for source in sources:
            grads = backend.backward(grad, ours, keys(source, 1), keys(source, 2), *state, view(source), scale)
            dq += grads[0]
            for index, s in enumerate(source):
                piece = slice(index * layout.local_len, (index + 1) * layout.local_len)
                dkv[s][0] += grads[1][:, piece]
                dkv[s][1] += grads[2][:, piece]
        dqs.append(dq)
        outs.append(state[0])
        sums.append(state[1])
    found = [
        layout.unshard(outs, 1), layout.unshard(sums, 2), layout.unshard(dqs, 1),
        *(layout.unshard([pair[which] for pair in dkv], 1) for which in range(2)),
    ]  # fmt: skip
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_other_views_are_refused_by_name() -> None:
    backend = FlashBackend(OnTheCpu())
    every = torch.arange(4)
    dense = SparsePattern.dense(1, 2, 32, 8)
    sparse = SparsePattern(32, 8, diagonals=torch.zeros(1, 2, 1, dtype=torch.int32))
    starts = torch.zeros(1, 32, dtype=torch.int64)
    q = torch.zeros(1, 32, 2, 8, dtype=torch.float64)
    for view, words in (
        (ShardView(sparse, every, every), "the pattern is sparse"),
        (ShardView(dense, every, every, doc_start=starts), "packed documents"),
        (ShardView(dense, every, column_positions=torch.zeros(1, 2, 32, dtype=torch.int64)), "gathered columns"),
        (ShardView(dense, every.flip(0), every), "in no order"),
        (ShardView(dense, every[1:3], torch.tensor([1, 3, 2, 0])), "in no order"),
    ):
        assert words in str(backend.refuses(view))
        with pytest.raises(ValueError, match=words):
            backend.forward(q[:, : len(view.q_blocks) * 8], q, q, view, 1.0)


def test_rows_are_added_to_a_carried_state() -> None:
    """Keys before the queries arrive in two calls, the later ones first."""
    q, k, v, dout = inputs(48)
    wanted = reference(q, k, v, dout)
    pattern, backend, ids = SparsePattern.dense(2, 4, 48, 8), FlashBackend(OnTheCpu()), torch.arange(6)
    rows, state = slice(32, 48), None
    for low, high in ((2, 6), (0, 2)):
        view = ShardView(pattern, ids[4:], ids[low:high])
        keys = slice(low * 8, high * 8)
        state = backend.forward(q[:, rows], k[:, keys], v[:, keys], view, 8**-0.5, state)
    assert state is not None
    torch.testing.assert_close(state[0], wanted[0][:, rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(state[1], wanted[1][:, :, rows], rtol=0, atol=1e-12)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[OnTheCpu]:
    """The registry's flash backend computes on the CPU."""
    engine = OnTheCpu()
    _instance.cache_clear()
    monkeypatch.setitem(_FACTORIES, "flash", lambda: FlashBackend(engine))
    yield engine
    _instance.cache_clear()


def test_auto_takes_it_for_dense_patterns_only(engine: OnTheCpu) -> None:
    assert resolve_backend("auto", "cpu", torch.float64, 8).name != "flash"
    assert resolve_backend("auto", "cpu", torch.float64, 8, dense=True).name == "flash"
    assert resolve_backend("flash", "cpu", torch.float64, 8).name == "flash"


def test_here_it_says_what_it_needs() -> None:
    assert "CUDA" in str(backends("cpu", torch.bfloat16, 64)["flash"])
    with pytest.raises(ValueError, match="'flash' cannot run here: it needs CUDA"):
        resolve_backend("flash", "cpu", torch.bfloat16, 64)


def test_the_operators_of_torch_exist_and_are_asked_for_determinism() -> None:
    """Against torch's own schemas: nothing runs."""
    q, k = (
        torch.randn(1, 8, 4, 8, dtype=torch.float16, device="meta"),
        torch.randn(1, 8, 2, 8, dtype=torch.float16, device="meta"),
    )
    lse = torch.empty(1, 4, 8, device="meta")
    before = torch.are_deterministic_algorithms_enabled()
    seen = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "flash_attention" in str(func):
                seen.append((str(func), torch.are_deterministic_algorithms_enabled(), args[-6:]))
                if "backward" in str(func):
                    return tuple(torch.empty_like(x) for x in args[1:4])
                return torch.empty_like(args[0]), lse, None, None, 8, 8, None, None, None
            return func(*args, **(kwargs or {}))

    with Recorder():
        out, found = TorchFlash().forward(q, k, k, True, 0.3)
        assert out.shape == q.shape and found is lse
        grads = TorchFlash().backward(q, q, k, k, out, lse, True, 0.3)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert [deterministic for _, deterministic, _ in seen] == [before, True]
    assert torch.are_deterministic_algorithms_enabled() == before


def test_flash_attention_is_asked_for_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the signatures of flash-attn 2.7 and 2.8."""
    calls: list[dict[str, Any]] = []
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def forward(
        q: Tensor, k: Tensor, v: Tensor, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
        window_size_right: int, softcap: float, alibi_slopes: Any, return_softmax: bool,
    ) -> tuple[Any, ...]:  # fmt: skip
        calls.append({"window": (window_size_left, window_size_right), "causal": causal})
        return *OnTheCpu().forward(q, k, v, causal, softmax_scale), None, None

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
        dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
        alibi_slopes: Any, deterministic: bool, rng_state: Any = None,
    ) -> None:  # fmt: skip
        calls.append({"deterministic": deterministic, "dropout": dropout_p})
        grads = OnTheCpu().backward(dout, q, k, v, out, softmax_lse, causal, softmax_scale)
        for place, grad in zip((dq, dk, dv), grads, strict=True):
            place.copy_(grad)

    module._flash_attn_forward, module._flash_attn_backward = forward, backward  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    q, k, v, dout = inputs(24)
    wanted = reference(q, k, v, dout)
    backend, every = FlashBackend(FlashAttention()), torch.arange(3)
    view = ShardView(SparsePattern.dense(2, 4, 24, 8), every, every)
    state = backend.forward(q, k, v, view, 8**-0.5)
    grads = backend.backward(dout, q, k, v, *state, view, 8**-0.5)
    for a, b in zip((*state, *grads), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    assert calls == [{"window": (-1, -1), "causal": True}, {"deterministic": True, "dropout": 0.0}]
