"""Keys and values of the tokens that live on one rank."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Per layer the rotated keys and the values of this rank's tokens, in no particular order.

    Room for the tokens to come is taken at the prefill, so decoding copies nothing; a cache that is filled beyond it
    doubles.

    Args:
        extra: tokens that will be appended after the prefill.
    """

    def __init__(self, extra: int = 0) -> None:
        self.extra = extra
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._held: dict[int, int] = {}

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep the tokens of a prefill: k, v [1, n, K, D]; n may be 0, a rank that holds nothing but padding."""
        self._held[layer] = k.shape[1]
        for store, x in ((self._keys, k), (self._values, v)):
            _, n, heads, head_dim = x.shape
            # Head first, as the products of decoding read it.
            room = torch.empty(heads, n + self.extra, head_dim, dtype=x.dtype, device=x.device)
            room[:, :n] = x[0].transpose(0, 1)
            store[layer] = room

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Keep one more token: k, v [1, 1, K, D]."""
        held = self._held[layer]
        for store, x in ((self._keys, k), (self._values, v)):
            room = store[layer]
            if held == room.shape[1]:
                larger = room.new_empty(room.shape[0], max(2 * held, 1), room.shape[2])
                larger[:, :held] = room
                store[layer] = room = larger
            room[:, held] = x[0, 0]
        self._held[layer] = held + 1

    def get(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values), both [K, held, D]: views, no copies."""
        held = self._held[layer]
        return self._keys[layer][:, :held], self._values[layer][:, :held]

    def held(self, layer: int = 0) -> int:
        """Tokens of this rank in a layer."""
        return self._held[layer]
