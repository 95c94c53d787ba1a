"""The exactness matrix: (pattern, layout, schedule, topology, documents, group, backend) against dense masked attention.

One case draws q, k, v and an output gradient, computes the truth with `sparse_kernels.reference_attention` in float64, runs
`ring_attention` on every rank and compares out, lse, dq, dk and dv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from mtrain.attention import ring_attention
from mtrain.comm import Ring, run_ranks
from mtrain.layout import RingLayout, padded_blocks
from mtrain.patterns import PatternPlan, TopK, a_shape_pattern, estimate_vertical_slash
from mtrain.recipe.schema import AttentionRecipe, TopKBudget
from sparse_kernels import SparsePattern, reference_attention

PATTERNS = ("dense", "a_shape", "vertical_slash", "random", "xattention", "moba", "random_columns")
LAYOUTS = ("contiguous", "zigzag", "striped", "balanced", "random")
SCHEDULES = ("ring", "gather")
TOPOLOGIES = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4))
GROUPS = (1, 4, 7)
BACKENDS = ("reference", "cpu")
# Not divisible by the block, by any number of ranks, or by two.
SEQ_LEN, BLOCK, HEAD_DIM = 149, 8, 8
NAMES = ("out", "lse", "dq", "dk", "dv")
# The patterns that are made as in a run.
RECIPES = {
    "xattention": AttentionRecipe(pattern="xattention", block=BLOCK, sink=2, local=5, stride=4, threshold=0.4),
    "moba": AttentionRecipe(pattern="moba", block=BLOCK, sink=2, local=5, chunk=16, top_k=2),
    "random_columns": AttentionRecipe(
        pattern="random_columns", block=BLOCK, sink=2, local=5, budget=TopKBudget(columns=9, slashes=2)
    ),
}


@dataclass(frozen=True)
class Case:
    """One combination of the axes."""

    pattern: str
    layout: str
    schedule: str
    topology: tuple[int, int]
    packed: bool
    group: int
    backend: str
    dtype: torch.dtype = torch.float64

    @property
    def tolerance(self) -> float:
        """1e-10 in float64, 1e-5 in float32 (on inputs of order one)."""
        return 1e-10 if self.dtype == torch.float64 else 1e-5


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of a case and the truth about them; whole sequences, float64."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    doc_start: Tensor
    pattern: SparsePattern
    truth: tuple[Tensor, ...]

    def to(self, device: torch.device) -> Problem:
        """The same problem on another device."""
        q, k, v, dout, doc_start = (t.to(device) for t in (self.q, self.k, self.v, self.dout, self.doc_start))
        return Problem(q, k, v, dout, doc_start, self.pattern.to(device), tuple(t.to(device) for t in self.truth))


def all_cases(dtype: torch.dtype = torch.float64) -> Iterator[Case]:
    """The full matrix, every combination once."""
    axes = (PATTERNS, LAYOUTS, SCHEDULES, TOPOLOGIES, (False, True), GROUPS, BACKENDS)
    for pattern, layout, schedule, topology, packed, group, backend in product(*axes):
        yield Case(pattern, layout, schedule, topology, packed, group, backend, dtype)


@lru_cache(maxsize=64)
def make_problem(pattern: str, packed: bool, group: int, dtype: torch.dtype) -> Problem:
    """The inputs are drawn in the dtype under test, so the truth in float64 sees exactly the same numbers."""
    generator = torch.Generator().manual_seed(17 * group + packed + 5 * PATTERNS.index(pattern))
    batch, kv_heads = 2, 2 if group < 7 else 1
    heads = group * kv_heads

    def draw(count: int) -> Tensor:
        return torch.randn(batch, SEQ_LEN, count, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v, dout = (draw(count).double() for count in (heads, kv_heads, kv_heads, heads))
    doc_start = documents(batch, packed)
    chosen = make_pattern(pattern, q, k, doc_start, generator)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = reference_attention(leaves[0], leaves[1], leaves[2], chosen.to_dense(doc_start))
    gradients = torch.autograd.grad(out, leaves, dout)
    return Problem(q, k, v, dout, doc_start, chosen, (out.detach(), lse.detach(), *gradients))


def documents(batch: int, packed: bool) -> Tensor:
    """int64 [B, S]: one document per row, or several of odd lengths (one of a single token), different in every row."""
    starts = torch.zeros(batch, SEQ_LEN, dtype=torch.int64)
    if packed:
        for row in range(batch):
            for first in (13 + row, 14 + row, 77, 120 - 5 * row):
                starts[row, first:] = first
    return starts


def make_pattern(kind: str, q: Tensor, k: Tensor, doc_start: Tensor, generator: torch.Generator) -> SparsePattern:
    """A pattern of the named kind for these inputs."""
    batch, heads = q.shape[0], q.shape[2]
    if kind == "dense":
        return SparsePattern.dense(batch, heads, SEQ_LEN, BLOCK)
    if kind == "a_shape":
        return a_shape_pattern(batch, heads, SEQ_LEN, BLOCK, sink=3, local=20, doc_start=doc_start)
    if kind == "vertical_slash":
        # Random attention is flat: half of its mass, as a coverage, would lie on nearly all block offsets, a dense mask.
        budget = TopK(columns=tuple(range(9, 9 + heads)), slashes=2)
        return estimate_vertical_slash(q, k, budget=budget, block=BLOCK, sink=2, local=5, probe=16, doc_start=doc_start)
    if kind in RECIPES:
        return PatternPlan(RECIPES[kind], 1).index(0, q, k, doc_start=doc_start)
    assert kind == "random", kind
    blocks = -(-SEQ_LEN // BLOCK)
    columns = torch.rand(batch, heads, SEQ_LEN, generator=generator).argsort(-1)[..., :11].sort(-1).values.int()
    columns[:, ::2, -4:] = SEQ_LEN  # lists of different lengths
    chosen = torch.rand(batch, heads, blocks, blocks, generator=generator) < 0.15
    return SparsePattern(SEQ_LEN, BLOCK, columns=columns, blocks=chosen)


def make_layout(kind: str, ranks: int) -> RingLayout:
    """A layout of the named kind; "balanced" and "random" get an assignment (snake order, and a shuffled one)."""
    if kind not in ("balanced", "random"):
        return RingLayout.build(kind, SEQ_LEN, ranks, BLOCK)
    total = padded_blocks("balanced", SEQ_LEN, ranks, BLOCK)
    order = torch.arange(total) % (2 * ranks)
    assignment = torch.minimum(order, 2 * ranks - 1 - order)
    if kind == "random" or total % (2 * ranks):
        shuffled = torch.randperm(total, generator=torch.Generator().manual_seed(ranks))
        assignment = (torch.arange(total) % ranks)[shuffled]
    return RingLayout.build("balanced", SEQ_LEN, ranks, BLOCK, assignment)


def run_on(ring: Ring, case: Case, problem: Problem, layout: RingLayout) -> list[Tensor]:
    """This rank's shards of out, lse [B, n, H], dq, dk, dv."""

    def mine(x: Tensor) -> Tensor:
        return layout.shard(x, ring.rank, 1)

    leaves = [mine(t).to(case.dtype).requires_grad_() for t in (problem.q, problem.k, problem.v)]
    out, lse = ring_attention(
        leaves[0],
        leaves[1],
        leaves[2],
        problem.pattern,
        ring=ring,
        layout=layout,
        schedule=case.schedule,
        doc_start=mine(problem.doc_start) if case.packed else None,
        backend=case.backend,
        return_lse=True,
    )
    gradients = torch.autograd.grad(out, leaves, mine(problem.dout).to(case.dtype))
    return [out.detach(), lse.transpose(1, 2), *gradients]


