"""The engine on a GPU answers as it does on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtrain.comm import run_ranks
from mtrain.recipe.schema import AttentionRecipe, TopKBudget
from tests.mtrain.engines import answers, assert_same_answers, engine_of, ids_of
from tests.mtrain.small_models import model_of

SHAPE = {"hidden_size": 256, "max_position_embeddings": 1024}  # head_dim 64: the Triton kernels take no 32
SPARSE = AttentionRecipe(block=64, budget=TopKBudget(columns=40, slashes=3), sink=4, local=64)


@pytest.mark.parametrize("attention", [None, SPARSE], ids=["dense", "sparse"])
def test_float32_is_that_of_the_cpu(attention: AttentionRecipe | None) -> None:
    model, ids = model_of("qwen2", **SHAPE), ids_of(700)
    want = engine_of(model, attention).token_logprobs(ids)
    got = engine_of(model.cuda(), attention).token_logprobs(ids)
    assert np.abs(got.logprobs - want.logprobs).mean() < 1e-3  # tf32 may be on; a wrong key shows far above it


@pytest.mark.parametrize("attention", [None, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ring_of_threads(attention: AttentionRecipe | None, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    from tests.mtrain.small_models import config_of

    torch.manual_seed(3)
    # dtype= and not .to(): the rotary frequencies stay float32.
    model = AutoModelForCausalLM.from_config(
        config_of("qwen2", **SHAPE), dtype=dtype, attn_implementation="sdpa"
    ).cuda()
    question = (ids_of(700), 12, [699, 5])
    want = answers(engine_of(model, attention), *question)
    for got in run_ranks(lambda ring: answers(engine_of(model, attention, ring), *question), 1, 2):
        if dtype == torch.float32:
            assert_same_answers(got, want, 1e-3)
        assert len(got["tokens"]) == 12 and np.abs(got["logprobs"] - want["logprobs"]).mean() < 0.05
