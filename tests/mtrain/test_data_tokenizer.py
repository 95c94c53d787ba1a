"""Tokenizers: the byte tokenizer is exact, survives a reload, and what is not a tokenizer is an error one can act on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from mtrain.data.documents import read_stdlib
from mtrain.data.retrieval import RetrievalMaker, RetrievalTask
from mtrain.data.symbols import symbols_of, vocabulary
from mtrain.data.tokenizer import KEYS, VALUES, encode_texts, is_byte_tokenizer, load_tokenizer, pad_id
from mtrain.errors import DataError


@pytest.fixture(scope="module")
def word_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE trained here: a stand-in for a hub tokenizer, with no bos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    text = [document.text for _, document in zip(range(30), read_stdlib(), strict=False)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(text, trainer)
    directory = tmp_path_factory.mktemp("words")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>").save_pretrained(directory)
    return directory


def _awkward_texts() -> list[str]:
    rng = random.Random(0)
    letters = (
        [chr(i) for i in range(0x250)] + list("日本語🎉\u200b\ufeff\u2028") + ["  ", "\r\n", "\t", " .", " n't", "'s"]
    )
    return ["", " ", "  leading and trailing  ", "a\x00b", *("".join(rng.choices(letters, k=97)) for _ in range(40))]


def test_ids_are_the_documented_ones() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.is_fast and len(tokenizer) == 388
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257, 258)
    assert tokenizer.convert_tokens_to_ids(["<|ask|>", *KEYS, *VALUES]) == list(range(259, 388))
    assert tokenizer("A\n\xff")["input_ids"] == list("A\n\xff".encode())
    assert tokenizer("a<|k05|>b")["input_ids"] == [97, 265, 98]


def test_round_trip_is_exact_and_the_quick_path_is_the_tokenizer() -> None:
    tokenizer = load_tokenizer("bytes")
    texts = _awkward_texts()
    for text, quick in zip(texts, encode_texts(tokenizer, texts), strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert quick.dtype == np.int64 and quick.tolist() == ids


def test_text_cannot_forge_a_symbol() -> None:
    (ids,) = encode_texts(load_tokenizer("bytes"), ["<|eos|><|k00|>"])
    assert max(ids) < 256


def test_saved_and_reloaded_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained(tmp_path)
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert is_byte_tokenizer(again) and pad_id(again) == 256
        for text in _awkward_texts():
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
            assert again.decode(again(text)["input_ids"]) == text


def test_a_tokenizer_with_words_lends_them_as_symbols(word_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(word_tokenizer_dir))
    assert not is_byte_tokenizer(tokenizer)
    symbols = symbols_of(tokenizer, alphabet=8)
    together = np.concatenate([symbols.keys, symbols.values, symbols.fillers])
    assert len(symbols.keys) == len(symbols.values) == 8 and len(set(together.tolist())) == len(together)
    for index in together:
        assert tokenizer.decode([int(index)]).strip().isalpha()
    with pytest.raises(DataError, match="alphabet 500"):
        symbols_of(tokenizer, alphabet=500)
    assert tokenizer.eos_token_id not in vocabulary(tokenizer, "all")
    for options in ({"alphabet": 8, "haystack": "symbols", "questions": 3}, {"task": "needle", "haystack": "symbols"}):
        sample, _ = RetrievalMaker(tokenizer, RetrievalTask.read(options)).make(np.random.default_rng(0), 300)
        assert len(sample) == 300 and 0 < sample.targets.sum() < 40


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "is not a name"),
        ("./nowhere", "no directory"),
        ("/nowhere/at/all", "no directory"),
        ("a/b/c", "no directory"),
    ],
)
def test_bad_names(name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_tokenizer(name)


def test_a_directory_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(str(tmp_path))


def test_a_config_alone_is_no_tokenizer(tmp_path: Path) -> None:
    """transformers makes one without a vocabulary for some families, which would turn every text into nothing."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(DataError, match="has no vocabulary"):
        load_tokenizer(str(tmp_path))


def test_code_beside_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    config = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError):
        load_tokenizer(str(tmp_path))
    assert not canary.exists()


def test_beside_a_model_of_any_family_it_keeps_its_ids(tmp_path: Path) -> None:
    """AutoTokenizer picks the class by the model's family; that class must not add ids or split text differently."""
    from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config

    text = "héllo\n\tdef f(x): return 12345  # <|k03|><|v07|>"
    ours = load_tokenizer("bytes")
    for config in (Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, Phi3Config):
        directory = tmp_path / config.model_type
        config().save_pretrained(directory)
        ours.save_pretrained(directory)
        loaded = AutoTokenizer.from_pretrained(directory)
        assert len(loaded) == len(ours), config.model_type
        assert loaded(text)["input_ids"] == ours(text)["input_ids"], config.model_type
