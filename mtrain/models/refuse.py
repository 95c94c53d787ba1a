"""Models that would be changed silently are refused by name, with what to type instead.

The pattern models one thing: causal attention over all earlier tokens of the document, restricted to columns and
diagonals. A layer that does anything else (a window, chunks, a recurrence, a soft-cap, dropout on the probabilities)
would train another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtrain.errors import ModelError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "phi3")

# These choose their frequencies from the largest position of the local call (transformers/modeling_rope_utils.py,
# dynamic_rope_update), so ranks that hold different shards would rotate with different angles.
LOCAL_ROPE_TYPES = ("dynamic", "longrope")

_SOFT_CAPS = ("attn_logit_softcapping", "final_logit_softcapping", "logit_softcapping")


def refuse(config: Any, world_size: int = 1) -> None:
    """Raise unless every layer of the model is one that the pattern models exactly.

    Args:
        config: a transformers config.
        world_size: ranks of the ring; some RoPE types are exact on one rank only.

    Raises:
        ModelError: names each layer or config key that is in the way and what to set.
    """
    refuse_family(getattr(config, "model_type", None))
    problems = [
        *_head_problems(config),
        *_layer_problems(config),
        *_attention_problems(config),
        *_rope_problems(config, world_size),
    ]
    if problems:
        raise ModelError(
            f"this {config.model_type} model cannot be trained exactly with sparse ring attention: "
            + "; ".join(problems)
        )


def refuse_family(model_type: str | None) -> None:
    """Raise unless ``model_type`` is a family whose attention layers are known to do nothing but causal attention."""
    if model_type not in FAMILIES:
        raise ModelError(
            f"model family {model_type!r} is not supported: its attention layers have not been checked against the "
            f"pattern; use one of {', '.join(FAMILIES)} (model_type in config.json, or model.config.model_type in the "
            "recipe)"
        )


def refuse_call(sliding_window: int | None, dropout: float, layer: int) -> None:
    """The same refusals for one attention call, in case the config was edited after the model had been built."""
    if sliding_window is not None:
        raise ModelError(f"layer {layer} was built with sliding_window={sliding_window}; {_WINDOW_ADVICE}")
    if dropout:
        raise ModelError(f"layer {layer} applies attention dropout {dropout}; {_DROPOUT_ADVICE}")


_WINDOW_ADVICE = (
    "a window hides keys that the pattern may choose. To train without the window set model.config.sliding_window=null "
    'in the recipe, or "sliding_window": null in the config.json of the model'
)
_DROPOUT_ADVICE = "block-sparse kernels have no dropout on the probabilities: set attention_dropout to 0.0"


def _head_problems(config: Any) -> list[str]:
    """Head counts that transformers accepts and the first forward trips over."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if min(heads, kv_heads) < 1 or heads % kv_heads:
        return [
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={kv_heads}: set both in model.config (a family "
            "has a default of its own for the one that is left out)"
        ]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_dim < 2 or head_dim % 2:
        return [
            f"head_dim={head_dim}, but rotary positions turn channels in pairs: set an even head_dim, or make hidden_size "
            f"{config.hidden_size} an even multiple of num_attention_heads {heads}"
        ]
    return []


def _layer_problems(config: Any) -> list[str]:
    problems = []
    layer_types = getattr(config, "layer_types", None) or ()
    for kind in sorted(set(layer_types) - {"full_attention"}):
        layers = [str(i) for i, name in enumerate(layer_types) if name == kind]
        shown = ", ".join(layers[:8]) + (" ..." if len(layers) > 8 else "")
        problems.append(
            f"layer_types makes layer {shown} a {kind} layer, the "
            "pattern models full_attention only (with use_sliding_window=false and no layer_types every layer is one)"
        )
    if getattr(config, "sliding_window", None) is not None:
        problems.append(f"sliding_window={config.sliding_window}: {_WINDOW_ADVICE}")
    if getattr(config, "attention_chunk_size", None) is not None:
        problems.append(
            f"attention_chunk_size={config.attention_chunk_size}: chunked attention is not modelled by the pattern"
        )
    return problems


def _attention_problems(config: Any) -> list[str]:
    problems = []
    for key in _SOFT_CAPS:
        if getattr(config, key, None) is not None:
            problems.append(f"{key}={getattr(config, key)}: soft-capped logits are not modelled by the kernels")
    if getattr(config, "attention_dropout", 0.0):
        problems.append(f"attention_dropout={config.attention_dropout}: {_DROPOUT_ADVICE}")
    if getattr(config, "is_causal", True) is False:
        problems.append("is_causal=False: only causal models have a next-token loss")
    return problems


def _rope_problems(config: Any, world_size: int) -> list[str]:
    kind = rope_type(config)
    if world_size == 1 or kind not in LOCAL_ROPE_TYPES:
        return []
    problem = (
        f"rope_type={kind!r} picks its frequencies from the positions one rank holds, so {world_size} ranks would "
        "disagree: use a static type (model.rope={rope_type: yarn, factor: 4.0}, llama3, linear, or default with a "
        "larger rope_theta), or one rank"
    )
    return [problem]


def rope_type(config: Any) -> str:
    """The RoPE type of a config ("default" when it names none)."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, Mapping):
        return "default"
    return str(parameters.get("rope_type") or parameters.get("type") or "default")
