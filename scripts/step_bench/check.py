"""Correctness first: the sparse step with a full budget is the dense step, and steps learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtrain.data.loader import Batch
from mtrain.recipe import TopKBudget
from scripts.step_bench.bench import Bench, Contestant, with_budget
from scripts.step_bench.contestants import budget_of

Record = dict[str, Any]
COMPARED = ("loss", "gradient norm", "gradient")
# Largest relative difference of loss, gradient norm and the gradient itself (norm of the difference over all parameters). On the
# CPU, at full width (vocabulary 8192, up to 1K tokens), two exact kernels were 3e-5, 9e-4 and 3.5e-2 apart in bf16 and 24 layers
# (wide biases: the softmax magnifies the rounding of q and k), 1e-7, 8e-8 and 3e-6 in fp32 and 12 layers; a budget of a third
# of the pairs was 2e-3, 8e-2 and 1.3 away.
TOLERANCE = {"fp32": (1e-5, 1e-4, 1e-4), "bf16": (1e-3, 1e-2, 0.12)}
LEARNING_RATE = 1e-4
CONTROL = 0.05


def check(bench: Bench, dense: Contestant, length: int) -> tuple[list[str], Record]:
    """(what is wrong, what was found). The weights are afterwards what they were.

    Full budget: every column and every slash, so the same pairs as dense by way of the sparse kernels. As a control, a budget of
    5 % runs too: were its gradient not far off, the comparison could not see a wrong mask.
    """
    settings, batch = bench.settings, bench.batch(length)
    sparse = Contestant("vertical_slash", settings.attention(), "topk")
    full = with_budget(sparse, settings, TopKBudget(columns=length, slashes=length))
    few = with_budget(sparse, settings, budget_of("topk", CONTROL / 2, length, settings.block))
    truth, gradient = _step(bench, dense, batch)
    found: Record = {"length": length, "dense": truth, "tolerance": TOLERANCE[settings.precision]}
    for name, contestant in (("full", full), ("control", few)):
        values, other = _step(bench, contestant, batch)
        found[f"{name}_density"] = bench.densities()[0]
        found[name] = [abs(x - y) / abs(y) for x, y in zip(values, truth, strict=True)] + [_apart(other, gradient)]
    del gradient, other
    problems = []
    if not found["full_density"] > 1 - 1e-9:
        problems.append(f"the full budget has density {found['full_density']:.4f}, not 1")
    for what, off, limit in zip(COMPARED, found["full"], found["tolerance"], strict=True):
        if not off <= limit:  # also true for NaN
            problems.append(
                f"{what} of the sparse step with a full budget is {off:.1e} off the dense one, allowed {limit:g}"
            )
    if not found["control"][-1] > 2 * found["tolerance"][-1]:
        problems.append(
            f"the gradient of a sparse step is only {found['control'][-1]:.1e} off: the comparison proves nothing"
        )
    for contestant in (dense, few):
        losses = _two_steps(bench, contestant, length)
        found[f"{contestant.name} learns"] = losses
        found.setdefault("waits", {})[contestant.name] = bench.waits(contestant, batch)
        if not losses[1] < losses[0]:
            problems.append(
                f"{contestant.name}: a step took the loss from {losses[0]:.5f} to {losses[1]:.5f}, not down"
            )
    return problems, found


def _step(bench: Bench, contestant: Contestant, batch: Batch) -> tuple[list[float], list[Tensor]]:
    """([loss, gradient norm], the clipped gradients) of a step that changes nothing."""
    gradients: list[Tensor] = []

    def keep(*_: Any) -> None:
        gradients.extend(p.grad.clone() for p in bench.model.parameters() if p.grad is not None)

    hook = bench.optimizer.register_step_pre_hook(keep)
    result = bench.step(contestant, batch, 0.0).result
    hook.remove()
    return [result.loss, result.grad_norm], gradients


def _apart(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """|a - b| / |b| over all parameters."""
    off = sum((a - b).double().square().sum() for a, b in zip(gradients, truth, strict=True))
    return float((off / sum(b.double().square().sum() for b in truth)) ** 0.5)


def _two_steps(bench: Bench, contestant: Contestant, length: int) -> list[float]:
    """Losses before and after one update, on the same row; weights and moments are put back."""
    batch = bench.batch(length)
    before = [p.detach().clone() for p in bench.model.parameters()]
    bench.new_optimizer()
    losses = [bench.step(contestant, batch, LEARNING_RATE).result.loss for _ in range(2)]
    with torch.no_grad():
        for parameter, old in zip(bench.model.parameters(), before, strict=True):
            parameter.copy_(old)
    bench.new_optimizer()
    return losses
