"""Models and calls that would be computed wrongly are refused, each by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, MistralConfig

from mtrain.comm import Ring, SingleRing, run_ranks
from mtrain.errors import ModelError
from mtrain.layout import RingLayout
from mtrain.models.attach import attach
from mtrain.models.refuse import refuse
from tests.mtrain.small_models import BLOCK, DENSE, SEQ, SPARSE, config_of, documents, model_of, tokens

REFUSED: list[tuple[str, dict[str, Any], int, str]] = [
    ("mistral", {"sliding_window": 4096}, 1, "sliding_window=4096.*sliding_window=null"),
    ("phi3", {"sliding_window": 64}, 1, "sliding_window=64"),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
        1,
        "layer 1 a sliding_attention",
    ),
    ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, 1, "layer 1 a linear_attention"),
    ("llama", {"attention_chunk_size": 64}, 1, "attention_chunk_size=64"),
    ("llama", {"attn_logit_softcapping": 30.0}, 1, "attn_logit_softcapping=30"),
    ("llama", {"attention_dropout": 0.1}, 1, "attention_dropout=0.1.*0.0"),
    ("llama", {"is_causal": False}, 1, "is_causal=False"),
    ("qwen2", {"num_key_value_heads": 32}, 1, "num_attention_heads=[0-9]+ is no multiple of num_key_value_heads=32"),
    ("qwen2", {"hidden_size": 12, "num_attention_heads": 4, "num_key_value_heads": 4}, 1, "head_dim=3, but rotary"),
    ("llama", {"hidden_size": 4, "head_dim": 1}, 1, "head_dim=1, but rotary"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 2, "'dynamic'.*2 ranks"),
    (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            }
        },
        3,
        "'longrope'.*3 ranks",
    ),
]


@pytest.mark.parametrize(("family", "changes", "world_size", "words"), REFUSED, ids=[case[3][:24] for case in REFUSED])
def test_refusals_name_what_is_in_the_way(family: str, changes: dict[str, Any], world_size: int, words: str) -> None:
    config = config_of(family, **changes)
    with pytest.raises(ModelError, match=words):
        refuse(config, world_size)
    if world_size > 1:
        refuse(config, 1)


def test_unknown_families_are_refused() -> None:
    with pytest.raises(ModelError, match="'gpt2' is not supported.*llama, qwen2, qwen3, mistral, phi3"):
        refuse(AutoConfig.for_model("gpt2"))
    refuse(MistralConfig(sliding_window=None), 8)


def test_attach_refuses() -> None:
    layout = RingLayout.build("striped", SEQ, 1, BLOCK)
    with pytest.raises(ModelError, match="sliding_window=4096"):
        attach(model_of("mistral", sliding_window=4096), DENSE, SingleRing(), layout)
    with pytest.raises(ModelError, match="attach first, wrap afterwards"):
        attach(torch.nn.Linear(2, 2), DENSE, SingleRing(), layout)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="2 ranks"):
        attach(model_of("llama"), DENSE, SingleRing(), RingLayout.build("striped", SEQ, 2, BLOCK))
    with pytest.raises(ModelError, match="blocks of 16"):
        attach(model_of("llama"), DENSE, SingleRing(), RingLayout.build("striped", SEQ, 1, 16))
    with pytest.raises(ModelError, match="rounded to torch.bfloat16"):
        attach(model_of("llama", torch.bfloat16), DENSE, SingleRing(), layout)
    plain = model_of("llama")
    plain.set_attn_implementation("mtrain")
    with pytest.raises(ModelError, match="only after"):
        plain(input_ids=tokens())


CALLS: list[tuple[Callable[[Tensor, Tensor], dict[str, Any]], str]] = [
    (lambda whole, part: {"input_ids": whole}, "got 75 tokens per row.*each of 2 ranks 40"),
    (lambda whole, part: {"input_ids": part, "labels": part}, "shift_labels"),
    (lambda whole, part: {"input_ids": part, "use_cache": True}, "whole sequence on one rank"),
    (lambda whole, part: {"input_ids": part, "doc_start": documents()}, r"expected \[2, 40\]"),
    (lambda whole, part: {"input_ids": part, "attention_mask": torch.tensor([[0] + [1] * 39] * 2)}, "not sharded"),
    (lambda whole, part: {"input_ids": part, "position_ids": torch.arange(40)[None]}, "not those of the layout"),
]


@pytest.mark.parametrize(("arguments", "words"), CALLS, ids=[case[1][:20] for case in CALLS])
def test_calls_that_do_not_fit_the_shard(arguments: Any, words: str) -> None:
    layout, ids = RingLayout.build("striped", SEQ, 2, BLOCK), tokens()
    model = model_of("llama")

    def rank(ring: Ring) -> None:
        mine = attach(copy.deepcopy(model), DENSE, ring, layout)
        mine(**arguments(ids, layout.shard(ids, ring.rank, 1)))

    with pytest.raises(ModelError, match=words):
        run_ranks(rank, 1, 2, timeout=20)


def test_packed_positions_without_documents_are_an_error() -> None:
    model = attach(model_of("llama"), SPARSE, SingleRing(), RingLayout.build("striped", SEQ, 1, BLOCK))
    restart = torch.cat([torch.arange(30), torch.arange(SEQ - 30)]).expand(2, -1)
    with pytest.raises(ModelError, match="doc_start"):
        model(input_ids=tokens(), position_ids=restart)
    starts = (torch.arange(SEQ) >= 30).long().expand(2, -1) * 30
    packed = model(input_ids=tokens(), position_ids=restart, doc_start=starts).logits
    # RoPE is relative: positions within the document and positions in the row give the same model.
    torch.testing.assert_close(packed, model(input_ids=tokens(), doc_start=starts).logits, rtol=1e-3, atol=1e-3)
