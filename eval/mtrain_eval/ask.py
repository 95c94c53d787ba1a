"""From a sample to an answer: which call of the engine, where the text stops, what is remembered."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.errors import EvalError
from mtrain_eval.sample import Prediction, Sample, Task
from mtrain_eval.tokens import decode_answer


class GenerationLike(Protocol):
    """What generating gives; see mtrain.inference.Generation."""

    @property
    def tokens(self) -> list[int]: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def decode_s(self) -> float: ...
    @property
    def density(self) -> float | None: ...


class ScoresLike(Protocol):
    """What scoring gives; see mtrain.inference.TokenScores."""

    @property
    def logprobs(self) -> np.ndarray: ...
    @property
    def density(self) -> float | None: ...


class EngineLike(Protocol):
    """What the evaluation asks of a model; mtrain.inference.Engine is one. Every call is made by all ranks of its ring."""

    tokenizer: PreTrainedTokenizerBase
    max_positions: int
    last_density: float | None

    def generate(
        self, ids: np.ndarray, max_new_tokens: int, *, stop: Callable[[list[int]], bool] | None = None
    ) -> GenerationLike: ...
    def token_logprobs(self, ids: np.ndarray) -> ScoresLike: ...
    def predict_at(self, ids: np.ndarray, at: Sequence[int]) -> np.ndarray: ...


@dataclass(frozen=True)
class Answer:
    """A prediction and what it took.

    Attributes:
        prediction: what the scorer gets.
        generated: tokens, the end token included; 0 where nothing is generated.
        prefill_s, decode_s: wall seconds.
        density: of the prompt's attention; None: dense.
    """

    prediction: Prediction
    generated: int
    prefill_s: float
    decode_s: float
    density: float | None


def ask(engine: EngineLike, sample: Sample) -> Answer:
    """Ask the model; every rank of its ring makes this call with the same sample."""
    tokenizer = engine.tokenizer
    if sample.kind == "generate":
        stop = make_stop(tokenizer, sample.stop) if sample.stop else None
        found = engine.generate(sample.ids, sample.max_new_tokens, stop=stop)
        text = cut(decode_answer(tokenizer, found.tokens), sample.stop)
        prediction = Prediction(text=text, tokens=tuple(found.tokens))
        return Answer(prediction, len(found.tokens), found.prefill_s, found.decode_s, found.density)
    started = time.perf_counter()
    if sample.kind == "score":
        scores = engine.token_logprobs(sample.ids)
        prediction, density = Prediction(logprobs=scores.logprobs), scores.density
    else:
        tokens = [int(token) for token in engine.predict_at(sample.ids, sample.at)]
        # Special tokens may be the answer here, so they are shown.
        prediction, density = Prediction(str(tokenizer.decode(tokens)), tuple(tokens)), engine.last_density
    return Answer(prediction, 0, time.perf_counter() - started, 0.0, density)


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(ends)] if ends else text


def make_stop(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> Callable[[list[int]], bool]:
    """Is one of the stop strings in what these tokens say? Asked after every token, so only the newest ones are decoded.

    Every token that says anything is at least one byte, so a stop string that the newest token completes lies within so many
    tokens as it has bytes, and a few more for a character that is cut by the window. Tokens that say nothing may hide one
    that long; it then costs time, and `cut` finds it all the same.
    """
    window = 8 + max(len(word.encode()) for word in stop)

    def stops(tokens: list[int]) -> bool:
        text = decode_answer(tokenizer, tokens[-window:])
        return any(word in text for word in stop)

    return stops


def prompt_sha256(sample: Sample) -> str:
    """Everything that is asked: the tokens, how the answer is taken, and what would be right."""
    rest = [sample.kind, sample.max_new_tokens, list(sample.stop), list(sample.at), list(sample.targets)]
    digest = hashlib.sha256(np.ascontiguousarray(sample.ids, dtype="<i8").tobytes())
    digest.update(json.dumps(rest).encode())
    return digest.hexdigest()


def check_sample(sample: Sample) -> None:
    """What every suite promises.

    Raises:
        EvalError: a sample longer than its length (it would be cut without a word), or with nothing to answer.
    """
    used = len(sample.ids) + (sample.max_new_tokens if sample.kind == "generate" else 0)
    name = f"{sample.task}, length {sample.length}, sample {sample.index}"
    if used > sample.length:
        raise EvalError(
            f"{name}: takes {used} tokens, more than its length; this is a mistake of the suite, please report"
        )
    if sample.kind == "generate" and sample.max_new_tokens < 1:
        raise EvalError(f"{name}: asks for an answer of no token; this is a mistake of the suite, please report")


def make_row(task: Task, sample: Sample, answer: Answer) -> dict[str, Any]:
    """The stored form of one answer, scored. Scores that are not finite stay in it; it is the caller who decides."""
    scores = {name: float(value) for name, value in task.score(sample, answer.prediction).items()}
    return {
        "task": task.name,
        "suite": task.suite,
        "length": sample.length,
        "index": sample.index,
        "scores": scores,
        "prediction": answer.prediction.text,
        "targets": list(sample.targets),
        "prompt_tokens": len(sample.ids),
        "generated_tokens": answer.generated,
        "truncated": sample.truncated,
        "depth": sample.depth,
        "prefill_s": round(answer.prefill_s, 4),
        "decode_s": round(answer.decode_s, 4),
        "density": answer.density,
        "prompt_sha256": prompt_sha256(sample),
        "meta": dict(sample.meta),
    }


def all_finite(scores: Mapping[str, float]) -> bool:
    """Can these scores be averaged?"""
    return all(math.isfinite(value) for value in scores.values())
