"""How much haystack fits a length: as much as possible, counted with the model's own tokenizer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from mtrain.errors import EvalError

_GUESSES = 8  # steps by estimate; halving then ends the search whatever the tokenizer does
_STEPS = 64
_FEW = 12  # units apart, two counts tell what a unit costs


def largest_fit(
    count: Callable[[int], int],
    budget: int,
    smallest: int,
    cost: Callable[[int], float] | None = None,
    largest: int | None = None,
) -> int:
    """A number of units n with count(n) <= budget < count(n + 1), found with few counts.

    Tokens do not add up over pieces of text, so only counts of whole prompts decide; ``cost`` says where to look. With
    ``largest`` and everything fitting, n is ``largest``.

    Args:
        count: tokens of the whole prompt with so many units.
        budget: most tokens; count(smallest) must be within it.
        smallest, largest: bounds of n; no largest: as many as there are tokens, and more.
        cost: an estimate of the tokens of n units; never falling. None: units are alike, and a few are tried first.

    Raises:
        EvalError: the tokenizer gives no tokens for the units.
    """
    low, high = smallest, (smallest + 4 * budget if largest is None else largest) + 1
    at, tokens, factor = smallest, count(smallest), 1.0
    price = cost or float
    for step in range(_STEPS):
        if high - low == 1:
            break
        n = (low + high) // 2
        if step == 0 and cost is None:
            n = min(low + _FEW, high - 1)
        elif step < _GUESSES:
            target = price(at) + (budget - tokens) / factor
            n = bisect_right(range(high), target, low + 1, high, key=price) - 1
            n = min(max(n, low + 1), high - 1)
        measured = count(n)
        if abs(n - at) >= _FEW and measured != tokens and price(n) != price(at):
            factor = max((measured - tokens) / (price(n) - price(at)), 1e-6)
        at, tokens = n, measured
        low, high = (n, high) if measured <= budget else (low, n)
    if largest is None and low == smallest + 4 * budget:
        raise EvalError(f"the tokenizer gives {count(low)} tokens for {low} units of text, so no length can be filled")
    return low
