"""The standard library's source files as tokens: real text on every machine, without a network.

The files are those of the running interpreter (about 10 MB), so another Python version gives other text.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.data.documents import read_stdlib
from mtrain.data.store import TokenStore, build_store, tokenizer_fingerprint


@dataclass(frozen=True)
class TokenizerKey:
    """Tokenizer compared by what it does to text, not by identity."""

    tokenizer: PreTrainedTokenizerBase

    def __hash__(self) -> int:
        return hash(len(self.tokenizer))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizerKey) and (
            self.tokenizer is other.tokenizer
            or tokenizer_fingerprint(self.tokenizer) == tokenizer_fingerprint(other.tokenizer)
        )


@lru_cache(maxsize=2)
def stdlib_store(key: TokenizerKey) -> TokenStore:
    """The standard library's source files, tokenised once per process."""
    return build_store(read_stdlib(), key.tokenizer, what="the standard library", progress=False)


@lru_cache(maxsize=4)
def stdlib_text(key: TokenizerKey, held_out: bool) -> np.ndarray:
    """All training (or held-out) library source as one array of ids without bos and eos: the haystack."""
    store = stdlib_store(key)
    chosen = np.repeat(store.held_out() == held_out, store.lengths())
    tokens = store.tokens[chosen]
    frame = [i for i in (key.tokenizer.bos_token_id, key.tokenizer.eos_token_id) if i is not None]
    return tokens[~np.isin(tokens, frame)]
