"""Our tasks as lm-eval documents: what `eval/tasks/*.yaml` call.

A document is one sample; it is made when lm-eval asks for it, so ``--limit 10`` makes ten and not five hundred. The prompt is what
`mtrain eval` would give with the same seed, byte for byte, and so is the scoring.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.data.tokenizer import load_tokenizer
from mtrain.errors import EvalError
from mtrain.recipe.parts import read_size
from mtrain_eval.sample import DoesNotFitError, Prediction, Sample, SuiteOptions, Task
from mtrain_eval.suites import make_tasks
from mtrain_eval.tokens import count_tokens

# RULER's own number of samples per task and length.
SAMPLES = 500
FIELDS = ("prompt", "text", "target", "targets", "index", "length", "task", "depth", "truncated", "meta", "options")


class Documents(Sequence[dict[str, Any]]):
    """The samples of one (task, length), made lazily; the newest few are kept, because lm-eval looks at the first one twice."""

    def __init__(self, task: Task, length: int, count: int, options: Mapping[str, Any]) -> None:
        self.task, self.length, self.size, self.options = task, length, count, dict(options)
        self.features = dict.fromkeys(FIELDS)
        self.tokenizer = _tokenizer(self.options["tokenizer"])
        self._made = functools.lru_cache(maxsize=2)(self._make)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.size))]
        place = index + self.size if index < 0 else index
        if not 0 <= place < self.size:
            raise IndexError(index)
        return dict(self._made(place))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(self.size))

    def _make(self, index: int) -> dict[str, Any]:
        try:
            sample = self.task.sample(self.length, index)
        except DoesNotFitError as error:
            raise DoesNotFitError(f"{self.task.name} at {self.length} tokens: {error}") from error
        # Where a suite works on tokens alone, lm-eval still wants the text.
        text = sample.text or str(self.tokenizer.decode(sample.ids, skip_special_tokens=True))
        return {
            "prompt": text,
            "text": text,
            "target": sample.targets[0] if sample.targets else "",
            "targets": list(sample.targets),
            "index": sample.index,
            "length": sample.length,
            "task": sample.task,
            "depth": sample.depth,
            "truncated": sample.truncated,
            "meta": json.dumps(dict(sample.meta)),
            "options": self.options,
        }


def dataset(
    task: str,
    length: int | str,
    pretrained: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    num_samples: int = SAMPLES,
    data_dir: str | None = None,
    online: bool = False,
    **_: Any,
) -> dict[str, Documents]:
    """lm-eval's ``custom_dataset``: the documents of one task at one length.

    Args:
        task: a task of `mtrain_eval.suites`.
        length: tokens of prompt and answer together.
        pretrained, tokenizer: whose tokens count; lm-eval fills them in from ``--model_args``.
        seed, num_samples, data_dir, online: from ``--metadata '{"seed": 1}'``; as in `mtrain eval`.

    Raises:
        EvalError: no tokenizer, or a task whose samples no text can hold.
        DoesNotFitError: a length that the task cannot have; some tasks say so only when a document is made.
    """
    name = tokenizer or pretrained
    if name is None:
        raise EvalError(f"{task}: lengths are counted in a model's tokens, say whose: pretrained=DIR in --model_args")
    options = {"tokenizer": str(name), "seed": int(seed), "data_dir": data_dir, "online": bool(online)}
    size = length if isinstance(length, int) else read_size(length, "length")
    return {"test": _documents(task, size, num_samples, json.dumps(options, sort_keys=True))}


# Kept, so that the first sample, which tells whether a task fits its length, is not made again when the run begins.
@functools.lru_cache(maxsize=64)
def _documents(name: str, length: int, most: int, options: str) -> Documents:
    task = _task(name, options)
    there = task.count(length)
    return Documents(task, length, most if there is None else min(most, there), json.loads(options))


@functools.lru_cache(maxsize=8)
def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(name)


@functools.lru_cache(maxsize=64)
def _task(name: str, options: str) -> Task:
    given = json.loads(options)
    told = SuiteOptions(
        tokenizer=_tokenizer(given["tokenizer"]),
        seed=given["seed"],
        data_dir=None if given["data_dir"] is None else Path(given["data_dir"]),
        online=given["online"],
    )
    suite = name.split("_")[0]
    return make_tasks([suite], told, [name])[0]


def score(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """lm-eval's ``process_results`` of a generated answer: the task's own metric, by its official scorer."""
    task = _task(document["task"], json.dumps(document["options"], sort_keys=True))
    sample = Sample(
        task=document["task"],
        length=document["length"],
        index=document["index"],
        ids=np.empty(0, dtype=np.int64),  # scorers read texts
        text=document["prompt"],
        targets=tuple(document["targets"]),
        depth=document["depth"],
        truncated=document["truncated"],
        meta=json.loads(document["meta"]),
    )
    return {"score": float(task.score(sample, Prediction(text=str(results[0])))[task.metric])}


def token_nll(document: Mapping[str, Any], results: Sequence[Any]) -> dict[str, tuple[float, int]]:
    """lm-eval's ``process_results`` of a rolling log-likelihood: its sum and the tokens behind it."""
    result = results[0]
    likelihood = result[0] if isinstance(result, tuple) else result
    tokenizer = _tokenizer(document["options"]["tokenizer"])
    return {"token_perplexity": (float(likelihood), count_tokens(tokenizer, document["text"]))}


def perplexity(items: Sequence[tuple[float, int]]) -> float:
    """lm-eval's aggregation: exp of the mean negative log-likelihood per token, over all texts."""
    return math.exp(-math.fsum(item[0] for item in items) / sum(item[1] for item in items))
