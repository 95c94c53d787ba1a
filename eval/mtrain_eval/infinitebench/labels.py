"""Right answers in the types of the benchmark's own files, whatever a file's rows were turned into on the way.

The hub's schema makes every answer a list of strings; the official scorers, given such a label, call right answers wrong
(an integer is never equal to a string, a key never among the letters of a list). So the type is restored by the task.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mtrain.errors import EvalError
from mtrain_eval.infinitebench.catalogue import LabelKind

LETTERS = "ABCD"


def restore(kind: LabelKind, answer: Any, options: Sequence[str] = ()) -> Any:
    """A label as the official files have it.

    Args:
        kind: of the task.
        answer: as found: a string, a number, or a list (of lists) of these.
        options: the row's options (kind ``option``).

    Returns:
        ``text`` str; ``texts`` list of str; ``option`` [text, letter]; ``integer`` int; ``number`` int or float (as written);
        ``integers`` list of int.

    Raises:
        EvalError: the answer cannot be of that type.
    """
    flat = _flat(answer)
    if not flat:
        raise EvalError(f"the answer {answer!r} is empty")
    try:
        if kind == "text":
            return str(flat[0])
        if kind == "texts":
            return [str(one) for one in flat]
        if kind == "integer":
            return int(flat[0])
        if kind == "number":
            return _number(flat[0])
        if kind == "integers":
            numbers = [int(digits) for one in flat for digits in re.findall(r"-?[0-9]+", str(one))]
            if not numbers:
                raise ValueError
            return numbers
    except ValueError as error:
        raise EvalError(f"the answer {str(answer)[:80]!r} is no number") from error
    return _option([str(one) for one in flat], list(options))


def as_targets(label: Any) -> tuple[str, ...]:
    """A label as the texts of `Sample.targets`; `restore` makes the label of them again."""
    if isinstance(label, list):
        if all(isinstance(one, int) for one in label):
            return (", ".join(str(one) for one in label),)
        return tuple(str(one) for one in label)
    return (str(label),)


def _flat(answer: Any) -> list[Any]:
    if isinstance(answer, (list, tuple)):
        return [one for part in answer for one in _flat(part)]
    return [] if answer is None else [answer]


def _number(value: Any) -> int | float:
    if isinstance(value, (int, float)):
        return value
    text = str(value).strip()
    return float(text) if "." in text else int(text)


def _option(answer: list[str], options: list[str]) -> list[str]:
    """[text, letter]: the hub's rows have the text alone, the official files both."""
    if len(answer) == 2 and answer[1] in tuple(LETTERS):
        return answer
    if answer[0] in options[: len(LETTERS)]:
        return [answer[0], LETTERS[options.index(answer[0])]]
    if answer[0] in tuple(LETTERS) and LETTERS.index(answer[0]) < len(options):
        return [options[LETTERS.index(answer[0])], answer[0]]
    raise EvalError(f"the answer {answer!r} is none of the options {options!r}")
