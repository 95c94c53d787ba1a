"""Two runs side by side: which is compared with which, paired differences, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mtrain.errors import EvalError
from mtrain_eval.compare import choose_sides, compare, perplexity_change, split_side, tables_of
from mtrain_eval.results import build
from mtrain_eval.show import Table
from tests.mtrain_eval.hand_made import TASKS, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories: both, again (the same), dense, sparse (one kind each), seeded (another seed)."""
    folder = tmp_path_factory.mktemp("compare")
    for name, kinds, seed in [
        ("both", ("dense", "sparse"), 0),
        ("again", ("dense", "sparse"), 0),
        ("dense_only", ("dense",), 0),
        ("sparse_only", ("sparse",), 0),
        ("seeded", ("dense", "sparse"), 1),
    ]:
        output = make_run(folder / name, kinds, seed=seed)
        made = build(json.loads((output / "run.json").read_text()), output, TASKS)
        (output / "results.json").write_text(json.dumps(made))
    return folder


def tables(a: Path | str, b: Path | str) -> list[Table]:
    return [table for left, right in choose_sides(str(a), str(b)) for table in tables_of(left, right)]


def test_dense_against_sparse_in_one_run_by_hand(runs: Path) -> None:
    found = tables(runs / "both", runs / "both")
    assert [table.title.split(":")[0] for table in found] == ["dense (A) and sparse (B)", "niah", "retrieval", "pg19"]
    suites = {(line[0], line[1]): line for line in found[0].rows}
    assert suites["retrieval", "1K"][2:6] == ["1", "8", "75.0", "50.0"]
    # right for 1, 2, 3, 5, 6, 7 against 1, 3, 5, 7: worse for 2, better for none; one of each added: 1/10 and 3/10
    half = 1.959964 * math.sqrt((0.1 + 0.3 - 0.04) / 10)
    assert suites["retrieval", "1K"][6] == f"-25.0 [{100 * (-0.2 - half):+.1f}, {100 * (-0.2 + half):+.1f}]"
    assert suites["retrieval", "1K"][7] == "0.50"  # McNemar: two pairs disagree, both the same way
    assert suites["retrieval", "4K"][2:6] == ["2", "16", "75.0", "50.0"]
    books = found[3]
    assert books.rows == [["books", "perplexity", "4", "9.25 +0.5 [+0.5, +0.5] \u25b2", "8.5 +0.5 [+0.5, +0.5] \u25b2"]]
    assert found[2].rows[1][3] == "-"  # prose does not fit at 1K


def test_the_same_kinds_of_two_runs(runs: Path) -> None:
    found = tables(runs / "both", runs / "again")
    titles = [table.title for table in found if "(A)" in table.title]
    assert titles == [
        "both (dense) (A) and again (dense) (B): means of suites in %",
        "both (sparse) (A) and again (sparse) (B): means of suites in %",
    ]
    assert found[0].header[4:6] == ["A: both (dense)", "B: again (dense)"]
    assert all(line[6].startswith("+0.0 [") and line[7] == "1.00" for line in found[0].rows)


def test_sides_can_be_named(runs: Path) -> None:
    for a, b in [
        (f"{runs / 'both'}:sparse", f"{runs / 'both'}:dense"),
        (runs / "sparse_only", runs / "dense_only"),
        (runs / "sparse_only", f"{runs / 'both'}:dense"),
        (runs / "both" / "sparse", f"{runs / 'both'}/dense/"),
    ]:
        ((left, right),) = choose_sides(str(a), str(b))
        assert (left.attention, right.attention) == ("sparse", "dense")
    kinds = [
        (left.attention, right.attention) for left, right in choose_sides(str(runs / "both"), str(runs / "dense_only"))
    ]
    assert kinds == [("dense", "dense")]


def test_split_side(tmp_path: Path) -> None:
    assert split_side("runs/a:dense") == (Path("runs/a"), "dense")
    assert split_side("runs/a") == (Path("runs/a"), None)
    assert split_side("c:/runs/a") == (Path("c:/runs/a"), None)
    odd = tmp_path / "a:b"
    odd.mkdir()
    assert split_side(str(odd)) == (odd, None)


@pytest.mark.parametrize(
    ("a", "b", "complaint"),
    [
        ("both", "seeded", "different prompts.*what differs: seed: 0 -> 1"),
        ("dense_only", "dense_only", "holds dense attention only"),
        ("both:moba", "both:dense", "holds dense and sparse attention, not 'moba'; .*DIR:dense or DIR/dense"),
        ("both/moba", "both:dense", "holds dense and sparse attention, not 'moba'"),
        ("both:dense", "again", "say which to compare"),
        ("both", "nowhere", "cannot read .*no such run; a run is given as DIR, .*DIR:dense"),
        (".", "both", "cannot read .*results.json"),
    ],
)
def test_what_cannot_be_compared_is_refused(runs: Path, a: str, b: str, complaint: str) -> None:
    with pytest.raises(EvalError, match=complaint):
        tables(runs / a, runs / b)


