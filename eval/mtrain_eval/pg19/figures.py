"""From log-probabilities to sums of one sample, and from the sums of many to perplexities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mtrain_eval.sample import Figure
from mtrain_eval.statistics import bootstrap_ratio, mean_figure

LAST = 1024
_LARGEST = 300.0  # exp of more than 354 has no square in float64, and with it no standard error


def nll_sums(logprobs: np.ndarray, scored_from: int = 1) -> dict[str, float]:
    """Sums over the scored tokens of a sample, in float64.

    Args:
        logprobs: float32 [n - 1], of tokens 1 .. n - 1.
        scored_from: index of the first token that counts, 1 .. n - 1; those before are context only.

    Returns:
        ``nll_sum`` and ``tokens``; ``last_nll`` and ``last_tokens`` of the last 1024 tokens of the sample; for every k with a
        token at a position from 2^k to 2^(k + 1) - 1, ``bucket_k_nll`` and ``bucket_k_tokens``. Nats.
    """
    nll = -np.asarray(logprobs, dtype=np.float64)[scored_from - 1 :]
    last = nll[-LAST:]
    sums = {
        "nll_sum": float(nll.sum()),
        "tokens": float(len(nll)),
        "last_nll": float(last.sum()),
        "last_tokens": float(len(last)),
    }
    end = scored_from + len(nll)
    for k in range(scored_from.bit_length() - 1, (end - 1).bit_length()):
        inside = nll[max(0, 2**k - scored_from) : max(0, 2 ** (k + 1) - scored_from)]
        if len(inside):
            sums[f"bucket_{k}_nll"] = float(inside.sum())
            sums[f"bucket_{k}_tokens"] = float(len(inside))
    return sums


def perplexity(nll: float, tokens: float) -> float:
    """exp(nll / tokens), at most exp(300), so that figures stay finite."""
    return math.exp(min(nll / max(tokens, 1.0), _LARGEST))


def perplexity_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """Figures over stored rows; each error by resampling documents, because tokens of one book are no independent draws.

    ``perplexity``            exp(sum of NLL / sum of tokens)
    ``document_perplexity``   plain mean of the documents' own (MInference's number)
    ``last_perplexity``       of the last 1024 tokens of each sample: what a long context is for
    ``word_perplexity``, ``byte_perplexity``, ``bits_per_byte``   comparable between tokenizers
    ``nll_to_N``              mean NLL in nats at positions N / 2 to N - 1
    """
    sums = _by_document(rows)
    nll, tokens = sums["nll_sum"], sums["tokens"]
    figures = {
        "perplexity": bootstrap_ratio(nll, tokens, _exp),
        "document_perplexity": mean_figure([perplexity(a, b) for a, b in zip(nll, tokens, strict=True)], shares=False),
    }
    if "last_nll" in sums:
        figures["last_perplexity"] = bootstrap_ratio(sums["last_nll"], sums["last_tokens"], _exp)
    figures["word_perplexity"] = bootstrap_ratio(nll, np.maximum(sums["words"], 1).tolist(), _exp)
    size = np.maximum(sums["bytes"], 1).tolist()
    figures["byte_perplexity"] = bootstrap_ratio(nll, size, _exp)
    figures["bits_per_byte"] = bootstrap_ratio(nll, size, _bits)
    for k in sorted(int(name.split("_")[1]) for name in sums if name.startswith("bucket_") and name.endswith("_nll")):
        # Documents too short for this position, or windows that score none there, have nothing to say about it.
        pairs = zip(sums[f"bucket_{k}_nll"], sums[f"bucket_{k}_tokens"], strict=True)
        top, bottom = zip(*((a, b) for a, b in pairs if b), strict=True)
        figures[f"nll_to_{2 ** (k + 1)}"] = bootstrap_ratio(top, bottom)
    return figures


def _by_document(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Name of a sum -> its total for each document (rows that name none are documents of their own)."""
    documents: dict[Any, dict[str, float]] = {}
    for row in rows:
        totals = documents.setdefault(row.get("meta", {}).get("document", ("row", row["index"])), {})
        for name, value in row["scores"].items():
            totals[name] = totals.get(name, 0.0) + value
    names = dict.fromkeys(name for totals in documents.values() for name in totals)
    return {name: [totals.get(name, 0.0) for totals in documents.values()] for name in names}


def _exp(ratio: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(ratio, _LARGEST))


def _bits(ratio: np.ndarray) -> np.ndarray:
    return ratio / math.log(2)
