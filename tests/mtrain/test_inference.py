"""One process: the engine says what the plain model of transformers says, and refuses what it cannot do."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mtrain.comm import SingleRing
from mtrain.data.tokenizer import byte_tokenizer
from mtrain.errors import EvalError, ModelError
from mtrain.export import export_model
from mtrain.inference import Engine, load_engine
from mtrain.inference import batches as batches_module
from mtrain.inference import head as head_module
from mtrain.inference.batches import attend_cached, merge_partial
from mtrain.inference.cache import KeyValueCache
from mtrain.layout import RingLayout
from mtrain.models.attach import attach
from sparse_kernels.reference import reference_attention
from tests.mtrain.engines import answers, assert_same_answers, engine_of, ids_of
from tests.mtrain.small_models import BLOCK, DENSE, FAMILIES, SPARSE, VOCAB, config_of, model_of

NO_END = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def expected(model: Any, ids: np.ndarray, new: int, at: list[int], **options: Any) -> dict[str, Any]:
    """What transformers says: logits of the whole text, and generate(), with these options."""
    text = torch.from_numpy(ids)[None]
    model = model.eval()
    with torch.no_grad():
        logits = model(input_ids=text, use_cache=False).logits[0]
        options = {"attention_mask": torch.ones_like(text), "max_new_tokens": new, **NO_END, **options}
        tokens = model.generate(text, **options)[0, len(ids) :]
    scores = logits.log_softmax(-1)[:-1].gather(1, text[0, 1:, None])[:, 0]
    best = logits.argmax(-1)
    return {
        "tokens": tokens.tolist(),
        "density": None,
        "at": best[at].numpy(),
        "logprobs": scores.numpy(),
        "greedy": (best[:-1] == text[0, 1:]).numpy(),
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_dense_is_plain_transformers(family: str, kv_heads: int) -> None:
    model, ids = model_of(family, num_key_value_heads=kv_heads), ids_of(75)
    want = expected(copy.deepcopy(model), ids, 34, [74, 0, 30])
    for attention in (None, DENSE):
        assert_same_answers(answers(engine_of(model, attention), ids, 34, [74, 0, 30]), want, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [3, 75, 128])
def test_sparse_prefill_is_the_attached_model(family: str, length: int) -> None:
    """Log-likelihoods of the attached model's own forward; generation with its dense decoding steps."""
    model, ids = model_of(family), ids_of(length)
    layout = RingLayout.build("contiguous", length, 1, BLOCK)
    attached = attach(copy.deepcopy(model), SPARSE, SingleRing(), layout).eval()
    want = expected(attached, ids, 33, [length - 1])
    with torch.no_grad():
        attached(input_ids=torch.from_numpy(ids)[None])
    density = attached.mtrain_context.statistics()["density"]
    got = answers(engine_of(model, SPARSE), ids, 33, [length - 1])
    assert got["density"] == pytest.approx(density, abs=1e-12) and (length < 75 or density < 0.8)
    assert_same_answers(got, want | {"density": got["density"]}, 1e-5)


def test_warm_up_of_the_training_is_over() -> None:
    attention = dataclasses.replace(SPARSE, dense_warmup_steps=100, refresh="frozen", dense_first_layers=1)
    engine = engine_of(model_of("qwen2"), attention)
    first = engine.token_logprobs(ids_of(90, seed=1))
    assert first.density is not None and 0.5 < first.density < 0.9
    engine.token_logprobs(ids_of(90, seed=2))
    again = engine.token_logprobs(ids_of(90, seed=1))
    assert np.array_equal(first.logprobs, again.logprobs)  # every prompt has an estimate of its own


def test_a_model_of_the_same_config_keeps_its_attention() -> None:
    config = config_of("llama")
    one, other = (AutoModelForCausalLM.from_config(config, attn_implementation="sdpa") for _ in range(2))
    other.config = one.config
    Engine(one, byte_tokenizer(), SPARSE, SingleRing())
    assert other.config._attn_implementation == "sdpa"


