"""Models are loaded exactly or not at all: weights, seeds, rotary frequencies, vocabulary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mtrain.data.tokenizer import load_tokenizer
from mtrain.errors import ModelError
from mtrain.models.build import adopt_special_tokens, load_model
from mtrain.models.rope import check_rope, frequencies
from mtrain.recipe.schema import ModelRecipe

TINY = {
    "vocab_size": 61, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def recipe(family: str = "qwen2", rope: Any = None, limit: int | None = None, **changes: Any) -> ModelRecipe:
    window = {"sliding_window": None} if family == "mistral" else {}
    config = {"model_type": family, **TINY, **window, **changes}
    return ModelRecipe(config=config, rope=rope, max_position_embeddings=limit)


def saved(path: Path, **changes: Any) -> str:
    load_model(recipe(**changes), seed=4).save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_from_scratch_and_back(family: str, tmp_path: Path) -> None:
    """The same seed gives the same weights, the global generator is left alone, a saved model comes back bit for bit."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second, other = (load_model(recipe(family), seed=seed) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.training and first.config.model_type == family and first.config is not second.config
    first.save_pretrained(tmp_path)
    loaded = load_model(ModelRecipe(path=str(tmp_path), dtype="float32"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), loaded.parameters(), strict=True))


def test_bfloat16_weights_keep_float32_frequencies(tmp_path: Path) -> None:
    model = load_model(ModelRecipe(path=saved(tmp_path, tie_word_embeddings=True), dtype="bfloat16"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(ModelError, match="rounded to torch.bfloat16"):
        check_rope(model.to(torch.bfloat16))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 1e6},
        {"rope_type": "linear", "factor": 4.0},
        YARN,
        {**YARN, "rope_theta": 5e5, "truncate": False, "beta_fast": 16.0, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**YARN, "attention_factor": 1.25},
        LLAMA3,
    ],
    ids=str,
)
def test_override_reaches_the_model(family: str, rope: dict[str, Any], tmp_path: Path) -> None:
    """Frequencies are those of transformers' own formula with the trained length, and survive an export."""
    model = load_model(recipe(family, rope, 4096))
    assert model.config.max_position_embeddings == 4096
    kind = rope.get("rope_type", "default")
    if kind in ("yarn", "llama3"):
        assert model.config.rope_parameters["original_max_position_embeddings"] == 512
    want, scale = frequencies(model.config)
    if kind != "default":
        theirs, their_scale = ROPE_INIT_FUNCTIONS[kind](model.config, torch.device("cpu"))
        torch.testing.assert_close(want, theirs, rtol=1e-5, atol=0)
        assert scale == pytest.approx(their_scale)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, want, rtol=1e-5, atol=0)
    model.save_pretrained(tmp_path)
    again = load_model(ModelRecipe(path=str(tmp_path)))
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_yarn_by_hand() -> None:
    """Fast waves are kept, slow ones divided by the factor, the temperature is 0.1 ln(factor) + 1."""
    model = load_model(recipe("qwen2", {**YARN, "rope_theta": 1e6}, 4096))
    plain = 1e6 ** (-torch.arange(0, 16, 2) / 16)
    got = model.model.rotary_emb.inv_freq / plain
    assert got[0] == 1.0
    assert got[-1] == pytest.approx(1 / 8, rel=1e-5)
    assert model.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(8) + 1)


