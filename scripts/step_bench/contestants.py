"""Who takes turns: the best dense kernel of this machine, and vertical-slash with budgets found for the densities asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtrain.data.loader import Batch
from mtrain.recipe import CoverageBudget, TopKBudget
from scripts.kernel_bench import contestants
from scripts.kernel_bench.cases import Shape, inputs
from scripts.kernel_bench.measure import one_round, usable
from scripts.step_bench.bench import Bench, Contestant, Settings, with_budget
from sparse_kernels import SparsePattern, backends, sparse_attention

Record = dict[str, Any]
ROUNDS = 5
NEAR = math.log(1.1)  # a density within 10 % of the one asked for is near enough; the real one is reported
LOOKS = 8  # forwards spent on finding one budget


def choose_dense(settings: Settings, length: int, known: str | None = None) -> tuple[Contestant, list[Record]]:
    """The dense attention with the fastest forward and backward of one layer at ``length``, and what all candidates took.

    Candidates: torch's SDPA kernels and flash-attn as they are, and mtrain's own backends in dense mode. Inputs bfloat16.
    ``known``: the one of this name, whatever it takes (results of another run are added to).
    """
    heads, kv_heads = (int(settings.config[f"num_{x}_heads"]) for x in ("attention", "key_value"))
    tensors = inputs(Shape(heads, kv_heads, settings.head_dim, settings.block), length, settings.device)
    candidates: dict[str, tuple[contestants.Attend, str | None]] = {
        name: (attend, None) for name, attend in contestants.dense(settings.device).items()
    }
    for name, reason in backends(settings.device, torch.bfloat16, settings.head_dim).items():
        if reason is None and name != "reference":
            pattern = SparsePattern.dense(1, heads, length, settings.block).to(settings.device)
            candidates[f"mtrain {name}, dense"] = (_own(pattern, name), name)
    trials: list[Record] = []
    for name, (attend, _) in candidates.items():
        reason = usable(attend, tensors, True)
        trials.append({"name": name, "length": length, **({"not_run": reason} if reason else {"ms": []})})
    alive = [trial for trial in trials if "ms" in trial]
    for _ in range(ROUNDS if settings.device.type == "cuda" else 1):
        for trial in alive:
            trial["ms"].append(sum(x or 0.0 for x in one_round(candidates[trial["name"]][0], tensors, True)))
    for trial in alive:
        trial["ms"] = sorted(trial["ms"])[len(trial["ms"]) // 2]
    if not alive:
        raise RuntimeError(f"no dense attention runs here: {trials}")
    best = known or min(alive, key=lambda trial: trial["ms"])["name"]
    if best not in {trial["name"] for trial in alive}:
        raise RuntimeError(f"the dense attention {best!r} of the results to add to does not run here: {trials}")
    attend, backend = candidates[best]
    recipe = settings.attention(pattern="dense", **({"backend": backend} if backend else {}))
    return Contestant(best, recipe, attend=None if backend else attend), trials


def _own(pattern: SparsePattern, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = sparse_attention(q, k, v, pattern, backend=backend)
        assert isinstance(out, Tensor)
        return out

    return attend


class Budgets:
    """Finds the budget that gives a density; remembers what it found, because it is nearly the same at the next length."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.knobs: dict[tuple[str, float], float] = {}

    def contestant(self, kind: str, wanted: float, batch: Batch) -> Contestant:
        """A vertical-slash attention near the wanted density at this batch's length."""
        settings, length = self.bench.settings, batch.tokens.shape[1]
        base = Contestant(f"{kind} {wanted:.0%}", settings.attention(), kind, wanted)

        def of(knob: float) -> Contestant:
            return with_budget(base, settings, budget_of(kind, knob, length, settings.block))

        first = self.knobs.get((kind, wanted), wanted / 2)
        knob, _ = solve(lambda x: self.bench.look(of(x), batch), first, wanted)
        self.knobs[kind, wanted] = knob
        return of(knob)


def budget_of(kind: str, knob: float, length: int, block: int) -> TopKBudget | CoverageBudget:
    """top-k: the share of the causal pairs that columns get, and the same for slashes (a token distance touches two block
    diagonals). coverage: p; the cap bounds the index on the device and not the density."""
    if kind == "topk":
        columns, slashes = round(knob * length), round(knob * length / (2 * block))
        return TopKBudget(columns=max(1, columns), slashes=max(1, slashes))
    return CoverageBudget(p=knob, cap=max(1, length // 8))


def solve(density_of: Callable[[float], float], knob: float, wanted: float) -> tuple[float, float]:
    """(knob in (0, 1], its density): the nearest to ``wanted`` of a growing function, in at most `LOOKS` looks."""
    low: float | None = None
    high: float | None = None
    seen: dict[float, float] = {}
    for _ in range(LOOKS):
        if knob in seen:
            break
        real = seen[knob] = density_of(knob)
        if abs(math.log(real / wanted)) < NEAR:
            break
        low, high = (knob, high) if real < wanted else (low, knob)
        if low is not None and high is not None:
            knob = math.sqrt(low * high)
        else:
            knob = min(1.0, knob * min(4.0, max(0.25, wanted / real)))
    best = min(seen, key=lambda x: abs(math.log(seen[x] / wanted)))
    return best, seen[best]
