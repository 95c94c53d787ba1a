"""A run's results as tables: tasks by lengths, perplexities, RULER's layout, costs.

A cell that no sample fits has "-" and a footnote; lengths beyond those of the training are marked; figures on stand-in text
are never called by the benchmark's name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mtrain_eval.results import (
    PUBLISHED,
    SHARES,
    Results,
    figure,
    lengths,
    reason,
    rows_of,
    short,
    suites,
    task_names,
)
from mtrain_eval.sample import Figure
from mtrain_eval.show import NOTHING, Table, number, percent, percent_of, plain

BEYOND = "\u2020"  # dagger: beyond the positions the model was trained on
STAND_IN = "*"
TITLES = {"ruler": "RULER", "infinitebench": "InfiniteBench", "pg19": "PG-19"}
LARGEST = 1e6  # of a perplexity in a table
COLUMNS = 8  # figures side by side before a table is broken
SOURCES = {
    "published": "published",
    "local": "local data",
    "generated": "generated",
    "synthetic": "synthetic" + STAND_IN,
}


# --- tables --------------------------------------------------------------------------------------------------------------


def all_tables(results: Results) -> list[Table]:
    """Every table of a run, in reading order."""
    tables: list[Table] = []
    for suite in suites(results):
        if suite in SHARES:
            tables += suite_tables(results, suite)
        else:
            tables += perplexity_tables(results, suite)
    tables += ruler_tables(results) + infinitebench_tables(results)
    tables.append(cost_table(results))
    return tables


def suite_tables(results: Results, suite: str) -> list[Table]:
    """Tasks x lengths of one suite, the attentions side by side; broken by lengths when it would be too wide."""
    attentions, asked = results["attentions"], lengths(results, suite)
    step = max(1, COLUMNS // max(1, len(attentions)))
    tables = []
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        title = f"{suite}: share of right answers in %"
        if len(asked) > step:
            title += f", {short(part[0])} to {short(part[-1])}"
        tables.append(_suite_table(results, suite, part, title))
    return tables


def _suite_table(results: Results, suite: str, asked: Sequence[int], title: str) -> Table:
    attentions, notes = results["attentions"], _Notes()
    columns = [(length, attention) for length in asked for attention in attentions]
    header = ["task", "metric", "source", "n"]
    header += [f"{heading(results, length)} {attention}" for length, attention in columns]
    table = Table(title, header, [])
    for name in task_names(results, suite):
        about = results["tasks"][name]
        found = [figure(results, attention, name, length) for length, attention in columns]
        cells = [
            percent(one) if one is not None else notes.mark(reason(results, attention, name, length))
            for one, (length, attention) in zip(found, columns, strict=True)
        ]
        table.rows.append([name, about["metric"], SOURCES[about["source"]], _counts(found), *cells])
    means = [_suite_mean(results, suite, length, attention, notes) for length, attention in columns]
    one = next(iter(results["attentions"]), None)
    label = results["summary"][one]["suites"][suite]["label"] if one else suite
    table.total = [label, "", "", "", *means]
    table.notes = [*_standing_notes(results, suite, asked), *notes.lines]
    return table


def _suite_mean(results: Results, suite: str, length: int, attention: str, notes: _Notes) -> str:
    found = results["summary"][attention]["suites"].get(suite, {"lengths": {}})["lengths"].get(str(length))
    if found is None:
        return NOTHING
    text = percent(Figure(**found["mean"]))
    if found["missing"]:
        text += notes.mark(f"mean of {found['tasks']}: the other tasks have no figure there", sign="")
    return text


def perplexity_tables(results: Results, suite: str) -> list[Table]:
    """One table per task that measures a perplexity: its figures down, lengths across."""
    tables = []
    for name in task_names(results, suite):
        notes, asked = _Notes(), lengths(results, suite)
        metrics = [
            metric
            for attention in results["attentions"]
            for cell in results["figures"].get(attention, {}).get(name, {}).values()
            for metric in cell
            if not metric.startswith("nll_to_")
        ]
        table = Table(
            f"{name} ({SOURCES[results['tasks'][name]['source']].rstrip(STAND_IN)})", ["figure", "attention"], []
        )
        table.header += [heading(results, length) for length in asked]
        bytewise = _bytes_are_tokens(results, name)
        for metric in dict.fromkeys(metrics):
            if metric == "byte_perplexity" and bytewise:
                continue
            for attention in results["attentions"]:
                found = {length: figure(results, attention, name, length, metric) for length in asked}
                cells = [
                    _perplexity(one, notes) if one is not None else notes.mark(reason(results, attention, name, length))
                    for length, one in found.items()
                ]
                table.rows.append([metric, attention, *cells])
        for attention in results["attentions"]:
            counts = [str(len(rows_of(results, attention, name, length))) for length in asked]
            table.rows.append(["samples", attention, *counts])
        table.notes = [*_standing_notes(results, suite, asked), *notes.lines]
        if bytewise:
            table.notes.append("byte_perplexity is the perplexity: each token is one byte")
        table.notes.append("intervals by resampling documents; the loss by position is in results.json (nll_to_N)")
        tables.append(table)
    return tables


def _perplexity(found: Figure, notes: _Notes) -> str:
    if found.value <= LARGEST:
        return plain(found)
    return notes.mark("above a million, too large to say anything; the figure is in results.json")


def _bytes_are_tokens(results: Results, task: str) -> bool:
    """Whether perplexity by byte and by token are the same everywhere, as with a tokenizer of bytes."""
    cells = [cell for per_task in results["figures"].values() for cell in per_task.get(task, {}).values()]
    return bool(cells) and all(
        {"perplexity", "byte_perplexity"} <= cell.keys()
        and cell["perplexity"]["value"] == cell["byte_perplexity"]["value"]
        for cell in cells
    )


def ruler_tables(results: Results) -> list[Table]:
    """NVIDIA's layout: one row per attention, lengths across, then the means and the effective length."""
    if "ruler" not in suites(results):
        return []
    asked = lengths(results, "ruler")
    summaries = {attention: results["summary"][attention]["ruler"] for attention in results["attentions"]}
    header = ["attention", *[heading(results, length) for length in asked]]
    header += ["avg", "wAvg (inc)", "wAvg (dec)", "effective length"]
    table = Table("", header, [])
    for attention, found in summaries.items():
        averages = {int(length): value for length, value in found["average"].items()}
        # A mean over lengths with different tasks would compare nothing.
        mean = None if found["wavg_inc"] is None else sum(averages.values()) / len(averages)
        row = [attention, *[percent_of(averages.get(length)) for length in asked]]
        row += [percent_of(mean), percent_of(found["wavg_inc"]), percent_of(found["wavg_dec"]), _effective(found)]
        table.rows.append(row)
        table.notes += [note for note in found["notes"] if note not in table.notes]
    names = list(dict.fromkeys(found["name"] for found in summaries.values()))
    table.title = f"{' / '.join(names)}: averages in the benchmark's layout"
    table.notes += [
        "effective length: the longest from 4K on with an average of at least 85.6, Llama-2-7B-chat's at 4K (Hsieh et al. "
        "2024); inc and dec weigh the lengths 1, 2, 3, ... upwards and downwards",
        *_beyond_note(results, asked),
    ]
    return [table]


