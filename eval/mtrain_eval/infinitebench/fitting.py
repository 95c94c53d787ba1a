"""How many haystack units fill a length."""

from __future__ import annotations

from collections.abc import Callable

from mtrain.errors import EvalError


def fill(tokens: Callable[[int], int], room: int, low: int, guess: int) -> int:
    """A number of units n >= low that fits while n + 1 does not: tokens(n) <= room < tokens(n + 1).

    Interpolates between what was measured, and halves the interval every third time, so it ends for any tokenizer.

    Args:
        tokens: of a prompt with that many units; grows with them, though not evenly.
        room: tokens there are; tokens(low) <= room.
        low: fewest units.
        guess: where to look first; decides how often `tokens` is called, not more.

    Raises:
        EvalError: ever more units never fill the room.
    """
    measured: dict[int, int] = {}

    def measure(n: int) -> int:
        if n not in measured:
            measured[n] = tokens(n)
        return measured[n]

    good, bad, rounds = low, None, 0
    rate = 0.0  # tokens of a unit
    n = max(guess, low + 1)
    while bad is None or bad - good > 1:
        if measure(n) <= room:
            good = n
        else:
            bad = n
        if n > low:
            rate = (measure(n) - measure(low)) / (n - low)
        rounds += 1
        if bad is None and good > low + 8 * (room + 8):
            raise EvalError(f"{good} units of text make {measure(good)} tokens; this tokenizer cannot fill a length")
        n = _next(good, bad, room - measure(good), rate, rounds)
    return good


def _next(good: int, bad: int | None, left: int, rate: float, rounds: int) -> int:
    """Where to measure next, strictly between good and bad."""
    aim = good + int(left / rate) if rate > 0 else 2 * good
    if bad is None:
        return min(max(aim, good + 1), 2 * good + 16)
    if rounds % 3 == 0:
        return (good + bad) // 2
    return min(max(aim, good + 1), bad - 1)
