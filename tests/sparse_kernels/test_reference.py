"""The truth itself: against torch's own attention, finite differences, and the algebra of partial softmaxes."""

from __future__ import annotations

import pytest
import torch

from sparse_kernels import ShardView, SparsePattern, merge_states, reference_attention
from sparse_kernels.reference_backend import ReferenceBackend


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("group", [1, 3])
def test_equals_torch_attention(group: int) -> None:
    q, k, v = random(2, 11, 2 * group, 5), random(2, 13, 2, 5, seed=1), random(2, 13, 2, 5, seed=2)
    mask = random(2, 2 * group, 11, 13, seed=3) > 0
    mask[..., 0] = True
    out, lse = reference_attention(q, k, v, mask, scale=0.7)
    keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask, scale=0.7
    )
    torch.testing.assert_close(out, wanted.transpose(1, 2), rtol=0, atol=1e-12)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * 0.7
    torch.testing.assert_close(lse, scores.masked_fill(~mask, -torch.inf).logsumexp(-1), rtol=0, atol=1e-12)


def test_rows_without_keys_are_zero_and_have_no_gradient() -> None:
    q, k, v = (random(1, 4, 1, 3, seed=s).requires_grad_() for s in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2] = False
    out, lse = reference_attention(q, k, v, mask)
    assert bool((out[0, 2] == 0).all()) and lse[0, 0, 2] == -torch.inf and bool(lse[0, 0, 3].isfinite())
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert bool((dq[0, 2] == 0).all())
    assert not any(bool(t.isnan().any()) for t in (dq, dk, dv))


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        reference_attention(
            random(1, 2, 3, 4), random(1, 2, 2, 4), random(1, 2, 2, 4), torch.ones(2, 2, dtype=torch.bool)
        )


def test_half_precision_accumulates_in_float32() -> None:
    q, k, v = (random(1, 9, 2, 4, seed=s).bfloat16() for s in range(3))
    mask = torch.ones(9, 9, dtype=torch.bool).tril()
    out, lse = reference_attention(q, k, v, mask)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    wanted, _ = reference_attention(q.double(), k.double(), v.double(), mask)
    assert torch.equal(out, wanted.bfloat16())


def test_merge_of_halves_is_the_whole() -> None:
    q, k, v = random(2, 6, 4, 5), random(2, 9, 2, 5, seed=1), random(2, 9, 2, 5, seed=2)
    mask = random(2, 4, 6, 9, seed=3) > 0.3
    mask[:, :, 1] = False  # empty on both sides
    mask[:, :, 2, :4] = False  # empty on the left
    whole = reference_attention(q, k, v, mask)
    left = reference_attention(q, k[:, :4], v[:, :4], mask[..., :4])
    right = reference_attention(q, k[:, 4:], v[:, 4:], mask[..., 4:])
    for merged in (merge_states(*left, *right), merge_states(*right, *left)):
        torch.testing.assert_close(merged[0], whole[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(merged[1], whole[1], rtol=0, atol=1e-12)


def test_the_empty_state_is_the_identity_of_the_merge() -> None:
    out, lse = random(1, 3, 2, 4), random(1, 2, 3, seed=1) * 30
    empty = torch.zeros_like(out), torch.full_like(lse, -torch.inf)
    for merged in (merge_states(out, lse, *empty), merge_states(*empty, out, lse)):
        torch.testing.assert_close(merged[0], out, rtol=1e-15, atol=0)
        torch.testing.assert_close(merged[1], lse, rtol=1e-15, atol=0)
    both = merge_states(*empty, *empty)
    assert torch.equal(both[0], empty[0]) and torch.equal(both[1], empty[1])


def test_merge_accumulates_in_float32() -> None:
    out, lse = random(1, 3, 2, 4).bfloat16(), random(1, 2, 3, seed=1).float()
    merged = merge_states(out, lse, out, lse)
    assert merged[0].dtype == merged[1].dtype == torch.float32


def test_backward_of_the_reference_backend_is_the_derivative() -> None:
    """Hand-written gradients over two disjoint views against autograd over the whole."""
    generator = torch.Generator().manual_seed(4)
    blocks = torch.rand(1, 4, 5, 5, generator=generator) < 0.3
    pattern = SparsePattern(18, 4, torch.tensor([[[1, 7, 18]] * 4], dtype=torch.int32), blocks=blocks)
    q, k, v, dout = (
        random(1, 20, 4, 3),
        random(1, 20, 2, 3, seed=1),
        random(1, 20, 2, 3, seed=2),
        random(1, 20, 4, 3, seed=5),
    )
    every = torch.arange(5)
    whole = ShardView(pattern, every, k_blocks=every, inline_columns=True)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = reference_attention(*leaves, whole.mask(), scale=0.5)
    wanted = torch.autograd.grad(out, leaves, dout)
    backend, state = ReferenceBackend(), None
    halves = [ShardView(pattern, every, k_blocks=ids, inline_columns=True) for ids in (every[:2], every[2:])]
    cuts = [slice(0, 8), slice(8, 20)]
    for view, cut in zip(halves, cuts, strict=True):
        state = backend.forward(q, k[:, cut], v[:, cut], view, 0.5, state)
    assert state is not None
    torch.testing.assert_close(state[0], out.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(state[1], lse.detach(), rtol=0, atol=1e-12)
    parts = [
        backend.backward(dout, q, k[:, c], v[:, c], *state, view, 0.5) for view, c in zip(halves, cuts, strict=True)
    ]
    found = (parts[0][0] + parts[1][0], torch.cat([p[1] for p in parts], 1), torch.cat([p[2] for p in parts], 1))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
