"""A ring of ranks answers exactly what one process answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtrain.comm import ProcessRing, Ring, SingleRing, run_ranks
from mtrain.errors import EvalError
from mtrain.inference.batches import PrefillBatch
from mtrain.inference.cache import KeyValueCache
from mtrain.patterns.plan import PATTERNS
from mtrain.recipe.schema import AttentionRecipe
from mtrain.topology import RingTopology
from tests.mtrain.engines import answers, assert_same_answers, engine_of, ids_of, on_ranks
from tests.mtrain.processes import run_processes
from tests.mtrain.small_models import BLOCK, DENSE, SPARSE, model_of

A_SHAPE = AttentionRecipe(pattern="a_shape", block=BLOCK, sink=2, local=9)
CASES = [
    # ranks, layout, schedule, attention, length
    ((1, 2), "contiguous", "ring", DENSE, 75),
    ((1, 2), "zigzag", "gather", SPARSE, 91),
    ((1, 2), "striped", "ring", SPARSE, 128),
    ((1, 2), "balanced", "ring", SPARSE, 61),
    ((1, 3), "striped", "ring", SPARSE, 91),
    ((1, 3), "zigzag", "ring", DENSE, 50),
    ((1, 3), "contiguous", "gather", A_SHAPE, 77),
    ((2, 2), "striped", "gather", DENSE, 101),
    ((2, 2), "zigzag", "ring", SPARSE, 123),
    ((2, 2), "contiguous", "ring", A_SHAPE, 65),
    # fewer blocks than ranks: some rank holds nothing but padding
    ((1, 4), "striped", "ring", SPARSE, 17),
    ((1, 4), "contiguous", "gather", DENSE, 9),
    ((2, 2), "zigzag", "ring", DENSE, 1),
    ((1, 3), "contiguous", "ring", SPARSE, 2),
]


def case_of(layout: Any, schedule: Any, attention: AttentionRecipe) -> AttentionRecipe:
    return dataclasses.replace(attention, layout=layout, schedule=schedule)


def places(length: int) -> list[int]:
    return [length - 1, length // 2, 0, length // 2]


@pytest.mark.parametrize(("ranks", "layout", "schedule", "attention", "length"), CASES)
def test_ring_equals_one_process_in_float64(ranks, layout, schedule, attention, length) -> None:
    model = model_of("qwen2", torch.float64)
    question = (ids_of(length), 33, places(length))
    want = answers(engine_of(model, attention), *question)
    assert len(want["tokens"]) == 33
    for got in on_ranks(model, case_of(layout, schedule, attention), *ranks, *question):
        assert_same_answers(got, want, 1e-10)


@pytest.mark.parametrize("pattern", sorted(PATTERNS))
def test_every_pattern(pattern: Any) -> None:
    model, attention = model_of("llama", torch.float64), dataclasses.replace(SPARSE, pattern=pattern, block=16)
    question = (ids_of(115), 8, places(115))
    want = answers(engine_of(model, attention), *question)
    for got in on_ranks(model, attention, 1, 3, *question):
        assert_same_answers(got, want, 1e-10)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("attention", [None, SPARSE], ids=["dense", "sparse"])
def test_ring_equals_one_process_in_float32(family: str, attention: AttentionRecipe | None) -> None:
    model = model_of(family)
    question = (ids_of(99), 31, places(99))
    want = answers(engine_of(model, attention), *question)
    assert want["logprobs"].dtype == np.float32
    for ranks in ((1, 2), (1, 3), (2, 2)):
        for got in on_ranks(model, attention, *ranks, *question):
            assert_same_answers(got, want, 1e-5)


def test_padding_asks_no_questions() -> None:
    """Padding rows that shout change not one bit: they are neither probe rows of the estimate, nor keys, nor cached."""
    model = model_of("qwen2")
    with torch.no_grad():
        model.get_input_embeddings().weight[59] *= 50
    ids = np.where(ids_of(67) == 59, 58, ids_of(67))
    attention = dataclasses.replace(SPARSE, probe=BLOCK + 3)
    padded = 0

    def rank(ring: Ring, loud: bool) -> Any:
        engine = engine_of(model, attention, ring)
        forward = engine._forward

        def shouting(tokens: Tensor, positions: Tensor, batch: Any) -> Tensor:
            nonlocal padded
            if loud and isinstance(batch, PrefillBatch):
                padded += int((positions >= len(ids)).sum())
                tokens = torch.where(positions >= len(ids), 59, tokens)
            return forward(tokens, positions, batch)

        engine._forward = shouting  # type: ignore[method-assign]
        return answers(engine, ids, 8, places(67))

    for ranks in ((1, 2), (1, 4)):
        quiet, loud = (run_ranks(lambda ring, loud=loud: rank(ring, loud), *ranks) for loud in (False, True))
        assert_same_answers(loud[0], quiet[0], 0.0)
    assert padded > 0
    assert_same_answers(quiet[0], answers(engine_of(model, attention), ids, 8, places(67)), 1e-5)


def test_cache_stays_where_the_prefill_left_it() -> None:
    """Decoding sends per layer and token one row [H, D + 1] and two numbers for the decision; each rank holds its share."""
    model, length, new = model_of("llama"), 70, 21
    caches: dict[int, KeyValueCache] = {}

    def rank(ring: Ring) -> tuple[int, int, int]:
        engine = engine_of(model, SPARSE, ring)
        step = engine._step

        def spy(token: int, position: int, cache: KeyValueCache) -> Tensor:
            caches[ring.rank] = cache
            before = ring.traffic.copy()
            row = step(token, position, cache)
            sent = ring.traffic - before
            assert dict(sent) == {"all_gather": 2, "all_gather_bytes": 2 * 4 * (8 + 1) * 4}
            return row

        engine._step = spy  # type: ignore[method-assign]
        before = ring.traffic["broadcast_bytes"]
        engine.generate(ids_of(length), new)
        return ring.traffic["broadcast_bytes"] - before, engine.layout_for(length).local_len, engine._layers

    for sent, _, _ in run_ranks(rank, 1, 3):
        assert sent == new * 2 * 8 + 32 * 4  # every decision, and once the last row of the prefill
    held = [caches[index].held(layer) for index in range(3) for layer in range(2)]
    assert sum(held[::2]) == sum(held[1::2]) == length + new - 1  # the last token is never fed back
    assert max(held) - min(held) <= BLOCK + 1


def test_rank_0_decides() -> None:
    """A rank whose logits differ (another device, another rounding) goes along, and only rank 0 is asked to stop."""
    model, ids = model_of("llama"), ids_of(40)
    want = engine_of(model, None).generate(ids, 30).tokens
    asked: list[int] = []

    def rank(ring: Ring) -> list[int]:
        engine = engine_of(model, None, ring)
        if ring.rank:
            engine._head.best = lambda rows: torch.zeros(rows.shape[0], dtype=torch.int64)  # type: ignore[method-assign]

        def stop(tokens: list[int]) -> bool:
            asked.append(ring.rank)
            return len(tokens) == 12

        return engine.generate(ids, 30, stop=stop).tokens

    assert run_ranks(rank, 1, 3) == [want[:12]] * 3
    assert asked == [0] * 12


@pytest.mark.parametrize("difference", ["ids", "length", "new", "at", "call"])
def test_ranks_that_ask_different_things_are_told(difference: str) -> None:
    model = model_of("llama")

    def rank(ring: Ring) -> None:
        engine = engine_of(model, None, ring)
        other = ring.rank == 1 and difference
        if difference in ("at", "call"):
            if other == "call":
                engine.token_logprobs(ids_of(30))
            engine.predict_at(ids_of(30), [3 if other == "at" else 4])
        ids = ids_of(31 if other == "length" else 30, seed=8 if other == "ids" else 7)
        engine.generate(ids, 3 if other == "new" else 4)

    with pytest.raises(EvalError, match="different questions"):
        run_ranks(rank, 1, 2, timeout=20)


def process(length: int) -> list[dict[str, Any]]:
    question = (ids_of(length), 32, places(length))
    ring = ProcessRing.create(RingTopology(1, 3))
    return [answers(engine_of(model_of("qwen2"), attention, ring), *question) for attention in (None, SPARSE)]


def test_processes_over_gloo(tmp_path) -> None:
    length = 83
    question = (ids_of(length), 32, places(length))
    want = [answers(engine_of(model_of("qwen2"), attention, SingleRing()), *question) for attention in (None, SPARSE)]
    for result in run_processes(process, 3, tmp_path, length):
        if isinstance(result, Exception):
            raise result
        for got, expected in zip(result, want, strict=True):
            assert_same_answers(got, expected, 1e-5)
