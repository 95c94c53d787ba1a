"""The house rules, read off the source: what may import what, who may talk and who may look at the environment.

Each rule is a function from a parsed file to complaints, and is itself tested on a file that breaks it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "sparse_kernels": ROOT / "sparse_kernels",
    "mtrain": ROOT / "mtrain",
    "mtrain_eval": ROOT / "eval" / "mtrain_eval",
}
# Imports point down only: a package may use those to its right.
ORDER = ("mtrain_eval", "mtrain", "sparse_kernels")
OUTSIDE = ("scripts", "tests", "benchmarks", "recipes", "eval")

TALKS = {"mtrain/comm.py", "mtrain/parallel.py", "mtrain/checkpoint.py"}
READS_ENVIRONMENT = {"mtrain/parallel.py"}
# Imported inside the function that needs them; kernels written in Triton have a folder of their own.
# The subclass of lm-eval's model needs its base when it is defined; nothing imports that folder but who wants lm-eval.
LM_EVAL_HOME = "eval/mtrain_eval/harness/"
OPTIONAL = {"triton", "flash_attn", "lm_eval", "matplotlib", "datasets", "tensorboard"}
TRITON_HOME = "sparse_kernels/gpu/"

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 90
MAX_PARAMETERS = 12
# Run as `python -m scripts.parity`; an example of a program outside of this tree.
NOT_BY_PATH = {"scripts/parity.py", "scripts/attach_example.py"}
# Its keywords are the public contract of the design, settings with defaults; a bag of settings would only hide them.
MANY_PARAMETERS = {"estimate_vertical_slash"}

Rule = Callable[[str, str], list[str]]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import; `from a import b` counts as a.b, because b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def upward_imports(path: str, source: str) -> list[str]:
    """Imports of a package further up, or of scripts and tests."""
    package = next(name for name in ORDER if path.startswith((f"{name}/", f"eval/{name}/")))
    banned = (*ORDER[: ORDER.index(package)], *OUTSIDE)
    return [
        f"{path}:{line} imports {name}" for line, name in imported(ast.parse(source)) if name.split(".")[0] in banned
    ]


def talking(path: str, source: str) -> list[str]:
    """Any use of torch.distributed outside the three files that may."""
    if path in TALKS:
        return []
    tree = ast.parse(source)
    found = [line for line, name in imported(tree) if name.startswith("torch.distributed")]
    found += [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    ]
    return [f"{path}:{line} uses torch.distributed" for line in sorted(found)]


def environment(path: str, source: str) -> list[str]:
    """Any look at the environment outside the one file that may."""
    if path in READS_ENVIRONMENT:
        return []
    tree = ast.parse(source)
    names = {"os.environ", "os.environb", "os.getenv", "os.putenv"}
    found = [line for line, name in imported(tree) if name in names]
    found += [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) in names]
    return [f"{path}:{line} reads the environment" for line in sorted(found)]


def eager_optional(path: str, source: str) -> list[str]:
    """Optional packages imported when the file is imported."""
    if path.startswith((TRITON_HOME, LM_EVAL_HOME)):
        return []
    lazy: set[int] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lazy.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return [
        f"{path}:{line} imports {name} at the top"
        for line, name in imported(tree)
        if line not in lazy and (name.split(".")[0] in OPTIONAL or name.startswith("torch.utils.tensorboard"))
    ]


def long_things(path: str, source: str) -> list[str]:
    """Files, functions and parameter lists beyond the limit."""
    count = source.count("\n")
    found = [f"{path} has {count} lines, at most {MAX_FILE_LINES}"] if count > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            parameters = len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs)
            excused = (
                path.startswith(TRITON_HOME) or node.name in MANY_PARAMETERS
            )  # a kernel takes every stride it needs
            if lines > MAX_FUNCTION_LINES:
                found.append(f"{path}:{node.lineno} {node.name} has {lines} lines, at most {MAX_FUNCTION_LINES}")
            if parameters > MAX_PARAMETERS and not excused:
                found.append(f"{path}:{node.lineno} {node.name} has {parameters} parameters, at most {MAX_PARAMETERS}")
    return found


def needs_installation(path: str, source: str) -> list[str]:
    """A script that imports our packages at its top and does not put the tree on sys.path first.

    Uninstalled it would not run, and beside another checkout that is installed it would run that one's code.
    """
    if path in NOT_BY_PATH:
        return []
    for node in ast.parse(source).body:
        if ast.unparse(node).startswith("sys.path.insert("):
            return []
        found = [(line, name) for line, name in imported(node) if name.split(".")[0] in (*ORDER, "scripts")]
        if found and isinstance(node, (ast.Import, ast.ImportFrom)):
            return [f"{path}:{found[0][0]} imports {found[0][1]} before sys.path.insert(0, <the tree>)"]
    return []


def machine_paths(path: str, source: str) -> list[str]:
    """Paths that exist on one machine only, and package indexes other than the user's own."""
    pattern = re.compile(
        r"(?<![\w.*])/(?:work|root|home|Users)/\w|/tmp/[a-z]/|--?(?:extra-)?index-url|https?://[^\s/]*(?:local|proxy)"
    )
    return [
        f"{path}:{number} names {match[0]!r}"
        for number, line in enumerate(source.splitlines(), 1)
        if (match := pattern.search(line))
    ]


