"""Two runs side by side on the same prompts, or dense against sparse attention inside one run.

Differences are B minus A over the samples that both answered, with paired 95 % intervals: what is hard for both runs does
not blur what changed between them. Runs that were asked different prompts are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mtrain.errors import EvalError
from mtrain_eval.fingerprint import differences
from mtrain_eval.results import FILE, SHARES, Results, lengths, load_results, short, suites, task_names
from mtrain_eval.show import Table, markdown, percent_change, percent_of, plain_change, probability, terminal
from mtrain_eval.statistics import (
    Difference,
    Row,
    bootstrap_ratio_difference,
    mean_difference,
    pair_rows,
    paired_difference,
)
from mtrain_eval.store import write_whole

UP, DOWN = "\u25b2", "\u25bc"
# Parts of a fingerprint that decide which prompts are made; the others (model, attention, precision) are what is compared.
PROMPTS = ("seed", "tokenizer", "data", "versions")
FORMS = "a run is given as DIR, one kind of attention in it as DIR:dense or DIR/dense (or sparse)"


@dataclass(frozen=True)
class Side:
    """One of the two: a run and one kind of attention in it."""

    name: str
    results: Results
    attention: str

    @cached_property
    def by_cell(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """(task, length) -> its stored rows."""
        cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for row in self.all_rows():
            cells.setdefault((row["task"], row["length"]), []).append(row)
        return cells

    def rows(self, task: str, length: int) -> list[dict[str, Any]]:
        """Its stored rows of a cell."""
        return self.by_cell.get((task, length), [])

    def all_rows(self) -> list[dict[str, Any]]:
        """Its stored rows."""
        return [row for row in self.results["samples"] if row["attention"] == self.attention]


def compare(a: Path, b: Path, *, output: Path | None = None) -> str:
    """Compare two runs; tables for a terminal that say how they differ.

    Args:
        a, b: each is ``DIR``, the --output of a run; or ``DIR:dense``, ``DIR:sparse`` (also ``DIR/dense``, ``DIR/sparse``), one
            kind of attention in it. Two whole runs are compared kind by kind; the same directory twice compares dense with
            sparse.
        output: directory for compare.md (the tables as markdown) and compare.html; None: nothing is written.

    Raises:
        EvalError: a run cannot be read, the two have nothing in common, or they were asked different prompts.
    """
    sides = choose_sides(str(a), str(b))
    parts = [tables_of(left, right) for left, right in sides]
    tables = [table for part in parts for table in part]
    if output is not None:
        # The page needs this module for the paired tables of a report.
        from mtrain_eval.html import comparison_page

        output.mkdir(parents=True, exist_ok=True)
        write_whole(output / "compare.md", "\n".join(map(markdown, tables)))
        write_whole(output / "compare.html", comparison_page(sides, parts))
    return "\n".join(map(terminal, tables))


# --- what is compared with what ------------------------------------------------------------------------------------------


def choose_sides(a: str, b: str) -> list[tuple[Side, Side]]:
    """The pairs to compare: those named, else dense with sparse of one run, else the same kind in both runs.

    Raises:
        EvalError: it is not clear which attention of A belongs to which of B.
    """
    (path_a, kind_a), (path_b, kind_b) = split_side(a), split_side(b)
    for path in (path_a, path_b):
        if not path.exists():
            raise EvalError(f"cannot read {path}: there is no such run; {FORMS}")
    same = path_a.resolve() == path_b.resolve()
    run_a = load_results(path_a)
    run_b = run_a if same else load_results(path_b)
    kinds_a, kinds_b = _kinds(run_a, a, kind_a), _kinds(run_b, b, kind_b)
    if same and kind_a is None and kind_b is None:
        if len(kinds_a) != 2:
            raise EvalError(
                f"{path_a} holds {_and(kinds_a)} attention only; evaluate the other kind too (--attention both)"
            )
        pairs = [(kinds_a[0], kinds_a[1])]
    elif len(kinds_a) == len(kinds_b) == 1:
        pairs = [(kinds_a[0], kinds_b[0])]
    else:
        pairs = [(kind, kind) for kind in kinds_a if kind in kinds_b]
        if kind_a or kind_b or not pairs:
            raise EvalError(
                f"{a} holds {_and(kinds_a)} attention, {b} {_and(kinds_b)}; say which to compare, for example "
                f"{path_a}:{kinds_a[0]} {path_b}:{kinds_b[0]}"
            )
    return [
        (Side(_name(path_a, left, same), run_a, left), Side(_name(path_b, right, same), run_b, right))
        for left, right in pairs
    ]


def split_side(text: str) -> tuple[Path, str | None]:
    """``DIR:dense`` and, in a run directory, ``DIR/dense`` -> (DIR, dense); another path that exists is taken as it is."""
    path = Path(text)
    # The rows of a kind lie in a directory of its name, so this path mostly exists.
    if path.name and not path.is_file() and not (path / FILE).exists() and (path.parent / FILE).exists():
        return path.parent, path.name
    head, _, kind = text.rpartition(":")
    if not head or "/" in kind or "\\" in kind or Path(text).exists():
        return Path(text), None
    return Path(head), kind


def _kinds(run: Results, given: str, kind: str | None) -> list[str]:
    kinds: list[str] = run["attentions"]
    if not kinds:
        raise EvalError(f"{given} holds no answers; run mtrain eval with this --output first")
    if kind is None:
        return kinds
    if kind not in kinds:
        raise EvalError(f"{given}: the run holds {_and(kinds)} attention, not {kind!r}; {FORMS}")
    return [kind]


def _name(path: Path, kind: str, same: bool) -> str:
    return kind if same else f"{path.name or path} ({kind})"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def require_same_prompts(a: Side, b: Side) -> None:
    """Refuse runs that were asked different things.

    Raises:
        EvalError: names a cell and, from the fingerprints, what differs: seed, tokenizer, data or versions.
    """
    for cell in a.by_cell:
        try:
            pair_rows(a.rows(*cell), b.rows(*cell))
        except EvalError as error:
            ours, theirs = (side.results["run"].get("fingerprint", {}) for side in (a, b))
            found = [line for line in differences(theirs, ours) if line.startswith(PROMPTS)]
            cause = (
                "what differs: " + "; ".join(found)
                if found
                else "seed, tokenizer and versions are the same: the data differ"
            )
            raise EvalError(f"{a.name} and {b.name} cannot be compared: {error} ({cause})") from None


# --- tables --------------------------------------------------------------------------------------------------------------


def tables_of(a: Side, b: Side) -> list[Table]:
    """The whole comparison of two sides: suites, tasks, perplexity, what only one has.

    Raises:
        EvalError: they were asked different prompts, or share no sample.
    """
    require_same_prompts(a, b)
    shared = [name for name in a.results["tasks"] if name in b.results["tasks"]]
    changes = {
        (name, length): change
        for name in shared
        for length in lengths(a.results)
        if (change := change_of(a, b, name, length)) is not None
    }
    if not changes:
        raise EvalError(f"{a.name} and {b.name} share no sample; compare runs of the same tasks and lengths")
    tables = [_suite_table(a, b, changes)]
    for suite in suites(a.results):
        names = [name for name in task_names(a.results, suite) if any(name == key[0] for key in changes)]
        if names:
            tables.append(_task_table(a, b, suite, names, changes))
    only = _only_table(a, b)
    return [*tables, only] if only.rows else tables


def change_of(a: Side, b: Side, task: str, length: int) -> Difference | None:
    """What changed in one cell: the mean of the main metric, or the perplexity over the same documents."""
    metric = a.results["tasks"][task]["metric"]
    rows = a.rows(task, length), b.rows(task, length)
    if metric == "perplexity" and all("nll_sum" in row["scores"] for side in rows for row in side):
        pairs = pair_rows(*rows)
        return perplexity_change(pairs) if pairs else None
    return paired_difference(*rows, metric)


def perplexity_change(pairs: Sequence[tuple[Row, Row]]) -> Difference:
    """Perplexity of b minus that of a: exp(sum of NLL / sum of tokens) over the same samples, resampling documents."""
    documents: dict[Any, np.ndarray] = {}
    for a, b in pairs:
        name = a["meta"].get("document", ("row", a["index"]))
        sums = [a["scores"]["nll_sum"], a["scores"]["tokens"], b["scores"]["nll_sum"], b["scores"]["tokens"]]
        documents[name] = documents.get(name, np.zeros(4)) + sums
    nll_a, tokens_a, nll_b, tokens_b = np.stack(list(documents.values())).T
    whole = bootstrap_ratio_difference((nll_a, tokens_a), (nll_b, tokens_b), bounded_exp)
    own = nll_b / tokens_b - nll_a / tokens_a
    return Difference(
        **asdict(whole),
        p=None,
        better=int((own > 0).sum()),
        worse=int((own < 0).sum()),
        mean_a=float(bounded_exp(nll_a.sum() / tokens_a.sum())),
        mean_b=float(bounded_exp(nll_b.sum() / tokens_b.sum())),
    )


def bounded_exp(ratio: np.ndarray) -> np.ndarray:
    """exp, at most what a float64 holds."""
    return np.exp(np.minimum(ratio, 700.0))


def _suite_table(a: Side, b: Side, changes: dict[tuple[str, int], Difference]) -> Table:
    table = Table(
        f"{a.name} (A) and {b.name} (B): means of suites in %",
        ["suite", "length", "tasks", "pairs", f"A: {a.name}", f"B: {b.name}", "B - A [95 %]", "p"],
        [],
    )
    for suite in suites(a.results):
        if suite not in SHARES:
            continue
        for length in lengths(a.results, suite):
            parts = [changes[name, length] for name in task_names(a.results, suite) if (name, length) in changes]
            whole = mean_difference(parts)
            if whole is None:
                continue
            cells = [str(len(parts)), str(whole.n), percent_of(whole.mean_a), percent_of(whole.mean_b)]
            table.rows.append(
                [suite, short(length), *cells, _marked(percent_change(whole), whole), probability(whole.p)]
            )
    sources = [about["source"] for about in a.results["tasks"].values() if about["suite"] in SHARES]
    if "synthetic" in sources:
        table.notes.append(
            f"{sources.count('synthetic')} of the {len(sources)} tasks are on synthetic text: no benchmark's scores"
        )
    return table


def _task_table(
    a: Side, b: Side, suite: str, names: Sequence[str], changes: dict[tuple[str, int], Difference]
) -> Table:
    asked = [length for length in lengths(a.results, suite) if any((name, length) in changes for name in names)]
    shares = suite in SHARES
    title = f"{suite}: B - A in points [95 %]" if shares else f"{suite}: A, then B - A [95 %]; lower is better"
    table = Table(title, ["task", "metric", "pairs", *[short(length) for length in asked]], [])
    tested = 0
    for name in names:
        found = [changes.get((name, length)) for length in asked]
        tested += sum(one is not None and one.low is not None for one in found)
        pairs = sorted({one.n for one in found if one is not None})
        count = str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]}-{pairs[-1]}"
        cells = [percent_change(one) if shares else _with_start(one) for one in found]
        marked = [_marked(text, one) for text, one in zip(cells, found, strict=True)]
        table.rows.append([name, a.results["tasks"][name]["metric"], count, *marked])
    if tested:
        table.notes.append(
            f"{UP} {DOWN}: the interval leaves out zero; of {tested} such intervals about {0.05 * tested:.1f} would by chance"
        )
    return table


def _with_start(change: Difference | None) -> str:
    return plain_change(None) if change is None else f"{change.mean_a:.4g} {plain_change(change)}"


def _marked(text: str, change: Difference | None) -> str:
    if change is None or not change.clear:
        return text
    return f"{text} {UP if change.value > 0 else DOWN}"


def _only_table(a: Side, b: Side) -> Table:
    """Samples that only one side answered, counted per suite."""
    table = Table(
        "answered by one side only", ["suite", "tasks", "lengths", f"only A: {a.name}", f"only B: {b.name}"], []
    )
    keys = [{(row["suite"], row["task"], row["length"], row["index"]) for row in side.all_rows()} for side in (a, b)]
    alone = keys[0] ^ keys[1]
    for suite in sorted({key[0] for key in alone}):
        mine = [key for key in alone if key[0] == suite]
        counts = [sum(key in own for key in mine) for own in keys]
        asked = ", ".join(short(length) for length in sorted({key[2] for key in mine}))
        table.rows.append([suite, str(len({key[1] for key in mine})), asked, *map(str, counts)])
    return table
