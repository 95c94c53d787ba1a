"""A context extension in miniature, end to end: train short, extend with sparse ring attention, compare with the dense twin.

mtrain quickstart
mtrain quickstart --output runs/mine seed=1
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from mtrain.errors import MtrainError
from mtrain.quickstart.stages import Stage, plan, run_stage

MARK = "quickstart.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe overrides for every stage, such as seed=1"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/quickstart"), help="directory of all its runs (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run all stages from the start, measure, report; exit status 1 when a promise did not hold."""
    started = time.monotonic()
    for override in args.overrides:
        if override.startswith(("output=", "model.path=")) or "=" not in override:
            raise MtrainError(
                f"{override!r} cannot be given to every stage: overrides are key=value, each stage writes under --output DIR and "
                "starts from the one before it"
            )
    stages = plan(args.output, args.overrides)  # a mistake in an override ends it here, before anything is touched
    _fresh(args.output)
    seconds = {name: sum(run_stage(stage) for stage in parts) for name, parts in stages.items()}
    return _conclude(args.output, stages, seconds, started)


def _fresh(output: Path) -> None:
    """An empty directory. An earlier quickstart there is set aside under a numbered name; other files are never touched."""
    if output.exists() and any(output.iterdir()):
        if not (output / MARK).exists():
            raise MtrainError(f"{output} holds files that no quickstart made; give another place with --output DIR")
        number = 1
        while (aside := output.with_name(f"{output.name}_{number}")).exists():
            number += 1
        output.rename(aside)
        print(f"the earlier quickstart is now {aside}", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / MARK).write_text("{}\n")


def _conclude(output: Path, stages: dict[str, list[Stage]], seconds: dict[str, float], started: float) -> int:
    # Imported late: transformers takes seconds, and the stages are processes of their own.
    from mtrain.quickstart import measure, report

    base, sparse, dense = (stages[name][-1] for name in ("base", "sparse", "dense"))
    for stage in (base, sparse, dense):
        if not measure.export_is_plain(stage.export):
            raise MtrainError(f"{stage.export} is not a plain Hugging Face directory")
    final = sparse.recipe.train.seq_len
    lengths = [base.recipe.train.seq_len]
    while lengths[-1] * 2 <= final:
        lengths.append(lengths[-1] * 2)
    exam = measure.Exam(lengths=tuple(lengths))
    rope = sparse.recipe.model.rope
    subjects = [
        measure.Subject("before, dense", str(base.export)),
        measure.Subject("before with extended positions, dense", str(base.export), rope=rope),
        measure.Subject("sparse-trained, sparse", str(sparse.export), sparse=True),
        measure.Subject("sparse-trained, dense", str(sparse.export)),
        measure.Subject("dense-trained, dense", str(dense.export)),
        measure.Subject("dense-trained, sparse", str(dense.export), sparse=True),
    ]
    print("\n== measuring the exports: retrieval by length and depth, held-out loss", flush=True)
    results = measure.measure_all(subjects, exam, sparse.recipe)
    bars = report.promises(
        results,
        final,
        [subjects[0].label, subjects[1].label],
        [subjects[2].label, subjects[3].label],
        subjects[4].label,
    )
    runs = [report.describe_run(name, parts[-1].output, seconds[name]) for name, parts in stages.items()]
    text = report.write_report(output / "report.md", runs, results, exam, bars, time.monotonic() - started)
    print(
        f"\n{text}\n\nreport: {output / 'report.md'}; models: {base.export}, {sparse.export}, {dense.export}",
        flush=True,
    )
    return 0 if all(bar.held for bar in bars) else 1
