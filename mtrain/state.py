"""What a run is made of, as named tensors: parameters, optimizer moments; and how to tell whose they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtrain.errors import CheckpointError

# Entries of a config that say how it is run or where it came from, not which function the weights are for.
_INCIDENTAL = {
    "_name_or_path",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "attn_implementation",
    "_attn_implementation",
}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied tensor appears once, under its first name."""
    seen: set[int] = set()
    named = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            named[name] = tensor.detach()
    return named


def _on_device(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device)


def load_model_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], place: Callable[[Tensor, Tensor], Tensor] = _on_device
) -> None:
    """Copy saved values into a model's own tensors.

    Args:
        model: whose tensors they become.
        tensors: whole tensors by name.
        place: (whole tensor, the model's own) -> what is kept here of the first one, such as `World.as_held`.

    Raises:
        CheckpointError: another model's: names the first key or shape that differs.
    """
    mine = model_tensors(model)
    require_same_shapes(
        {name: tuple(t.shape) for name, t in mine.items()}, {n: tuple(t.shape) for n, t in tensors.items()}
    )
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(place(tensors[name], tensor))


def require_same_shapes(mine: Mapping[str, tuple[int, ...]], saved: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError naming the first tensor that is missing, unknown or of another shape."""
    for name, shape in mine.items():
        if name not in saved:
            raise CheckpointError(f"the checkpoint belongs to another model: it has no {name!r} (here {list(shape)})")
        if saved[name] != shape:
            raise CheckpointError(
                f"the checkpoint belongs to another model: {name!r} has shape {list(saved[name])} there, {list(shape)} here"
            )
    for name in saved:
        if name not in mine:
            raise CheckpointError(
                f"the checkpoint belongs to another model: it has {name!r}, which this model does not"
            )


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``moment/parameter name`` -> tensor, independent of the order of parameters and groups."""
    named = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            named[f"{key}/{name}"] = torch.as_tensor(value).detach()
    return named


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    place: Callable[[Tensor, Tensor], Tensor] = _on_device,
) -> None:
    """Inverse of `optimizer_tensors`, with whole tensors; ``place`` as in `load_model_tensors`, beside the parameter.

    Raises:
        CheckpointError: the state names parameters that this model does not train, or leaves some out.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        key, _, name = full_name.partition("/")
        if name not in parameters:
            raise CheckpointError(
                f"the optimizer state has {full_name!r}, but this model does not train a parameter {name!r}"
            )
        state.setdefault(name, {})[key] = tensor
    if state and (missing := sorted(parameters.keys() - state.keys())):
        raise CheckpointError(f"the optimizer state has nothing for the trained parameter {missing[0]!r}")
    for name, entries in state.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: place(tensor, parameter) for key, tensor in entries.items()}


def config_fingerprint(config: Any) -> dict[str, Any]:
    """The entries of a transformers config that decide the function its weights compute (sizes, RoPE, activations)."""
    entries = {key: value for key, value in sorted(config.to_dict().items()) if key not in _INCIDENTAL}
    # Through JSON, so that it compares equal to its saved self (id2label has integer keys, tuples become lists).
    plain = json.loads(json.dumps(entries, default=str))
    assert isinstance(plain, dict)
    return plain


def require_same_config(mine: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise CheckpointError naming the first entry of two `config_fingerprint`s that differs."""
    for key in sorted(mine.keys() | saved.keys()):
        if mine.get(key) != saved.get(key):
            raise CheckpointError(
                f"the checkpoint belongs to another model: config {key!r} is {saved.get(key)!r} there, {mine.get(key)!r} here; "
                "restore the recipe's model section, or choose another output directory"
            )


def changed_keys(mine: Mapping[str, Any], saved: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested dicts, sorted."""
    changed = []
    for key in sorted(mine.keys() | saved.keys()):
        a, b = mine.get(key), saved.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += changed_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append(f"{prefix}{key}")
    return changed