def _effective(found: dict[str, Any]) -> str:
    """The effective length; "<4K" when complete lengths were run and none passes."""
    if found["effective_length"] is not None:
        return short(int(found["effective_length"]))
    complete = [int(length) for length, count in found["tasks"].items() if count == PUBLISHED["ruler"][1]]
    tested = [length for length in complete if length >= 4096]
    return f"<{short(min(tested))}" if tested else NOTHING


def infinitebench_tables(results: Results) -> list[Table]:
    """The means over tasks that papers print, where all of their tasks were run on the published data or local files."""
    rows = [
        [name, attention, *[percent(_figure(means.get(str(length)))) for length in lengths(results, "infinitebench")]]
        for attention in results["attentions"]
        for name, means in results["summary"][attention].get("infinitebench", {}).items()
    ]
    header = ["mean", "attention", *[heading(results, length) for length in lengths(results, "infinitebench")]]
    notes = _beyond_note(results, lengths(results, "infinitebench"))
    title = "InfiniteBench's tasks on local data" if _local(results, "infinitebench") else "InfiniteBench"
    return [Table(f"{title}: means over tasks in %", header, rows, notes=notes)] if rows else []


def _figure(found: dict[str, Any] | None) -> Figure | None:
    return None if found is None else Figure(**found)


