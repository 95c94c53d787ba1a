"""Templates read out of the installed lm-eval: what is there, and what is said when it is not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtrain.errors import EvalError
from mtrain_eval import upstream


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A tasks folder of our own in place of lm-eval's."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "utils.py").write_text(
        'raise SystemExit("run")\n'
        'A = {"b": """x {c}""", "n": 3}\n'
        'B: str = "y"\n'
        "C = str(1)\n"
        "def f(doc):\n"
        '    inner = "z\\n"\n'
        "    inner = inner.strip()\n"
        '    return (f"a {doc} {{b}} " "c {d}" f"{doc}")\n'
        'def g(): return "plain {x}"\n'
        "def h(): return 1\n"
    )
    (tmp_path / "some" / "base_yaml").write_text('description: "Read. "\ndoc_to_text: "old"\nmax: 3\n')
    (tmp_path / "some" / "one.yaml").write_text('include: base_yaml\ndoc_to_text: "{{context}} {x}\\n{{ input }}"\n')
    (tmp_path / "some" / "two.yaml").write_text("include: base_yaml\ndoc_to_text: !function utils.f\n")
    (tmp_path / "some" / "three.yaml").write_text("task: three\n")
    monkeypatch.setattr(upstream, "tasks_folder", lambda: tmp_path)
    caches = (upstream._read, upstream._module)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_constants_are_parsed_and_nothing_is_run(tree: Path) -> None:
    assert upstream.constant("some/utils.py", "A") == {"b": "x {c}", "n": 3}
    assert upstream.constant("some/utils.py", "B") == "y"
    assert upstream.constant("some/utils.py", "inner", within="f") == "z\n"
    for name, within in (("C", ""), ("D", ""), ("inner", ""), ("A", "f"), ("A", "missing")):
        with pytest.raises(EvalError, match=r"no .*lm-eval 0\.4\.13.*pip install 'mtrain\[eval\]'"):
            upstream.constant("some/utils.py", name, within)
    with pytest.raises(EvalError, match=r"tasks/some/other\.py"):
        upstream.constant("some/other.py", "A")


def test_templates_of_task_files(tree: Path) -> None:
    made = upstream.template_of("some", "one.yaml")
    assert made.format(context="C", input="I") == "Read. C {x}\nI"
    made = upstream.template_of("some", "two.yaml")
    assert made.format(doc="D") == "Read. a D {b} c {d}D"
    assert upstream.returned_template("some/utils.py", "g").format() == "plain {x}"
    assert upstream.task_file("some", "two.yaml")["max"] == 3
    assert upstream.task_file("some", "two.yaml")["doc_to_text"] == "utils.f"
    with pytest.raises(EvalError, match="doc_to_text"):
        upstream.template_of("some", "three.yaml")
    with pytest.raises(EvalError, match="what h returns"):
        upstream.returned_template("some/utils.py", "h")


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None)
    upstream.tasks_folder.cache_clear()
    with pytest.raises(EvalError, match=r"pip install 'mtrain\[eval\]'"):
        upstream.tasks_folder()
    upstream.tasks_folder.cache_clear()


def test_the_installed_one_has_what_is_read_and_is_not_imported() -> None:
    before = {name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")}
    template = upstream.constant("ruler/niah_utils.py", "TEMPLATE")
    assert "{context}" in template and "{query}" in template and "{type_needle_v}" in template
    for file in ("cwe_utils.py", "fwe_utils.py", "qa_utils.py"):
        assert {"tokens_to_generate", "template", "answer_prefix"} <= upstream.constant(
            f"ruler/{file}", "CONFIG"
        ).keys()
    assert "{context}" in upstream.template_of("infinitebench", "infinitebench_longbook_qa_en.yaml")
    assert {name for name in sys.modules if name.startswith("lm_eval.tasks.ruler")} == before
