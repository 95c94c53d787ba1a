"""Student's t without scipy: the half-width of its central 95 %, and the share within a half-width."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


@lru_cache(maxsize=256)
def student_t(degrees: int) -> float:
    """Half-width of the central 95 % of Student's t with so many degrees of freedom."""
    if degrees > 1000:  # first terms of the expansion around the normal; error below 3e-6
        return Z + (Z**3 + Z) / (4 * degrees)
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_share(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def student_t_share(t: float, degrees: int) -> float:
    """P(|T| <= t): with T = sqrt(degrees) tan(angle), the share of cos(angle)^(degrees - 1) below the angle of t.

    Series of Abramowitz & Stegun 26.7.3 and 26.7.4, exact up to rounding.
    """
    if degrees > 1000:
        return 1 - 2 * NormalDist().cdf(-t * (1 - 1 / (4 * degrees)) / math.sqrt(1 + t * t / (2 * degrees)))
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 2 * angle / math.pi
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