def changed(source: Path, target: Path, change: Any) -> Path:
    """A copy of a run's results with a change."""
    found = json.loads((source / "results.json").read_text())
    change(found)
    target.mkdir()
    (target / "results.json").write_text(json.dumps(found))
    return target


def test_another_tokenizer_and_other_data_are_named(runs: Path, tmp_path: Path) -> None:
    def other_prompts(found: dict[str, Any]) -> None:
        for sample in found["samples"]:
            sample["prompt_sha256"] += "!"

    def other_tokenizer(found: dict[str, Any]) -> None:
        other_prompts(found)
        found["run"]["fingerprint"]["tokenizer"] = "xyz"

    data = changed(runs / "both", tmp_path / "data", other_prompts)
    with pytest.raises(EvalError, match="grid, length 1024, sample 0.*the data differ"):
        tables(runs / "both", data)
    tokenizer = changed(runs / "both", tmp_path / "tokenizer", other_tokenizer)
    with pytest.raises(EvalError, match="what differs: tokenizer: abc -> xyz"):
        tables(runs / "both", tokenizer)


def test_perplexities_are_compared_by_document() -> None:
    def books(nll: list[float]) -> list[dict[str, Any]]:
        found = zip(nll, (100.0, 50.0, 200.0), (0, 0, 1), strict=True)
        return [
            {"index": i, "meta": {"document": document}, "scores": {"nll_sum": value, "tokens": tokens}}
            for i, (value, tokens, document) in enumerate(found)
        ]

    a, b = books([200.0, 100.0, 500.0]), books([210.0, 100.0, 490.0])
    change = perplexity_change(list(zip(a, b, strict=True)))
    assert change.mean_a == change.mean_b == pytest.approx(math.exp(800 / 350))
    assert (change.value, change.n, change.better, change.worse) == (0.0, 2, 1, 1)
    assert change.low is not None and change.low < 0 < change.high  # type: ignore[operator]
    worse = perplexity_change(list(zip(a, books([210.0, 100.0, 520.0]), strict=True)))
    assert worse.value == pytest.approx(math.exp(830 / 350) - math.exp(800 / 350)) and worse.clear
    assert perplexity_change([(a[0], b[0])]).low is None


def test_what_only_one_answered_is_listed(runs: Path, tmp_path: Path) -> None:
    def fewer(found: dict[str, Any]) -> None:
        found["samples"] = [s for s in found["samples"] if s["task"] != "keys" or s["index"] >= 3]

    part = changed(runs / "dense_only", tmp_path / "part", fewer)
    found = tables(runs / "dense_only", part)
    assert found[-1].header[3:] == ["only A: dense_only (dense)", "only B: part (dense)"]
    assert found[-1].rows == [["retrieval", "1", "1K, 4K", "6", "0"]]
    assert tables(part, runs / "dense_only")[-1].rows == [["retrieval", "1", "1K, 4K", "0", "6"]]
    assert found[0].rows[2][3] == "5"

    def none(found: dict[str, Any]) -> None:
        found["samples"] = []

    with pytest.raises(EvalError, match="share no sample"):
        tables(runs / "dense_only", changed(runs / "dense_only", tmp_path / "none", none))


def test_no_word_of_intervals_where_there_are_none(runs: Path, tmp_path: Path) -> None:
    def one_each(found: dict[str, Any]) -> None:
        found["samples"] = [s for s in found["samples"] if s["index"] == 0]

    many = {table.title: table.notes for table in tables(runs / "both", runs / "both")}
    one = {t.title: t.notes for t in tables(*[changed(runs / "both", tmp_path / "one", one_each)] * 2)}
    title = next(title for title in many if title.startswith("pg19"))
    assert any("by chance" in note for note in many[title]) and one[title] == []


def test_compare_shows_tables_and_writes_markdown(runs: Path, tmp_path: Path) -> None:
    text = compare(runs / "both", runs / "both", output=tmp_path / "out")
    assert "|" not in text and max(map(len, text.splitlines())) < 140
    lines = text.splitlines()
    assert lines[0] == "dense (A) and sparse (B): means of suites in %" and set(lines[1]) == {"="}
    written = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    assert written.startswith(f"### {lines[0]}\n\n| suite |") and written.count("###") == text.count("\n===")
    page = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert page.count("<table>") == 4 and "<script" not in page
    assert [text.split('"')[0] for text in page.split('<img alt="')[1:]] == [
        "grid: length x depth of the needle",
        "tasks x lengths",
    ]
    assert compare(runs / "both", runs / "both") == text