def test_override_of_a_saved_model(tmp_path: Path) -> None:
    path = saved(tmp_path)
    longer = load_model(ModelRecipe(path=path, rope=YARN, max_position_embeddings=4096))
    assert longer.config.rope_parameters["original_max_position_embeddings"] == 512
    plain = load_model(ModelRecipe(path=path))
    assert not torch.equal(longer.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    longer.save_pretrained(tmp_path / "longer")
    back = ModelRecipe(path=str(tmp_path / "longer"), rope={"rope_type": "default", "rope_theta": 10000.0})
    assert torch.equal(load_model(back).model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("family", "rope", "words"),
    [
        ("qwen2", {"rope_type": "yarm", "factor": 2.0}, "unknown rope_type 'yarm'.*yarn"),
        ("qwen2", {"rope_type": "yarn", "facter": 2.0}, "no key 'facter'.*did you mean 'factor'"),
        ("qwen2", {"rope_type": "yarn"}, "needs factor"),
        ("llama", {"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor, high_freq_factor"),
        ("qwen2", {"rope_type": "yarn", "factor": 1.0}, "changes nothing"),
        ("phi3", YARN, "phi3 does not accept"),
        ("phi3", LLAMA3, "phi3 does not accept"),
    ],
)
def test_overrides_that_would_be_lost(family: str, rope: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(recipe(family, rope, 4096))


def test_dynamic_rope_is_refused_under_sharding_only() -> None:
    dynamic = recipe("llama", {"rope_type": "dynamic", "factor": 2.0})
    load_model(dynamic)
    with pytest.raises(ModelError, match="'dynamic'.*2 ranks"):
        load_model(dynamic, world_size=2)


def test_frequencies_edited_after_loading_are_noticed() -> None:
    model = load_model(recipe())
    model.config.rope_parameters["rope_theta"] = 1e6
    with pytest.raises(ModelError, match="does not use the rope_parameters"):
        check_rope(model)


def test_vocabulary() -> None:
    config = {key: value for key, value in TINY.items() if key != "vocab_size"}
    filled = load_model(ModelRecipe(config={"model_type": "llama", **config}), vocab_size=77)
    assert filled.config.vocab_size == filled.lm_head.weight.shape[0] == 77
    assert load_model(recipe(), vocab_size=60).config.vocab_size == 61
    with pytest.raises(ModelError, match="62 tokens but the model embeds only 61"):
        load_model(recipe(), vocab_size=62)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"model_type": "qwen2", "num_hiden_layers": 2}, "did you mean 'num_hidden_layers'"),
        ({"model_type": "qwen2", "hidden_size": "wide"}, "does not accept model.config.*hidden_size"),
        ({"model_type": "mistral"}, "sliding_window=4096"),
    ],
)
def test_bad_configs(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        load_model(ModelRecipe(config=config))


def test_bad_directories(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_model(ModelRecipe(path=str(tmp_path / "nowhere")))
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(ModelRecipe(path=str(tmp_path)))
    path = saved(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    kept = weights.read_bytes()
    weights.unlink()
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, pickles"):
        load_model(ModelRecipe(path=path))
    weights.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ModelError, match="cannot load model"):
        load_model(ModelRecipe(path=path))


def test_weights_that_do_not_fit_the_config(tmp_path: Path) -> None:
    path = saved(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3').replace(
        '"full_attention",', '"full_attention", "full_attention",', 1))  # fmt: skip
    with pytest.raises(ModelError, match=r"missing keys: model\.layers\.2.*start at random"):
        load_model(ModelRecipe(path=path))
    config.write_text(text.replace('"vocab_size": 61', '"vocab_size": 62'))
    with pytest.raises(ModelError, match="do not fit|cannot load"):
        load_model(ModelRecipe(path=path))


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    path = saved(tmp_path)
    config = tmp_path / "config.json"
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('ran')")
    config.write_text(config.read_text().replace('"model_type": "qwen2"', '"model_type": "evil", "auto_map": '
                      '{"AutoConfig": "modeling_evil.Evil", "AutoModelForCausalLM": "modeling_evil.Evil"}'))  # fmt: skip
    with pytest.raises(ModelError, match="cannot read the config|not supported"):
        load_model(ModelRecipe(path=path))


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_model_from_scratch_ends_where_its_tokenizer_does(family: str) -> None:
    """Llama's default eos is id 2, a plain byte of the byte tokenizer: generate would stop there and nowhere else."""
    tokenizer = load_tokenizer("bytes")
    model = load_model(recipe(family, vocab_size=388))
    adopt_special_tokens(model, tokenizer, {"bos_token_id": 1})
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 258, 256)
