"""Which depth a sample has: a grid walked so that every beginning of it covers the whole range."""

from __future__ import annotations

POINTS = 9


def spread_depths(points: int = POINTS) -> tuple[float, ...]:
    """``points`` >= 2 depths from 0 (start of the haystack) to 1 (end), equally far apart, in the order they are asked.

    Both ends come first, then the middle of the widest gap, and so on: 0, 1, 1/2, 1/4, 3/4, 1/8, ... With 9 points the
    first 5 are the grid of 5, so few samples per length still show start, middle and end.
    """
    order, rest = [0, points - 1], list(range(1, points - 1))
    while rest:
        widest = max(rest, key=lambda point: (min(abs(point - done) for done in order), -point))
        order.append(widest)
        rest.remove(widest)
    return tuple(point / (points - 1) for point in order)


def depth_of(index: int, depths: tuple[float, ...]) -> tuple[float, int]:
    """(depth, round) of sample ``index``: each round asks every depth once, so the first len(depths) samples are a whole grid."""
    return depths[index % len(depths)], index // len(depths)
