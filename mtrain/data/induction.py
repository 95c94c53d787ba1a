"""Induction warm-up: a random segment tiled with a random period, loss after the first period.

Two-layer models learn to copy from it in a few hundred steps, and recall grows out of that circuit (Olsson et al. 2022,
"In-context learning and induction heads", arXiv:2209.11895). The period must be random, or the model learns a fixed
distance instead, which does not carry over to recall.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.data.packing import Row, Sample, make_row, sample_lengths
from mtrain.data.source import Options, Source, seeded
from mtrain.data.symbols import vocabulary
from mtrain.data.tokenizer import pad_id


class InductionSource(Source):
    """Rows of random segments tiled with a random period.

    Options: ``period`` [low, high] as fractions of the sample length; ``vocab``: ``all`` tokens but pad, bos and eos, the
    retrieval ``symbols``, or plain ``text`` tokens (no special ones).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any],
        *,
        name: str,
        seed: int,
        seq_len: int,
        packing: bool = True,
        length: int | None = None,
    ) -> None:
        take = Options(options, "an induction source")
        self.period = take.fractions("period", (0.125, 0.75))
        vocab = take.choice("vocab", ("all", "symbols", "text"), "all")
        take.done()
        self.name, self.seed, self.seq_len, self.pad = name, seed, seq_len, pad_id(tokenizer)
        self.ids = vocabulary(tokenizer, vocab)
        self.lengths = sample_lengths(seq_len, length, packing, 4, name)

    def row(self, index: int) -> Row:
        """See :meth:`Source.row`."""
        rng = seeded(self.seed, self.name, index)
        return make_row([self._sample(rng, n) for n in self.lengths], self.seq_len, self.pad)

    def _sample(self, rng: np.random.Generator, length: int) -> Sample:
        low = max(2, int(length * self.period[0]))
        period = int(rng.integers(low, max(low, int(length * self.period[1])) + 1))
        tokens = np.resize(self.ids[rng.integers(0, len(self.ids), min(period, length))], length)
        return Sample(tokens, np.arange(length) > period)
