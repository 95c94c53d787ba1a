"""Rotary frequencies: override them for a longer context, and prove that the model really uses what was asked.

Overrides get lost in several ways (Phi-3 renames yarn to longrope; a config-level original_max_position_embeddings wins
over the one in rope_parameters; a bfloat16 cast rounds the frequencies), and a lost override trains a model that cannot
tell far tokens apart.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn

from mtrain.errors import ModelError
from mtrain.models.refuse import rope_type

# What transformers raises for a config it does not like.
CONFIG_ERRORS = (ValueError, KeyError, TypeError, AttributeError, StrictDataclassError)

_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "longrope": {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"},
}  # fmt: skip
_COMMON = {"rope_type", "rope_theta", "partial_rotary_factor"}
_REQUIRED = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def override_rope(config: Any, rope: Mapping[str, Any] | None, max_position_embeddings: int | None) -> Any:
    """A new config with ``rope`` merged into rope_parameters and the position limit replaced.

    The length a yarn or llama3 override scales from is the limit the model was trained with: when neither the override
    nor the model names original_max_position_embeddings, the *old* max_position_embeddings is written down before it is
    replaced (transformers would take the new one, which undoes the scaling).

    Args:
        config: a transformers config; it is not changed.
        rope: keys of rope_parameters to set, or None. When it changes rope_type, only rope_theta and
            partial_rotary_factor of the old parameters are kept.
        max_position_embeddings: tokens, or None to keep the model's own.

    Raises:
        ModelError: unknown or missing keys, or a family that does not keep the parameters it was given.
    """
    settings = copy.deepcopy(config.to_dict())
    merged: dict[str, Any] | None = None
    if rope:
        merged = _merge(
            dict(settings.get("rope_parameters") or {}), dict(rope), int(settings["max_position_embeddings"])
        )
        settings["rope_parameters"] = copy.deepcopy(merged)
        if "original_max_position_embeddings" in merged and "original_max_position_embeddings" in settings:
            settings["original_max_position_embeddings"] = merged["original_max_position_embeddings"]
    if max_position_embeddings is not None:
        settings["max_position_embeddings"] = max_position_embeddings
    try:
        # Rebuilt from plain values, as a reload of the exported model will do, so what is lost there is lost here.
        changed = type(config).from_dict(settings)
    except CONFIG_ERRORS as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"{config.model_type} does not accept rope {merged}, max_position_embeddings "
            f"{settings['max_position_embeddings']}: {reason}"
        ) from error
    if merged is not None:
        _check_kept(changed, merged)
    return changed


def check_rope(model: nn.Module, before: Any | None = None) -> None:
    """Raise unless the frequencies in the model are those of its config, in float32, and an override had an effect.

    Args:
        model: a transformers model.
        before: the config before an override; None: nothing was overridden.

    Raises:
        ModelError: frequencies that are rounded, differ from the config's, or are those from before the override.
    """
    config: Any = model.config
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "inv_freq", None), Tensor)
    ]
    if not found:
        raise ModelError(f"no rotary embedding (a module with inv_freq) was found in {type(model).__name__}")
    for name, module in found:
        inv_freq: Tensor = module.inv_freq
        if inv_freq.dtype not in (torch.float32, torch.float64):
            raise ModelError(
                f"the rotary frequencies ({name}.inv_freq) were rounded to {inv_freq.dtype}, which loses positions in "
                "long contexts: load with dtype=torch.bfloat16 instead of calling model.to(torch.bfloat16)"
            )
        if rope_type(config) in ("dynamic", "longrope"):
            continue  # chosen anew in every forward
        if inv_freq.is_meta:
            continue  # not loaded yet
        want, want_scale = frequencies(config)
        scale = float(getattr(module, "attention_scaling", 1.0))
        if not _same(inv_freq, scale, want, want_scale):
            raise ModelError(
                f"{name} does not use the rope_parameters {config.rope_parameters} of its config: load the model again "
                "instead of editing config.rope_parameters afterwards"
            )
        if before is None or dict(before.rope_parameters or {}) == dict(config.rope_parameters or {}):
            continue
        if rope_type(before) not in ("dynamic", "longrope") and _same(inv_freq, scale, *frequencies(before)):
            raise ModelError(
                f"the rope override {config.rope_parameters} changes nothing: the model rotates as it did before"
            )


def frequencies(config: Any) -> tuple[Tensor, float]:
    """Inverse frequencies [rotary dim / 2], float32, and the factor on cos and sin, of a static RoPE type.

    Our own arithmetic, so that it can disagree with transformers. linear: positions / factor. llama3: long waves
    divided by factor, short ones kept, a linear blend between (Llama 3.1). yarn: the blend is a ramp over dimensions
    (Peng et al., arXiv 2309.00071, equations 17-22).

    Args:
        config: a transformers config with rope_type default, linear, llama3 or yarn.
    """
    given = dict(config.rope_parameters)
    kind, theta = rope_type(config), float(given["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * given.get("partial_rotary_factor", 1.0))
    plain = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if kind == "default":
        return plain.float(), 1.0
    factor = float(given["factor"])
    if kind == "linear":
        return (plain / factor).float(), 1.0
    original = int(given["original_max_position_embeddings"])
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        turns = original * plain / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return (plain * (keep + (1 - keep) / factor)).float(), 1.0
    assert kind == "yarn", kind
    return _yarn(given, plain, dim, theta, factor, original)


def _yarn(
    given: Mapping[str, Any], plain: Tensor, dim: int, theta: float, factor: float, original: int
) -> tuple[Tensor, float]:
    def dimension(turns: float) -> float:
        """Where in the dimensions a wave makes so many turns over the original context."""
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(given.get("beta_fast") or 32), dimension(given.get("beta_slow") or 1)
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - first) / max(last - first, 0.001)).clamp(0, 1)
    scale = given.get("attention_factor")
    if scale is None:
        mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
        scale = (
            _temperature(factor, mscale) / _temperature(factor, all_dim)
            if mscale and all_dim
            else _temperature(factor, 1.0)
        )
    return (plain * (1 - ramp + ramp / factor)).float(), float(scale)


def _temperature(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _same(inv_freq: Tensor, scale: float, want: Tensor, want_scale: float) -> bool:
    if inv_freq.shape != want.shape:
        return False
    # 1e-5: far above float32 rounding of a power, far below any deliberate change.
    return (
        bool(torch.allclose(inv_freq.detach().cpu().float(), want, rtol=1e-5, atol=0))
        and abs(scale - want_scale) <= 1e-5
    )


def _merge(old: dict[str, Any], rope: dict[str, Any], old_limit: int) -> dict[str, Any]:
    old_kind = str(old.get("rope_type") or old.get("type") or "default")
    kind = str(rope.get("rope_type", old_kind))
    if kind not in _KEYS:
        raise ModelError(f"unknown rope_type {kind!r} in model.rope; choose one of {', '.join(_KEYS)}")
    allowed = sorted(_COMMON | _KEYS[kind])
    for key in rope:
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"model.rope has no key {key!r} for rope_type {kind!r} (keys: {', '.join(allowed)}){hint}")
    merged = {
        key: value for key, value in old.items() if kind == old_kind or key in ("rope_theta", "partial_rotary_factor")
    }
    merged.update(rope, rope_type=kind)
    missing = [key for key in _REQUIRED.get(kind, ()) if key not in merged]
    if missing:
        raise ModelError(f"rope_type {kind!r} in model.rope needs {', '.join(missing)}")
    if "original_max_position_embeddings" in _KEYS[kind]:
        merged.setdefault("original_max_position_embeddings", old.get("original_max_position_embeddings", old_limit))
    return merged


def _check_kept(config: Any, merged: Mapping[str, Any]) -> None:
    held = dict(config.rope_parameters or {})
    for key, value in merged.items():
        if held.get(key) != value:
            raise ModelError(
                f"{config.model_type} turns rope {key}={value!r} into {held.get(key)!r}, so the override would be "
                "lost; use rope_type: default with a larger rope_theta for this family"
            )
