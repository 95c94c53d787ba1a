"""Small Hugging Face models with attention far from uniform, and rows to feed them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mtrain.recipe.schema import AttentionRecipe, TopKBudget

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3")
SEQ, BLOCK, VOCAB = 75, 8, 61
DENSE = AttentionRecipe(pattern="dense", block=BLOCK)
FEW = TopKBudget(columns=4, slashes=2)
SPARSE = AttentionRecipe(block=BLOCK, budget=FEW, sink=1, local=3, probe=7)
TINY = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def config_of(family: str, **changes: Any) -> Any:
    window = {"sliding_window": None} if family == "mistral" else {}
    return AutoConfig.for_model(family, **{**TINY, **window, **changes})


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config_of(family, **changes), attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough that attention is far from uniform
                parameter.mul_(5.0)
    return model.to(dtype).train()


def tokens(batch: int = 2, length: int = SEQ) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(5))


def documents(length: int = SEQ) -> Tensor:
    starts = torch.zeros(2, length, dtype=torch.int64)
    starts[0, 20:], starts[0, 21:] = 20, 21
    starts[1, 50:] = 50
    return starts
