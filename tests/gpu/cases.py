"""Cases and checks of the GPU tests. They take the device as an argument, so that tiny ones also run in the interpreter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_kernels import ShardView, SparsePattern, sparse_attention
from sparse_kernels.accuracy import dense_by_rows, two_rules
from sparse_kernels.gpu import TritonBackend
from sparse_kernels.pattern import pad_doc_start

NAMES = ("out", "dq", "dk", "dv")


@dataclass
class Case:
    """Inputs in low precision, the pattern and the documents."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    pattern: SparsePattern
    doc_start: Tensor | None = None


def random_pattern(
    seq_len: int, block: int, heads: int, columns: int, diagonals: int, blocks: float, generator: torch.Generator
) -> SparsePattern:
    """Sinks, a local band, random columns and diagonals, and with probability ``blocks`` single blocks."""
    number = -(-seq_len // block)
    column = torch.full((1, heads, columns), seq_len, dtype=torch.int32)
    diagonal = torch.full((1, heads, diagonals + 1), -1, dtype=torch.int32)
    for h in range(heads):
        chosen = torch.randperm(seq_len, generator=generator)[: max(0, columns - h)].sort().values
        chosen[: min(4, len(chosen))] = torch.arange(min(4, len(chosen)))
        chosen = chosen.sort().values
        column[0, h, : len(chosen)] = chosen
        far = torch.randperm(number - 1, generator=generator)[:diagonals].sort().values + 1
        diagonal[0, h, : len(far) + 1] = torch.cat([torch.zeros(1, dtype=torch.int64), far])
    single = None
    if blocks:
        single = torch.rand(1, heads, number, number, generator=generator) < blocks
    return SparsePattern(seq_len, block, column, diagonal, single)


def make_case(
    device: str,
    seed: int,
    seq_len: int,
    head_dim: int,
    *,
    kv_heads: int = 1,
    group: int = 2,
    block: int = 128,
    columns: int = 65,
    diagonals: int = 4,
    blocks: float = 0.0,
    documents: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """A case from a seed; the numbers do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * group
    pattern = random_pattern(seq_len, block, heads, columns, diagonals, blocks, generator).to(device)
    made = [torch.randn(1, seq_len, n, head_dim, generator=generator) for n in (heads, kv_heads, kv_heads, heads)]
    q, k, v, dout = (t.to(device=device, dtype=dtype) for t in made)
    doc_start = None
    if documents:
        starts = torch.zeros(seq_len, dtype=torch.int64)
        begin = torch.randint(seq_len, (documents,), generator=generator)
        starts[begin] = begin
        doc_start = starts.cummax(0).values[None].to(device)
    return Case(q, k, v, dout, pattern, doc_start)


def run(case: Case, backend: str = "triton") -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv) of `sparse_attention`."""
    leaves = [t.detach().requires_grad_() for t in (case.q, case.k, case.v)]
    out, lse = sparse_attention(*leaves, case.pattern, doc_start=case.doc_start, backend=backend, return_lse=True)
    return (out.detach(), lse, *torch.autograd.grad(out, leaves, case.dout))


def complaints(case: Case, found: tuple[Tensor, ...]) -> list[str]:
    """What breaks the two rules, and an lse that is off."""
    arguments = (case.q, case.k, case.v, case.dout, case.pattern)
    truth = dense_by_rows(*arguments, dtype=torch.float64, doc_start=case.doc_start)
    plain = dense_by_rows(*arguments, dtype=case.q.dtype, doc_start=case.doc_start)
    problems = []
    off = float(((found[1].double() - truth[1]).abs() / truth[1].abs().clamp(min=1)).max())
    if not off <= 5e-5:
        problems.append(f"lse: relative error {off:.3g}, allowed 5e-5")
    for name, at in zip(NAMES, (0, 2, 3, 4), strict=True):
        problem = two_rules(found[at], truth[at], plain[at], gradient=at > 0)
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def unselected_gradient(case: Case) -> float:
    """Largest dk or dv of keys that the last query block, the only one with a gradient, does not select."""
    pattern, size = case.pattern, case.pattern.seq_len
    last = (pattern.num_blocks - 1) * pattern.block
    dout = case.dout.clone()
    dout[:, :last] = 0
    found = run(Case(case.q, case.k, case.v, dout, pattern, case.doc_start))
    group = pattern.heads // case.k.shape[2]
    worst = 0.0
    for h in range(pattern.heads):
        one = pattern.select(slice(h, h + 1))
        near = one.block_mask(torch.tensor([pattern.num_blocks - 1]), torch.arange(pattern.num_blocks))[0, 0, 0]
        seen = near.repeat_interleave(pattern.block)[:size]
        column = torch.zeros(size + 1, dtype=torch.bool, device=seen.device)
        column.scatter_(0, one.columns[0, 0].long(), True)
        seen = seen | column[:size]
        if h % group == 0:
            union = torch.zeros_like(seen)
        union |= seen
        if h % group == group - 1:
            for gradient in found[3:]:
                worst = max(worst, float(gradient[0, ~union, h // group].abs().max()) if bool((~union).any()) else 0.0)
    return worst


def differing_runs(case: Case, repeats: int) -> int:
    """In how many of ``repeats`` further runs any bit of out, lse, dq, dk, dv differs from the first run."""
    first = run(case)
    different = torch.zeros((), dtype=torch.int64, device=case.q.device)
    for _ in range(repeats):
        again = run(case)
        different += torch.stack([(a != b).any() for a, b in zip(first, again, strict=True)]).any()
    return int(different)


def far_apart(case: Case, row_stride: int) -> Case:
    """The same case with ``row_stride`` numbers from one row to the next, all four tensors side by side in one buffer."""
    tensors = (case.q, case.k, case.v, case.dout)
    size = tensors[0].shape[1]
    room = torch.empty(size * row_stride, dtype=case.q.dtype, device=case.q.device)
    placed, offset = [], 0
    for tensor in tensors:
        heads, head_dim = tensor.shape[2:]
        view = room.as_strided(tensor.shape, (0, row_stride, head_dim, 1), offset)
        view.copy_(tensor)
        placed.append(view)
        offset += heads * head_dim
    assert offset <= row_stride
    return Case(*placed, case.pattern, case.doc_start)


def harmed_by_padding(case: Case) -> list[str]:
    """The results that change when the rows behind the end of the sequence hold NaN instead of zeros."""
    pattern = case.pattern
    every = torch.arange(pattern.num_blocks)
    starts = pad_doc_start(case.doc_start, pattern)
    view = ShardView(pattern, every, k_blocks=every, inline_columns=True, doc_start=starts)
    backend = TritonBackend()
    missing = pattern.num_blocks * pattern.block - pattern.seq_len
    results = []
    for junk in (0.0, float("nan")):
        tensors = (case.q, case.k, case.v, case.dout)
        q, k, v, dout = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, missing), value=junk) for t in tensors)
        out, lse = backend.forward(q, k, v, view, 0.1)
        results.append([out, lse, *backend.backward(dout, q, k, v, out, lse, view, 0.1)])
    names = ("out", "lse", "dq", "dk", "dv")
    return [name for name, a, b in zip(names, *results, strict=True) if not torch.equal(a, b)]
