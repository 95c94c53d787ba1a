"""The flash backend on the GPU, with every engine that is here: two rules against float64, ring steps, the same bits."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels import ShardView, SparsePattern
from sparse_kernels.accuracy import dense_by_rows, two_rules
from sparse_kernels.flash import Engine, FlashAttention, FlashBackend, TorchFlash, has_flash_attention
from tests.gpu.cases import Case, complaints, make_case, run

ENGINES = {"torch": TorchFlash, "flash-attn": FlashAttention}


def engine_of(name: str) -> Engine:
    if name == "flash-attn" and not has_flash_attention():
        pytest.skip("flash-attn 2.7 or newer is not importable")
    return ENGINES[name]()


def dense_case(seq_len: int, head_dim: int, dtype: torch.dtype = torch.bfloat16, block: int = 128) -> Case:
    case = make_case("cuda", seq_len, seq_len, head_dim, kv_heads=2, group=4, dtype=dtype)
    case.pattern = SparsePattern.dense(1, 8, seq_len, block, device="cuda")
    return case


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("seq_len", [4096, 8192 - 37])
def test_the_registered_backend_keeps_the_two_rules(seq_len: int, head_dim: int) -> None:
    case = dense_case(seq_len, head_dim)
    assert not complaints(case, run(case, "flash"))


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ring_steps_add_up(name: str, head_dim: int) -> None:
    """Zigzag over two ranks: a causal square of two runs, and shards that fall into rectangles."""
    case, block, ranks = dense_case(2048, head_dim, block=64), 64, 2
    backend, scale = FlashBackend(engine_of(name)), head_dim**-0.5
    ids = torch.arange(32).view(4, 8)
    held = [torch.cat([ids[r], ids[3 - r]]) for r in range(ranks)]
    rows = [(h[:, None] * block + torch.arange(block)).flatten().cuda() for h in held]
    out, lse = torch.zeros_like(case.q, dtype=torch.float32), torch.zeros(1, 8, 2048, device="cuda")
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (case.q, case.k, case.v))
    for r in range(ranks):
        q, state = case.q[:, rows[r]], None
        order = [r, 1 - r]
        for s in order:
            view = ShardView(case.pattern, held[r], held[s])
            state = backend.forward(q, case.k[:, rows[s]], case.v[:, rows[s]], view, scale, state)
        assert state is not None
        out[:, rows[r]], lse[:, :, rows[r]] = state
        for s in order:
            view = ShardView(case.pattern, held[r], held[s])
            keys, values = case.k[:, rows[s]], case.v[:, rows[s]]
            grads = backend.backward(case.dout[:, rows[r]], q, keys, values, *state, view, scale)
            for total, part, where in zip((dq, dk, dv), grads, (rows[r], rows[s], rows[s]), strict=True):
                total[:, where] += part
    arguments = (case.q, case.k, case.v, case.dout, case.pattern)
    truth = dense_by_rows(*arguments, dtype=torch.float64)
    plain = dense_by_rows(*arguments, dtype=torch.bfloat16)
    assert float((lse.double() - truth[1]).abs().max()) < 1e-4
    for found, at in ((out, 0), (dq, 2), (dk, 3), (dv, 4)):
        assert not two_rules(found.bfloat16(), truth[at], plain[at], gradient=at > 0)


@pytest.mark.parametrize("name", ENGINES)
def test_fifty_runs_give_the_same_bits(name: str) -> None:
    case, every = dense_case(4096, 128), torch.arange(32)
    backend, view = FlashBackend(engine_of(name)), ShardView(case.pattern, every, every)

    def once() -> list[torch.Tensor]:
        state = backend.forward(case.q, case.k, case.v, view, 0.1)
        return [*state, *backend.backward(case.dout, case.q, case.k, case.v, *state, view, 0.1)]

    first = once()
    for _ in range(50):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))
