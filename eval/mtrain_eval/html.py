"""The report: one HTML file that shows everything without anything from outside, and the files beside it.

Predictions are text from a model and documents from anywhere: every word is escaped, and the page forbids scripts.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtrain_eval.compare import Side, tables_of
from mtrain_eval.pictures import View, as_png, draw_all, needle_map, needle_tasks, task_map
from mtrain_eval.results import SHARES, Results, short, suites
from mtrain_eval.show import Table, escaped, markdown, numeric_columns, terminal
from mtrain_eval.store import write_whole
from mtrain_eval.tables import all_tables

FAILED_PER_CELL = 5
LONGEST = 1500  # characters of one answer that are shown

STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .6em 0; } th, td { padding: .2em .7em; border-bottom: 1px solid #e4e4e4; }
th { text-align: left; background: #f4f4f4; } .r { text-align: right; font-variant-numeric: tabular-nums; }
tr.total td { font-weight: 600; border-top: 2px solid #999; } .note { color: #555; font-size: .9em; margin: .1em 0; }
.wide { overflow-x: auto; } img { max-width: 100%; } details { margin: .3em 0; } summary { cursor: pointer; }
pre { background: #f7f7f7; padding: .5em; white-space: pre-wrap; overflow-wrap: anywhere; margin: .2em 0 .6em; }
"""


def publish(output: Path, results: Results) -> list[Path]:
    """Write results.md, the pictures and report.html beside results.json; the files written."""
    tables = all_tables(results) + paired_tables(results)
    captions = draw_all(results, output)
    title = report_title(results)
    pictures = "\n".join(f"![{caption}]({file})" for file, caption in captions.items())
    text = (
        f"# {escaped(title)}\n\n"
        + "\n".join(markdown(table) for table in tables)
        + (f"\n{pictures}\n" if pictures else "")
    )
    write_whole(output / "results.md", _clean(text))
    images = {caption: (output / file).read_bytes() for file, caption in captions.items()}
    write_whole(output / "report.html", report(results, tables, images))
    return [output / name for name in ("results.md", "report.html", *captions)]


def terminal_report(results: Results) -> str:
    """What a run shows when it ends: its tables, and how the suites differ between two kinds of attention."""
    return "\n".join(terminal(table) for table in [*all_tables(results), *paired_tables(results)[:1]])


def paired_tables(results: Results) -> list[Table]:
    """Sparse against dense on the same prompts, when a run has both and they share samples."""
    if len(results["attentions"]) != 2:
        return []
    a, b = (Side(attention, results, attention) for attention in results["attentions"])
    keys = [{(row["task"], row["length"], row["index"]) for row in side.all_rows()} for side in (a, b)]
    return tables_of(a, b) if keys[0] & keys[1] else []


def report_title(results: Results) -> str:
    """What was evaluated."""
    model = results["run"].get("model", {})
    return f"Evaluation of {model.get('path', 'a model')}"


