"""What a model can do: retrieval accuracy by length and depth, and held-out loss; under dense or under sparse attention."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtrain.comm import SingleRing
from mtrain.data.loader import held_out_rows
from mtrain.data.retrieval import retrieval_prompts
from mtrain.data.tokenizer import load_tokenizer
from mtrain.layout import RingLayout
from mtrain.models import attach
from mtrain.models.build import load_model
from mtrain.recipe import ModelRecipe, Recipe, recipe_from_dict

DEPTH_BINS = 5


@dataclass(frozen=True)
class Subject:
    """A model under one kind of attention.

    Attributes:
        label: how the report names it.
        model: plain Hugging Face directory.
        sparse: attention through mtrain with the recipe's pattern; otherwise plain transformers, dense.
        rope: rope_parameters override, to ask what extended positions do without training.
    """

    label: str
    model: str
    sparse: bool = False
    rope: dict[str, Any] | None = None


@dataclass(frozen=True)
class Exam:
    """What is asked of every subject; the same prompts for all."""

    lengths: tuple[int, ...]
    prompts: int = 16
    final_prompts: int = 40
    pairs: int = 32
    questions: int = 16
    text_rows: int = 16
    seed: int = 2026


@dataclass
class Result:
    """Answers of one subject: accuracy by length, by depth at the last length, text loss (nats per token), mean density."""

    accuracy: dict[int, float] = field(default_factory=dict)
    by_depth: list[float] = field(default_factory=list)
    answers: int = 0
    text_loss: float = 0.0
    density: float | None = None


def measure_all(subjects: Sequence[Subject], exam: Exam, recipe: Recipe, workers: int = 2) -> dict[str, Result]:
    """Every subject, ``workers`` at a time in processes of their own."""
    jobs = [(asdict(subject), asdict(exam), recipe.to_dict()) for subject in subjects]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(_measure_job, jobs))
    return {subject.label: result for subject, result in zip(subjects, results, strict=True)}


def _measure_job(job: tuple[dict[str, Any], dict[str, Any], dict[str, Any]]) -> Result:
    from transformers.utils.logging import disable_progress_bar

    subject, exam, recipe = job
    torch.set_num_threads(1)
    disable_progress_bar()  # the models are tiny, and several load at a time
    return measure(Subject(**subject), Exam(**exam), recipe_from_dict(recipe))


@torch.inference_mode()
def measure(subject: Subject, exam: Exam, recipe: Recipe) -> Result:
    """One subject through the whole exam."""
    tokenizer = load_tokenizer(subject.model)
    final = exam.lengths[-1]
    model = _load(subject, recipe, final)
    result = Result()
    for length in exam.lengths:
        count = exam.final_prompts if length == final else exam.prompts
        prompts = retrieval_prompts(
            tokenizer, length, None, count, exam.seed, pairs=exam.pairs, questions=exam.questions
        )
        right = torch.stack(
            [_answers(model, tokens, at) for tokens, at in zip(prompts.tokens, prompts.at, strict=True)]
        )
        right = right == prompts.answers
        result.accuracy[length] = float(right.double().mean())
        if length == final:
            result.by_depth = by_depth(right, prompts.depths)
            result.answers = right.numel()
    rows = held_out_rows(
        recipe.data,
        tokenizer,
        exam.text_rows,
        final,
        kinds=["python-stdlib"],
        single_document=True,
        seed=exam.seed,
        progress=False,
    )
    densities: list[float] = []
    sums = torch.zeros(2, dtype=torch.float64)
    for tokens, labels in zip(rows.tokens, rows.labels, strict=True):
        sums += _text_loss(model, tokens, labels)
        if subject.sparse:
            densities.append(model.mtrain_context.statistics()["density"])
    result.text_loss = float(sums[0] / sums[1])
    result.density = sum(densities) / len(densities) if densities else None
    return result


def by_depth(right: Tensor, depths: Tensor) -> list[float]:
    """Accuracy in equal depth bins; bool and float64 [prompts, questions], depth 0 = start of the haystack."""
    bins = (depths * DEPTH_BINS).long().clamp(0, DEPTH_BINS - 1)
    return [float(right[bins == index].double().mean()) for index in range(DEPTH_BINS)]


def _load(subject: Subject, recipe: Recipe, length: int) -> Any:
    if not subject.sparse and subject.rope is None:
        # Plain transformers, as a user without mtrain would load it.
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(subject.model, local_files_only=True).eval()
    model = load_model(ModelRecipe(path=subject.model, rope=subject.rope)).eval()
    if subject.sparse:
        layout = RingLayout.build("contiguous", length, 1, recipe.attention.block)
        attach(model, recipe.attention, SingleRing(), layout)
    return model


def _logits(model: Any, tokens: Tensor, keep: Tensor) -> Tensor:
    """Logits [kept, vocab] at some positions of one row; the head never sees the others."""
    hidden = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state
    return torch.nn.functional.linear(hidden[0, keep], model.get_output_embeddings().weight)


def _answers(model: Any, tokens: Tensor, at: Tensor) -> Tensor:
    return _logits(model, tokens, at).argmax(-1)


def _text_loss(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    valid = labels != -100
    logits = _logits(model, tokens, valid)
    loss = torch.nn.functional.cross_entropy(logits.float(), labels[valid], reduction="sum")
    return torch.tensor([float(loss), float(valid.sum())], dtype=torch.float64)


def export_is_plain(directory: Path) -> bool:
    """No trace of mtrain is needed to load the export: its config names a transformers architecture and no custom code."""
    text = (directory / "config.json").read_text()
    return "auto_map" not in text and "mtrain" not in text
