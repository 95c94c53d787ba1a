"""Evaluate a model at the lengths it was trained for: RULER, needle grids, InfiniteBench, PG-19.

mtrain eval runs/quickstart/sparse/export --suite ruler,retrieval --lengths 1K,2K,4K --attention both --limit 20
accelerate launch --config_file recipes/accelerate/cpu_2.yaml -m mtrain eval ...      every prompt split over the processes
mtrain eval --compare runs/eval-a runs/eval-b                                         two runs side by side, paired

The same command again goes on where it was stopped. Exit status: 0 done, 2 something to mend, 3 samples are
missing or nothing was measured.
"""

from __future__ import annotations

import argparse
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtrain.errors import EvalError, LaunchError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtrain.comm import Ring
    from mtrain_eval.config import EvalConfig
    from mtrain_eval.runner import Outcome

MISSING = 3
LONGEST_TIMEOUT = 30 * 24 * 3600
OUTPUT = Path("runs/eval")
DATA = """what --data-dir D may hold (taken as it is, and called local data):
  D/paul_graham_essays/*.txt, *.md, *.json, *.jsonl    essays; in JSON the field "text"            (ruler, niah)
  D/ruler/dev-v2.0.json                                SQuAD 2.0                                   (ruler_qa_1)
  D/ruler/hotpot_dev_distractor_v1.json                HotpotQA                                    (ruler_qa_2)
  D/infinitebench/passkey.jsonl, ...                   InfiniteBench's own files, one for a task   (infinitebench)
  D/pg19/*.txt, *.md, *.json, *.jsonl                  books; in JSON the field "text"             (pg19)
made-up text stands in for what is not there, or the task is left out"""
SUITES = "ruler,niah,infinitebench,pg19"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.epilog = DATA
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="directory in Hugging Face format, such as an export, or a hub id")
    what = parser.add_argument_group("what is asked")
    what.add_argument("--suite", default=SUITES, metavar="A,B", help="also: retrieval (default: %(default)s)")
    what.add_argument("--tasks", default="", metavar="A,B", help="only these tasks of the suites (default: all)")
    what.add_argument("--lengths", metavar="4K,8K", help="tokens of prompt and answer together; K = 1024")
    what.add_argument(
        "--limit", type=int, default=50, metavar="N", help="samples per task and length (default: %(default)s)"
    )
    what.add_argument("--seed", type=int, default=0, metavar="S", help="of all samples (default: %(default)s)")
    what.add_argument("--data-dir", type=Path, metavar="D", help="directory of data sets, laid out as below")
    what.add_argument("--online", action="store_true", help="data sets may be fetched from the hub")
    how = parser.add_argument_group("how the model is run")
    how.add_argument("--attention", choices=("dense", "sparse", "both"), default="dense", help="of prompts; answers are "
                     "always generated with all keys in view (default: %(default)s)")  # fmt: skip
    how.add_argument(
        "--recipe", metavar="FILE", help="its attention section is what sparse means (default: the model's own)"
    )
    how.add_argument("--max-positions", metavar="N", help="let the model take longer texts than its config says")
    how.add_argument(
        "--rope", metavar="SECTION", help="merged over rope_parameters, e.g. '{rope_type: yarn, factor: 4}'"
    )
    how.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of weights (default: %(default)s)"
    )
    how.add_argument(
        "--outer", type=int, default=1, metavar="N", help="of a launch: nodes in the ring (default: %(default)s)"
    )
    how.add_argument("--inner", type=int, metavar="N", help="of a launch: processes per node (default: all there are)")
    how.add_argument(
        "--replicas",
        type=int,
        default=1,
        metavar="N",
        help="of a launch: rings that share the samples out among them, on nodes that share DIR (default: %(default)s)",
    )
    how.add_argument(
        "--timeout", type=float, default=1800.0, metavar="S", help="seconds until a silent process is lost"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--output", type=Path, metavar="DIR", help=f"(default: {OUTPUT}; with --compare: nowhere)")
    out.add_argument(
        "--no-resume", action="store_true", help="set an earlier run in DIR aside instead of going on with it"
    )
    out.add_argument(
        "--official-lm-eval",
        action="store_true",
        help="run lm-eval's own RULER tasks instead of ours, unchanged; not comparable with RULER's table",
    )
    out.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="no evaluation: compare two finished runs"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate, or compare.

    Raises:
        EvalError: anything in the arguments, the model or the data that a user can mend.
    """
    if args.compare is not None:
        if args.model is not None:
            raise EvalError(f"--compare takes two finished runs and no model; leave out {args.model!r}")
        from mtrain_eval.compare import compare

        print(compare(*args.compare, output=args.output))
        return 0
    config = make_config(args)
    if args.official_lm_eval:
        return _official(config)
    from mtrain.parallel import join_processes, leave_processes

    timeout = timedelta(seconds=args.timeout)
    _, size, device = join_processes(timeout)
    rings = make_rings(size, args.replicas, args.outer, args.inner, timeout)
    first = rings[1].rank == 0
    try:
        outcome = _evaluate(args, config, rings, device)
        code = _conclude(config, rings[1], outcome)
    except LaunchError as error:
        told = str(error).replace(", then start again from the last checkpoint", "")
        raise LaunchError(f"{told}; every answer so far is in {config.output}, the same command goes on") from error
    except KeyboardInterrupt:
        if first:
            print(f"\nstopped; every answer so far is in {config.output}, the same command goes on", file=sys.stderr)
        raise
    leave_processes()
    return code


def make_config(args: argparse.Namespace) -> EvalConfig:
    """The arguments as an `EvalConfig`.

    Raises:
        EvalError: a value that makes no sense.
    """
    from mtrain.errors import RecipeError
    from mtrain.recipe.parts import read_section, read_size
    from mtrain_eval.config import MODES, EvalConfig, read_lengths, split_names

    if args.model is None:
        raise EvalError("which model? mtrain eval MODEL --lengths 4K,8K (see mtrain eval --help)")
    _check_names(args)
    if args.recipe is not None and args.attention == "dense":
        raise EvalError(
            f"--recipe {args.recipe} says what sparse attention is, and --attention dense has none: give --attention sparse "
            "or --attention both, or leave out --recipe"
        )
    if args.lengths is None:
        raise EvalError("which lengths? Give for example --lengths 4K,8K (tokens of prompt and answer together)")
    if args.limit < 1 or args.seed < 0:
        raise EvalError(f"--limit must be at least 1 and --seed at least 0, got {args.limit} and {args.seed}")
    if not 0 < args.timeout <= LONGEST_TIMEOUT:  # NaN neither
        raise EvalError(f"--timeout must be above 0 and at most {LONGEST_TIMEOUT} seconds, got {args.timeout:g}")
    try:
        positions = None if args.max_positions is None else read_size(args.max_positions, "--max-positions")
        rope = None if args.rope is None else read_section(args.rope, "--rope")
    except RecipeError as error:
        raise EvalError(str(error)) from None
    return EvalConfig(
        model=args.model,
        lengths=read_lengths(args.lengths),
        suites=split_names(args.suite),
        tasks=split_names(args.tasks),
        attention=MODES[args.attention],
        limit=args.limit,
        seed=args.seed,
        output=args.output or OUTPUT,
        recipe=args.recipe,
        data_dir=args.data_dir,
        online=args.online,
        max_positions=positions,
        rope=rope,
        dtype=args.dtype,
    )


def _check_names(args: argparse.Namespace) -> None:
    """What was typed wrong is said before what was not typed at all, and before anything large is read."""
    from mtrain_eval.config import split_names
    from mtrain_eval.run_directory import check_model
    from mtrain_eval.sample import SuiteOptions
    from mtrain_eval.suites import find_suites, make_tasks

    suites, tasks = split_names(args.suite), split_names(args.tasks)
    if not suites:
        raise EvalError(f"--suite names none; give for example --suite {SUITES}")
    find_suites(suites)
    check_model(args.model)
    if args.data_dir is not None and not args.data_dir.is_dir():
        raise EvalError(f"--data-dir {args.data_dir}: no such directory")
    if tasks and args.lengths is None and not args.official_lm_eval:
        # With lengths, the run itself checks them.
        make_tasks(suites, SuiteOptions(_tokenizer(args.model), args.seed, args.data_dir, args.online), tasks)


def make_rings(size: int, replicas: int, outer: int, inner: int | None, timeout: timedelta) -> tuple[Ring, Ring]:
    """The ring of this process, and the ring of all processes of the launch (the same one without replicas).

    Raises:
        LaunchError: replicas x outer x inner is another number than there are processes.
    """
    from mtrain.comm import ProcessRing, SingleRing
    from mtrain.topology import RingTopology

    inner = inner if inner is not None else max(1, size // max(outer * replicas, 1))
    if min(replicas, outer, inner) < 1 or replicas * outer * inner != size:
        raise LaunchError(
            f"--replicas {replicas} x --outer {outer} x --inner {inner} must be the {size} process(es) that are running; leave "
            "them out for one flat ring, or start more with accelerate launch --num_processes"
        )
    # A replica that is done waits for the slowest, for hours if need be; one that has died is noticed all the same.
    patience = timeout if replicas == 1 else timedelta(days=30)
    everyone = SingleRing() if size == 1 else ProcessRing.create(RingTopology(1, size), patience)
    topology = RingTopology(outer, inner)
    if topology.world_size == 1:
        return SingleRing(), everyone
    if topology == RingTopology(1, size):
        return everyone, everyone
    return ProcessRing.create(topology, timeout), everyone


def _official(config: EvalConfig) -> int:
    """lm-eval's own tasks, under their own label."""
    from mtrain_eval.harness.official import evaluate_official

    if table := evaluate_official(config, _tokenizer(config.model)):
        print(table, flush=True)
    return 0


def _tokenizer(model: str) -> PreTrainedTokenizerBase:
    from mtrain.data.tokenizer import load_tokenizer
    from mtrain.errors import DataError

    try:
        return load_tokenizer(model)
    except DataError as error:
        raise EvalError(f"{error}; save the model's tokenizer beside it, prompts cannot be made without") from None


def _evaluate(args: argparse.Namespace, config: EvalConfig, rings: tuple[Ring, Ring], device: Any) -> Outcome:
    from mtrain.inference import load_engine
    from mtrain.models.build import load_config
    from mtrain.models.rope import override_rope
    from mtrain.recipe import ModelRecipe
    from mtrain_eval.runner import evaluate

    own = load_config(ModelRecipe(path=config.model))
    used = override_rope(own, config.rope, config.max_positions)

    def load(config: EvalConfig, recipe: Any, ring: Ring) -> Any:
        return load_engine(
            config.model,
            recipe,
            ring,
            max_positions=config.max_positions,
            rope=config.rope,
            dtype=config.dtype,
            device=device,
        )

    return evaluate(
        config,
        rings[0],
        load,
        everyone=rings[1],
        tokenizer=_tokenizer(config.model),
        positions=int(used.max_position_embeddings),
        command=" ".join(["mtrain", *sys.argv[1:]]),
        resume=not args.no_resume,
        facts={
            "own_positions": int(own.max_position_embeddings),
            "device": str(device),
            "replicas": args.replicas,
            "outer": args.outer,
        },
    )


def _conclude(config: EvalConfig, ring: Ring, outcome: Outcome) -> int:
    """Results, pictures and the table on the first rank; the exit status on all."""
    from mtrain_eval.agree import on_first

    def finish() -> None:
        from mtrain_eval.html import terminal_report
        from mtrain_eval.results import finish as write_results

        print(terminal_report(write_results(config.output, outcome.tasks)))
        print(f"everything, with pictures and answers: {config.output / 'report.html'}", flush=True)

    on_first(ring, finish)
    if outcome.missing and ring.rank == 0:
        print(
            f"{outcome.missing} samples are missing, because a score was no finite number: the model's logits are broken "
            "there; the same command asks them again",
            file=sys.stderr,
        )
    if outcome.unmeasured and ring.rank == 0:
        _say_unmeasured(config, outcome)
    return MISSING if outcome.missing or outcome.nothing else 0


def _say_unmeasured(config: EvalConfig, outcome: Outcome) -> None:
    named = [name if needed is None else f"{name} ({needed})" for name, needed, _ in outcome.unmeasured]
    print(
        f"not measured, no sample fits (in brackets the smallest length that would do): {', '.join(named)}",
        file=sys.stderr,
    )
    if outcome.nothing:
        sizes = [(needed, name) for name, needed, _ in outcome.unmeasured if needed is not None]
        asked = ", ".join(map(str, config.lengths))
        why = (
            f"no sample fits --lengths {asked}; the smallest length that would do is {min(sizes)[0]} ({min(sizes)[1]})"
            if sizes
            else outcome.unmeasured[0][2]
        )
        print(f"nothing was measured: {why}", file=sys.stderr, flush=True)