def test_end_tokens_and_stop() -> None:
    engine = engine_of(model_of("llama"), None)
    ids = ids_of(30)
    tokens = engine.generate(ids, 40).tokens
    assert len(tokens) == 40
    engine.end_tokens = frozenset([tokens[5], VOCAB + 1])
    first = tokens.index(tokens[5])
    assert engine.generate(ids, 40).tokens == tokens[: first + 1]  # the end token is the last one
    engine.end_tokens = frozenset()
    seen: list[list[int]] = []

    def stop(found: list[int]) -> bool:
        seen.append(found)
        return len(found) == 4

    result = engine.generate(ids, 40, stop=stop)
    assert result.tokens == tokens[:4] and seen == [tokens[: n + 1] for n in range(4)]
    assert engine.generate(ids, 1).tokens == tokens[:1]
    assert result.prefill_s > 0 and result.decode_s > 0


@pytest.mark.parametrize(
    ("generation", "config", "ends"), [([5, 7], 9, {5, 7}), (4, 9, {4}), (None, [9], {9}), (None, None, {258})]
)
def test_the_model_says_what_ends_a_text(generation: Any, config: Any, ends: set[int]) -> None:
    model = model_of("llama")
    model.generation_config.eos_token_id, model.config.eos_token_id = generation, config
    assert Engine(model, byte_tokenizer(), None, SingleRing()).end_tokens == ends


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_no_more_logits_than_a_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    product = head_module._product
    monkeypatch.setattr(head_module, "_product", lambda x, w: (rows.append(x.shape[0]), product(x, w))[1])
    model, ids = model_of("llama"), ids_of(75)
    want = engine_of(model, None, chunk=75).token_logprobs(ids)
    rows.clear()
    engine = engine_of(model, None, chunk=chunk)
    np.testing.assert_allclose(engine.token_logprobs(ids).logprobs, want.logprobs, rtol=1e-6, atol=1e-6)
    assert max(rows) <= chunk and sum(rows) == 75
    rows.clear()
    engine.generate(ids, 5)
    engine.predict_at(ids, [3, 4])
    assert sum(rows) == 5 + 2


def test_default_chunk_keeps_logits_small() -> None:
    chunks = [engine_of(model_of("llama", vocab_size=vocab), None, chunk=None)._head.chunk for vocab in (61, 1 << 15)]
    assert chunks == [512, 128]


