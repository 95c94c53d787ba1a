"""RULER's scorers, per answer (scripts/eval/synthetic/constants.py and evaluate.py of NVIDIA/RULER).

The published figures are these times 100.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """The answer as it is compared: control characters become newlines, the ends are stripped."""
    return _CONTROL.sub("\n", prediction.strip()).strip()


def string_match_all(prediction: str, targets: Sequence[str]) -> float:
    """Share of the targets that occur in the prediction, whatever their case."""
    text = clean(prediction).lower()
    return sum(target.lower() in text for target in targets) / len(targets)


def string_match_part(prediction: str, targets: Sequence[str]) -> float:
    """1.0 when any of the targets occurs in the prediction, whatever its case."""
    text = clean(prediction).lower()
    return float(any(target.lower() in text for target in targets))
