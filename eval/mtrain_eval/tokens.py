"""Text to tokens as the model was trained to see it."""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> np.ndarray:
    """int64 [n]: the text with the special tokens that the tokenizer itself puts before a text, and none after it.

    A text that already begins with the beginning token does not get another. An end token that a tokenizer appends would
    end the prompt before the answer, so it is taken off.
    """
    ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if eos is not None and eos != bos and ids and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return np.asarray(ids, dtype=np.int64)


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a prompt, special ones included: the number that a length limits."""
    return len(encode_prompt(tokenizer, text))


def decode_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int] | tuple[int, ...]) -> str:
    """Generated tokens as text, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
