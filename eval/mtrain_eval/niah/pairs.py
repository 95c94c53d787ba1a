"""The needle grid for models trained on mtrain's own retrieval: a key and its value, one token each, in library source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mtrain.data.tokenizer import ASK, KEYS, VALUES
from mtrain_eval.niah.grid import depth_of, spread_depths
from mtrain_eval.retrieval.task import RecallTask, Shape
from mtrain_eval.sample import Figure, Prediction, Sample, SuiteOptions
from mtrain_eval.seeds import sample_rng
from mtrain_eval.statistics import mean_figures


class PairsTask(RecallTask):
    """32 pairs anywhere, the one that is asked at the depth of the grid."""

    suite = "niah"

    def __init__(self, options: SuiteOptions, points: int | None = None) -> None:
        super().__init__(options, "niah_pairs", Shape(pairs=32, questions=1))
        self.depths = spread_depths() if points is None else spread_depths(points)

    def sample(self, length: int, index: int) -> Sample:
        """See Task: exactly ``length`` tokens, answer included."""
        depth, round_ = depth_of(index, self.depths)
        made = self.make(length, index, sample_rng(self.options.seed, self.name, length, index), depth)
        return replace(made, meta={"depth_asked": depth, "round": round_, "haystack": "stdlib"})

    def score(self, sample: Sample, prediction: Prediction) -> dict[str, float]:
        """``accuracy``: is the most likely token after the key its value?"""
        return {"accuracy": float(prediction.tokens[0] == sample.ids[sample.at[0] + 1])}

    def aggregate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """See Task: means over samples."""
        return mean_figures(rows)


def has_symbols(options: SuiteOptions) -> bool:
    """Has the tokenizer mtrain's own key and value symbols?"""
    vocabulary = options.tokenizer.get_vocab()
    return all(name in vocabulary for name in (ASK, *KEYS, *VALUES))
