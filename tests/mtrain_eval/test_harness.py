"""mtrain inside lm-eval: the same prompts, answers and numbers as `mtrain eval`, and as lm-eval's own Hugging Face model."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mtrain.errors import EvalError, MtrainError
from mtrain.export import export_model
from mtrain.inference import load_engine
from mtrain.models.build import adopt_special_tokens, load_model
from mtrain.recipe import ModelRecipe
from mtrain_eval.ask import ask
from mtrain_eval.harness.documents import dataset, perplexity, score
from mtrain_eval.harness.yaml_files import LENGTHS, entries, write_tasks
from mtrain_eval.sample import SuiteOptions
from mtrain_eval.suites import make_tasks
from tests.mtrain.processes import run_processes
from tests.mtrain.tiny import MODEL
from tests.mtrain_eval.fakes import WORDS

LENGTH = 700
TASKS = ("ruler_fwe", "niah_number")
ATTENTION = {"pattern": "vertical_slash", "block": 16, "sink": 2, "local": 8, "probe": 8,
             "budget": {"kind": "topk", "columns": 24, "slashes": 4}}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with random weights, exported as a training would."""
    made = load_model(
        ModelRecipe(config={**MODEL, "max_position_embeddings": LENGTH + 8}), seed=3, vocab_size=len(WORDS)
    )
    adopt_special_tokens(made, WORDS, {})
    training = {"step": 1, "tokens": 1, "recipe": {"attention": ATTENTION, "train": {"seq_len": LENGTH}}}
    return export_model(made, WORDS, tmp_path_factory.mktemp("models") / "export", training=training)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tasks")
    write_tasks(directory, [LENGTH])
    return directory


