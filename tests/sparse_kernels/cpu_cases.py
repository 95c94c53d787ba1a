"""Randomised cases of the CPU backend and the truth about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels import ShardView, SparsePattern, reference_attention
from sparse_kernels.cpu import CpuBackend
from sparse_kernels.pattern import pad_doc_start

CPU = CpuBackend()


@dataclass
class Case:
    """Everything one comparison needs, in float64: the global pattern and the whole, block-padded sequence."""

    pattern: SparsePattern
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    doc_start: Tensor | None  # [B, padded]
    scale: float

    @property
    def every(self) -> Tensor:
        return torch.arange(self.pattern.num_blocks)

    def whole(self) -> ShardView:
        return ShardView(self.pattern, self.every, k_blocks=self.every, inline_columns=True, doc_start=self.doc_start)


def random_pattern(
    generator: torch.Generator,
    batch: int,
    heads: int,
    seq_len: int,
    block: int,
    columns: int,
    diagonals: int,
    blocks: bool,
) -> SparsePattern:
    """Lists of every length up to the given ones; the first head has the full number of columns."""
    number = -(-seq_len // block)
    column = torch.full((batch, heads, columns), seq_len, dtype=torch.int32)
    diagonal = torch.full((batch, heads, diagonals + 1), -1, dtype=torch.int32)
    for b in range(batch):
        for h in range(heads):
            count = columns if h == 0 else int(torch.randint(columns + 1, (), generator=generator))
            chosen = torch.randperm(seq_len, generator=generator)[:count].sort().values
            column[b, h, : len(chosen)] = chosen
            count = int(torch.randint(diagonals + 1, (), generator=generator))
            chosen = torch.randperm(number - 1, generator=generator)[:count].sort().values + 1
            diagonal[b, h, : len(chosen) + 1] = torch.cat([torch.zeros(1, dtype=torch.int64), chosen])
    chosen = torch.rand(batch, heads, number, number, generator=generator) < 0.15 if blocks else None
    return SparsePattern(seq_len, block, column, diagonal, chosen)


def random_documents(generator: torch.Generator, batch: int, seq_len: int, rate: float) -> Tensor:
    """doc_start [B, S] with a new document at each token with probability ``rate``; includes documents of length 1."""
    starts = torch.rand(batch, seq_len, generator=generator) < rate
    starts[:, 0] = True
    starts[:, seq_len // 2 : seq_len // 2 + 3] = True
    return torch.where(starts, torch.arange(seq_len), 0).cummax(1).values


def make_case(
    seed: int, seq_len: int, block: int, *, batch: int = 1, kv_heads: int = 2, group: int = 1, head_dim: int = 8,
    columns: int = 5, diagonals: int = 2, blocks: bool = False, documents: float = 0.0, sharpness: float = 1.0, full: bool = False,
) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * group
    if full:
        pattern = SparsePattern.dense(batch, heads, seq_len, block)
    else:
        pattern = random_pattern(generator, batch, heads, seq_len, block, columns, diagonals, blocks)
    padded = pattern.num_blocks * block
    tensors = []
    for number in (heads, kv_heads, kv_heads, heads):
        tensors.append(torch.randn(batch, padded, number, head_dim, generator=generator, dtype=torch.float64))
    q, k, v, dout = tensors
    q = q * sharpness
    doc_start = random_documents(generator, batch, seq_len, documents) if documents else None
    return Case(pattern, q, k, v, dout, pad_doc_start(doc_start, pattern), head_dim**-0.5 * 1.1)


def truth_of(case: Case) -> list[Tensor]:
    """[out, lse, dq, dk, dv] by autograd through dense masked attention."""
    leaves = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
    out, lse = reference_attention(*leaves, case.whole().mask(), scale=case.scale)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, case.dout)]


def run_whole(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """[out, lse, dq, dk, dv] of the CPU backend on one view of everything."""
    q, k, v, dout = (t.to(dtype) for t in (case.q, case.k, case.v, case.dout))
    view = case.whole()
    out, lse = CPU.forward(q, k, v, view, case.scale)
    return [out, lse, *CPU.backward(dout, q, k, v, out, lse, view, case.scale)]


def assert_same(found: list[Tensor], wanted: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        assert a.shape == b.shape, name
        assert not a.isnan().any(), f"{name} has NaN"
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), f"{name}: rows without keys differ"
        error = float((a.double() - b)[finite].abs().max()) if bool(finite.any()) else 0.0
        limit = tolerance * max(1.0, float(b[finite].abs().max()) if bool(finite.any()) else 1.0)
        assert error <= limit, f"{name} is off by {error:.2e}, allowed {limit:.2e}"