def report(results: Results, tables: Sequence[Table], images: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        results: of `mtrain_eval.results.finish`.
        tables: in reading order.
        images: caption -> PNG.
    """
    parts = [table_html(table) for table in tables]
    if images:
        parts.append("<h2>Pictures</h2>")
    parts += [_image(caption, data) for caption, data in images.items()]
    parts += [_failed(results), _about(results)]
    return page(report_title(results), "\n".join(parts))


def comparison_page(sides: Sequence[tuple[Side, Side]], parts: Sequence[Sequence[Table]]) -> str:
    """Tables and maps of comparisons, one pair of sides after the other."""
    body = []
    for (a, b), tables in zip(sides, parts, strict=True):
        body += [table_html(table) for table in tables]
        body += [_image(caption, data) for caption, data in compared_maps(a, b).items()]
    return page(f"Comparison: {parts[0][0].title}", "\n".join(body))


def compared_maps(a: Side, b: Side) -> dict[str, bytes]:
    """Caption -> PNG with three panels: A, B and B - A."""
    views = [View(f"A: {a.name}", a.results, a.attention), View(f"B: {b.name}", b.results, b.attention)]
    if not any(suite in SHARES for suite in suites(a.results)):
        return {}
    both = [name for name in needle_tasks(a.results) if name in needle_tasks(b.results)]
    maps = {f"{name}: length x depth of the needle": needle_map(a.results, name, views) for name in both}
    maps["tasks x lengths"] = task_map(a.results, views)
    return {caption: as_png(picture) for caption, picture in maps.items()}


def page(title: str, body: str) -> str:
    """An HTML page around a body that is HTML already; nothing from outside is ever loaded."""
    return _clean(
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><h1>{html.escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table_html(table: Table) -> str:
    """One table; every cell escaped."""
    right = numeric_columns(table)

    def cells(row: Sequence[str], tag: str = "td") -> str:
        return "".join(
            f'<{tag} class="r">{html.escape(text)}</{tag}>' if flag else f"<{tag}>{html.escape(text)}</{tag}>"
            for text, flag in zip(row, right, strict=True)
        )

    rows = [f"<tr>{cells(table.header, 'th')}</tr>", *[f"<tr>{cells(row)}</tr>" for row in table.rows]]
    if table.total:
        rows.append(f'<tr class="total">{cells(table.total)}</tr>')
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    return f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table>{chr(10).join(rows)}</table></div>{notes}'


def _image(caption: str, data: bytes) -> str:
    name = html.escape(caption, quote=True)
    code = base64.b64encode(data).decode()
    return f'<figure><img alt="{name}" src="data:image/png;base64,{code}"><figcaption>{name}</figcaption></figure>'


# --- wrong answers -------------------------------------------------------------------------------------------------------


def failed_samples(results: Results) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    """(attention, task, length) -> samples that are not wholly right, of tasks that measure a share by sample."""
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for row in results["samples"]:
        score = row["scores"].get(results["tasks"][row["task"]]["metric"])
        if score is not None and score < 1.0 and row["targets"]:
            found.setdefault((row["attention"], row["task"], row["length"]), []).append(row)
    return found


def _failed(results: Results) -> str:
    groups = failed_samples(results)
    if not groups:
        return ""
    parts = ["<h2>Samples not wholly right</h2>"]
    for (attention, task, length), rows in groups.items():
        metric = results["tasks"][task]["metric"]
        shown = "".join(_sample(row, metric) for row in rows[:FAILED_PER_CELL])
        more = len(rows) - FAILED_PER_CELL
        rest = f'<p class="note">{more} more in results.json</p>' if more > 0 else ""
        name = html.escape(f"{attention}, {task}, {short(length)}: {len(rows)}")
        parts.append(f"<details><summary>{name}</summary>{shown}{rest}</details>")
    return "\n".join(parts)


def _sample(row: Mapping[str, Any], metric: str) -> str:
    depth = "" if row["depth"] is None else f", depth {row['depth']:.2f}"
    head = f"sample {row['index']}: {metric} {row['scores'][metric]:.2f}, {row['prompt_tokens']} prompt tokens{depth}"
    wanted, given = " | ".join(map(str, row["targets"])), str(row["prediction"])
    return (
        f"<p>{html.escape(head)}</p><pre>expected: {html.escape(_shorten(wanted))}\n"
        f"answered: {html.escape(_shorten(given)) or '(nothing)'}</pre>"
    )


def _shorten(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text) - LONGEST} more characters)"


# --- what was run --------------------------------------------------------------------------------------------------------


def _about(results: Results) -> str:
    run = results["run"]
    left_out = results.get("left_out", [])
    parts = ["<h2>How it was run</h2>", f"<pre>{html.escape(str(run.get('command', '')))}</pre>"]
    if left_out:
        names = ", ".join(sorted({cell["task"] for cell in left_out}))
        parts.append(
            f'<p class="note">rows of other tasks in this directory, not counted here: {html.escape(names)}</p>'
        )
    for key, value in run.items():
        if key != "command":
            text = json.dumps(value, indent=1, ensure_ascii=False, default=str)
            parts.append(f"<details><summary>{html.escape(key)}</summary><pre>{html.escape(text)}</pre></details>")
    return "\n".join(parts)


def _clean(text: str) -> str:
    """Halves of characters that a model left behind cannot be written as UTF-8; other control characters confuse readers."""
    whole = text.encode("utf-8", errors="replace").decode("utf-8")
    return "".join(char if char >= " " or char in "\n\t" else "\ufffd" for char in whole)
