"""What is traced: models, patterns and layouts; the check that comes first; the measurement of one case."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mtrain.balance import Forecast, imbalance, measure, solve, tile_density, work
from mtrain.layout import RingLayout
from mtrain.topology import RingTopology
from scripts.kernel_bench.cases import Shape, inputs, vertical_slash
from scripts.ring_trace_parts.replay import AFTER, BEFORE, COLUMNS, Label, RankRun, World, compilations, run_rank
from sparse_kernels import ShardView, SparsePattern, backends, reference_attention, resolve_backend
from sparse_kernels.accuracy import dense_by_rows, two_rules

FLOP_FORMULA = (
    "FLOP of a (rank, step) = 4 x D x area forward, 10 x D x area backward; area = computed tile area summed over query heads "
    "(mtrain.balance.work): b^2 per selected tile, the diagonal one included, and b per (query block, column) outside them"
)
ROWS_ALLOWED = 2**-6  # of the largest value, at full length, where the whole result has no float64 twin
Record = dict[str, Any]


class WrongResultError(RuntimeError):
    """A case whose result is wrong: its times are worth nothing."""


@dataclass(frozen=True)
class Model:
    """What a training step consists of besides attention, from the model's config.json on the Hugging Face hub."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    shape: Shape

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrix products of one layer: q, k, v, o and the gated MLP."""
        heads = (2 * self.shape.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
        return self.hidden * heads + 3 * self.hidden * self.intermediate

    def linear_flop(self, tokens: int) -> int:
        """FLOP of one step's matrix products: 8 per weight of the layers (6, and 2 for recomputation), 6 per weight of the head."""
        return tokens * (8 * self.layers * self.layer_parameters + 6 * self.hidden * self.vocabulary)


MODELS = {
    "qwen2.5-3b": Model("Qwen2.5-3B", 36, 2048, 11008, 151936, Shape(16, 2, 128, 128)),
    "llama-3.1-8b": Model("Llama-3.1-8B", 32, 4096, 14336, 128256, Shape(32, 8, 128, 128)),
    "tiny": Model("tiny", 2, 64, 128, 256, Shape(4, 2, 16, 64)),
}


@dataclass(frozen=True)
class Case:
    """One layer of a model at one length, under one pattern (density 1: dense), in one layout."""

    model: str
    length: int
    density: float
    layout: str

    @property
    def shape(self) -> Shape:
        """Heads and block."""
        return MODELS[self.model].shape


def layout_of(case: Case, pattern: SparsePattern, topology: RingTopology) -> RingLayout:
    """The case's layout; balanced is solved for this very pattern, as for a step that repeats the last one."""
    if case.layout != "balanced":
        return RingLayout.build(case.layout, case.length, topology.world_size, case.shape.block)
    plan = solve(Forecast.of(measure(pattern), case.length, case.shape.block), topology)
    return RingLayout.build("balanced", case.length, topology.world_size, case.shape.block, assignment=plan.owner)


def bytes_needed(case: Case, ranks: int) -> int:
    """Device memory of a case, columns apart: q and dout whole, k and v whole and as shards, and one rank's float32 work."""
    shape = case.shape
    whole = case.length * shape.head_dim * 2 * (2 * shape.heads + 2 * 2 * shape.kv_heads)
    # q, dout, out and dq of a rank twice over in float32; per shard at most four pairs of dk, dv at a time.
    rank = case.length // ranks * shape.head_dim * 4 * (2 * 4 * shape.heads + 4 * 2 * shape.kv_heads)
    return whole + rank


def too_large(case: Case, topology: RingTopology, device: torch.device) -> str | None:
    """None if the case fits into the device's memory, else why not."""
    needed = bytes_needed(case, topology.world_size)
    if device.type != "cuda" or needed <= 0.9 * torch.cuda.get_device_properties(device).total_memory:
        return None
    return f"{case} needs about {needed / 2**30:.0f} GiB of device memory"


