"""What a recipe may say: one frozen dataclass per section, every field with its unit and its default.

The field types drive the strict reader in `mtrain.recipe.load`: a new key is one line here, plus a rule in `checks` if not every
value makes sense. A recipe never changes after it is loaded. In YAML, sizes may be written 512K or 1M (K = 1024).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from mtrain.recipe import checks


@dataclass(frozen=True)
class ModelRecipe:
    """Which causal language model is trained; exactly one of `path` and `config`."""

    path: str | None = None  # hub id or local directory in Hugging Face format, such as the export of an earlier run
    config: dict[str, Any] | None = None  # a transformers config, model_type included: random weights, from scratch
    revision: str | None = None  # branch, tag or commit of a hub id
    rope: dict[str, Any] | None = None  # merged over the model's rope_parameters, e.g. {rope_type: yarn, factor: 16}
    max_position_embeddings: int | None = None  # tokens; replaces the model's own limit
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights that the optimizer updates

    def __post_init__(self) -> None:
        checks.check_model(self)


@dataclass(frozen=True)
class SourceRecipe:
    """One stream of training samples."""

    kind: Literal["python-stdlib", "retrieval", "induction", "text", "jsonl", "parquet", "hf"]
    path: str | None = None  # file or glob (text, jsonl, parquet) or hub id (hf)
    field: str = "text"  # name of the column that holds the text
    weight: float = 1.0  # share of the rows, relative to the other sources that are active in the same step
    split: str = "train"  # hf only
    name: str | None = None  # hf only: configuration of the data set
    length: int | None = None  # tokens per sample; default: train.seq_len
    from_step: int = 0  # first optimizer step (0-based) in which the source is used
    until_step: int | None = None  # first step in which it is not used any more; default: to the end
    options: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # what only this kind knows, e.g. pairs, questions

    def __post_init__(self) -> None:
        checks.check_source(self)


@dataclass(frozen=True)
class DataRecipe:
    """Where tokens come from."""

    sources: tuple[SourceRecipe, ...]
    packing: bool = True  # several documents share a row; attention and loss never cross a document boundary
    # Above 0: a twentieth of the documents is never trained on. The loss on so many rows of them (shared out evenly over the
    # sources of text; over the others where there are none) is measured at the end and every log.validate_every steps.
    validation_rows: int = 0

    def __post_init__(self) -> None:
        checks.check_data(self)


@dataclass(frozen=True)
class CoverageBudget:
    """The smallest set of columns and diagonals whose estimated attention mass is at least `p`."""

    kind: Literal["coverage"] = "coverage"
    p: float = 0.95  # attention mass, 0 < p <= 1
    floor: int = 1  # at least this many columns and this many diagonals
    cap: int | None = None  # at most this many columns and this many diagonals

    def __post_init__(self) -> None:
        checks.check_coverage(self)


@dataclass(frozen=True)
class TopKBudget:
    """Fixed numbers of columns and diagonals for every head."""

    columns: int
    slashes: int
    kind: Literal["topk"] = "topk"

    def __post_init__(self) -> None:
        checks.check_topk(self)


@dataclass(frozen=True)
class RefreshEvery:
    """Estimate the pattern anew in every `every`-th step, from its first micro-batch, and re-use it until the next."""

    every: int

    def __post_init__(self) -> None:
        checks.at_least(self, 1, "every")


@dataclass(frozen=True)
class AttentionRecipe:
    """Which keys a query may see, who owns which tokens and who computes it."""

    pattern: Literal["vertical_slash", "dense", "a_shape", "xattention", "moba", "random_columns"] = "vertical_slash"
    block: int = 64  # b, tokens per block: unit of layout and pattern
    budget: CoverageBudget | TopKBudget = CoverageBudget()  # vertical_slash; random_columns (topk only)
    stride: int = 16  # xattention only: tokens per group of an antidiagonal sum; divides block
    threshold: float = 0.9  # xattention only: share of a query block's estimated attention, 0 < threshold <= 1
    chunk: int | None = None  # moba only: tokens per chunk, a multiple of block; default: one block
    top_k: int = 8  # moba only: chunks per query block, its own included
    sink: int = 16  # first tokens of each document that every later token sees (xattention, moba: their whole blocks)
    local: int = 128  # token distances 0..local that are always seen
    probe: int = 64  # vertical_slash only: last query rows whose attention is measured to estimate the pattern
    probe_spread: int = 0  # so many more groups of probe rows, spread evenly over the sequence
    share: Literal["kv_head"] | None = None  # vertical_slash only; the query heads of a key/value head share a pattern
    refresh: Literal["every_step", "frozen"] | RefreshEvery = "every_step"  # or {every: k}; frozen: estimated once
    dense_first_layers: int = 0
    dense_last_layers: int = 0
    dense_warmup_steps: int = 0  # all layers are dense in the first so many steps
    layout: Literal["contiguous", "zigzag", "striped", "balanced"] = "striped"
    schedule: Literal["ring", "gather"] = "ring"
    backend: str = "auto"  # a name of sparse_kernels.backends(); auto: the first that can run, chosen once at start

    def __post_init__(self) -> None:
        checks.check_attention(self)

    @property
    def refresh_every(self) -> int:
        """Steps between two estimates; 0: estimate once and keep it (frozen)."""
        if isinstance(self.refresh, RefreshEvery):
            return self.refresh.every
        return 1 if self.refresh == "every_step" else 0


@dataclass(frozen=True)
class ParallelRecipe:
    """The mesh: dp x outer x inner processes. A ring has outer * inner ranks; `outer` counts nodes, `inner` ranks per node."""

    dp: int = 1
    outer: int = 1
    inner: int = 1
    engine: Literal["ddp", "fsdp"] = "ddp"  # each rank holds all weights, gradients and AdamW moments, or 1/world_size
    timeout_s: float = 600.0  # a peer that is silent for so long is lost, and the run ends

    def __post_init__(self) -> None:
        checks.check_parallel(self)

    @property
    def ring_size(self) -> int:
        """W, the ranks that share one sequence."""
        return self.outer * self.inner

    @property
    def world_size(self) -> int:
        """Processes the launch must start."""
        return self.dp * self.ring_size


@dataclass(frozen=True)
class TrainRecipe:
    """The optimizer loop (AdamW)."""

    steps: int  # optimizer steps
    seq_len: int  # S, tokens per row
    lr: float  # peak learning rate
    batch_rows: int = 1  # rows per optimizer step over all data-parallel ranks
    micro_rows: int = 1  # rows per micro-batch per data-parallel rank; the rest is gradient accumulation
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0  # linear, from 0 to lr; a run of fewer steps just never gets to lr
    min_lr_ratio: float = 0.1  # last learning rate / lr (cosine, linear)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0  # not applied to norms, biases and embeddings' 1-d parameters
    clip: float = 1.0  # largest global gradient norm; 0: no clipping
    precision: Literal["fp32", "bf16"] = "fp32"  # of forward and backward (autocast)
    activation_checkpointing: bool = False  # recompute each layer in the backward pass
    loss_chunk: int = 1024  # tokens whose logits exist at one time

    def __post_init__(self) -> None:
        checks.check_train(self)


@dataclass(frozen=True)
class CheckpointRecipe:
    """When the state is saved and where a run starts from."""

    every: int = 0  # steps; 0: only at the end
    keep: int = 2  # newest complete checkpoints that are kept
    resume: str = "auto"  # auto: newest complete checkpoint in output, if any; never; or a checkpoint directory
    stop_after: int | None = None  # save and stop cleanly after this many steps, as if the time were up

    def __post_init__(self) -> None:
        checks.check_checkpoint(self)


@dataclass(frozen=True)
class LogRecipe:
    """What a run tells while it runs."""

    every: int = 10  # steps between two lines of run.jsonl and of the terminal
    tensorboard: bool = True
    recall_every: int = 0  # steps between two measurements of recall, which cost one dense forward; 0: never
    validate_every: int = 0  # steps between two measurements of the loss on data.validation_rows; 0: only at the end
    validate_dense: bool = False  # measure these rows with dense attention too: what the pattern costs

    def __post_init__(self) -> None:
        checks.check_log(self)


@dataclass(frozen=True)
class Recipe:
    """One run, repeatable from its recipe alone. Relative paths start at the working directory."""

    model: ModelRecipe
    data: DataRecipe
    train: TrainRecipe
    name: str = "run"  # default in a file: the file's stem
    seed: int = 0
    output: str = "runs/run"  # default in a file: runs/<name>
    tokenizer: str = "bytes"  # bytes, model (= the tokenizer at model.path), or a hub id or local directory
    attention: AttentionRecipe = field(default_factory=AttentionRecipe)
    parallel: ParallelRecipe = field(default_factory=ParallelRecipe)
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    log: LogRecipe = field(default_factory=LogRecipe)

    def __post_init__(self) -> None:
        checks.check_recipe(self)

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step on each data-parallel rank."""
        return self.train.batch_rows // (self.train.micro_rows * self.parallel.dp)

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe as JSON-able values, defaults included; `recipe_from_dict` reads it back to an equal recipe."""
        plain = _plain(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
