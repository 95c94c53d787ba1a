"""Alphabets of single tokens for the synthetic tasks, from any tokenizer."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.data.tokenizer import ASK, KEYS, NUM_SYMBOLS, VALUES, encode_texts, is_byte_tokenizer
from mtrain.errors import DataError


@dataclass(frozen=True)
class Symbols:
    """Single-token alphabets, int64: ``keys``, ``values`` and ``fillers``; ``ask`` opens the questions."""

    keys: np.ndarray
    values: np.ndarray
    fillers: np.ndarray
    ask: int


def symbols_of(tokenizer: PreTrainedTokenizerBase, alphabet: int = NUM_SYMBOLS) -> Symbols:
    """``alphabet`` keys and as many values: the tokenizer's own symbols where it has them, else whole lower-case words.

    Raises DataError when the tokenizer has too few of both.
    """
    vocabulary = tokenizer.get_vocab()
    if all(name in vocabulary for name in (ASK, *KEYS[:1], *VALUES[:1])):
        keys, values = (
            [vocabulary[name] for name in names if name in vocabulary][:alphabet] for names in (KEYS, VALUES)
        )
        fillers, ask = list(range(32, 96)), vocabulary[ASK]
    else:
        words = sorted(index for token, index in vocabulary.items() if re.fullmatch(r"[Ġ▁][a-z]{4,}", token))
        keys, values, fillers = words[0 : 2 * alphabet : 2], words[1 : 2 * alphabet : 2], words[2 * alphabet :][:64]
        ask = int(encode_texts(tokenizer, ["?"])[0][-1])
    if min(len(keys), len(values)) < alphabet:
        raise DataError(
            f"data: this tokenizer offers {min(len(keys), len(values))} key symbols, alphabet {alphabet} needs more; lower it"
        )
    first, second, third = (np.array(ids, dtype=np.int64) for ids in (keys, values, fillers))
    return Symbols(first, second, third, ask)


def vocabulary(tokenizer: PreTrainedTokenizerBase, vocab: str) -> np.ndarray:
    """Ids to draw random tokens from: ``all`` but pad, bos and eos, the ``symbols``, or ``text`` (no special token)."""
    if vocab == "symbols":
        symbols = symbols_of(tokenizer)
        return np.concatenate([symbols.keys, symbols.values])
    special = set(tokenizer.all_special_ids)
    if vocab == "text":
        wanted = range(256) if is_byte_tokenizer(tokenizer) else range(len(tokenizer))
        return np.array([i for i in wanted if i not in special], dtype=np.int64)
    frame = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    return np.array([i for i in range(len(tokenizer)) if i not in frame], dtype=np.int64)
