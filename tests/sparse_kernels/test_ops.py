"""The torch operators around `sparse_attention`: opcheck, torch.compile in one graph, activation checkpointing, meta tensors."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sparse_kernels import SparsePattern, backends, sparse_attention
from sparse_kernels.ops import attention, attention_backward, flatten
from sparse_kernels.pattern import pad_doc_start

HERE = [name for name, reason in backends("cpu", torch.float32, 8).items() if reason is None and name != "triton"]


def case(seq_len: int = 29, block: int = 8, blocks: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """(q, k, v, pattern): two batch rows, four query heads on two key-value heads."""
    g = torch.Generator().manual_seed(seq_len)
    q = torch.randn(2, seq_len, 4, 8, generator=g).to(dtype).requires_grad_()
    k, v = (torch.randn(2, seq_len, 2, 8, generator=g).to(dtype).requires_grad_() for _ in range(2))
    columns = torch.rand(2, 4, seq_len, generator=g).argsort(-1)[..., :3].int().sort(-1).values
    columns = torch.nn.functional.pad(columns, (0, 2), value=seq_len)
    diagonals = torch.tensor([0, 2, -1], dtype=torch.int32).expand(2, 4, 3).contiguous()
    number = -(-seq_len // block)
    extra = torch.rand(2, 4, number, number, generator=g) < 0.3 if blocks else None
    return q, k, v, SparsePattern(seq_len, block, columns, diagonals, extra)


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend", [*HERE, "auto"])
@pytest.mark.parametrize("variant", ["plain", "documents", "blocks", "bfloat16", "dense"])
@pytest.mark.filterwarnings("ignore")
def test_opcheck(backend: str, variant: str) -> None:
    dtype = torch.bfloat16 if variant == "bfloat16" else torch.float32
    q, k, v, pattern = case(24, blocks=variant == "blocks", dtype=dtype)
    if variant == "dense":
        pattern = SparsePattern.dense(2, 4, 24, 8)
    starts = torch.where(torch.arange(24) < 11, 0, 11).expand(2, -1) if variant == "documents" else None
    index, sizes = flatten(pattern, pad_doc_start(starts, pattern))
    torch.library.opcheck(attention, (q, k, v, index, sizes, 0.3, backend))
    out, lse, exact = attention(q.detach(), k.detach(), v.detach(), index, sizes, 0.3, backend)
    exact = exact if exact.numel() else out
    arguments = (torch.randn_like(out), q.detach(), k.detach(), v.detach(), exact, lse, index, sizes, 0.3, backend)
    torch.library.opcheck(attention_backward, arguments)


@pytest.mark.parametrize(("seq_len", "blocks"), [(24, False), (29, False), (29, True)])
@pytest.mark.filterwarnings("ignore")
def test_compiles_into_one_graph(seq_len: int, blocks: bool) -> None:
    q, k, v, pattern = case(seq_len, blocks=blocks)

    def loss(q: Tensor, k: Tensor, v: Tensor, pattern: SparsePattern) -> Tensor:
        out, lse = sparse_attention(q * 1.5, k, v, pattern, return_lse=True)
        return out.tanh().sum() + lse.sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    wanted, found = loss(q, k, v, pattern), compiled(q, k, v, pattern)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    for a, b in zip(gradients(found, q, k, v), gradients(wanted, q, k, v), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    # Another pattern of the same shape is other data, not another graph.
    other = SparsePattern(
        seq_len, 8, pattern.columns, torch.where(pattern.diagonals == 2, 1, pattern.diagonals), pattern.blocks
    )
    torch.testing.assert_close(compiled(q, k, v, other), loss(q, k, v, other), rtol=0, atol=1e-5)


def test_checkpointed_layers_give_the_same_gradients() -> None:
    q, k, v, pattern = case()

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sparse_attention(q.sin(), k, v, pattern)
        assert isinstance(out, Tensor)
        return out.square()

    plain = gradients(layer(q, k, v).sum(), q, k, v)
    again = gradients(checkpoint(layer, q, k, v, use_reentrant=False).sum(), q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_a_checkpoint_policy_can_keep_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selective checkpointing sees one operator: told to keep its result, the backward does not run the forward again."""
    from sparse_kernels.cpu import CpuBackend

    calls = []
    forward = CpuBackend.forward
    monkeypatch.setattr(CpuBackend, "forward", lambda *args: calls.append(1) or forward(*args))
    q, k, v, pattern = case()

    def policy(_ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = op == torch.ops.sparse_kernels.attention.default and keep
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    for keep in (True, False):
        calls.clear()
        out = checkpoint(
            lambda q, k, v: sparse_attention(q.sin(), k, v, pattern, backend="cpu"),
            q, k, v, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy),
        )  # fmt: skip
        gradients(out.sum(), q, k, v)
        assert len(calls) == (1 if keep else 2)


