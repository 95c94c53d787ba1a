"""AdamW with decay only where it belongs, and learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math

import torch
from torch import nn

from mtrain.errors import RecipeError

SCHEDULES = ("constant", "linear", "cosine")


def learning_rate(
    step: int, *, peak: float, schedule: str, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0
) -> float:
    """The learning rate of one optimizer step; nothing to save or restore, because nothing is remembered.

    Args:
        step: 0 for the first update. The warm-up is linear and its first step already moves: (step + 1) / warmup_steps.
        peak: the rate right after the warm-up.
        schedule: constant; linear or cosine: from ``peak`` down to ``peak * min_ratio`` at the last step.
        total_steps: updates of the whole run; later steps keep the last rate.

    Raises:
        RecipeError: an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise RecipeError(f"unknown train.schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    decay_steps = max(total_steps - warmup_steps - 1, 1)
    progress = min((step - warmup_steps) / decay_steps, 1.0)
    shape = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (min_ratio + (1.0 - min_ratio) * shape)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two AdamW groups: matrices decay; vectors and scalars (norm weights, biases) do not. Frozen parameters are left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_adamw(
    model: nn.Module, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over `parameter_groups`, in torch's fused form (CPU and CUDA).

    Raises:
        RecipeError: the model has no parameter to train.
    """
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    if not groups:
        raise RecipeError("the model has no trainable parameter: every requires_grad is False")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of the optimizer the rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr
