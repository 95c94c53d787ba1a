"""A suite and an engine that need no model: what the runner does is tested apart from what models answer."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtrain.comm import Ring, SingleRing
from mtrain.data.tokenizer import byte_tokenizer
from mtrain.inference import Generation, TokenScores
from mtrain.recipe.schema import AttentionRecipe
from mtrain_eval import suites
from mtrain_eval.config import EvalConfig
from mtrain_eval.runner import Outcome, evaluate
from mtrain_eval.sample import DoesNotFitError, Figure, Prediction, Sample, SuiteOptions
from mtrain_eval.seeds import sample_rng
from mtrain_eval.statistics import mean_figures
from mtrain_eval.tokens import encode_prompt

WORDS = byte_tokenizer()


@dataclass(frozen=True)
class FakeTask:
    """A text of letters that hides a code. ``kind`` says what is asked of it."""

    name: str
    options: SuiteOptions
    kind: Any = "generate"
    samples: int | None = None
    smallest: int = 64
    suite: str = "fake"
    metric: str = "right"
    source: str = "generated"

    def count(self, length: int) -> int | None:
        return self.samples

    def sample(self, length: int, index: int) -> Sample:
        if length < self.smallest:
            raise DoesNotFitError(f"{self.name} needs {self.smallest} tokens", self.smallest)
        rng = sample_rng(self.options.seed, self.name, length, index)
        code = str(rng.integers(10**5, 10**6))
        letters = "".join(rng.choice(list("abcde "), length - 40))
        text = f"{letters} the code is {code}. code?"
        plain = Sample(self.name, length, index, encode_prompt(WORDS, text), text, (code,), self.kind, depth=0.5)
        if self.kind == "generate":
            return replace(plain, max_new_tokens=12, stop=("\n", "END"))
        return replace(plain, at=(3, 8, 5)) if self.kind == "recall" else plain

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        if self.kind == "generate":
            return {"right": float(sample.targets[0] in prediction.text)}
        if self.kind == "recall":
            return {
                "right": float(
                    np.mean([t == sample.ids[at + 1] for t, at in zip(prediction.tokens, sample.at, strict=True)])
                )
            }
        assert prediction.logprobs is not None and len(prediction.logprobs) == len(sample.ids) - 1
        return {"right": float(prediction.logprobs.sum()), "tokens": float(len(prediction.logprobs))}

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        return mean_figures(rows, shares=False)


def fake_tasks(options: SuiteOptions) -> list[FakeTask]:
    return [
        FakeTask("fake_code", options),
        FakeTask("fake_text", options, "score", samples=3),
        FakeTask("fake_next", options, "recall"),
        FakeTask("fake_large", options, smallest=200),
    ]


@pytest.fixture
def fake_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite ``fake`` is there like any other."""
    monkeypatch.setitem(suites.SUITES, "fake", "for tests")
    monkeypatch.setitem(sys.modules, "mtrain_eval.fake", types.SimpleNamespace(tasks=fake_tasks))  # type: ignore[arg-type]


class FakeEngine:
    """Finds the code in the prompt; dense and sparse differ in what they say of the density and in one wrong digit.

    Args:
        before: called before every answer, with the number of answers so far.
    """

    def __init__(
        self,
        ring: Ring,
        sparse: bool = False,
        max_positions: int = 1000,
        before: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.ring, self.sparse, self.max_positions, self.before = ring, sparse, max_positions, before
        self.tokenizer = WORDS
        self.last_density = 0.25 if sparse else None
        self.calls = 0

    def _meet(self, ids: np.ndarray) -> None:
        """What real engines do: every rank must be here with the same ids."""
        self.before(self.calls)
        self.calls += 1
        sums = self.ring.all_gather(torch.tensor([len(ids), int(ids.sum())]))
        assert all(torch.equal(part, sums[0]) for part in sums)

    def generate(
        self, ids: np.ndarray, max_new_tokens: int, *, stop: Callable[[list[int]], bool] | None = None
    ) -> Generation:
        self._meet(ids)
        found = re.search(r"code is (\d+)", WORDS.decode(ids.tolist()))
        assert found
        answer = (" 9" if self.sparse else " ") + found[1] + "\nand more"
        tokens: list[int] = []
        for token in WORDS(answer, add_special_tokens=False)["input_ids"][:max_new_tokens]:
            tokens.append(token)
            if stop is not None and stop(tokens):
                break
        return Generation(tokens, 0.5, 0.25, self.last_density)

    def token_logprobs(self, ids: np.ndarray) -> TokenScores:
        self._meet(ids)
        logprobs = -(ids[1:] % 7).astype(np.float32) - float(self.sparse)
        return TokenScores(logprobs, logprobs > -3, 0.5, self.last_density)

    def predict_at(self, ids: np.ndarray, at: Sequence[int]) -> np.ndarray:
        self._meet(ids)
        return np.asarray([ids[place + 1] for place in at])


def fake_model(directory: Path) -> Path:
    """Files that look like a model's, as far as a fingerprint can see."""
    model = directory / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text('{"max_position_embeddings": 1000}')
    (model / "tokenizer.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights" * 99)
    attention = {"pattern": "vertical_slash", "block": 8, "sink": 2, "local": 8, "probe": 8}
    training = {"step": 7, "tokens": 99, "recipe": {"attention": attention, "train": {"seq_len": 500}}}
    (model / "mtrain.json").write_text(json.dumps(training))
    return model


def config_of(directory: Path, **changes: Any) -> EvalConfig:
    """Two lengths, both attentions, four samples."""
    plain = EvalConfig(
        model=str(fake_model(directory)),
        lengths=(100, 300),
        suites=("fake",),
        attention=("dense", "sparse"),
        limit=4,
        output=directory / "run",
    )
    return replace(plain, **changes)


def run_fake(
    config: EvalConfig, ring: Ring | None = None, before: Callable[[int], None] = lambda count: None, **options: Any
) -> Outcome:
    """Evaluate with fake engines; ``before`` counts over both of them."""
    count = [0]

    def counted(_: int) -> None:
        before(count[0])
        count[0] += 1

    def load(config: EvalConfig, recipe: AttentionRecipe | None, ring: Ring) -> Any:
        return FakeEngine(ring, recipe is not None, config.max_positions or 1000, counted)

    positions = config.max_positions or 1000
    return evaluate(config, ring or SingleRing(), load, tokenizer=WORDS, positions=positions, **options)


def rows_in(output: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of a run by file, without what a clock says."""
    found = {}
    for path in sorted(output.glob("*/*/*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row.pop("prefill_s", None), row.pop("decode_s", None)
        found[path.relative_to(output).as_posix()] = rows
    return found
