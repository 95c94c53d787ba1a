"""The finished model as a plain Hugging Face directory: any transformers loads it, nothing of mtrain is needed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from mtrain.checkpoint import replace_directory, sync_directory
from mtrain.state import model_tensors


def export_model(
    model: nn.Module,
    tokenizer: Any,
    directory: Path,
    *,
    training: dict[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write config.json (with the trained RoPE and length), safetensors, generation config and tokenizer; main process only.

    The directory appears complete or not at all; an earlier export of the same name is replaced at the end.

    Args:
        model: the unwrapped transformers model.
        tokenizer: anything with ``save_pretrained``, or None.
        directory: where it goes.
        training: what to remember about the training, written to mtrain.json (name, steps, recipe).
        tensors: the whole weights, as `mtrain.state.model_tensors` names them; default: the model's own.

    Returns:
        The directory.
    """
    temporary = directory.with_name(f".writing_{directory.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_plain(model, temporary, model_tensors(model) if tensors is None else tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(temporary)
    if training is not None:
        (temporary / "mtrain.json").write_text(json.dumps(training, indent=1, sort_keys=True))
    for path in (path for path in temporary.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(temporary)
    replace_directory(temporary, directory)
    return directory


def save_plain(model: Any, directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """``save_pretrained`` of whole tensors; the saved config, unlike the model's own, has no trace of our attention."""
    config = model.config
    plain = copy.deepcopy(config)
    plain._attn_implementation = None
    plain.use_cache = True
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()  # it would tear the run's own
    try:
        model.config = plain
        model.save_pretrained(directory, state_dict={name: t.cpu() for name, t in tensors.items()})
    finally:
        model.config = config
        if bars:
            hf_logging.enable_progress_bar()