def errors_of(case: Case, problem: Problem, layout: RingLayout, shards: list[list[Tensor]]) -> dict[str, float]:
    """Largest absolute error of each of out, lse, dq, dk, dv, given all ranks' shards in rank order."""
    errors = {}
    for index, name in enumerate(NAMES):
        whole = layout.unshard([parts[index] for parts in shards], 1).double()
        truth = problem.truth[index].transpose(1, 2) if name == "lse" else problem.truth[index]
        assert torch.isfinite(whole).all(), (case, name)
        errors[name] = float((whole - truth).abs().max())
    return errors


def check_case(case: Case) -> dict[str, float]:
    """Run a case with threads as ranks; returns the errors by name."""
    problem = make_problem(case.pattern, case.packed, case.group, case.dtype)
    outer, inner = case.topology
    layout = make_layout(case.layout, outer * inner)
    shards = run_ranks(lambda ring: run_on(ring, case, problem, layout), outer, inner)
    return errors_of(case, problem, layout, shards)


def worst_by(
    cases: Iterator[Case],
    key: Callable[[Case], tuple[str, ...]],
    report: Callable[[Case, dict[str, float]], None] | None = None,
) -> dict[tuple[str, ...], dict[str, float]]:
    """Run cases and keep the worst error of each group; ``report`` is told every single result."""
    table: dict[tuple[str, ...], dict[str, float]] = {}
    for case in cases:
        errors = check_case(case)
        row = table.setdefault(key(case), {"cases": 0.0, **dict.fromkeys(NAMES, 0.0)})
        row["cases"] += 1
        for name, value in errors.items():
            row[name] = max(row[name], value)
        if report is not None:
            report(case, errors)
    return table


def covering_cases(dtype: torch.dtype = torch.float64) -> Iterator[Case]:
    """Every (pattern, layout, schedule, topology, documents) once on the CPU backend, the group rotating; every third also on
    the reference backend: the quick test."""
    axes = product(PATTERNS, LAYOUTS, SCHEDULES, TOPOLOGIES, (False, True))
    for index, (pattern, layout, schedule, topology, packed) in enumerate(axes):
        group = GROUPS[(index // 2 + packed) % len(GROUPS)]
        case = Case(pattern, layout, schedule, topology, packed, group, "cpu", dtype)
        yield case
        if index % 3 == 0:
            yield replace(case, backend="reference")
