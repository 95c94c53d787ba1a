"""Correctness first: the sparse step with a full budget is the dense step, and steps learn."""

from __future__ import annotations

from typing import Any

import torch

from mtrain.recipe import TopKBudget
from scripts.step_bench.bench import Bench, Contestant, with_budget
from scripts.step_bench.contestants import budget_of

Record = dict[str, Any]
# Largest relative difference of loss and gradient norm. bf16: attention differs in the last bit of 8, layer by layer.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 2e-2)}
LEARNING_RATE = 1e-4
CONTROL = 0.05


def check(bench: Bench, dense: Contestant, length: int) -> tuple[list[str], Record]:
    """(what is wrong, what was found). The weights are afterwards what they were.

    Full budget: every column and every slash, so the same pairs as dense by way of the sparse kernels. As a control, a budget of
    5 % runs too: how far a step that is not dense lies off says what the comparison can see.
    """
    settings, batch = bench.settings, bench.batch(length)
    sparse = Contestant("vertical_slash", settings.attention(), "topk")
    full = with_budget(sparse, settings, TopKBudget(columns=length, slashes=length))
    few = with_budget(sparse, settings, budget_of("topk", CONTROL / 2, length, settings.block))
    truth = bench.step(dense, batch, 0.0).result
    found: Record = {
        "length": length,
        "dense": [truth.loss, truth.grad_norm],
        "tolerance": TOLERANCE[settings.precision],
    }
    for name, contestant in (("full", full), ("control", few)):
        result = bench.step(contestant, batch, 0.0).result
        found[name] = [_off(result.loss, truth.loss), _off(result.grad_norm, truth.grad_norm)]
        found[f"{name}_density"] = bench.densities()[0]
    problems = []
    if not found["full_density"] > 1 - 1e-9:
        problems.append(f"the full budget has density {found['full_density']:.4f}, not 1")
    for what, off, limit in zip(("loss", "gradient norm"), found["full"], found["tolerance"], strict=True):
        if not off <= limit:  # also true for NaN
            problems.append(
                f"{what} of the sparse step with a full budget is {off:.1e} off the dense one, allowed {limit:g}"
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


def _off(value: float, truth: float) -> float:
    return abs(value - truth) / abs(truth)


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
