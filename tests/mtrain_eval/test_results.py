"""Results, tables and the report from a run directory written by hand."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mtrain.errors import EvalError
from mtrain_eval.html import table_html, terminal_report
from mtrain_eval.infinitebench.catalogue import ENTRIES
from mtrain_eval.results import build, figure, finish, label, lengths, load_results, short
from mtrain_eval.ruler.summary import TASKS as TASK_NAMES
from mtrain_eval.sample import Figure
from mtrain_eval.show import Table, markdown, percent, plain, probability, terminal
from mtrain_eval.statistics import wilson
from mtrain_eval.store import Cell, Store
from mtrain_eval.tables import all_tables
from tests.mtrain_eval.hand_made import HOSTILE, TASKS, HandTask, make_run, row


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = make_run(tmp_path_factory.mktemp("results") / "run")
    finish(output, TASKS)
    return output


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    return load_results(run)


def test_figures_and_summary_by_hand(results: dict[str, Any]) -> None:
    assert results["attentions"] == ["dense", "sparse"] and list(results["tasks"]) == [task.name for task in TASKS]
    low, high = wilson(0.75, 8)
    keys = figure(results, "dense", "keys", 1024)
    assert keys is not None and (keys.value, keys.n, keys.low, keys.high) == (0.75, 8, low, high)
    assert figure(results, "dense", "prose", 1024) is None
    books = figure(results, "sparse", "books", 4096)
    assert books is not None and books.value == pytest.approx((8 + 9 + 10 + 11) / 4 + 0.5 - 1)
    assert lengths(results) == lengths(results, "retrieval") == [1024, 4096]
    assert {(cell["attention"], cell["task"], cell["length"]) for cell in results["does_not_fit"]} == {
        ("dense", "prose", 1024),
        ("sparse", "prose", 1024),
    }
    summary = results["summary"]["sparse"]
    assert "pg19" not in summary["suites"]  # a mean of perplexities and shares says nothing
    retrieval = summary["suites"]["retrieval"]["lengths"]
    assert (retrieval["1024"]["mean"]["value"], retrieval["1024"]["missing"]) == (0.5, ["prose"])
    assert (retrieval["4096"]["tasks"], retrieval["4096"]["mean"]["n"]) == (2, 16)
    costs = summary["costs"]["4096"]
    assert (costs["samples"], costs["density"], costs["decode_tokens_per_s"]) == (26, 0.125, 16.0)
    assert results["summary"]["dense"]["costs"]["4096"]["density"] is None


def test_every_sample_is_in_the_file_with_its_answer(results: dict[str, Any]) -> None:
    assert len(results["samples"]) == 2 * (4 + 6 + 3 * 8 + 2 * 4)
    first = next(found for found in results["samples"] if found["task"] == "keys")
    assert (first["attention"], first["index"], first["prediction"]) == ("dense", 0, HOSTILE)


def test_an_average_has_the_benchmark_s_name_only_when_it_is_one() -> None:
    names = [f"t{i}" for i in range(13)]
    assert label("ruler", names, []) == "RULER average"
    assert label("ruler", names[:8], []) == "mean of 8 of 13 RULER tasks: no RULER score"
    assert label("ruler", names, ["t3"]).endswith("1 of 13 tasks on synthetic text: no RULER score")
    assert label("niah", names[:1], []) == "niah: mean of 1 task"
    assert label("niah", names[:3], names[:2]) == "niah: mean of 3 tasks, 2 on synthetic text"
    assert "no InfiniteBench score" in label("infinitebench", names[:5], names[:5])


def test_tables_by_hand(results: dict[str, Any]) -> None:
    tables = {table.title: table for table in all_tables(results)}
    retrieval = tables["retrieval: share of right answers in %"]
    assert retrieval.header[4:] == ["1K dense", "1K sparse", "4K\u2020 dense", "4K\u2020 sparse"]
    assert retrieval.rows[0] == [
        "keys",
        "match",
        "generated",
        "8",
        "75.0 ±26.0",
        "50.0 ±28.5",
        "75.0 ±26.0",
        "50.0 ±28.5",
    ]
    assert retrieval.rows[1][:6] == ["prose", "match", "synthetic*", "8", "- [1]", "- [1]"]
    assert "[1] prose takes 2000 tokens" in retrieval.notes
    assert any("beyond the 2048 positions" in note for note in retrieval.notes)
    assert any(note.startswith("* ") and "no benchmark scores" in note for note in retrieval.notes)
    books = tables["books (synthetic)"]
    assert [line[:3] for line in books.rows] == [
        ["perplexity", "dense", "9.25 ±2.1"],
        ["perplexity", "sparse", "9.75 ±2.1"],
        ["samples", "dense", "4"],
        ["samples", "sparse", "4"],
    ]


class Sums(HandTask):
    """Perplexities by token, byte and word as those of a run: the last one may be huge."""

    huge, byte = 2.5e9, 9.25

    def aggregate(self, rows: Any) -> dict[str, Figure]:
        word = self.huge if rows[0]["length"] == 1024 else 1e6
        found = {"perplexity": 9.25, "byte_perplexity": self.byte, "word_perplexity": word}
        return {name: Figure(value, 4) for name, value in found.items()}


def test_perplexities_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ("dense",))

    def books(byte: float) -> Table:
        task = Sums("books", "pg19", metric="perplexity", source="synthetic")
        task.byte = byte
        tables = all_tables(build(json.loads((output / "run.json").read_text()), output, [task]))
        return next(table for table in tables if table.title == "books (synthetic)")

    bytewise, wordwise = books(9.25), books(3.0)
    assert bytewise.rows[1] == ["word_perplexity", "dense", "- [1]", "1e+06"]
    assert any(note.startswith("[1] above a million") and "results.json" in note for note in bytewise.notes)
    assert "byte_perplexity is the perplexity: each token is one byte" in bytewise.notes
    assert [line[0] for line in bytewise.rows] == ["perplexity", "word_perplexity", "samples"]
    assert [line[0] for line in wordwise.rows] == ["perplexity", "byte_perplexity", "word_perplexity", "samples"]
    assert not any("each token is one byte" in note for note in wordwise.notes)


def ruler_run(output: Path, tasks: int) -> list[Table]:
    """Tables of a run of the first so many RULER tasks at 4K and 8K: 90 % right at 4K, 80 % at 8K."""
    made = [HandTask(name, "ruler") for name in TASK_NAMES[:tasks]]
    make_run(output, ("dense",))
    store = Store(output)
    for task in made:
        for length, right in ((4096, 9), (8192, 8)):
            for index in range(10):
                store.append(Cell("dense", task.name, length), row(task, length, index, float(index < right)))
    store.close()
    return all_tables(build(json.loads((output / "run.json").read_text()), output, made))


def test_ruler_s_layout_by_hand(tmp_path: Path) -> None:
    tables = {table.title: table for table in ruler_run(tmp_path / "run", 13)}
    layout = tables["RULER: averages in the benchmark's layout"]
    assert layout.header == ["attention", "4K\u2020", "8K\u2020", "avg", "wAvg (inc)", "wAvg (dec)", "effective length"]
    # (1 * 90 + 2 * 80) / 3 and (2 * 90 + 1 * 80) / 3
    assert layout.rows == [["dense", "90.0", "80.0", "85.0", "83.3", "86.7", "4K"]]
    assert tables["ruler: share of right answers in %"].total[0] == "RULER average"  # type: ignore[index]


def test_a_part_of_ruler_is_no_ruler_score(tmp_path: Path) -> None:
    tables = {table.title: table for table in ruler_run(tmp_path / "run", 12)}
    layout = tables["RULER-shaped tasks: averages in the benchmark's layout"]
    assert layout.rows[0][-1] == "-" and any("Not all 13 tasks" in note for note in layout.notes)
    total = tables["ruler: share of right answers in %"].total
    assert total is not None and total[0] == "mean of 12 of 13 RULER tasks: no RULER score"


def test_infinitebench_s_means(tmp_path: Path) -> None:
    made = [HandTask(entry.name, "infinitebench", source="published") for entry in ENTRIES]
    output = make_run(tmp_path / "run", ("dense",))
    store = Store(output)
    for task in made:
        for index in range(10):
            right = float(index < (8 if "longbook" in task.name else 6))
            store.append(Cell("dense", task.name, 4096), row(task, 4096, index, right))
    store.close()
    tables = all_tables(build(json.loads((output / "run.json").read_text()), output, made))
    (means,) = (table for table in tables if table.title == "InfiniteBench: means over tasks in %")
    # longbook_{sum,qa,choice}_eng and longbook_qa_chn of 10, three of the same of 5
    assert [line[2].split(" ")[0] for line in means.rows] == ["68.0", "72.0"]


def test_many_lengths_are_broken_into_several_tables(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ("dense",))
    store = Store(output)
    for power in range(10, 20):
        store.append(Cell("dense", "keys", 1 << power), row(TASKS[1], 1 << power, 9, 1.0))
    store.close()
    tables = all_tables(build(json.loads((output / "run.json").read_text()), output, TASKS))
    titles = [table.title for table in tables if table.title.startswith("retrieval")]
    assert [title.rpartition(", ")[2] for title in titles] == ["1K to 128K", "256K to 512K"]


def test_numbers_as_text() -> None:
    assert percent(None) == "-" and percent(Figure(1.0, 1)) == "100.0"
    assert percent(Figure(0.964, 5, 0.01, 0.93, 0.99)) == "96.4 ±3.0"
    assert plain(Figure(1234.5, 3, 1.0, 1230.0, 1240.0)) == "1234 ±5"  # half to even
    assert [probability(p) for p in (None, 0.0, 0.0123, 0.5)] == ["-", "<0.001", "0.012", "0.50"]
    assert [short(n) for n in (1000, 1024, 4096, 1 << 20, 3 << 19)] == ["1000", "1K", "4K", "1M", "1536K"]


def test_a_table_in_three_clothes() -> None:
    table = Table("a | b", ["name", "n"], [["x|<y>\nz", "1"], ["w", "-2"]], ["sum of both", "-1"], ["note & note"])
    assert markdown(table).splitlines() == [
        "### a \\| b",
        "",
        "| name | n |",
        "| --- | ---: |",
        "| x\\|&lt;y> z | 1 |",
        "| w | -2 |",
        "| **sum of both** | **-1** |",
        "",
        "note &amp; note  ",
    ]
    assert "<td>x|&lt;y&gt;\nz</td>" in table_html(table)
    lines = terminal(Table("t", ["name", "k", "n"], [["long name", "a", "10"]], ["sum", "", "3"])).splitlines()
    assert lines[2:] == ["name       k   n", "---------  -  --", "long name  a  10", "sum            3"]


def test_what_a_terminal_shows(results: dict[str, Any]) -> None:
    text = terminal_report(results)
    titles = [line for line, under in zip(text.splitlines(), text.splitlines()[1:], strict=False) if under[:3] == "==="]
    assert titles[0].startswith("niah") and titles[-1] == "dense (A) and sparse (B): means of suites in %"
    assert max(map(len, text.splitlines())) < 140 and "|" not in text


class Page(HTMLParser):
    """Every tag of a page with its attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_is_one_harmless_file(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and "b" not in tags and "x" not in tags and "link" not in tags
    images = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 3 and all(source.startswith("data:image/png;base64,iVBOR") for source in images)
    assert all(not (attributes.keys() & {"href", "onclick", "onerror"}) for _, attributes in page.tags)
    words = "".join(page.words)
    assert '<script>alert("x")</script> | a & b' in words  # shown as text
    assert "mtrain eval model --suite niah,<b>retrieval</b>" in words and "Evaluation of model <x>" in words
    assert "\x07" not in text and "sparse, keys, 1K: 4" in words
    assert "0.1.0" in words and tags.count("details") >= 4


def test_markdown_and_pictures_stand_beside_it(run: Path) -> None:
    text = (run / "results.md").read_text(encoding="utf-8")
    named = [line.split("(")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert named == ["needle_grid.png", "tasks.png", "books.png"]
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in named)
    assert "dense (A) and sparse (B)" in text and text.startswith("# Evaluation of model &lt;x>\n")


def test_one_attention_one_sample(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ("dense",))
    alone = HandTask("alone", "ruler")
    store = Store(output)
    store.append(Cell("dense", "books", 512), row(TASKS[3], 512, 0, 7.0))
    store.close()
    results = finish(output, [*TASKS, alone])
    assert results["figures"]["dense"]["books"]["512"]["perplexity"] == {
        "value": 7.0,
        "n": 1,
        "stderr": None,
        "low": None,
        "high": None,
    }
    assert "NaN" not in (output / "results.json").read_text() and "nan" not in (output / "results.md").read_text()
    assert "(A)" not in (output / "results.md").read_text()


def test_tasks_of_earlier_commands_count_where_a_mean_will_do(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ("dense",))
    store = Store(output)
    cell = Cell("dense", "sums", 1024)
    store.append(cell, row(HandTask("sums", "pg19", metric="nll"), 1024, 0, 3.0))
    store.close()
    about = json.loads((output / "run.json").read_text())
    about["tasks"]["sums"] = {"suite": "pg19", "metric": "perplexity", "source": "synthetic"}
    (output / "run.json").write_text(json.dumps(about))
    results = finish(output, TASKS[:1])
    assert results["left_out"] == [cell._asdict()]
    assert results["figures"]["dense"]["keys"]["1024"]["match"]["value"] == 0.75
    assert "sums" in (output / "report.html").read_text()


def test_what_cannot_be_read_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(EvalError, match="cannot read .*results.json .*expected the --output of a finished mtrain eval"):
        load_results(tmp_path)
    with pytest.raises(EvalError, match="cannot read .*run.json"):
        finish(tmp_path, TASKS)
    broken = tmp_path / "results.json"
    for text, complaint in [
        ((run / "results.json").read_text()[:-50], "is broken .*run mtrain eval again"),
        ("[1]", "holds no object"),
        ('{"format": 2}', "has format 2, this version reads 1"),
        (
            '{"format": 1, "run": {}, "attentions": ["dense"], "tasks": {}, "figures": {}, "does_not_fit": [], "summary": {}, '
            '"samples": [{}]}',
            "samples that mtrain eval did not write so",
        ),
        ('{"format": 1, "run": {}}', "has no attentions, does_not_fit, figures, samples, summary, tasks"),
    ]:
        broken.write_text(text)
        with pytest.raises(EvalError, match=complaint):
            load_results(tmp_path)


def test_a_task_without_its_own_figure_is_refused(tmp_path: Path) -> None:
    output = make_run(tmp_path / "run", ("dense",))
    with pytest.raises(EvalError, match="keys, length 1024: no figure for its metric 'other', only .'match'."):
        finish(output, [HandTask("keys", "retrieval", metric="other")])
