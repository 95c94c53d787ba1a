"""What a trained model can do, under any attention: recall in paired prompts, held-out loss, and which pairs it never sees."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtrain.checkpoint import list_checkpoints, load_tensors, step_of
from mtrain.comm import SingleRing
from mtrain.data.loader import held_out_rows
from mtrain.data.retrieval import retrieval_prompts
from mtrain.data.tokenizer import load_tokenizer
from mtrain.layout import RingLayout
from mtrain.models import attach
from mtrain.models.build import load_model
from mtrain.models.loss import install_loss_head
from mtrain.recipe import Recipe
from mtrain.recipe.schema import AttentionRecipe, ModelRecipe

BATCH = 16
DEPTHS = 4


def examine(recipe: Recipe, attention: AttentionRecipe, exam: dict[str, int]) -> dict[str, Any]:
    """One trained model under one attention.

    Args:
        recipe: of the finished run.
        attention: how it attends now; a frozen one uses the masks that the run kept.
        exam: prompts, pairs, questions, rows (held-out rows), seed.

    Returns:
        ``correct``: share of right answers of each prompt; ``by_depth``: share by the place of the asked pair, in quarters of
        the haystack; ``held_out_loss``: nats per answer on held-out rows of the recall task as it was trained;
        ``density``: mean over prompts; ``never``: share of far (query, key) position pairs, by log2 distance, that no head
        of a layer had in any prompt, mean over layers.
    """
    directory, size = Path(recipe.output), recipe.train.seq_len
    export = str(directory / "export")
    tokenizer = load_tokenizer(export)
    model: Any = load_model(ModelRecipe(path=export)).eval()
    install_loss_head(model, 1024)
    attach(model, attention, SingleRing(), RingLayout.build("contiguous", size, 1, attention.block))
    if attention.refresh == "frozen" and attention == recipe.attention:
        newest = max(list_checkpoints(directory / "checkpoints"), key=step_of)
        model.mtrain_context.plan.load_state_dict(load_tensors(newest, "patterns_0"))
    model.mtrain_context.step = recipe.train.steps  # past any dense warm-up
    prompts = retrieval_prompts(
        tokenizer,
        size,
        None,
        exam["prompts"],
        exam["seed"],
        pairs=exam["pairs"],
        questions=exam["questions"],
        haystack="symbols",
    )
    with torch.inference_mode():
        right, densities, union = [], [], None
        for tokens, at, answers in _batches(prompts.tokens, prompts.at, prompts.answers):
            hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
            hidden = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))
            logits = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)
            right.append(logits.argmax(-1) == answers)
            densities.append(model.mtrain_context.statistics()["density"])
            index = model.mtrain_context.latest.index
            held = torch.stack([index[layer].to_dense().flatten(0, 1).any(0) for layer in sorted(index)])
            union = held if union is None else union | held
        loss = _held_out_loss(model, recipe, tokenizer, exam)
    correct = torch.cat(right)
    quarter = (prompts.depths * DEPTHS).long().clamp(0, DEPTHS - 1)
    assert union is not None
    return {
        "correct": correct.double().mean(1).tolist(),
        "by_depth": [float(correct[quarter == depth].double().mean()) for depth in range(DEPTHS)],
        "held_out_loss": loss,
        "density": sum(densities) / len(densities),
        "never": never_by_distance(union),
    }


def never_by_distance(union: Tensor) -> list[float]:
    """Share of the causal pairs outside bool [layers, S, S], by distance 1, 2..3, 4..7, ..; mean over layers."""
    size = union.shape[-1]
    row = torch.arange(size)
    distance = row[:, None] - row
    shares = []
    for low in (2**n for n in range((size - 1).bit_length())):
        ring = (distance >= low) & (distance < 2 * low)
        shares.append(1 - float(union[:, ring].double().mean()))
    return shares


def _held_out_loss(model: Any, recipe: Recipe, tokenizer: Any, exam: dict[str, int]) -> float:
    rows = held_out_rows(
        recipe.data,
        tokenizer,
        exam["rows"],
        recipe.train.seq_len,
        kinds=["retrieval"],
        seed=exam["seed"],
        progress=False,
    )
    total, targets = 0.0, 0
    for tokens, labels, doc_start in _batches(rows.tokens, rows.labels, rows.doc_start):
        model.mtrain_context.begin(doc_start if bool(doc_start.any()) else None)
        total += float(model(input_ids=tokens, shift_labels=labels, use_cache=False).loss.double())
        targets += int((labels != -100).sum())
    return total / targets


def _batches(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    for first in range(0, len(tensors[0]), BATCH):
        yield tuple(tensor[first : first + BATCH] for tensor in tensors)