def test_bfloat16_keeps_float32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and cache in bfloat16; head, scores and log-softmax in float32, widened in parts."""
    model, ids = model_of("qwen2", torch.bfloat16), ids_of(60)
    for name in ("inv_freq", "original_inv_freq"):
        setattr(model.model.rotary_emb, name, model_of("qwen2").model.rotary_emb.inv_freq)
    engine = engine_of(model, None)
    whole = engine.token_logprobs(ids), engine.generate(ids, 20).tokens
    for module in (head_module, batches_module):
        monkeypatch.setattr(module, "WIDEN_ELEMENTS", 100)
    parts = engine.token_logprobs(ids), engine.generate(ids, 20).tokens
    np.testing.assert_allclose(parts[0].logprobs, whole[0].logprobs, rtol=1e-6, atol=1e-6)
    assert parts[1] == whole[1]
    plain = copy.deepcopy(model).eval().requires_grad_(False)
    with torch.no_grad():
        hidden = plain.model(input_ids=torch.from_numpy(ids)[None], use_cache=False).last_hidden_state[0]
    logits = hidden.float() @ plain.lm_head.weight.float().T
    want = logits.log_softmax(-1)[:-1].gather(1, torch.from_numpy(ids)[1:, None])[:, 0]
    assert np.abs(whole[0].logprobs - want.numpy()).mean() < 0.15  # what bfloat16 leaves of attention in another order
    assert len({float(x) for x in whole[0].logprobs}) > 55  # 8 bits would give the same few numbers


ROPES = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 48,
        "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 5.0, 8.0],
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "length"), [("dynamic", 70), ("dynamic", 41), ("longrope", 30), ("longrope", 90)])
def test_rope_that_looks_at_the_length(kind: str, length: int) -> None:
    """Generation across the turning point of longrope is that of transformers, and no question changes a later answer."""
    changes: dict[str, Any] = {"rope_parameters": dict(ROPES[kind])}
    if kind == "longrope":
        changes |= {"original_max_position_embeddings": 48, "max_position_embeddings": 192}
    else:
        changes |= {"max_position_embeddings": 60}
    model = model_of("phi3" if kind == "longrope" else "llama", **changes)
    # Without a cache where it would have to be made anew on the way: transformers 5.17 forgets the text there, 5.23 does not.
    want = expected(copy.deepcopy(model), ids_of(length), 40, [length - 1], use_cache=kind != "longrope")
    engine = engine_of(model, None)
    engine.max_positions = 300
    engine.token_logprobs(ids_of(170))
    for _ in range(2):
        assert_same_answers(answers(engine, ids_of(length), 40, [length - 1]), want, 1e-5)


def test_partial_attention_and_merge() -> None:
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(6, 8, generator=generator, dtype=torch.float64) * 3
    k, v = torch.randn(2, 2, 23, 8, generator=generator, dtype=torch.float64)
    want, want_lse = reference_attention(
        q[None, None], k.transpose(0, 1)[None], v.transpose(0, 1)[None], torch.ones(1, dtype=torch.bool), scale=0.7
    )
    out, lse = attend_cached(q, k, v, 0.7)
    torch.testing.assert_close(out, want[0, 0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, want_lse[0, :, 0], rtol=1e-12, atol=1e-12)
    parts = []
    for piece in (slice(0, 0), slice(0, 1), slice(1, 20), slice(20, 20), slice(20, 23)):
        part, part_lse = attend_cached(q, k[:, piece], v[:, piece], 0.7)
        parts.append(torch.cat([part, part_lse[:, None]], 1))
    torch.testing.assert_close(merge_partial(torch.stack(parts)), out, rtol=1e-12, atol=1e-12)
    # Scores far beyond what exp can take.
    for factor in (1e4, -1e4):
        states = [attend_cached(q * factor, k[:, piece], v[:, piece], 0.7) for piece in (slice(0, 9), slice(9, 23))]
        merged = merge_partial(torch.stack([torch.cat([part, part_lse[:, None]], 1) for part, part_lse in states]))
        torch.testing.assert_close(merged, attend_cached(q * factor, k, v, 0.7)[0], rtol=1e-9, atol=1e-9)


def test_cache_grows_beyond_its_room(poisoned_empty: None) -> None:
    generator = torch.Generator().manual_seed(3)
    for start, extra in ((0, 0), (0, 1), (3, 0), (3, 2)):
        k, v = torch.randn(2, 1, 20, 2, 4, generator=generator)
        cache = KeyValueCache(extra)
        cache.fill(1, k[:, :start], v[:, :start])
        for token in range(start, 20):
            cache.append(1, k[:, token : token + 1], v[:, token : token + 1])
            held = cache.get(1)
            for got, want in zip(held, (k, v), strict=True):
                assert torch.equal(got, want[0, : token + 1].transpose(0, 1))
            assert cache.held(1) == token + 1


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory as a training leaves it."""
    tokenizer = byte_tokenizer()
    model = model_of("qwen2", vocab_size=len(tokenizer), max_position_embeddings=96)
    return export_model(model, tokenizer, tmp_path_factory.mktemp("export") / "model")


