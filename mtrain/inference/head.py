"""The output projection, for a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mtrain.errors import EvalError, ModelError
from sparse_kernels.reference import accumulation_dtype

# Weights in bfloat16 are widened so many elements at a time, so that their float32 twin never exists whole.
WIDEN_ELEMENTS = 1 << 24
# Rows at a time on a GPU, and logits at a time on a CPU, where larger pieces leave the caches and take twice as long.
ROWS = 512
CPU_LOGITS = 1 << 22


class Head:
    """Logits in float32 (float64 stays): a bfloat16 logit has 8 bits, too few to tell near tokens apart.

    Args:
        model: a transformers causal language model.
        chunk: rows whose logits exist at one time; None: 512, on a CPU fewer for a large vocabulary.
    """

    def __init__(self, model: Any, chunk: int | None = None) -> None:
        projection: Any = model.get_output_embeddings()
        if not isinstance(projection, nn.Linear) or getattr(projection, "bias", None) is not None:
            raise ModelError(
                f"inference needs an output projection nn.Linear without bias, this model has {projection!r}"
            )
        if chunk is None:
            cpu = projection.weight.device.type == "cpu"
            chunk = min(ROWS, max(1, CPU_LOGITS // projection.weight.shape[0])) if cpu else ROWS
        if chunk < 1:
            raise EvalError(f"chunk is a number of rows, at least 1; got {chunk}")
        self.projection, self.chunk = projection, chunk

    def __call__(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of rows, logits [chunk, V]) for rows [n, E]."""
        for start in range(0, rows.shape[0], self.chunk):
            piece = slice(start, start + self.chunk)
            yield piece, _product(rows[piece], self.projection.weight)

    def best(self, rows: Tensor) -> Tensor:
        """int64 [n]: the most likely token after each row; of equal ones the lowest id."""
        found = [logits.argmax(-1) for _, logits in self(rows)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=rows.device)


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight.T, summed and kept in the wide dtype."""
    wide = accumulation_dtype(weight.dtype)
    if weight.dtype == wide:
        return rows @ weight.T
    if weight.device.type == "cuda":
        return torch.mm(rows, weight.T, out_dtype=wide)
    step = max(1, WIDEN_ELEMENTS // weight.shape[1])
    return torch.cat([rows.to(wide) @ part.to(wide).T for part in weight.split(step)], 1)
