"""How much haystack fits a length: as much as possible, counted with the model's own tokenizer."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from mtrain.errors import EvalError

_GUESSES = 8  # steps by estimate; doubling and halving then end the search whatever the tokenizer does
_STEPS = 80
_FEW = 12  # units apart, two counts tell what a unit costs


def largest_fit(
    count: Callable[[int], int],
    budget: int,
    smallest: int,
    cost: Callable[[int], float] | None = None,
) -> int:
    """A number of units n with count(n) <= budget < count(n + 1), found with few counts.

    Tokens do not add up over pieces of text, so only counts of whole prompts decide; ``cost`` says where to look.

    Args:
        count: tokens of the whole prompt with so many units.
        budget: most tokens; count(smallest) must be within it.
        smallest: least n.
        cost: an estimate of the tokens of n units; never falling. None: units are alike, and a few are tried first.

    Raises:
        EvalError: the tokenizer gives no tokens for the units.
    """
    top = smallest + 4 * budget  # a unit without a single token would be a strange one
    low, high, closed = smallest, top + 1, False  # closed: high was counted, and is too much
    at, tokens, factor = smallest, count(smallest), 1.0
    price = cost or float
    for step in range(_STEPS):
        if high - low == 1:
            break
        if step == 0 and cost is None:
            n = low + _FEW
        elif step < _GUESSES:
            n = bisect_right(range(high), price(at) + (budget - tokens) / factor, low + 1, high, key=price) - 1
        else:
            n = (low + high) // 2 if closed else low + 2 * (low - smallest) + 1
        n = min(max(n, low + 1), high - 1)
        measured = count(n)
        if abs(n - at) >= _FEW and measured != tokens and price(n) != price(at):
            factor = max((measured - tokens) / (price(n) - price(at)), 1e-6)
        at, tokens = n, measured
        low, high, closed = (n, high, closed) if measured <= budget else (low, n, True)
    if low == top:
        raise EvalError(f"the tokenizer gives {count(low)} tokens for {low} units of text, so no length can be filled")
    return low
