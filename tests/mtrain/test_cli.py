"""The command line: one line and a non-zero exit for every mistake, and nothing heavy before it is needed."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml

import mtrain.comm
from mtrain.cli import COMMANDS, main, split_words
from mtrain.commands import doctor
from mtrain.commands.inspect import warnings
from mtrain.errors import DataError, MtrainError
from mtrain.recipe import Recipe, load_recipe, recipe_from_dict

ROOT = Path(__file__).parents[2]


PLAIN = """\
model:
  config: {model_type: qwen2, max_position_embeddings: 512}
data:
  sources: [{kind: induction}]
train: {steps: 10, seq_len: 512, lr: 1e-3}
"""


@pytest.fixture
def plain(tmp_path: Path) -> str:
    """A recipe of ours, so that these tests do not depend on the values of a shipped one."""
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN)
    return str(path)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """`mtrain train` hands its recipe to this list instead of a trainer."""
    seen: list[Recipe] = []

    def train(recipe: Recipe) -> dict[str, float]:
        seen.append(recipe)
        return {"loss": 1.0}

    monkeypatch.setitem(sys.modules, "mtrain.trainer", types.SimpleNamespace(train=train))
    return seen


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def train(recipe: Recipe) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "mtrain.trainer", types.SimpleNamespace(train=train))


def test_train_hands_over_the_recipe(trained: list[Recipe], plain: str) -> None:
    assert main(["train", "quickstart", "train.steps=177", "train.lr=1e-5"]) == 0
    assert main(["train"]) == 0
    assert main(["train", "train.steps=178"]) == 0
    assert main(["train", plain, "--debug", "train.steps=79"]) == 0
    steps = load_recipe("quickstart").train.steps
    assert [recipe.train.steps for recipe in trained] == [177, steps, 178, 79]
    assert trained[0].train.lr == 1e-5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "nowhere/recipe.yaml"], "no recipe nowhere/recipe.yaml"),
        (["train", "quikstart"], "did you mean quickstart?"),
        (["train", "quickstart", "train.stepps=3"], "did you mean 'train.steps'?"),
        (["train", "quickstart", "train.steps"], "expected key=value after the recipe quickstart, got 'train.steps'"),
        (["train", "quickstart", "second.yaml"], "got 'second.yaml'"),
        (["train", "quickstart", "train.lr=fast"], "must be a number (1e-5 is fine); got fast"),
        (["train", "quickstart", "--fast"], "unrecognized arguments: --fast (see mtrain --help)"),
        (["train", "quickstart", "parallel.engine=zero"], "parallel.engine must be one of ddp, fsdp; got zero"),
        (["inspect", "quickstart", "seed=-1"], "seed: must be at least 0, got -1"),
        (["trian", "quickstart"], "unknown command 'trian'; did you mean 'train'?"),
        (["launch"], "unknown command 'launch'; commands: train, "),
        (["--version-of-what"], "required: COMMAND (see mtrain --help)"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    argv: list[str], message: str, trained: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.startswith("mtrain: error: ") and err.count("\n") == 1 and out == ""
    assert trained == []


def test_errors_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, DataError("a.jsonl:7: not JSON\n  (quarantine it)"))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "mtrain: error: a.jsonl:7: not JSON (quarantine it)\n"
    with pytest.raises(DataError):
        main(["train", "--debug"])
    fail_with(monkeypatch, PermissionError(13, "Permission denied", "runs"))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "mtrain: error: [Errno 13] Permission denied: 'runs' (--debug shows where)\n"
    with pytest.raises(PermissionError):
        main(["train", "--debug"])
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "mtrain: interrupted\n"
    # A defect of ours is not dressed up as a user's mistake.
    fail_with(monkeypatch, ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError):
        main(["train"])


def test_words() -> None:
    assert split_words([]) == ("quickstart", [])
    assert split_words(["a=1"]) == ("quickstart", ["a=1"])
    assert split_words(["x.yaml", "a=1", "b=c=d"]) == ("x.yaml", ["a=1", "b=c=d"])
    assert split_words(["runs/lr=1e-5/recipe.yaml"]) == ("runs/lr=1e-5/recipe.yaml", [])
    with pytest.raises(MtrainError, match="expected key=value"):
        split_words(["x.yaml", "y.yaml"])


def test_inspect_prints_a_recipe_that_loads_again(
    plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["parallel.inner=3", "train.seq_len=1000", "train.lr=1e-5"]
    assert main(["inspect", plain, *overrides]) == 0
    printed = capsys.readouterr().out
    recipe = load_recipe(plain, overrides)
    assert recipe_from_dict(yaml.safe_load(printed)) == recipe
    (tmp_path / "again.yaml").write_text(printed)
    assert load_recipe(tmp_path / "again.yaml") == recipe
    assert "# processes               3 = dp 1 x outer 1 x inner 3" in printed
    assert "# model state per rank    ddp: all weights, gradients and AdamW moments" in printed
    assert main(["inspect", plain, "parallel.inner=3", "parallel.engine=fsdp"]) == 0
    assert "fsdp: 1/3 of weights, gradients and AdamW moments" in capsys.readouterr().out
    assert "384 of 1,000 (+ 152 padding)" in printed  # 16 blocks of 64 over 3 ranks: 6 each
    assert "# warning: max_position_embeddings 512 is below train.seq_len 1000" in printed


def test_warnings(plain: str) -> None:
    assert warnings(load_recipe(plain)) == warnings(load_recipe("qwen2.5-3b-512k")) == []
    found = warnings(
        load_recipe(
            plain,
            ["attention={pattern: a_shape, layout: contiguous, sink: 256, local: 256}", "parallel.inner=9",
             "model.dtype=bfloat16", "train.steps=1001"],
        )
    )  # fmt: skip
    for words in ("8 blocks for 9 ranks", "attention is dense", "first rank nearly idle", "1/256", "loses all of 1001"):
        assert any(words in warning for warning in found), (words, found)
    (found,) = warnings(load_recipe(plain, ["attention={pattern: moba, top_k: 4, chunk: 128}"]))
    assert found == "attention.top_k=4 of 4 chunks: moba computes everything at 512 tokens; lower top_k or chunk"
    assert warnings(load_recipe(plain, ["attention={pattern: moba, top_k: 3, chunk: 128}"])) == []
    for pattern in ("vertical_slash", "random_columns"):
        for budget, name in (("512, slashes: 8", "columns=512"), ("8, slashes: 600", "slashes=600")):
            words = f"attention={{pattern: {pattern}, budget: {{kind: topk, columns: {budget}}}}}"
            (found,) = warnings(load_recipe(plain, [words]))
            assert f"attention.budget.{name}: {pattern} computes everything at 512 tokens" in found
    assert warnings(load_recipe(plain, ["attention.budget={kind: topk, columns: 511, slashes: 511}"])) == []
    assert warnings(load_recipe(plain, ["parallel={engine: fsdp, inner: 2}"])) == []
    (found,) = warnings(load_recipe(plain, ["parallel.engine=fsdp"]))
    assert found == "parallel.engine=fsdp: one process alone holds everything, as with ddp"


def test_a_large_choice_of_blocks_is_warned_of(plain: str) -> None:
    def of(*words: str) -> list[str]:
        found = warnings(load_recipe(plain, ["attention.pattern=xattention", "train.seq_len=512K", *words]))
        return [warning for warning in found if "MiB" in warning]

    # 8192 blocks: a triangle of 8192 * 8193 / 2 bits, 4.0005 MiB, spread over the ranks.
    (alone,) = of()
    assert alone.startswith(
        "xattention keeps 4.0 MiB of chosen blocks for every head of every layer until the backward"
    )
    assert of("parallel.inner=8") == of("attention.block=128", "parallel.inner=2") == of("parallel.inner=32") == []
    (kept,) = of("parallel.inner=32", "attention.refresh=frozen")
    assert kept.startswith("attention.refresh keeps the choices of all 8192 blocks over steps, 4.0 MiB for every head")
    assert of("attention.pattern=vertical_slash") == []


def test_blocks_kept_from_one_micro_batch_of_documents_are_warned_of(plain: str) -> None:
    def of(*words: str) -> list[str]:
        return [w for w in warnings(load_recipe(plain, [*words])) if "documents of one micro-batch" in w]

    for name in ("xattention", "moba"):
        kept = [f"attention={{pattern: {name}, top_k: 2, refresh: frozen}}"]
        assert len(of(*kept)) == 1 and of(*kept, "data.packing=false") == of(f"attention.pattern={name}") == []
    assert of("attention.pattern=vertical_slash", "attention.refresh=frozen") == []


def test_train_says_what_inspect_warns_of_once(
    trained: list[Recipe], plain: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", plain]) == 0
    assert capsys.readouterr().err == ""
    words = ["train", plain, "attention={pattern: moba}"]
    assert main(words) == 0
    line = "attention.top_k=8 of 8 chunks: moba computes everything at 512 tokens; lower top_k or chunk"
    assert capsys.readouterr().err == f"mtrain: warning: {line}\n"
    monkeypatch.setenv("RANK", "1")
    assert main(words) == 0
    assert capsys.readouterr().err == ""
    assert len(trained) == 3


def test_doctor_reports_versions_backends_and_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = tuple(name for name in doctor.REQUIRED if name != "datasets")  # which machines with a GPU often lack
    monkeypatch.setattr(doctor, "REQUIRED", here)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "torch        " in printed and "MISSING" not in printed
    assert "engines      ddp, fsdp (parallel.engine); DeepSpeed is not supported" in printed
    assert "reference yes" in printed and "quickstart" in printed
    assert {"gloo", "nccl"} == set(mtrain.comm.process_group_backends())
    monkeypatch.setattr(doctor, "REQUIRED", ("torch", "no-such-package"))
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "no-such-package MISSING: pip install no-such-package" in printed and "reference yes" in printed


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mtrain.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "try: main(['train', 'quickstart', 'train.stepps=1'])\n"
        "finally: print([m for m in ('torch', 'transformers', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert all(f"    {name}" in done.stdout for name in COMMANDS)
    assert done.stdout.rstrip().endswith("[]"), done.stdout


def test_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mtrain", "train", "missing.yaml"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("mtrain: error: no recipe missing.yaml;") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["cpu_2", "cpu_4", "gpu_1", "gpu_8"])
def test_launch_files_start_as_many_processes_as_they_say(name: str) -> None:
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{name}.yaml").read_text())
    processes = int(name.split("_")[1])
    assert config["num_processes"] == processes
    # A CPU type, or use_cpu, starts one process and says nothing.
    assert config["distributed_type"] == ("MULTI_GPU" if processes > 1 else "NO") and "use_cpu" not in config
    assert config["mixed_precision"] == "no"  # quoted in the file: a bare no is false in YAML


@pytest.mark.slow
def test_a_launch_that_does_not_fit_the_recipe_is_refused(plain: str, tmp_path: Path) -> None:
    """Real `accelerate launch` with two processes and a recipe for three."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu_2.yaml"]
    words = ["-m", "mtrain", "train", plain, "parallel.inner=3", f"output={tmp_path}"]
    done = subprocess.run([*launch, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    refusal = "mtrain: error: the recipe asks for dp 1 x outer 1 x inner 3 = 3 processes, but 2 are running"
    assert refusal in done.stderr, done.stderr[-3000:]
    assert "set parallel.inner=2" in done.stderr
