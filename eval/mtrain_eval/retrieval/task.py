"""Key-value pairs of single tokens hidden in held-out library source: what the quickstart trains, and shapes of RULER over it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mtrain.data.retrieval import RetrievalMaker, RetrievalTask
from mtrain.data.source import seeded
from mtrain_eval.sample import DoesNotFitError, Figure, Prediction, Sample, SuiteOptions
from mtrain_eval.seeds import sample_rng
from mtrain_eval.statistics import bootstrap_ratio, mean_figures, wilson

DEPTH_BINS = 5


@dataclass(frozen=True)
class Shape:
    """``pairs`` keys in the haystack, each with ``values`` values in a row; ``questions`` of the keys are asked in turn."""

    pairs: int
    questions: int
    values: int = 1


class SeveralValuesMaker(RetrievalMaker):
    """Keys followed by several values each, `k v v v v`; asked for in the same order after the key."""

    def __init__(self, values: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.values = values

    def shortest(self) -> int:
        """See RetrievalMaker."""
        pairs, questions = self.task.pairs[1], self.task.questions[1]
        return len(self.head) + (pairs + questions) * (1 + self.values) + 2

    def _symbols(
        self, rng: np.random.Generator, pairs: int, asked: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        symbols = self.symbols
        assert symbols is not None
        keys = symbols.keys[rng.permutation(len(symbols.keys))[:pairs], None]
        # A value stands once in a row, so what follows one is never in doubt within its pair.
        values = np.stack([rng.permutation(symbols.values)[: self.values] for _ in range(pairs)])
        rows = np.concatenate([keys, values], axis=1)
        tail = np.concatenate([[symbols.ask], rows[asked].reshape(-1)])
        answers = np.concatenate([[False], np.arange(len(tail) - 1) % (1 + self.values) > 0])
        return list(rows), tail, answers


class RecallTask:
    """Name the value of each key asked for. Earlier answers stand before later questions (teacher forcing), keys differ."""

    suite = "retrieval"
    metric = "accuracy"
    source = "generated"

    def __init__(self, options: SuiteOptions, name: str, shape: Shape) -> None:
        self.options, self.name, self.shape = options, name, shape

    def count(self, length: int) -> int | None:
        """See Task: as many as one likes."""
        return None

    def sample(self, length: int, index: int) -> Sample:
        """See Task."""
        return self.make(length, index, sample_rng(self.options.seed, self.name, length, index))

    def make(self, length: int, index: int, rng: np.random.Generator, depth: float | None = None) -> Sample:
        """A sample whose asked pairs lie at ``depth`` of the haystack (None: anywhere)."""
        maker = self._maker
        if length < maker.shortest():
            raise DoesNotFitError(
                f"{self.name}: {length} tokens do not hold {self.shape.pairs} pairs and {self.shape.questions} questions; "
                f"it takes {maker.shortest()}",
                maker.shortest(),
            )
        if depth is not None:
            maker = self._at(depth)
        made, depths = maker.make(rng, length)
        answers = np.flatnonzero(made.targets)
        single = len(depths) == 1
        # Depths are shares of the haystack; the sample's own depth is a share of the prompt.
        tail = 1 + self.shape.questions * (1 + self.shape.values)
        body = length - len(maker.head) - tail
        return Sample(
            task=self.name,
            length=length,
            index=index,
            ids=made.tokens,
            targets=tuple(
                str(word) for word in self.options.tokenizer.convert_ids_to_tokens(made.tokens[answers].tolist())
            ),
            kind="recall",
            at=tuple((answers - 1).tolist()),
            depth=(len(maker.head) + float(depths[0]) * body) / length if single else None,
            meta={"depths": [round(float(value), 4) for value in depths]},
        )

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        """``accuracy``; and right and asked answers by fifth of the haystack, for `aggregate`."""
        right = np.asarray(prediction.tokens, dtype=np.int64) == sample.ids[np.asarray(sample.at) + 1]
        scores = {"accuracy": float(right.mean())}
        depths = np.repeat(np.asarray(sample.meta["depths"]), self.shape.values)
        bins = np.minimum((depths * DEPTH_BINS).astype(np.int64), DEPTH_BINS - 1)
        for number in sorted(set(bins.tolist())):
            scores[f"depth_{number}_right"] = float(right[bins == number].sum())
            scores[f"depth_{number}_asked"] = float((bins == number).sum())
        return scores

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """``accuracy``, and ``accuracy_depth_0_20`` to ``accuracy_depth_80_100`` in percent of the haystack."""
        figures = mean_figures({**row, "scores": {"accuracy": row["scores"]["accuracy"]}} for row in rows)
        for number in range(DEPTH_BINS):
            found = [row["scores"] for row in rows if f"depth_{number}_asked" in row["scores"]]
            if found:
                low, high = (100 * edge // DEPTH_BINS for edge in (number, number + 1))
                figures[f"accuracy_depth_{low}_{high}"] = _share(
                    [scores[f"depth_{number}_right"] for scores in found],
                    [scores[f"depth_{number}_asked"] for scores in found],
                )
        return figures

    @cached_property
    def _maker(self) -> RetrievalMaker:
        shape = self.shape
        # As retrieval_prompts does it, so that a prompt of one number is the same there and here.
        task = RetrievalTask(
            pairs=(shape.pairs, shape.pairs), questions=(shape.questions, shape.questions), late_fraction=0.0
        )
        if shape.values == 1:
            return RetrievalMaker(self.options.tokenizer, task, held_out=True)
        return SeveralValuesMaker(shape.values, tokenizer=self.options.tokenizer, task=task, held_out=True)

    def _at(self, depth: float) -> RetrievalMaker:
        task = replace(self._maker.task, depth=depth, spread=0.0)
        return RetrievalMaker(self.options.tokenizer, task, held_out=True)


def _share(right: Sequence[float], asked: Sequence[float]) -> Figure:
    """Right answers of all asked, its error by resampling prompts; where all prompts agree, Wilson's interval over prompts."""
    figure = bootstrap_ratio(right, asked)
    if figure.stderr == 0.0:
        low, high = wilson(figure.value, figure.n)
        figure = replace(figure, low=low, high=high)
    return figure


class ExamTask(RecallTask):
    """The quickstart's exam: sample ``index`` is prompt ``index`` of `mtrain.data.retrieval.retrieval_prompts`, same seed."""

    def sample(self, length: int, index: int) -> Sample:
        """See Task."""
        return self.make(length, index, seeded(self.options.seed, "prompts", length, None, index))
