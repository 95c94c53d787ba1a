"""What a source of training rows is, and the two helpers every kind shares: seeded randomness and checked options."""

from __future__ import annotations

import difflib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtrain.data.packing import Row
from mtrain.errors import DataError


class Source(ABC):
    """Rows by number. ``row(i)`` depends on the source's settings, its seed and i alone, so any process may ask for any row."""

    name: str

    @abstractmethod
    def row(self, index: int) -> Row:
        """Row ``index`` >= 0 (an endless sequence)."""

    def state_dict(self, rows: int) -> dict[str, Any]:
        """JSON-able state of a source of which ``rows`` rows were drawn; empty where the row number says it all."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any], rows: int) -> None:
        """Check or restore what :meth:`state_dict` returned. Raises DataError when the data is no longer the same."""
        return None


def seeded(seed: int, *names: Any) -> np.random.Generator:
    """Random generator that depends on the arguments alone (equal on every machine with the same NumPy)."""
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


class Options:
    """The free ``options`` of a source, read with types and defaults; :meth:`done` refuses what nobody asked for."""

    def __init__(self, options: Mapping[str, Any], where: str) -> None:
        self._left = dict(options)
        self._known: list[str] = []
        self.where = where

    def integer(self, key: str, default: int, low: int = 0) -> int:
        """A whole number >= ``low``."""
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self._error(key, value, f"a whole number of at least {low}")
        return value

    def span(self, key: str, default: int | tuple[int, int], low: int = 1) -> tuple[int, int]:
        """A whole number, or a pair [low, high] from which each sample draws one."""
        value = self._take(key, default)
        pair = (value, value) if not isinstance(value, (list, tuple)) else tuple(value)
        whole = len(pair) == 2 and all(isinstance(x, int) and not isinstance(x, bool) for x in pair)
        if not whole or not low <= pair[0] <= pair[1]:
            raise self._error(key, value, f"a whole number of at least {low}, or a pair like [{low}, {low + 28}]")
        return int(pair[0]), int(pair[1])

    def fraction(self, key: str, default: float | None) -> float | None:
        """A number from 0 to 1, or None where that is the default."""
        value = self._take(key, default)
        if value is None and default is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise self._error(key, value, "a number from 0 to 1")
        return float(value)

    def fractions(self, key: str, default: tuple[float, float]) -> tuple[float, float]:
        """A pair of numbers 0 <= low <= high <= 1."""
        value = self._take(key, default)
        good = isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value)
        if not good or not 0 <= value[0] <= value[1] <= 1:
            raise self._error(key, value, "a pair of numbers like [0.125, 0.75]")
        return float(value[0]), float(value[1])

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of the names ``allowed``."""
        value = self._take(key, default)
        if value not in allowed:
            raise self._error(key, value, "one of " + ", ".join(allowed))
        return str(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self._take(key, default)
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def done(self) -> None:
        """Raise DataError for an option that this kind of source does not know, naming the nearest one that it does."""
        for key in self._left:
            near = difflib.get_close_matches(key, self._known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it knows {', '.join(self._known) or 'none'}"
            raise DataError(f"data: {self.where} has no option {key!r}; {hint}")

    def _take(self, key: str, default: Any) -> Any:
        self._known.append(key)
        return self._left.pop(key, default)

    def _error(self, key: str, value: Any, expected: str) -> DataError:
        return DataError(f"data: option {key!r} of {self.where} is {value!r}; expected {expected}")