# ---------------------------------------------------------------------------------------------------------------- correctness


def check(case: Case, topology: RingTopology, backend: str, device: torch.device) -> list[str]:
    """Replay a ring of this case's pattern and layout at the case's length; what is wrong with it against float64."""
    pattern, _ = vertical_slash(case.shape, case.length, case.density)
    layout, pattern = layout_of(case, pattern, topology), pattern.to(device)
    q, k, v, dout = (t.detach() for t in inputs(case.shape, case.length, device))
    world = World.of(k, v, pattern, layout, topology, collect=True)
    runs = [run_rank(rank, q, dout, world, pattern, backend) for rank in range(topology.world_size)]
    out, dq = (layout.unshard([getattr(run, name) for run in runs], 1) for name in ("out", "dq"))
    dk, dv = (t.to(k.dtype) for t in world.key_gradients(pattern))
    truth, plain = (dense_by_rows(q, k, v, dout, pattern, dtype=dtype) for dtype in (torch.float64, q.dtype))
    problems = []
    for name, found, at in zip(("out", "dq", "dk", "dv"), (out, dq, dk, dv), (0, 2, 3, 4), strict=True):
        problem = two_rules(found, truth[at], plain[at], gradient=at > 0)
        if problem:
            problems.append(f"{case}: {name}: {problem}")
    return problems


def check_rows(run: RankRun, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, pattern: SparsePattern) -> list[str]:
    """out and dq of the last query block at full length, last key-value head, given the run of the rank that owns the block.

    Every layout keeps a rank's blocks in ascending order, so these are the last rows of the run.
    """
    group, block = q.shape[2] // k.shape[2], pattern.block
    rows, heads = slice(q.shape[1] - block, q.shape[1]), slice(q.shape[2] - group, q.shape[2])
    every = torch.arange(pattern.num_blocks)
    view = ShardView(pattern.select(heads), every[-1:], k_blocks=every, inline_columns=True)
    leaf = q[:, rows, heads].double().requires_grad_()
    truth, _ = reference_attention(leaf, k[:, :, -1:].double(), v[:, :, -1:].double(), view.mask())
    wanted = truth.detach(), torch.autograd.grad(truth, leaf, dout[:, rows, heads].double())[0]
    problems = []
    for name, found, right in zip(("out", "dq"), (run.out, run.dq), wanted, strict=True):
        error, limit = (
            float((found[:, -block:, heads].double() - right).abs().max()),
            ROWS_ALLOWED * float(right.abs().max()),
        )
        if not error <= limit:
            problems.append(f"last rows of {name}: largest error {error:.3g}, allowed {limit:.3g}")
    return problems


# ------------------------------------------------------------------------------------------------------------------ measuring


