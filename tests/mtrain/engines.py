"""Engines on small models, and questions to ask them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from mtrain.comm import Ring, SingleRing, run_ranks
from mtrain.data.tokenizer import byte_tokenizer
from mtrain.inference import Engine
from mtrain.recipe.schema import AttentionRecipe
from tests.mtrain.small_models import VOCAB

WORDS = byte_tokenizer()


def ids_of(length: int, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, VOCAB, length)


def engine_of(model: Any, attention: AttentionRecipe | None, ring: Ring | None = None, **options: Any) -> Engine:
    """An engine on its own copy of the model, which never ends a text by itself."""
    engine = Engine(copy.deepcopy(model), WORDS, attention, ring or SingleRing(), **{"chunk": 16, **options})
    engine.end_tokens = frozenset()
    return engine


def answers(engine: Engine, ids: np.ndarray, new: int, at: list[int]) -> dict[str, Any]:
    """Everything an engine can say about a text."""
    generation = engine.generate(ids, new)
    result = {"tokens": generation.tokens, "density": generation.density, "at": engine.predict_at(ids, at)}
    if len(ids) > 1:
        scores = engine.token_logprobs(ids)
        result |= {"logprobs": scores.logprobs, "greedy": scores.greedy}
    return result


def on_ranks(
    model: Any, attention: AttentionRecipe | None, outer: int, inner: int, *question: Any
) -> list[dict[str, Any]]:
    """The answers of every rank of a ring of threads."""
    return run_ranks(lambda ring: answers(engine_of(model, attention, ring), *question), outer, inner)


def assert_same_answers(got: dict[str, Any], want: dict[str, Any], tolerance: float) -> None:
    assert got["tokens"] == want["tokens"] and got["density"] == want["density"]
    assert np.array_equal(got["at"], want["at"])
    if "logprobs" in want:
        np.testing.assert_allclose(got["logprobs"], want["logprobs"], rtol=tolerance, atol=tolerance)
        assert np.array_equal(got["greedy"], want["greedy"])
