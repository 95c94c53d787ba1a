"""Prompt templates of the published benchmarks, read out of the lm-eval that is installed.

The texts belong to their projects, so none is copied here: they are parsed out of lm-eval's files, which are never imported
(importing some of them starts a download) and never run. What is wrong with them upstream is mended where they are used.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from mtrain.errors import EvalError

INSTALL = "pip install 'mtrain[eval]'"
_FIELD = re.compile(r"\{\{\s*(\w+)\s*\}\}")


class Function(str):
    """The name behind a ``!function`` tag of a task file, e.g. ``utils.doc_to_text``; never called."""


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: Function(str(node.value)))


@lru_cache(maxsize=1)
def tasks_folder() -> Path:
    """Folder ``lm_eval/tasks`` of the installed lm-eval.

    Raises:
        EvalError: lm-eval is not installed.
    """
    spec = importlib.util.find_spec("lm_eval")
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places or not (Path(places[0]) / "tasks").is_dir():
        raise EvalError(f"the prompt templates are read out of lm-eval, which is not installed; {INSTALL}")
    return Path(places[0]) / "tasks"


def constant(file: str, name: str, within: str = "") -> Any:
    """Value of the literal ``name = ...`` in a file.

    Args:
        file: below the tasks folder, e.g. ``ruler/vt_utils.py``.
        name: a module's constant, or a variable of a function.
        within: that function; "": the module itself.

    Raises:
        EvalError: no lm-eval, or no such literal in it.
    """
    body = _function(file, within) if within else _module(file)
    for node in ast.walk(body) if within else body.body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            try:
                return ast.literal_eval(node.value)  # type: ignore[attr-defined]
            except ValueError:
                continue
    raise _moved(file, f"{within}: {name}" if within else name)


def returned_template(file: str, function: str) -> str:
    """The (f-)string that a function returns last, as a template for ``str.format``: ``{name}`` for each variable.

    Raises:
        EvalError: no lm-eval, no such function, or it returns something else.
    """
    returned = [node.value for node in ast.walk(_function(file, function)) if isinstance(node, ast.Return)]
    last = returned[-1] if returned else None
    if isinstance(last, ast.JoinedStr):
        return "".join(_part(part) for part in last.values)
    if isinstance(last, ast.Constant) and isinstance(last.value, str):
        return _escaped(last.value)
    raise _moved(file, f"what {function} returns")


def task_file(folder: str, name: str) -> dict[str, Any]:
    """A task's YAML with what it includes; its functions stay names (`Function`).

    Args:
        folder: below the tasks folder, e.g. ``infinitebench``.
        name: of the file.

    Raises:
        EvalError: no lm-eval, or no such file in it.
    """
    content: Any = yaml.load(_read(f"{folder}/{name}"), Loader=_Loader)  # a safe loader: it builds plain values only
    if not isinstance(content, dict):
        raise _moved(f"{folder}/{name}", "a task")
    included = content.pop("include", [])
    merged: dict[str, Any] = {}
    for other in [included] if isinstance(included, str) else included:
        merged |= task_file(folder, other)
    return merged | content


def template_of(folder: str, name: str) -> str:
    """Description and ``doc_to_text`` of a task's YAML as one template for ``str.format``.

    ``{{context}}`` becomes ``{context}``; where a function makes the text, the string that it returns is taken, whose fields
    are the function's own variables (`returned_template`).

    Raises:
        EvalError: as `task_file`.
    """
    content = task_file(folder, name)
    text = content.get("doc_to_text")
    if isinstance(text, Function):
        module, _, function = text.rpartition(".")
        made = returned_template(f"{folder}/{module}.py", function)
    elif isinstance(text, str):
        made = _from_jinja(text)
    else:
        raise _moved(f"{folder}/{name}", "doc_to_text")
    return _from_jinja(str(content.get("description", ""))) + made


def _from_jinja(text: str) -> str:
    pieces = _FIELD.split(text)  # text, field, text, field, ..., text
    return "".join("{" + piece + "}" if i % 2 else _escaped(piece) for i, piece in enumerate(pieces))


def _part(node: ast.expr) -> str:
    if isinstance(node, ast.FormattedValue):
        return "{" + ast.unparse(node.value) + "}"
    assert isinstance(node, ast.Constant)
    return _escaped(str(node.value))


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@cache
def _read(file: str) -> str:
    path = tasks_folder() / file
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise _moved(file, "the file") from error


@cache
def _module(file: str) -> ast.Module:
    return ast.parse(_read(file))


def _function(file: str, name: str) -> ast.FunctionDef:
    for node in ast.walk(_module(file)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise _moved(file, name)


def _moved(file: str, what: str) -> EvalError:
    return EvalError(
        f"the installed lm-eval has no {what} in tasks/{file}; this was written against lm-eval 0.4.13: "
        f"{INSTALL} 'lm-eval==0.4.13'"
    )
