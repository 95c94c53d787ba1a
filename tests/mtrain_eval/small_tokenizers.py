"""Two small trained tokenizers with merges, unlike each other: bytes with the space before a word, and pieces of a line."""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mtrain_eval.prose import load_essays
from mtrain_eval.sample import SuiteOptions


@lru_cache
def byte_bpe() -> PreTrainedTokenizerFast:
    """As GPT-2's: byte-level BPE; puts <s> before a text and, as some do, </s> after it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _trained(core, pre_tokenizers.ByteLevel.alphabet(), both=True)


@lru_cache
def piece_bpe() -> PreTrainedTokenizerFast:
    """As Llama's: the space is a letter of its own and one is added at the start; puts <s> before a text."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return _trained(core, [chr(code) for code in range(32, 127)] + ["\n"], both=False)


def _trained(core: Tokenizer, alphabet: list[str], both: bool) -> PreTrainedTokenizerFast:
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    essays, _ = load_essays(SuiteOptions(None, seed=99))
    core.train_from_iterator(essays[:6], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if both else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