def cost_table(results: Results) -> Table:
    """What it took, per attention and length."""
    header = ["length", "attention", "samples", "prompt tokens", "prefill s", "decoded tokens/s", "density", "cut"]
    table = Table("costs", header, [])
    for length in lengths(results):
        for attention in results["attentions"]:
            cost = results["summary"][attention]["costs"].get(str(length))
            if cost is None or not cost["samples"]:
                continue
            cells = [number(cost[key]) for key in ("prompt_tokens", "prefill_s", "decode_tokens_per_s")]
            density = "1" if cost["density"] is None else f"{cost['density']:.3f}"
            table.rows.append(
                [heading(results, length), attention, str(cost["samples"]), *cells, density, str(cost["truncated"])]
            )
    table.notes = [
        "means over samples; density: share of the causal (query, key) pairs of the prompt that attention looked at; cut: "
        "samples whose text was shortened to fit"
    ]
    return table


# --- pieces --------------------------------------------------------------------------------------------------------------


class _Notes:
    """Footnotes of one table, each reason once."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._numbers: dict[str, int] = {}

    def mark(self, why: str | None, sign: str = NOTHING) -> str:
        """A sign with the number of its footnote; the bare sign when there is no reason to give."""
        if why is None:
            return sign
        if why not in self._numbers:
            self._numbers[why] = len(self._numbers) + 1
            self.lines.append(f"[{self._numbers[why]}] {why}")
        return f"{sign} [{self._numbers[why]}]"


def _standing_notes(results: Results, suite: str, asked: Sequence[int]) -> list[str]:
    notes = []
    synthetic = [name for name in task_names(results, suite) if results["tasks"][name]["source"] == "synthetic"]
    if synthetic:
        title = TITLES.get(suite, "benchmark")
        notes.append(f"{STAND_IN} on a synthetic stand-in for the published text; these figures are no {title} scores")
    if _local(results, suite):
        folder = results["run"].get("config", {}).get("data_dir") or "--data-dir"
        notes.append(f"local data: whatever {folder} holds; it was not checked against the published text")
    return notes + _beyond_note(results, asked)


def _local(results: Results, suite: str) -> bool:
    return any(results["tasks"][name]["source"] == "local" for name in task_names(results, suite))


def _beyond_note(results: Results, asked: Sequence[int]) -> list[str]:
    trained = trained_positions(results)
    if trained is None or all(length <= trained for length in asked):
        return []
    return [f"{BEYOND} beyond the {trained} positions the model was trained on"]


def heading(results: Results, length: int) -> str:
    """A length as a column's head, marked when the model was not trained so far."""
    trained = trained_positions(results)
    return short(length) + (BEYOND if trained is not None and length > trained else "")


def trained_positions(results: Results) -> int | None:
    """How far the model was trained, as the run knows it; None when it does not."""
    model = results["run"].get("model", {})
    found = (model.get("training") or {}).get("seq_len") or model.get("own_positions")
    return int(found) if found else None


def _counts(found: Sequence[Figure | None]) -> str:
    counts = sorted({one.n for one in found if one is not None})
    return NOTHING if not counts else str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
