"""What InfiniteBench's synthetic tasks are made of, by its rules, at any size and with words of our own.

Facts: paper section 3.2 and OpenBMB/InfiniteBench, data/construct_synthetic_dataset.py. The published sizes (5,220 lines of
noise, 2,500 pairs, about 550 functions, 60,000 numbers) become a free number of units; everything else is kept: the needle's
places sweep the haystack evenly, keys are 5 digits, or 10 with neighbours doubled, or uuids; functions form layers that call
the next layer, so that a call runs through 2, 4, 6, 8 or 10 of them; numbers are 0..99 with a random edge on the side asked.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

NOISE = "The river is wide. The road is long. The wind is cold. On we walk. Home is far away.\n"
KEY_PLACES = 59
PAIR_PLACES = 500
DEPTHS = (2, 4, 6, 8, 10)
FIRST_INCREMENT, LAST_INCREMENT = -12, 17
LARGEST_ARGUMENT = 10
LARGEST_NUMBER = 99
ORDINALS = ("", "second ", "third ")
QUESTIONS = (*(f"{nth}largest" for nth in ORDINALS), *(f"{nth}smallest" for nth in ORDINALS), "median")


@dataclass(frozen=True)
class Made:
    """One haystack: the context, the question, the right answer in the label's type, where the needle begins in the context
    (None: it is nowhere in particular), and what the report may show."""

    context: str
    question: str
    label: str | int | float
    needle_at: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


# units -> haystack; more units leave those of fewer as they are
Maker = Callable[[int], Made]


def sweep(index: int, places: int) -> int:
    """Place 0..places - 1 of a sample: every place once in ``places`` samples, and any few samples spread over all of them
    (steps of about the golden section, as no step of a fixed order would)."""
    step = round(places * 0.618)
    while _common(step, places) != 1:
        step += 1
    return index * step % places


def passkey(random: Random, index: int) -> Maker:
    """A key of 5 digits said twice in a line of its own, among lines of noise (a unit is a line)."""
    key = "".join(str(random.randint(0, 9)) for _ in range(5))
    return _hidden(key, "pass key", index)


def number_string(random: Random, index: int) -> Maker:
    """The same with 10 digits: 5, then five times one of those so far is doubled where it stands."""
    digits = [str(random.randint(0, 9)) for _ in range(5)]
    for _ in range(5):
        at = random.randrange(len(digits))
        digits.insert(at, digits[at])
    return _hidden("".join(digits), "sequence of digits", index)


def kv_retrieval(random: Random, index: int) -> Maker:
    """Pairs of uuids as a JSON object (a unit is a pair); the pair asked is number units * place // 500."""
    place = sweep(index, PAIR_PLACES)
    keys: list[str] = []
    pairs: list[str] = []
    values: list[str] = []

    def make(units: int) -> Made:
        while len(pairs) < units:
            key, value = (str(uuid.UUID(int=random.getrandbits(128), version=4)) for _ in range(2))
            keys.append(key)
            values.append(value)
            pairs.append(f'"{key}": "{value}"')
        at = units * place // PAIR_PLACES
        start = "JSON data:\n{" + "".join(f"{pair}, " for pair in pairs[:at])
        return Made(
            start + ", ".join(pairs[at:units]) + "}",
            f'Key: "{keys[at]}"\nThe value that belongs to this key is:',
            values[at],
            len(start),
            {"units": units, "place": at},
        )

    return make


def math_find(random: Random, index: int) -> Maker:
    """A list of numbers (a unit is one); second and third are told apart by value, so 99, 99, 98 has 98 as its second largest.

    The edge of the side that is asked is drawn anew, 79..99 or 0..19; for the median, of either side.
    """
    wanted = QUESTIONS[index % len(QUESTIONS)]
    upper = "largest" in wanted or (wanted == "median" and random.random() < 0.5)
    first = 0 if upper else random.randint(0, LARGEST_NUMBER // 5)
    last = random.randint(LARGEST_NUMBER * 4 // 5, LARGEST_NUMBER) if upper else LARGEST_NUMBER
    numbers: list[int] = []

    def make(units: int) -> Made:
        while len(numbers) < units:
            numbers.append(random.randint(first, last))
        return Made(
            "[" + ", ".join(map(str, numbers[:units])) + "]",
            f"Answer with one number and nothing else. The {wanted} number of the list is:",
            _found(numbers[:units], wanted),
            None,
            {"units": units, "question": wanted},
        )

    return make


def code_run(random: Random, index: int, core: int) -> Maker:
    """Functions that call one of the next layer and add or subtract (a unit is a function); they stand sorted by number.

    Args:
        random, index: of the sample; the index decides the number of layers.
        core: functions (at least 10) in evenly filled layers, any of which may be called; what is more only calls.
    """
    depth = DEPTHS[index % len(DEPTHS)]
    argument = random.randint(-LARGEST_ARGUMENT, LARGEST_ARGUMENT)
    asked = depth * random.randrange(len(range(0, core, depth)))
    digits = max(4, len(str(4 * core)))
    names: dict[int, None] = {}  # a set in the order of drawing
    calls: list[tuple[int | None, int]] = []  # (function called, increment)

    def add() -> None:
        low = 10 ** (digits - 1) if len(names) < 4 * 10 ** (digits - 1) else 10**digits
        name = random.randrange(low, 10 * low)
        while name in names:
            name = random.randrange(low, 10 * low)
        names[name] = None
        layer = (len(calls) % depth) + 1
        below = None if layer == depth else layer + depth * random.randrange(len(range(layer, core, depth)))
        calls.append((below, random.randint(FIRST_INCREMENT, LAST_INCREMENT)))

    def make(units: int) -> Made:
        while len(calls) < units:
            add()
        listed = list(names)
        bodies = sorted((listed[i], _body(listed, calls[i])) for i in range(units))
        value, at = argument, asked
        while True:
            below, increment = calls[at]
            value += increment
            if below is None:
                break
            at = below
        call = f"func_{listed[asked]}({argument})"
        return Made(
            "\n\n".join(f"def func_{name}(x):\n    return {body}" for name, body in bodies),
            f"What does {call} return?",
            value,
            None,
            {"units": units, "layers": depth},
        )

    return make


def _hidden(key: str, what: str, index: int) -> Maker:
    """A key among lines of noise; lines before it: units * place // 58, from none to all."""
    needle = f"The {what} is {key}. Keep it in mind. {key} is the {what}.\n"
    place = sweep(index, KEY_PLACES)

    def make(units: int) -> Made:
        before = units * place // (KEY_PLACES - 1)
        context = NOISE * before + needle + NOISE * (units - before)
        return Made(context, f"What is the {what}?", key, before * len(NOISE), {"units": units, "place": before})

    return make


def _found(numbers: list[int], wanted: str) -> int | float:
    if wanted == "median":
        ordered, half = sorted(numbers), len(numbers) // 2
        return ordered[half] if len(numbers) % 2 else (ordered[half - 1] + ordered[half]) / 2
    values = sorted(set(numbers), reverse="largest" in wanted)
    nth = 1 if wanted.startswith("second") else 2 if wanted.startswith("third") else 0
    return values[min(nth, len(values) - 1)]


def _body(names: list[int], call: tuple[int | None, int]) -> str:
    below, increment = call
    inner = "x" if below is None else f"func_{names[below]}(x)"
    return inner if increment == 0 else f"{inner} {'-' if increment < 0 else '+'} {abs(increment)}"


def _common(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a