def test_meta_tensors_flow_through() -> None:
    q, k, v, pattern = case(dtype=torch.bfloat16)
    q, k, v = (x.detach().to("meta").requires_grad_() for x in (q, k, v))
    out, lse = sparse_attention(q, k, v, pattern.to("meta"), return_lse=True)
    assert out.shape == q.shape and out.dtype == torch.bfloat16
    assert lse.shape == (2, 4, 29) and lse.dtype == torch.float32 and not lse.requires_grad
    dq, dk, dv = gradients(out.sum(), q, k, v)
    assert dq.is_meta and dk.shape == k.shape and dv.dtype == v.dtype


@pytest.mark.parametrize("seq_len", [24, 29])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_out_is_never_widened_and_its_backward_sees_the_exact_out(
    dtype: torch.dtype, seq_len: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A float32 gradient of a bfloat16 output would take twice the room of the output; a rounded out would cost accuracy."""
    from sparse_kernels.cpu import CpuBackend

    q, k, v, pattern = case(seq_len, dtype=dtype)
    states: list[Tensor] = []
    forward, backward = CpuBackend.forward, CpuBackend.backward
    monkeypatch.setattr(CpuBackend, "forward", lambda *args: states.append(forward(*args)) or states[-1])
    monkeypatch.setattr(CpuBackend, "backward", lambda *args: states.append(args[5].clone()) or backward(*args))
    out = sparse_attention(q, k, v, pattern, backend="cpu")
    kinds, nodes = [], [out.grad_fn]
    while nodes:
        node = nodes.pop()
        node.register_prehook(lambda grads: kinds.extend(g.dtype for g in grads if g is not None))
        nodes += [after for after, _ in node.next_functions if after is not None]
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
    assert len(kinds) >= 5 and set(kinds) == {dtype}
    (exact, _), seen = states
    assert exact.dtype == torch.float32 and torch.equal(seen, exact)


def test_no_gradient_is_asked_of_inputs_that_need_none() -> None:
    q, k, v, pattern = case()
    out = sparse_attention(q, k.detach(), v.detach(), pattern)
    (dq,) = gradients(out.sum(), q)
    (wanted, *_) = gradients(sparse_attention(q, k, v, pattern).sum(), q, k, v)
    assert torch.equal(dq, wanted)


def test_forward_and_backward_share_a_view_that_dies_with_its_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_kernels.cpu import CpuBackend

    views = []
    forward, backward = CpuBackend.forward, CpuBackend.backward
    monkeypatch.setattr(CpuBackend, "forward", lambda *args: views.append(args[4]) or forward(*args))
    monkeypatch.setattr(CpuBackend, "backward", lambda *args: views.append(args[7]) or backward(*args))
    q, k, v, pattern = case(24)
    for _ in range(2):
        gradients(sparse_attention(q, k, v, pattern, backend="cpu").sum(), q, k, v)
    assert len(views) == 4 and all(view is views[0] for view in views)
    # Packed documents that are the same tensor are the same view, though it is padded to whole blocks; others are another view.
    packed = torch.zeros(2, 29, dtype=torch.int64)
    *odd, other = case(29)
    for _ in range(2):
        sparse_attention(*odd, other, doc_start=packed, backend="cpu")
    assert views[-1] is views[-2] and views[-1].doc_start.shape == (2, 32)
    del views[-2:], odd, other
    # Other documents or changed lists are another view.
    starts = torch.zeros(2, 24, dtype=torch.int64)
    sparse_attention(q, k, v, pattern, doc_start=starts, backend="cpu")
    pattern.diagonals[:, :, 1] = 1  # in place
    found = sparse_attention(q, k, v, pattern, doc_start=starts, backend="cpu")
    torch.testing.assert_close(found, sparse_attention(q, k, v, pattern, backend="reference"), rtol=0, atol=1e-5)
    assert len({id(view) for view in views}) == 3
    last = weakref.ref(views[-1])
    views.clear()
    monkeypatch.undo()
    del pattern, found
    gc.collect()
    assert last() is None


def test_a_pattern_changed_in_place_is_seen_in_inference_mode() -> None:
    """Inference tensors count no versions, so nothing may be kept by their identity."""
    q, k, v, pattern = case(24)
    with torch.inference_mode():
        inferred = SparsePattern(24, 8, pattern.columns.clone(), pattern.diagonals.clone())
        before = sparse_attention(q, k, v, inferred)
        inferred.diagonals[..., 1] = 1
        after = sparse_attention(q, k, v, inferred)
        wanted = sparse_attention(q, k, v, SparsePattern(24, 8, inferred.columns.clone(), inferred.diagonals.clone()))
    assert not torch.equal(before, after)
    assert torch.equal(after, wanted)


def test_mixed_dtypes_are_refused() -> None:
    q, k, v, pattern = case(24)
    with pytest.raises(ValueError, match=r"v is torch\.bfloat16 on cpu; all three must have one dtype"):
        sparse_attention(q, k, v.bfloat16(), pattern)