def trace(case: Case, topology: RingTopology, backend: str, device: torch.device, seconds: float) -> Record:
    """Times of every (rank, step) of a case in milliseconds, medians over rounds.

    The rank with the last block goes first, for the check and to warm up; where that promises a short round, a whole round is
    thrown away. A run in which a kernel was compiled is repeated. Rounds are added while they fit into ``seconds``.

    Raises:
        WrongResultError: the last rows are not those of float64.
    """
    pattern, cells = vertical_slash(case.shape, case.length, case.density)
    layout = layout_of(case, pattern, topology)
    areas = work(pattern, layout, topology)
    density = tile_density(pattern)
    pattern = pattern.to(device)
    q, k, v, dout = (t.detach() for t in inputs(case.shape, case.length, device))
    world = World.of(k, v, pattern, layout, topology, collect=False)
    last = int(layout.owner[pattern.num_blocks - 1])
    first = _settled(last, q, dout, world, pattern, backend)
    problems = check_rows(first, q, k, v, dout, pattern)
    if problems:
        raise WrongResultError(f"WRONG RESULTS, so no time is shown: {case}: " + "; ".join(problems))
    ranks = range(topology.world_size)
    if len(ranks) * (sum(first.forward.values()) + sum(first.backward.values())) * 1e-3 < seconds / 3:
        for rank in ranks:
            run_rank(rank, q, dout, world, pattern, backend)
    del first
    begin, rounds = time.perf_counter(), 0
    times: list[list[RankRun]] = [[] for _ in ranks]
    while not rounds or (time.perf_counter() - begin) * (rounds + 1) / rounds <= seconds:
        for rank, taken in enumerate(times):
            run = _settled(rank, q, dout, world, pattern, backend)
            taken.append(RankRun(run.forward, run.backward, out=q[:0], dq=q[:0]))
        rounds += 1
    shard, name = world.shards[0][0], resolve_backend(backend, device, q.dtype, q.shape[-1]).name
    rows = 0 if world.rows is None else world.rows.numel()
    return {
        **asdict(case), "backend": name, "outer": topology.outer, "inner": topology.inner, "rounds": rounds,
        "tile_density": density, "cells": cells, "area": areas.sum().item(), "area_imbalance": imbalance(areas),
        "kv_bytes": 2 * shard.numel() * shard.element_size(), "gradient_bytes": 2 * shard.numel() * 4,
        "row_bytes": rows * shard.element_size(), "row_gradient_bytes": rows * 4,
        "forward": _table([[run.forward for run in taken] for taken in times]),
        "backward": _table([[run.backward for run in taken] for taken in times]),
    }  # fmt: skip


def _settled(rank: int, q: Tensor, dout: Tensor, world: World, pattern: SparsePattern, backend: str) -> RankRun:
    """A run of the rank in which nothing was compiled."""
    for _ in range(4):
        with compilations(q.device) as compiled:
            run = run_rank(rank, q, dout, world, pattern, backend)
        if not compiled:
            return run
    raise RuntimeError(f"Triton compiles anew in every run of rank {rank} of {world.layout.kind}")


def _table(times: list[list[dict[Label, float]]]) -> Record:
    """Medians over rounds as lists by rank: "steps" [W, W], and [W] each for what surrounds them."""
    steps = range(len(times))

    def median(rank: int, label: Label) -> float:
        return float(f"{statistics.median(run.get(label, 0.0) for run in times[rank]):.4g}")

    table: Record = {name: [median(rank, name) for rank in steps] for name in (BEFORE, COLUMNS, AFTER)}
    table["steps"] = [[median(rank, step) for step in steps] for rank in steps]
    return table


def quickest_dense(case: Case, topology: RingTopology, device: torch.device) -> list[str]:
    """The backends that can run a dense case here, quickest first at the last rank's share: who sparse has to beat."""
    shape, length = case.shape, case.length
    found = backends(device, torch.bfloat16, shape.head_dim)
    usable = [name for name, reason in found.items() if reason is None and name != "reference"]
    if len(usable) == 1:
        return usable
    pattern, _ = vertical_slash(shape, length, case.density)
    layout, pattern = layout_of(case, pattern, topology), pattern.to(device)
    q, k, v, dout = (t.detach() for t in inputs(shape, length, device))
    world = World.of(k, v, pattern, layout, topology, collect=False)
    spent = {}
    for name in usable:
        taken = [run_rank(topology.world_size - 1, q, dout, world, pattern, name) for _ in range(3)][1:]
        spent[name] = min(sum(run.forward.values()) + sum(run.backward.values()) for run in taken)
    return sorted(usable, key=lambda name: spent[name])


def linear_rate(model: Model, tokens: int, device: torch.device) -> float:
    """FLOP/s of the MLP's first product in bfloat16, measured here: the speed assumed of all matrix products."""
    x = torch.randn(tokens, model.hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(model.hidden, model.intermediate, device=device, dtype=torch.bfloat16)
    taken = []
    for _ in range(7):
        begin = _wall(device)
        x @ weight
        taken.append(_wall(device) - begin)
    return 2 * tokens * model.hidden * model.intermediate / statistics.median(taken[2:])


def _wall(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
