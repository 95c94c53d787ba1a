"""A table of text, shown as markdown or in a terminal, and numbers as text.

Shares are shown times 100, with half the width of their 95 % interval.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mtrain_eval.sample import Figure
from mtrain_eval.statistics import Difference

NOTHING = "-"
NOTE_WIDTH = 110


@dataclass
class Table:
    """A title, a header, rows of text, a last row that sums up (its first cell may be long), and notes below."""

    title: str
    header: list[str]
    rows: list[list[str]]
    total: list[str] | None = None
    notes: list[str] = field(default_factory=list)


# --- numbers as text -----------------------------------------------------------------------------------------------------


def percent(found: Figure | None) -> str:
    """A share as 96.4 ±3.1."""
    if found is None:
        return NOTHING
    half = half_width(found.low, found.high)
    return f"{100 * found.value:.1f}" + ("" if half is None else f" ±{100 * half:.1f}")


def plain(found: Figure | None) -> str:
    """A number as it is, with four digits: 12.34 ±0.56."""
    if found is None:
        return NOTHING
    half = half_width(found.low, found.high)
    return f"{found.value:.4g}" + ("" if half is None else f" ±{half:.2g}")


def half_width(low: float | None, high: float | None) -> float | None:
    """Half the width of an interval."""
    return None if low is None or high is None else (high - low) / 2


def percent_change(change: Difference | None) -> str:
    """A difference of shares as -1.2 [-3.4, +1.0]."""
    if change is None:
        return NOTHING
    interval = (
        "" if change.low is None or change.high is None else f" [{100 * change.low:+.1f}, {100 * change.high:+.1f}]"
    )
    return f"{100 * change.value:+.1f}{interval}"


def plain_change(change: Difference | None) -> str:
    """The same for any number: +0.12 [-0.03, +0.27]."""
    if change is None:
        return NOTHING
    interval = "" if change.low is None or change.high is None else f" [{change.low:+.3g}, {change.high:+.3g}]"
    return f"{change.value:+.3g}{interval}"


def percent_of(value: float | None) -> str:
    """A share without an interval."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def number(value: float | None) -> str:
    """Three digits, or all of an integer's."""
    return NOTHING if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def probability(p: float | None) -> str:
    """A p-value with two digits, never 0."""
    return NOTHING if p is None else "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


# --- as text -----------------------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    """A table as GitHub's markdown; figures to the right."""
    lines = [f"### {escaped(table.title)}", "", _line([escaped(text) for text in table.header])]
    lines.append(_line(["---:" if flag else "---" for flag in numeric_columns(table)]))
    lines += [_line([escaped(text) for text in row]) for row in table.rows]
    if table.total:
        lines.append(_line([f"**{escaped(text)}**" if text else "" for text in table.total]))
    if table.notes:
        lines += ["", *[f"{escaped(note)}  " for note in table.notes]]
    return "\n".join(lines) + "\n"


def terminal(table: Table) -> str:
    """A table in aligned columns."""
    widths = [max(len(row[i]) for row in [table.header, *table.rows]) for i in range(len(table.header))]
    right = numeric_columns(table)
    if table.total:
        widths = [
            max(width, len(text)) if i else width
            for i, (width, text) in enumerate(zip(widths, table.total, strict=True))
        ]
    lines = [table.title, "=" * len(table.title), _aligned(table.header, widths, right)]
    lines.append("  ".join("-" * width for width in widths))
    lines += [_aligned(row, widths, right) for row in table.rows]
    if table.total:
        lines.append(_sum_line(table.total, widths, right))
    notes = [line for note in table.notes for line in textwrap.wrap(note, NOTE_WIDTH, subsequent_indent="  ")]
    return "\n".join([*lines, *notes]) + "\n"


def numeric_columns(table: Table) -> list[bool]:
    """Which columns hold figures only."""

    def figure(text: str) -> bool:
        return not text or text[0] in "+-<" or text[0].isdigit()

    return [i > 0 and bool(table.rows) and all(figure(row[i]) for row in table.rows) for i in range(len(table.header))]


def _sum_line(total: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    """The long first cell runs on into the empty ones beside it; where it is longer still, it has a line of its own."""
    empty = next((i for i, text in enumerate(total) if i and text), len(total))
    room = sum(widths[:empty]) + 2 * (empty - 1)
    figures = _aligned(total[empty:], widths[empty:], right[empty:])
    if len(total[0]) <= room:
        return f"{total[0].ljust(room)}  {figures}".rstrip()
    return f"{total[0]}\n{' ' * room}  {figures}".rstrip()


def _aligned(row: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    cells = [
        text.rjust(width) if flag else text.ljust(width) for text, width, flag in zip(row, widths, right, strict=True)
    ]
    return "  ".join(cells).rstrip()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def escaped(text: Any) -> str:
    """Text that cannot break out of a cell, or of the page."""
    one_line = " ".join(str(text).split())
    return one_line.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