def package_files() -> Iterator[tuple[str, str]]:
    for folder in PACKAGES.values():
        yield from read(folder.rglob("*.py"))


def read(files: Iterator[Path]) -> Iterator[tuple[str, str]]:
    for file in sorted(files):
        yield file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8", errors="replace")


BROKEN = [
    (upward_imports, "sparse_kernels/x.py", "from mtrain.layout import RingLayout"),
    (upward_imports, "mtrain/x.py", "def f():\n    import mtrain_eval.tasks"),
    (upward_imports, "mtrain/x.py", "from scripts import bench_cpu"),
    (talking, "mtrain/x.py", "import torch.distributed as dist"),
    (talking, "mtrain/x.py", "from torch import distributed"),
    (talking, "sparse_kernels/x.py", "import torch\ntorch.distributed.get_rank()"),
    (environment, "mtrain/x.py", "import os\nos.environ['RANK']"),
    (environment, "mtrain/x.py", "from os import environ"),
    (environment, "mtrain/comm.py", "import os\nos.getenv('RANK')"),
    (eager_optional, "mtrain/x.py", "import triton.language as tl"),
    (eager_optional, "mtrain/x.py", "try:\n    from flash_attn import flash_attn_func\nexcept ImportError:\n    pass"),
    (eager_optional, "mtrain/x.py", "from torch.utils.tensorboard import SummaryWriter"),
    (long_things, "mtrain/x.py", "x = 1\n" * (MAX_FILE_LINES + 1)),
    (long_things, "mtrain/x.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (long_things, "mtrain/x.py", "def f(" + ", ".join(f"a{i}" for i in range(MAX_PARAMETERS + 1)) + "): ..."),
    (needs_installation, "scripts/x.py", "import sys\nfrom mtrain.layout import RingLayout\nsys.path.insert(0, 'x')"),
    (machine_paths, "README.md", "cd /ro" + "ot/project"),
    (machine_paths, "Makefile", "pip install --index" + "-url x"),
]

ALLOWED = [
    (upward_imports, "mtrain/x.py", "from sparse_kernels import SparsePattern"),
    (talking, "mtrain/comm.py", "import torch.distributed as dist"),
    (environment, "mtrain/parallel.py", "import os\nos.environ['RANK']"),
    (eager_optional, "mtrain/x.py", "def f():\n    import datasets"),
    (eager_optional, "sparse_kernels/gpu/forward.py", "import triton"),
    (needs_installation, "scripts/x.py", "import sys\nsys.path.insert(0, 'x')\nfrom mtrain.layout import RingLayout"),
    (needs_installation, "scripts/x.py", "import torch\ndef main():\n    import mtrain"),
    (machine_paths, "README.md", "runs/work/x, ./root/x and https://example.org/home/x"),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_a_broken_rule_is_seen(rule: Rule, path: str, source: str) -> None:
    assert rule(path, source)


@pytest.mark.parametrize(("rule", "path", "source"), ALLOWED)
def test_what_is_allowed_passes(rule: Rule, path: str, source: str) -> None:
    assert not rule(path, source)


@pytest.mark.parametrize("rule", [upward_imports, talking, environment, eager_optional, long_things])
def test_packages_keep_the_rule(rule: Rule) -> None:
    files = list(package_files())
    assert len(files) > 20
    complaints = [complaint for path, source in files for complaint in rule(path, source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_scripts_run_without_installation() -> None:
    files = list(read((ROOT / "scripts").glob("*.py")))
    assert len(files) > 5
    complaints = [complaint for path, source in files for complaint in needs_installation(path, source)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_scripts_and_tests_are_short() -> None:
    for folder in ("tests", "scripts"):
        for path, source in read((ROOT / folder).rglob("*.py")):
            assert source.count("\n") <= MAX_FILE_LINES, f"{path} has more than {MAX_FILE_LINES} lines"


def test_no_file_names_a_machine() -> None:
    folders = [*PACKAGES.values(), ROOT / "tests", ROOT / "scripts", ROOT / "recipes", ROOT / ".ci"]
    files = [
        file for folder in folders for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts
    ]
    files += [
        file for file in ROOT.iterdir() if file.suffix in (".md", ".py", ".toml", ".txt") or file.name == "Makefile"
    ]
    complaints = [complaint for path, source in read(iter(files)) for complaint in machine_paths(path, source)]
    assert not complaints, "\n" + "\n".join(complaints)
