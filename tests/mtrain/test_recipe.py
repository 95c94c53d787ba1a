"""The strict recipe reader: what it accepts, and that every mistake is named with its place and its remedy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from mtrain.errors import RecipeError
from mtrain.layout import LAYOUTS
from mtrain.recipe import (
    AttentionRecipe,
    CoverageBudget,
    RefreshEvery,
    TopKBudget,
    TrainRecipe,
    find_recipe,
    load_recipe,
    recipe_from_dict,
    shipped_recipes,
)

MINIMAL = """\
model:
  path: some/model
data:
  sources:
    - {kind: python-stdlib}
    - kind: jsonl
      path: "data/*.jsonl"
train:
  steps: 10
  seq_len: 4K
  lr: 1e-5
"""


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_file(text: str, name: str = "run.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def error(path: Any, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


def test_minimal_recipe_and_its_defaults(write: Any) -> None:
    recipe = load_recipe(write(MINIMAL, "my-run.yaml"))
    assert (recipe.name, recipe.output, recipe.seed, recipe.tokenizer) == ("my-run", "runs/my-run", 0, "bytes")
    assert recipe.train == TrainRecipe(steps=10, seq_len=4096, lr=1e-5)
    assert isinstance(recipe.train.lr, float) and isinstance(recipe.train.seq_len, int)
    assert recipe.attention == AttentionRecipe() and recipe.attention.budget == CoverageBudget(p=0.95)
    assert [source.kind for source in recipe.data.sources] == ["python-stdlib", "jsonl"]
    assert recipe.parallel.world_size == recipe.accumulation == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("512K", 524288),
        ("4k", 4096),
        ("1M", 1 << 20),
        ("2G", 1 << 31),
        ("1_000", 1000),
        ("1e4", 10000),
        ("7", 7),
        ("32.0", 32),
    ],
)
def test_whole_numbers_and_sizes(write: Any, text: str, value: int) -> None:
    found = load_recipe(write(MINIMAL), [f"train.seq_len={text}"]).train.seq_len
    assert found == value and type(found) is int


@pytest.mark.parametrize(
    ("text", "value"), [("1e-5", 1e-5), ("1E-5", 1e-5), ("2.", 2.0), (".5", 0.5), ("3", 3.0), ("+1e+0", 1.0)]
)
def test_numbers(write: Any, text: str, value: float) -> None:
    assert load_recipe(write(MINIMAL.replace("1e-5", text))).train.lr == value
    assert load_recipe(write(MINIMAL), [f"train.lr={text}"]).train.lr == value


@pytest.mark.parametrize("text", ["1KB", "1.5K", "-1K", "0x10", "12:30:45", "1e999", ".inf", "nan", "1 2", "9" * 5000])
def test_what_is_no_number(write: Any, text: str) -> None:
    assert "train.seq_len must be a whole number" in error(write(MINIMAL.replace("4K", text)))


def test_text_stays_as_written(write: Any) -> None:
    """YAML would make false, 123, 1e10 and 45045 of these."""
    for text in ("no", "0123", "1e10", "12:30:45", "2026-01-01"):
        assert load_recipe(write(MINIMAL + f"name: {text}\n")).name == text
    model = MINIMAL.replace("path: some/model", "path: some/model\n  revision: 12345678")
    assert load_recipe(write(model)).model.revision == "12345678"


def test_free_sections_read_plain_values(write: Any) -> None:
    config = "config: {model_type: qwen2, max_position_embeddings: 4K, rms_norm_eps: 1e-6, tie: true, x: null, y: '1', z: [1, a]}"
    recipe = load_recipe(write(MINIMAL.replace("path: some/model", config)))
    assert recipe.model.config == {
        "model_type": "qwen2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie": True,
        "x": None,
        "y": "1",
        "z": [1, "a"],
    }
    assert "'yes' is ambiguous; write true or false" in error(
        write(MINIMAL.replace("path: some/model", config.replace("true", "yes")))
    )


def test_budget_and_refresh_take_several_forms(write: Any) -> None:
    file = write(MINIMAL)
    attention = load_recipe(
        file, ["attention.budget={kind: topk, columns: 1K, slashes: 20}", "attention.refresh={every: 4}"]
    ).attention
    assert attention.budget == TopKBudget(columns=1024, slashes=20)
    assert attention.refresh == RefreshEvery(4) and attention.refresh_every == 4
    assert load_recipe(file, ["attention.refresh.every=3"]).attention.refresh_every == 3
    assert load_recipe(file, ["attention.refresh=frozen"]).attention.refresh_every == 0
    assert load_recipe(file).attention.refresh_every == 1
    assert load_recipe(file, ["attention.budget.p=0.9"]).attention.budget == CoverageBudget(p=0.9)
    assert "unknown key 'attention.budget.p'" in error(
        file, "attention.budget={kind: topk, p: 0.9, columns: 1, slashes: 1}"
    )
    assert "missing key 'attention.budget.slashes'" in error(file, "attention.budget={kind: topk, columns: 1}")
    assert "attention.budget.kind must be one of coverage, topk" in error(file, "attention.budget.kind=best")


def test_overrides_reach_sections_lists_and_missing_places(write: Any) -> None:
    recipe = load_recipe(
        write(MINIMAL),
        ["data.sources.0.weight=2", "data.sources.1.path=*.jsonl", "data.sources.1.options={depth: [0, 1]}", "parallel.dp=2",
         "train.betas=[0.8, 0.9]", "train.batch_rows=8", "train.micro_rows=2", "name=other", "log.tensorboard=false"],
    )  # fmt: skip
    first, second = recipe.data.sources
    assert (first.weight, second.path, second.options) == (2.0, "*.jsonl", {"depth": [0, 1]})
    assert (recipe.parallel.dp, recipe.train.betas, recipe.accumulation) == (2, (0.8, 0.9), 2)
    assert (recipe.output, recipe.log.tensorboard) == ("runs/other", False)
    swapped = load_recipe(write(MINIMAL), ["model.path=null", "model.config.model_type=llama"])
    assert swapped.model.path is None and swapped.model.config == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lrr=1", "unknown key 'train.lrr'; did you mean 'train.lr'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'train.lr'?"),
        ("atention.block=1", "unknown key 'atention'; did you mean 'attention'?"),
        ("attention.patern=dense", "did you mean 'attention.pattern'?"),
        ("train.layout=striped", "did you mean 'attention.layout'?"),
        ("attention.pattern=densse", "must be one of vertical_slash, dense, a_shape, xattention, moba, random_columns; got densse"),
        ("attention.backend=cup", "unknown name 'cup'; did you mean 'cpu'?"),
        ("train.lr=fast", "train.lr must be a number (1e-5 is fine); got fast"),
        ("train.lr='1e-5'", "train.lr must be a number (1e-5 is fine); got the text '1e-5'"),
        ("train.steps=1.5", "train.steps must be a whole number"),
        ("train.steps=", "got nothing"),
        ("train.betas=[0.9]", "train.betas must be a list of 2: a number (1e-5 is fine) each; got a list of 1"),
        ("train=3", "train: expected a section with some of the keys steps, seq_len"),
        ("data.sources={}", "data.sources must be a list; got an empty section"),
        ("log.tensorboard=yes", "log.tensorboard must be true or false; got yes"),
        ("attention.refresh=never", "attention.refresh must be one of every_step, frozen or a section with the keys every"),
        ("model.config=3", "model.config must be a section or null; got 3"),
        ("data.sources.2.weight=1", "data.sources is a list of 2; '2' is no index into it"),
        ("data.sources.first.weight=1", "'first' is no index into it"),
        ("train.lr.x=1", "train.lr is 1e-5, which has no key 'x'"),
        ("train.lr", "expected key=value, for example train.steps=100"),
        ("train..lr=1", "expected key=value"),
        ("=1", "expected key=value"),
        ("train.betas=[0.9, ", "not valid YAML"),
        ("model.rope={a: !!python/object/apply:os.getcwd []}", "the tag 'tag:yaml.org,2002:python/object/apply:os.getcwd' is"),
        # rules
        ("model.config={model_type: llama}", "model.path: give exactly one of path"),
        ("model.path=null", "got neither"),
        ("model={config: {model_type: qwen2, num_attention_heads: 5, num_key_value_heads: 2}}",
         "model.config.num_attention_heads: must be a multiple of num_key_value_heads 2, got 5"),
        ("train.lr=0", "train.lr: must be greater than 0, got 0.0"),
        ("train.lr=-1", "must be greater than 0"),
        ("train.steps=0", "train.steps: must be at least 1, got 0"),
        ("train.betas=[0.9, 1.0]", "train.betas: must both be at least 0 and below 1"),
        ("train.min_lr_ratio=2", "from 0 to 1"),
        ("train.batch_rows=3 train.micro_rows=2", "multiple of parallel.dp x train.micro_rows = 2, got 3; try 4"),
        ("parallel.dp=2", "train.batch_rows: must be a multiple of parallel.dp x train.micro_rows = 2, got 1; try 2"),
        ("parallel.inner=0", "parallel.inner: must be at least 1, got 0"),
        ("parallel.timeout_s=0", "parallel.timeout_s: must be greater than 0"),
        ("attention.block=0", "attention.block: must be at least 1"),
        ("attention.budget.p=1.5", "attention.budget.p: is a share of the attention mass"),
        ("attention.budget={floor: 5, cap: 4}", "attention.budget.cap: must not be below floor 5, got 4"),
        ("attention.budget={kind: topk, columns: -1, slashes: 1}", "attention.budget.columns: must be at least 0"),
        ("attention.refresh={every: 0}", "attention.refresh.every: must be at least 1"),
        ("checkpoint.stop_after=11", "checkpoint.stop_after: must not exceed train.steps (10), got 11"),
        ("checkpoint.keep=0", "checkpoint.keep: must be at least 1"),
        ("checkpoint.resume=''", "checkpoint.resume: must be auto, never or a checkpoint directory"),
        ("log.every=0", "log.every: must be at least 1"),
        ("seed=-1", "seed: must be at least 0"),
        ("name=a/b", "name: must be a word without '/'"),
        ("tokenizer=''", "tokenizer: must be bytes, model, a hub id or a directory"),
        ("data.sources=[]", "data.sources: is empty"),
        ("data.sources.0.kind=web", "data.sources.0.kind must be one of python-stdlib"),
        ("data.sources.0.kind=hf", "data.sources.0.path: kind hf needs a hub id"),
        ("data.sources.0.path=x", "data.sources.0.path: kind python-stdlib makes its own samples"),
        ("data.sources.0.weight=0", "data.sources.0.weight: must be greater than 0"),
        ("data.sources.0.until_step=0", "data.sources.0.until_step: must be after from_step 0, got 0"),
        ("data.sources=[{kind: induction, until_step: 4}]", "data.sources: no source is active in step 4 of 10"),
        ("data.sources=[{kind: induction, from_step: 1}]", "data.sources: no source is active in step 0 of 10"),
    ],
)  # fmt: skip
def test_bad_override_is_one_clear_line(write: Any, override: str, message: str) -> None:
    overrides = override.split(" ") if override.startswith("train.batch_rows") else [override]
    found = error(write(MINIMAL), *overrides)
    assert message in found
    assert "override" in found or "run.yaml" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; a recipe has at least the sections model, data and train"),
        ("# only a comment\n", "is empty"),
        ("null\n", "is empty"),
        ("- a\n", "run.yaml:1: expected sections such as 'model:', got a list of 1"),
        ("just words\n", "run.yaml:1: expected sections such as 'model:', got just words"),
        ("model:\n  path: x\n", "missing key 'data', a section with the keys sources, packing"),
        (MINIMAL.replace("  lr: 1e-5\n", ""), "run.yaml:8: train: missing key 'train.lr', a number"),
        (MINIMAL.replace("  steps", "  stepps"), "run.yaml:9: unknown key 'train.stepps'; did you mean 'train.steps'?"),
        (MINIMAL.replace("kind: jsonl", "kind: json"), "run.yaml:6: data.sources.1.kind must be one of"),
        (MINIMAL + "  lr: 2e-5\n", "run.yaml:12: duplicate key 'lr', first given at"),
        (MINIMAL + "model: {}\n", "run.yaml:12: duplicate key 'model', first given at"),
        (MINIMAL.replace('"data/*.jsonl"', "*.jsonl"), "run.yaml:7: not valid YAML: expected alphabetic or numeric"),
        (MINIMAL.replace('"data/*.jsonl"', "*.jsonl"), "quote the value if it is a glob"),
        (MINIMAL.replace('"data/*.jsonl"', "*all"), "run.yaml:7: aliases such as *all are not supported"),
        (MINIMAL.replace("model:", "model: &m"), None),  # an anchor without an alias does nothing
        (MINIMAL + "---\nmodel: {}\n", "run.yaml:12: a second document starts here"),
        (MINIMAL.replace("steps: 10", "steps: !!int 10"), "run.yaml:9: the tag 'tag:yaml.org,2002:int' is not allowed"),
        (MINIMAL.replace("steps: 10", "steps: !!python/object/apply:os.abort []"), "run.yaml:9: the tag"),
        (MINIMAL.replace("steps: 10", "steps: [10"), "not valid YAML"),
        (MINIMAL.replace("  steps", "\tsteps"), "run.yaml:9: not valid YAML"),
        (MINIMAL.replace("steps: 10", "{a: 1}: 10"), "run.yaml:9: a key must be a word, got a section with the keys a"),
        (MINIMAL + "name: \x07\n", "run.yaml:12: not valid YAML: character #x0007 is not allowed"),
        (MINIMAL + "seed: " + "[" * 100 + "]" * 100 + "\n", "nested more than 32 levels deep"),
        ("x: 1\n" * 300_000, "a recipe has at most 1048576. Is this a data file?"),
    ],
)  # fmt: skip
def test_bad_file_is_one_clear_line(write: Any, text: str, message: str | None) -> None:
    if message is None:
        assert load_recipe(write(text)).train.steps == 10
    else:
        assert message in error(write(text))


def test_windows_files_and_foreign_encodings(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(path).train.steps == 10
    path.write_bytes(MINIMAL.encode() + b"name: caf\xe9\n")
    assert "run.yaml:12: not UTF-8 text (byte 0xe9)" in error(path)


def test_missing_files_name_their_neighbour(write: Any, tmp_path: Path) -> None:
    write(MINIMAL, "extend.yaml")
    assert "did you mean " + str(tmp_path / "extend.yaml") in error(tmp_path / "extent.yaml")
    assert "did you mean quickstart?" in error("quikstart")
    assert "is a directory" in error(tmp_path)
    assert "no recipe" in error(tmp_path / "none" / "x.yaml")


def test_no_code_runs_from_a_recipe(write: Any, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    error(write(MINIMAL + f"name: !!python/object/apply:os.mkdir ['{canary}']\n"))
    assert not canary.exists()


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_load_and_survive_json(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name.rsplit("/", 1)[-1] or "/" in name
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe
    assert load_recipe(f"recipes/{name}.yaml") == recipe


def test_launch_files_are_found_but_are_no_recipes() -> None:
    assert find_recipe("accelerate/cpu_2").name == "cpu_2.yaml"
    assert not any("cpu_2" in name for name in shipped_recipes())


def test_the_512k_recipe_is_for_32_gpus() -> None:
    recipe = load_recipe("qwen2.5-3b-512k")
    assert recipe.parallel.world_size == 32 and recipe.parallel.outer == 4
    assert recipe.train.seq_len == recipe.model.max_position_embeddings == 524288
    rope = recipe.model.rope
    assert rope is not None and rope["factor"] * rope["original_max_position_embeddings"] == 524288


def test_a_dictionary_is_checked_like_a_file(write: Any) -> None:
    values = load_recipe(write(MINIMAL), ["attention.refresh={every: 2}"]).to_dict()
    assert recipe_from_dict(values).to_dict() == values
    values["train"]["steps"] = 0
    with pytest.raises(RecipeError, match="^checkpoint.json: train.steps: must be at least 1"):
        recipe_from_dict(values, "checkpoint.json")
    del values["train"]["steps"]
    with pytest.raises(RecipeError, match="missing key 'train.steps'"):
        recipe_from_dict(values)


def test_recipes_made_in_python_are_checked_too() -> None:
    with pytest.raises(RecipeError, match="lr: must be greater than 0"):
        TrainRecipe(steps=1, seq_len=1, lr=0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttentionRecipe().block = 3  # type: ignore[misc]


def test_layout_names_are_those_of_the_layouts() -> None:
    assert set(get_args(get_type_hints(AttentionRecipe)["layout"])) == set(LAYOUTS)