def test_the_example_of_load_engine_runs(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = (load_engine.__doc__ or "").split("Example::")[1].split("Args:")[0]
    exec(textwrap.dedent(example).replace("runs/quickstart/sparse/export", str(export)), {})
    assert capsys.readouterr().out.endswith("\n")


def test_text_in_place_of_ids_is_told_how_to_become_ids(export: Path) -> None:
    engine = load_engine(str(export))
    text: Any = "needle"
    for ask in (lambda: engine.generate(text, 3), lambda: engine.token_logprobs(text)):
        with pytest.raises(EvalError, match=r"got text: encode it first with engine.tokenizer\(text\)\['input_ids'\]"):
            ask()


def test_load(export: Path) -> None:
    engine = load_engine(str(export))
    assert (engine.max_positions, engine.vocab_size, engine.device.type) == (96, 388, "cpu")
    assert next(engine.model.parameters()).dtype == torch.float32 and not engine.model.training
    ids = np.array(engine.tokenizer("needle in a haystack")["input_ids"])
    ids.flags.writeable = False
    want = engine.token_logprobs(ids)
    assert want.logprobs.shape == want.greedy.shape == (len(ids) - 1,)
    assert want.density is None and want.seconds > 0
    half = load_engine(str(export), SPARSE, dtype="bfloat16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    assert half.generate(ids, 3).density is not None and half.last_density is not None
    longer = load_engine(str(export), max_positions=300, rope={"rope_type": "yarn", "factor": 4.0})
    assert longer.max_positions == 300 and longer.model.config.rope_parameters["original_max_position_embeddings"] == 96
    assert len(longer.token_logprobs(ids_of(290)).logprobs) == 289
    assert np.abs(longer.token_logprobs(ids).logprobs - want.logprobs).max() > 1e-3


def test_stored_bfloat16_is_loaded_as_such(export: Path, tmp_path: Path) -> None:
    export_model(load_engine(str(export), dtype="bfloat16").model, byte_tokenizer(), tmp_path / "half")
    assert next(load_engine(str(tmp_path / "half")).model.parameters()).dtype == torch.bfloat16
    assert next(load_engine(str(tmp_path / "half"), dtype="float32").model.parameters()).dtype == torch.float32


def test_what_cannot_be_loaded(export: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_engine(str(tmp_path / "nothing"))
    with pytest.raises(EvalError, match="float16.*choose one of auto, float32, bfloat16"):
        load_engine(str(export), dtype="float16")
    bare = tmp_path / "bare"
    shutil.copytree(export, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(EvalError, match="no tokenizer for .*save the model's tokenizer into its directory"):
        load_engine(str(bare))
    assert load_engine(str(bare), tokenizer="bytes").vocab_size == 388
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(ModelError, match="388 tokens but the model embeds only 100"):
        load_engine(str(bare), tokenizer="bytes")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda e: e.generate(ids_of(250), 7), "250 tokens and 7 to generate are beyond this model's 256 positions"),
        (
            lambda e: e.token_logprobs(ids_of(257)),
            "257 tokens are beyond .*mtrain train.*model.rope.*--max-positions 257",
        ),
        (lambda e: e.token_logprobs(ids_of(1)), "no next token to score"),
        (lambda e: e.generate(ids_of(0), 3), "n >= 1"),
        (lambda e: e.generate(ids_of(3)[None], 3), r"shape \[n\].*\[1, 3\]"),
        (lambda e: e.generate(ids_of(3) + 0.5, 3), "whole numbers"),
        (lambda e: e.generate(ids_of(3), 0), "max_new_tokens must be at least 1, got 0"),
        (lambda e: e.generate(np.array([1, VOCAB]), 3), f"1..{VOCAB} do not fit a model of {VOCAB} tokens"),
        (lambda e: e.generate(np.array([-1, 2]), 3), "do not fit"),
        (lambda e: e.predict_at(ids_of(9), [0, 9]), "positions 0..9 are asked of a text of 9 tokens"),
        (lambda e: e.predict_at(ids_of(9), [-1]), "positions -1..-1"),
        (lambda e: engine_of(e.model, None, chunk=0), "chunk is a number of rows, at least 1; got 0"),
    ],
)
def test_questions_that_have_no_answer(ask: Any, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        ask(engine_of(model_of("llama"), None))


def test_longest_text_fits() -> None:
    engine = engine_of(model_of("llama"), None)
    assert len(engine.generate(ids_of(249), 7).tokens) == 7
    assert len(engine.token_logprobs(ids_of(256)).logprobs) == 255
    assert engine.predict_at(ids_of(256), []).shape == (0,)
