"""lm-eval's own command line with the model `mtrain` registered.

mtrain lm-eval run --model mtrain --model_args pretrained=DIR,attention=sparse --include_path eval/tasks --tasks ruler_4096
mtrain lm-eval ls tasks --include_path eval/tasks
mtrain lm-eval write-tasks DIR --lengths 3K,6K          our tasks as lm-eval files, for any lengths

Everything after `mtrain lm-eval` goes to lm-eval as it is. Under accelerate launch every process takes part in every prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from datetime import timedelta
from pathlib import Path

from mtrain.errors import EvalError

WRITE = "write-tasks"
OUTPUT_FLAGS = ("--output_path", "-o")


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="...", help="what lm-eval takes: run, ls, validate")


def run(args: argparse.Namespace) -> int:
    """Hand over to lm-eval.

    Raises:
        EvalError: lm-eval is not installed; or see `checked_tasks`.
    """
    words = [word for word in args.words if word != "--"]
    if words[:1] == [WRITE]:
        return _write_tasks(words[1:])
    try:
        from lm_eval._cli.harness import HarnessCLI
    except ImportError as error:
        raise EvalError(f"lm-eval is missing or too old ({error}); pip install 'mtrain[eval]'") from None
    import mtrain_eval.harness.lm  # noqa: F401  registers the model
    from mtrain.parallel import join_processes
    from mtrain_eval.harness.choice import checked_tasks

    first = join_processes(timedelta(minutes=30))[0] == 0
    sys.argv = ["lm-eval", *(words if first else _silent(words))]
    # lm-eval lets the first process of every node print and write; only the first of all has something to say.
    quiet = contextlib.nullcontext() if first else contextlib.redirect_stdout(io.StringIO())
    notes: list[str] = []

    def say(line: str) -> None:
        notes.append(line)
        if first:
            print(f"mtrain: {line}", file=sys.stderr, flush=True)

    with quiet, checked_tasks(say):
        command = HarnessCLI()
        command.execute(command.parse_args())
    for line in notes.copy():  # again, because progress bars stand between the first time and the table
        say(line)
    return 0


def _silent(words: list[str]) -> list[str]:
    """The words without those that write files."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in OUTPUT_FLAGS:
            skip = True
        elif word not in ("--log_samples", "-s") and not word.startswith("--output_path="):
            kept.append(word)
    return kept


def _write_tasks(words: list[str]) -> int:
    from mtrain_eval.config import read_lengths
    from mtrain_eval.harness.yaml_files import LENGTHS, names_to_type, write_tasks

    parser = argparse.ArgumentParser(prog=f"mtrain lm-eval {WRITE}")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--lengths", help="such as 3K,6K (default: 4K to 512K)")
    args = parser.parse_args(words)
    lengths = LENGTHS if args.lengths is None else read_lengths(args.lengths)
    written = write_tasks(args.directory, lengths)
    print(
        f"{len(written)} files below {args.directory}; use them with --include_path {args.directory} --tasks and one of"
    )
    for names in names_to_type(lengths):
        print(f"  {' '.join(names)}")
    print(
        f"or single tasks such as ruler_vt_{lengths[0]}; `mtrain lm-eval ls tasks --include_path {args.directory}` lists all"
    )
    return 0
