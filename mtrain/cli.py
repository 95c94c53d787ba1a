"""The command line. A new command is one file in `mtrain/commands` and one line in `COMMANDS`.

mtrain train quickstart train.steps=20
accelerate launch --config_file recipes/accelerate/cpu_2.yaml -m mtrain train quickstart parallel.dp=2
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from mtrain.errors import MtrainError
from mtrain.recipe.load import DEFAULT

# name -> what it does; the code is in mtrain.commands.<name>, or where ELSEWHERE says
COMMANDS = {
    "train": "train a model as a recipe says",
    "quickstart": "a context extension in miniature: train, extend sparsely over two ranks, compare with the dense twin",
    "inspect": "print a recipe as it resolves: every value, the mesh, the layout, warnings",
    "verify": "prove on this machine that ring attention equals dense masked attention",
    "eval": "RULER, needle grids, InfiniteBench and PG-19 on a model, with dense or with its sparse attention",
    "lm-eval": "lm-evaluation-harness with the model `mtrain` in it",
    "doctor": "print versions, devices and which attention backends can run here",
}
# By name only: evaluation is a package above this one, which never imports it.
ELSEWHERE = {"eval": "mtrain_eval.command", "lm-eval": "mtrain_eval.harness.command"}

USER_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Errors in one line, like all our errors."""

    def error(self, message: str) -> NoReturn:
        raise MtrainError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The parser with every command."""
    debug = _Parser(add_help=False)
    debug.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    parser = _Parser(prog="mtrain", description=(importlib.import_module("mtrain").__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, summary in COMMANDS.items():
        module = _module(name)
        sub = commands.add_parser(name, help=summary, description=module.__doc__, parents=[debug],
                                  formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
        module.configure(sub)
    return parser


def _module(command: str) -> Any:
    """The code of a command; for a package that is not installed, a stand-in that says so when it is run."""
    name = ELSEWHERE.get(command, f"mtrain.commands.{command}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if command not in ELSEWHERE or error.name != name.split(".")[0]:
            raise
        return _NotInstalled(command)


class _NotInstalled:
    """A command whose package is missing: still in the help, takes any arguments, and says how to get it."""

    def __init__(self, command: str) -> None:
        self.command = command
        self.__doc__ = "Not installed: pip install 'mtrain[eval]'"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("words", nargs=argparse.REMAINDER)

    def run(self, args: argparse.Namespace) -> NoReturn:
        raise MtrainError(f"mtrain {self.command} needs a package that is not installed: pip install 'mtrain[eval]'")


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """RECIPE [key=value ...], for every command that reads a recipe."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE [key=value ...]",
        help=f"a YAML file or the name of a shipped recipe (default: {DEFAULT}), then overrides such as train.lr=1e-5",
    )


def split_words(words: Sequence[str]) -> tuple[str, list[str]]:
    """Recipe and overrides. Without a recipe the shipped default is meant.

    Raises:
        MtrainError: a second word without "=".
    """
    recipe, overrides = DEFAULT, list(words)
    if overrides and "=" not in overrides[0].split("/")[-1]:
        recipe = overrides.pop(0)
    for word in overrides:
        if "=" not in word:
            raise MtrainError(f"expected key=value after the recipe {recipe}, got {word!r}")
    return recipe, overrides


def run(argv: Sequence[str]) -> int:
    """Parse and run; errors are raised.

    Raises:
        MtrainError: anything a user can mend.
    """
    parser = build_parser()
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = get_close_matches(argv[0], COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise MtrainError(f"unknown command {argv[0]!r}; {hint}commands: {', '.join(COMMANDS)}")
    # argparse gives all free words to the first gap between options, so the one option that may stand anywhere goes last.
    args = parser.parse_args(
        [*(word for word in argv if word != "--debug"), *(["--debug"] if "--debug" in argv else [])]
    )
    code: int = _module(args.command).run(args)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Exit codes: 0 done, 2 something the user can mend (one line on stderr), 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        return run(argv)
    except MtrainError as error:
        if "--debug" in argv:
            raise
        print(f"mtrain: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return USER_ERROR
    except BrokenPipeError:  # `mtrain inspect ... | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, a directory that may not be written
        if "--debug" in argv:
            raise
        print(f"mtrain: error: {error} (--debug shows where)", file=sys.stderr, flush=True)
        return USER_ERROR
    except KeyboardInterrupt:
        if "--debug" in argv:
            raise
        print("mtrain: interrupted", file=sys.stderr, flush=True)
        return INTERRUPTED