def through_harness(lm: Any, files: Path, model: Path, tasks: list[str], limit: int = 2) -> dict[str, Any]:
    """What lm-eval reports."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(
        include_path=str(files), include_defaults=False, metadata={"pretrained": str(model), "seed": 5}
    )
    results = simple_evaluate(lm, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    assert results is not None
    return dict(results)


def answers(results: dict[str, Any]) -> dict[str, list[str]]:
    return {task: [row["resps"][0][0] for row in rows] for task, rows in results["samples"].items()}


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_same_numbers_as_mtrain_eval_and_as_transformers(model: Path, files: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from mtrain_eval.harness.lm import MtrainLM

    names = [f"{name}_{LENGTH}" for name in TASKS]
    ours = through_harness(MtrainLM(str(model), device="cuda"), files, model, [*names, f"pg19_{LENGTH}"])
    plain = through_harness(HFLM(str(model), device="cpu"), files, model, [*names, f"pg19_{LENGTH}"])
    for name in names:
        assert answers(ours)[name] == answers(plain)[name] and len(answers(ours)[name]) == 2
        assert ours["results"][name]["score,none"] == plain["results"][name]["score,none"]
    key = "token_perplexity,none"
    found, expected = (results["results"][f"pg19_{LENGTH}"][key] for results in (ours, plain))
    assert found == pytest.approx(expected, rel=1e-5) and 1 < found < 2 * len(WORDS)
    # The same through `mtrain eval`'s own parts: task, engine, scorer.
    engine = load_engine(str(model), None)
    for task in make_tasks(["ruler", "niah"], SuiteOptions(WORDS, seed=5), TASKS):
        samples = [task.sample(LENGTH, index) for index in range(2)]
        predictions = [ask(engine, sample).prediction for sample in samples]
        assert answers(ours)[f"{task.name}_{LENGTH}"] == [prediction.text for prediction in predictions]
        rows = ours["samples"][f"{task.name}_{LENGTH}"]
        assert [row["doc"]["prompt"] for row in rows] == [sample.text for sample in samples]
        scores = [
            task.score(sample, prediction)[task.metric] for sample, prediction in zip(samples, predictions, strict=True)
        ]
        assert [row["score"] for row in rows] == scores


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`mtrain lm-eval WORDS`, without lm-eval's own thousands of tasks."""
    import lm_eval.tasks

    from mtrain.cli import run

    monkeypatch.setattr(
        lm_eval.tasks, "TaskManager", functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    )
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # which lm-eval sets
    monkeypatch.setattr(sys, "argv", ["lm-eval"])
    return lambda *words: run(["lm-eval", *map(str, words)])


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_tasks_that_do_not_fit_are_left_out_and_named(
    model: Path, files: Path, command: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    group = {"group": f"pair_{LENGTH}", "task": [f"ruler_cwe_{LENGTH}", f"ruler_fwe_{LENGTH}"]}
    (files / "pair.yaml").write_text(yaml.safe_dump(group))
    line = ("run", "--model", "mtrain", "--include_path", files, "--limit", 1, "--model_args", f"pretrained={model}")
    with caplog.at_level(logging.WARNING):
        assert command(*line, "--tasks", f"pair_{LENGTH}") == 0
    shown = capsys.readouterr()
    assert (
        f"|ruler_fwe_{LENGTH}|" in shown.out and "cwe" not in shown.out.split("Tasks")[-1] and "pair" not in shown.out
    )
    assert f"mtrain: left out ruler_cwe_{LENGTH}: ruler_cwe does not fit {LENGTH} tokens" in shown.err
    assert f"mtrain: pair_{LENGTH} gets no mean without them" in shown.err
    assert shown.err.count("mtrain: left out") == 2  # before the run, and again below its table
    assert "Custom kwargs" not in caplog.text and "--limit" in caplog.text
    with pytest.raises(EvalError, match="no task fits its length: ruler_cwe does not fit"):
        command(*line, "--tasks", f"ruler_cwe_{LENGTH}")
    # What is not ours keeps lm-eval's message.
    logging.getLogger("lm_eval.api.task").warning("other: Custom kwargs can be passed to `--metadata` in console")
    assert "other: Custom kwargs" in caplog.text


def test_groups_whose_members_all_fit_stay(model: Path) -> None:
    from mtrain_eval.harness.choice import OURS, fitting

    def body(task: str, length: int) -> dict[str, Any]:
        return {
            "task": f"{task}_{length}",
            "custom_dataset": f"/some/{OURS}",
            "dataset_kwargs": {"task": task, "length": length},
        }

    bodies = [body("ruler_fwe", 700), body("ruler_fwe", 701), body("ruler_cwe", 700), body("ruler_fwe", 20)]
    index = {made["task"]: made for made in bodies}
    index["good"] = {"group": "good", "task": ["ruler_fwe_700", "ruler_fwe_701"]}
    index["outer"] = {"group": "outer", "task": ["good", "ruler_cwe_700"]}
    index["tag"] = {"tags": ["ruler_fwe_20", "ruler_fwe_701"]}
    index["theirs"] = {"group": "theirs", "task": ["arc", {"task": "other", "num_fewshot": 2}]}
    lines: list[str] = []

    def chosen(*names: str) -> list[Any]:
        lines.clear()
        return fitting(names, index, {"pretrained": str(model)}, lines.append)

    assert chosen("good", "theirs", "arc") == ["good", "theirs", "arc"] and not lines
    assert chosen("outer") == ["good"] and [line.split(":")[0] for line in lines][0] == "left out ruler_cwe_700"
    assert chosen("tag", "ruler_fwe_701") == ["ruler_fwe_701"] and "left out ruler_fwe_20:" in lines[0]
    with pytest.raises(EvalError, match="no task fits"):
        chosen("ruler_fwe_20", "ruler_cwe_700")


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_misspelt_tasks_and_keys_name_the_nearest(model: Path, files: Path, command: Any) -> None:
    def refused(arguments: str, task: str, *more: Any) -> str:
        with pytest.raises(EvalError) as error:
            command("run", "--model", "mtrain", "--model_args", arguments, "--tasks", task, *more)
        return str(error.value)

    path = ("--include_path", files)
    found = refused(f"pretrained={model}", "niah_number_1024", *path)
    assert f"unknown task 'niah_number_1024'; did you mean niah_number_{LENGTH}?" in found and "--lengths 1K" in found
    assert f"did you mean niah_{LENGTH}?" in refused(f"pretrained={model}", "niah_1024", *path)
    assert f"'ruler_cw'; did you mean ruler_cwe_{LENGTH}" in refused(f"pretrained={model}", "ruler_cw", *path)
    assert "ours need --include_path" in refused(f"pretrained={model}", "niah_1024")
    task = f"ruler_fwe_{LENGTH}"
    assert "'attnetion'; did you mean 'attention'?" in refused(f"pretrained={model},attnetion=sparse", task, *path)
    assert "'pretraind'; did you mean 'pretrained'?" in refused(f"pretraind={model}", task, *path)
    assert "'colums'; did you mean 'columns'?" in refused(f"pretrained={model},colums=3", task, *path)


def test_write_tasks_says_what_to_type(tmp_path: Path, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("write-tasks", tmp_path, "--lengths", "3K,700") == 0
    printed = capsys.readouterr().out
    for line in ("  ruler_700 ruler_3072", "  niah_700 niah_3072", "  pg19_700 pg19_3072", "  infinitebench_131072"):
        assert line in printed.splitlines()
    names = [yaml.safe_load(path.read_text())["group"] for path in tmp_path.glob("*/_*.yaml")]
    assert sorted(names) == ["infinitebench_131072", "niah_3072", "niah_700", "ruler_3072", "ruler_700"]


def _on_a_ring(model: str, files: str) -> tuple[int, int, dict[str, list[str]], str]:
    from mtrain_eval.harness.lm import MtrainLM

    lm = MtrainLM(model, attention="sparse", timeout=60)
    sample = make_tasks(["ruler"], SuiteOptions(WORDS, seed=5), ["ruler_fwe"])[0].sample(LENGTH, 0)
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    request = type("Request", (), {"args": (sample.text, settings)})
    return lm.rank, lm.world_size, {"answer": lm.generate_until([request])}, lm.attention.pattern  # type: ignore[union-attr]


def test_a_ring_gives_every_rank_all_requests(model: Path, files: Path, tmp_path: Path) -> None:
    alone = _on_a_ring(str(model), str(files))
    assert alone[:2] == (0, 1) and alone[3] == "vertical_slash"
    together = run_processes(_on_a_ring, 2, tmp_path, str(model), str(files))
    assert together == [alone, alone]


def test_attention_of_model_args(model: Path) -> None:
    from mtrain_eval.harness.lm import attention_of

    trained = attention_of(str(model), "sparse", None, {})
    changed = attention_of(str(model), "vertical_slash", None, {"columns": 6, "slashes": 2, "local": 16})
    assert trained is not None and changed is not None and trained.block == changed.block == 16
    assert (changed.budget.columns, changed.local, trained.local) == (6, 16, 8)  # type: ignore[union-attr]
    covering = attention_of(str(model), "vertical_slash", None, {"p": 0.9})
    assert covering is not None and covering.budget.kind == "coverage"
    assert attention_of(str(model), "dense", None, {}) is None
    for arguments in (("both", {}), ("dense", {"block": 16}), ("vertical_slash", {"blok": 16}), ("vertikal", {})):
        with pytest.raises(MtrainError):
            attention_of(str(model), arguments[0], None, dict(arguments[1]))  # type: ignore[arg-type]


def test_nothing_is_cut_sampled_or_cached_in_silence(model: Path) -> None:
    from lm_eval.api.model import CacheHook

    from mtrain_eval.harness.lm import MtrainLM

    lm = MtrainLM(str(model), batch_size=1)

    def ask_for(text: str, **settings: Any) -> list[str]:
        return lm.generate_until([type("Request", (), {"args": (text, settings)})], disable_tqdm=True)

    with pytest.raises(EvalError, match="do not fit into 708"):
        ask_for("x" * (LENGTH + 8), max_gen_toks=1)
    with pytest.raises(EvalError, match="greedily"):
        ask_for("x", do_sample=True, temperature=0.7, max_gen_toks=1)
    with pytest.raises(EvalError, match="--batch_size"):
        MtrainLM(str(model), batch_size=4)
    with pytest.raises(EvalError, match="--use_cache"):
        lm.set_cache_hook(CacheHook(type("Cached", (), {"dbdict": {}})()))  # type: ignore[arg-type]
    lm.set_cache_hook(CacheHook(None))
    whole = ask_for("one two", max_gen_toks=20)[0]
    assert len(whole) > 1 and ask_for("one two", max_gen_toks=20, until=[whole[1]])[0] == whole[: whole.index(whole[1])]


def test_rolling_windows_score_every_token_once(model: Path) -> None:
    from mtrain_eval.harness.lm import MtrainLM

    short = MtrainLM(str(model), max_length=40)
    text = "".join(chr(97 + (7 * i * i) % 26) for i in range(100))
    found = short.loglikelihood_rolling([type("Request", (), {"args": (text,)})], disable_tqdm=True)[0]
    ids = np.array([short.prefix_token_id, *WORDS(text)["input_ids"]])
    # Disjoint, but for the last one: it gets as much context as fits.
    windows = ((ids[:40], 39), (ids[39:79], 39), (ids[61:], 22))
    expected = math.fsum(float(short.engine.token_logprobs(part).logprobs[-new:].sum()) for part, new in windows)
    assert found == pytest.approx(expected, rel=1e-5)


def test_documents_are_made_when_asked_for(model: Path) -> None:
    made = dataset("ruler_fwe", "700", pretrained=str(model), num_samples=3)["test"]
    assert len(made) == 3 and len(made[1:]) == 2 and made[-1]["index"] == 2
    assert set(made.features) == set(made[0])
    assert [document["prompt"] for document in made] == [made[i]["prompt"] for i in range(3)]
    right = ", ".join(made[0]["targets"])
    assert score(made[0], [right]) == {"score": 1.0} and score(made[0], [""]) == {"score": 0.0}
    with pytest.raises(IndexError):
        made[3]
    with pytest.raises(EvalError, match="pretrained=DIR"):
        dataset("ruler_fwe", 600)
    with pytest.raises(EvalError, match="ruler_cwe at 100 tokens"):
        dataset("ruler_cwe", 100, pretrained=str(model))["test"][0]
    assert perplexity([(-2.0, 1), (-4.0, 2)]) == pytest.approx(math.e**2)


def test_the_files_in_the_repository_are_what_is_written(tmp_path: Path) -> None:
    kept = Path(__file__).parents[2] / "eval/tasks"
    for path in write_tasks(tmp_path):
        assert (kept / path.relative_to(tmp_path)).read_text() == path.read_text(), (
            "mtrain lm-eval write-tasks eval/tasks"
        )
    assert {entry.suite for entry in entries(LENGTHS)} == {"ruler", "niah", "infinitebench", "pg19"}
    group = yaml.safe_load((kept / "ruler/_ruler_4096.yaml").read_text())
    assert len(group["task"]) == 13 and not group["aggregate_metric_list"][0]["weight_by_size"]


def test_official_tasks_are_run_unchanged_and_labelled(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval

    from mtrain_eval.config import EvalConfig
    from mtrain_eval.harness.official import FILE, LABEL, OFFLINE, evaluate_official, wanted_tasks

    asked: list[dict[str, Any]] = []

    def run(lm: Any, **given: Any) -> dict[str, Any]:
        asked.append({"attention": lm.attention, **given})
        return {"results": {"niah_single_1": {"512,none": 0.25, "700,none": -1}}}

    monkeypatch.setattr(lm_eval, "simple_evaluate", run)
    config = EvalConfig(model=str(model), lengths=(512, 700), attention=("dense", "sparse"), output=tmp_path, limit=3)
    table = evaluate_official(config, WORDS)
    # The byte tokenizer would let lm-eval's vt run for ever.
    assert asked[0]["tasks"] == [name for name in OFFLINE if name not in ("ruler_vt", "ruler_cwe")]
    assert [call["attention"] is None for call in asked] == [True, False] and asked[0]["limit"] == 3
    assert LABEL in table and "| dense | niah_single_1 | 25.0 | not run |" in table
    assert json.loads((tmp_path / FILE).read_text())["label"] == LABEL

    def refused(**changes: Any) -> None:
        wanted_tasks(dataclasses.replace(config, **changes), WORDS)

    for changes, message in (
        ({"tasks": ("ruler_niah",)}, "no RULER task"),
        ({"tasks": ("ruler_qa_squad",)}, "--online"),
        ({"tasks": ("ruler_vt",)}, "never end"),
        ({"suites": ("infinitebench",)}, "cannot load"),
    ):
        with pytest.raises(EvalError, match=message):
            refused(**changes)
