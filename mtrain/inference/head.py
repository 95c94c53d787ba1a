"""The output projection, for a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mtrain.errors import ModelError
from sparse_kernels.reference import accumulation_dtype


class Head:
    """Logits in float32 (float64 stays): a bfloat16 logit has 8 bits, too few to tell near tokens apart.

    Args:
        model: a transformers causal language model.
        chunk: rows whose logits exist at one time.
    """

    def __init__(self, model: Any, chunk: int) -> None:
        projection = model.get_output_embeddings()
        if not isinstance(projection, nn.Linear) or projection.bias is not None:
            raise ModelError(
                f"inference needs an output projection nn.Linear without bias, this model has {projection!r}"
            )
        self.projection: nn.Linear = projection
        self.chunk = chunk

    def __call__(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yields (slice of rows, logits [chunk, V]) for rows [n, E]."""
        weight = self.projection.weight
        wide = accumulation_dtype(weight.dtype)
        fused = weight.dtype != wide and weight.device.type == "cuda"
        if not fused:
            weight = weight.to(wide)
        for start in range(0, rows.shape[0], self.chunk):
            piece = slice(start, start + self.chunk)
            if fused:
                yield piece, torch.mm(rows[piece], weight.T, out_dtype=wide)
            else:
                yield piece, rows[piece].to(wide) @ weight.T

    def best(self, rows: Tensor) -> Tensor:
        """int64 [n]: the most likely token after each row; of equal ones the lowest id."""
        found = [logits.argmax(-1) for _, logits in self(rows)]
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=rows.device)
