"""Tokenizers: any fast Hugging Face tokenizer, and a byte-level one that is built here without a download.

The byte tokenizer (``tokenizer: bytes``) is a BPE without merges over the byte alphabet of GPT-2 (Radford et al. 2019,
"Language Models are Unsupervised Multitask Learners", section 2.2), so every string survives a round trip exactly.

    ids 0..255    the bytes, in byte order
    ids 256..259  <|pad|> <|bos|> <|eos|> <|ask|>
    ids 260..323  <|k00|> .. <|k63|>   key symbols of the synthetic retrieval task
    ids 324..387  <|v00|> .. <|v63|>   value symbols
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mtrain.errors import DataError

BYTES = "bytes"
NUM_SYMBOLS = 64
ASK = "<|ask|>"
KEYS = tuple(f"<|k{i:02d}|>" for i in range(NUM_SYMBOLS))
VALUES = tuple(f"<|v{i:02d}|>" for i in range(NUM_SYMBOLS))
_PAD, _BOS, _EOS = "<|pad|>", "<|bos|>", "<|eos|>"


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer called ``name``: ``"bytes"``, a local directory, or a hub id.

    Code that comes with a tokenizer is never run (``trust_remote_code`` stays off).
    Raises DataError when nothing usable is found under that name.
    """
    if not isinstance(name, str) or not name.strip():
        raise DataError(
            f"tokenizer: {name!r} is not a name; write `bytes`, a local directory, or a hub id such as Qwen/Qwen2.5-3B"
        )
    if name == BYTES:
        return byte_tokenizer()
    local = Path(name).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise DataError(f"tokenizer: no directory {name!r}; give an existing directory, a hub id, or `bytes`")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (
        Exception
    ) as error:  # transformers raises OSError, ValueError, KeyError and hub errors for one thing: not usable
        where = (
            f"the directory {name!r} holds no tokenizer"
            if local
            else f"no tokenizer {name!r} on this machine or the hub"
        )
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"tokenizer: {where} that loads ({reason}); give a directory with tokenizer.json, a hub id, or `bytes`"
        ) from error
    if not tokenizer.is_fast:
        raise DataError(f"tokenizer: {name!r} has no fast version (tokenizer.json); convert it once, or use `bytes`")
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        # Some families (Qwen2) build a tokenizer from config.json alone; it knows no word and says nothing.
        raise DataError(
            f"tokenizer: {name!r} has no vocabulary (its tokenizer.json is missing); give a directory with tokenizer.json, a "
            "hub id, or `bytes`"
        )
    return tokenizer


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level fast tokenizer with 388 ids (table in the module docstring); needs no file and no network."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    core = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(_byte_letters())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = [_PAD, _BOS, _EOS, ASK, *KEYS, *VALUES]
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        # Bytes leave nothing unknown. It is named all the same, because AutoTokenizer loads a directory by its model's family,
        # and some families (Qwen2) would add an unknown token of their own, one id beyond the model's embedding.
        unk_token=_PAD,
        pad_token=_PAD,
        bos_token=_BOS,
        eos_token=_EOS,
        extra_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether ids 0..255 are the bytes themselves, whatever directory the tokenizer was loaded from."""
    if len(tokenizer) != 260 + 2 * NUM_SYMBOLS:
        return False
    return tokenizer.convert_ids_to_tokens(list(range(256))) == _byte_letters()


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids of each text, int64 [n], with no special token added.

    With the byte tokenizer text that spells a special token (``<|eos|>``) stays plain bytes, so a document can never
    forge a symbol; other tokenizers keep their own rule.
    """
    if is_byte_tokenizer(tokenizer):
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) for text in texts]
    ids = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [np.asarray(row, dtype=np.int64) for row in ids]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id that fills the end of unpacked rows; it is never a target, so any id does when the tokenizer names none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)
    return 0


def _byte_letters() -> list[str]:
    """The printable letter that stands for byte 0, 1, .. 255 in GPT-2's byte alphabet."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    letters = {byte: chr(byte) for byte in plain}
    return [letters[byte] if byte in letters else chr(next(spare)) for byte in range(256)]
