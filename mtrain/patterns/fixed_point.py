"""Sums that are exact in any order: numbers are cut to fixed-point integers before they are added.

Every integer sum stays below 2^`MANTISSA`, so that it is exact in float64 too (the coverage target is computed in it).
"""

from __future__ import annotations

import torch
from torch import Tensor

MANTISSA = 52


def exponential_unit(seq_len: int) -> float:
    """What 1.0 is in a sum of at most ``seq_len`` exponentials that are at most 1."""
    return 2.0 ** (MANTISSA - seq_len.bit_length())


def probability_factor(sums: Tensor, seq_len: int, summed: int) -> Tensor:
    """float64 like ``sums``: times exp(logit - peak) it is the probability in fixed point; 0 for a row that sees nothing.

    Args:
        sums: int64, each row's sum of exponentials in units of `exponential_unit`.
        summed: rows whose probabilities end in one sum, each row of mass 1.
    """
    unit = exponential_unit(seq_len) * 2.0 ** (MANTISSA - summed.bit_length())
    return torch.where(sums > 0, unit / sums.double(), 0.0)
