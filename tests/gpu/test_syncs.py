"""Nothing on the way from q and k to the gradients waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from mtrain.patterns import Coverage, PatternPlan, TopK, estimate_vertical_slash
from mtrain.patterns.budget import Budget
from mtrain.recipe.schema import AttentionRecipe
from sparse_kernels import SparsePattern, sparse_attention
from tests.gpu.cases import Case, make_case


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any synchronising call raises."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype, once, when it is first set
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def attend(case: Case, pattern: SparsePattern) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    out = sparse_attention(*leaves, pattern, doc_start=case.doc_start, backend="triton")
    return (out, *torch.autograd.grad(out, leaves, case.dout))


def test_the_guard_raises() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        torch.ones(1, device="cuda").item()


@pytest.mark.parametrize("documents", [0, 4])
@pytest.mark.parametrize("budget", [TopK(64, 8), Coverage(0.9, floor=4, cap=128)])
def test_estimate_index_forward_and_backward(budget: Budget, documents: int) -> None:
    case = make_case("cuda", 4, 4096 - 37, 128, kv_heads=2, group=4, documents=documents)

    def step() -> tuple[Tensor, ...]:
        pattern = estimate_vertical_slash(
            case.q, case.k, budget=budget, block=128, sink=4, local=128, doc_start=case.doc_start
        )
        return attend(case, pattern)

    first = step()  # compiles the kernels
    torch.cuda.synchronize()
    with no_waiting():
        again = step()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("pattern", ["xattention", "moba"])
def test_choosing_blocks(pattern: str) -> None:
    case = make_case("cuda", 6, 4096 - 37, 128, kv_heads=2, group=4, documents=3)
    plan = PatternPlan(AttentionRecipe(pattern=pattern, block=128, stride=16, threshold=0.8, chunk=256, top_k=3), 1)

    def step() -> tuple[Tensor, ...]:
        return attend(case, plan.index(0, case.q, case.k, doc_start=case.doc_start))

    first = step()
    torch.cuda.synchronize()
    with no_waiting():
        again = step()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_patterns_of_single_blocks() -> None:
    case = make_case("cuda", 5, 4096 - 37, 128, kv_heads=2, group=4, blocks=0.05, documents=3)
    first = attend(case, case.pattern)
    # Another pattern of the same content, so that the index is built again.
    parts = [case.pattern.columns.clone(), case.pattern.diagonals.clone(), case.pattern.block_rows.table()]
    torch.cuda.synchronize()
    with no_waiting():
        again = attend(case, SparsePattern(case.pattern.seq_len, case.pattern.block, *parts))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
