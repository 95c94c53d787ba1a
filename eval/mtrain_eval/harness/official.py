"""`mtrain eval --official-lm-eval`: lm-eval's own RULER tasks, unchanged, for whoever must compare with numbers made by them.

They are not RULER as published, nor ours. What differs in lm-eval 0.4.13: QA answers are scored in full where one of several should
do, CWE has lost its example, prompts may fill little more than half of the length, and a sample depends on what ran before it. So
the results stand in a file of their own, under a label that says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtrain.errors import EvalError
from mtrain_eval.config import SPARSE, EvalConfig
from mtrain_eval.tokens import count_tokens

LABEL = "lm-eval's own variant: not comparable with RULER's table, nor with `mtrain eval`"
FILE = "official_lm_eval.json"
OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
ONLINE = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery",
          "ruler_qa_squad", "ruler_qa_hotpot")  # fmt: skip
# Its builders of these never end (vt), or divide by zero (cwe), when an example of theirs takes too many tokens.
NEED_LONG_TOKENS = ("ruler_vt", "ruler_cwe")
MIN_CHARACTERS_PER_TOKEN = 2.5


def evaluate_official(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Run them with every kind of attention of the configuration; the table as text, results in ``OUTPUT/FILE``.

    Raises:
        EvalError: tasks that lm-eval has not, that need the network, or that would never end with this tokenizer.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from mtrain_eval.harness.lm import MtrainLM

    names = wanted_tasks(config, tokenizer)
    metadata = {"tokenizer": config.model, "pretrained": config.model, "max_seq_lengths": list(config.lengths)}
    manager = TaskManager(metadata=metadata)
    found: dict[str, Any] = {}
    first = True
    for attention in config.attention:
        recipe = config.recipe if attention == SPARSE else None
        lm = MtrainLM(config.model, attention, recipe, config.max_positions, config.dtype)
        results = simple_evaluate(lm, tasks=names, task_manager=manager, limit=config.limit, bootstrap_iters=0)
        first = lm.ring.rank == 0
        found[attention] = {} if results is None else results["results"]
        del lm  # or two models would be held at a time
    table = _table(found, config.lengths)
    if first:
        _write(config.output / FILE, {"label": LABEL, "model": config.model, "limit": config.limit, "results": found})
    return f"{LABEL}\n\n{table}" if first else ""


def wanted_tasks(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Which of lm-eval's tasks: those named, or all that the network (or its absence) allows.

    Raises:
        EvalError: see `evaluate_official`.
    """
    if "infinitebench" in config.suites and "ruler" not in config.suites:
        raise EvalError(
            "--official-lm-eval: lm-eval's infinitebench cannot load its data set (its YAML is no feature description); "
            "`mtrain eval --suite infinitebench` reads the same data"
        )
    known = OFFLINE + ONLINE
    for name in config.tasks:
        if name not in known:
            raise EvalError(f"--official-lm-eval: lm-eval has no RULER task {name!r}; it has {', '.join(known)}")
    names = list(config.tasks) or [*OFFLINE, *(ONLINE if config.online else ())]
    blocked = [name for name in names if name in ONLINE]
    if blocked and not config.online:
        raise EvalError(
            f"--official-lm-eval: {', '.join(blocked)} fetch essays or questions; add --online, or name others"
        )
    sentence = "The grass is green and the sky is blue, and so it goes on for a while in plain words. " * 20
    if len(sentence) / count_tokens(tokenizer, sentence) >= MIN_CHARACTERS_PER_TOKEN:
        return names
    endless = [name for name in names if name in NEED_LONG_TOKENS]
    if config.tasks and endless:
        raise EvalError(
            f"--official-lm-eval: lm-eval's {', '.join(endless)} never end with a tokenizer of so short tokens; `mtrain eval` "
            "has them for any tokenizer"
        )
    return [name for name in names if name not in endless]


def _table(found: dict[str, Any], lengths: tuple[int, ...]) -> str:
    lines = [
        "| attention | task | " + " | ".join(str(length) for length in lengths) + " |",
        "|" + "---|" * (2 + len(lengths)),
    ]
    for attention, tasks in found.items():
        for task, metrics in tasks.items():
            cells = [metrics.get(f"{length},none", -1) for length in lengths]
            # lm-eval says -1 where it evaluated nothing: --limit takes the first samples, which are those of the first length.
            shown = [f"{100 * cell:.1f}" if cell >= 0 else "not run" for cell in cells]
            lines.append(f"| {attention} | {task} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _write(path: Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
