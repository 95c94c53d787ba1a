"""The loader: which source each row of each optimizer step comes from, and the batches of one data-parallel rank.

Step t draws a source for each of its rows: one random offset per step, then an even grid over the weights of the sources
active at t (systematic sampling, so a step's mixture is as close to the weights as its row count allows). A source hands out
its rows in order; the loader counts them for all ranks. So row r of step t depends on (recipe, seed, t, r) and on nothing
else: not on the number of processes, not on how the run was cut into sessions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mtrain.data.packing import Row
from mtrain.data.source import Source, seeded
from mtrain.data.sources import SYNTHETIC, SourceContext, build_source, source_names
from mtrain.errors import DataError

if TYPE_CHECKING:
    from mtrain.recipe import DataRecipe, Recipe

_VERSION = 1


@dataclass(frozen=True)
class Batch:
    """Rows of one micro-batch: ``tokens``, ``labels``, ``doc_start`` int64 [B, S] (meaning: :mod:`mtrain.data.packing`).

    ``step`` is the optimizer step, ``rows`` the row numbers within it over all ranks, ``sources`` where each row came from.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    doc_start: torch.Tensor
    step: int = 0
    rows: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Sequence[Row], step: int = 0, numbers: Sequence[int] = (), sources: Sequence[str] = ()) -> Batch:
        """Stack rows of equal length."""
        return cls(
            torch.stack([row.tokens for row in rows]),
            torch.stack([row.labels for row in rows]),
            torch.stack([row.doc_start for row in rows]),
            step,
            tuple(numbers),
            tuple(sources),
        )


@dataclass(frozen=True)
class Entry:
    """A source in the mixture: active in steps ``from_step`` <= t < ``until_step`` with ``weight`` relative to the others."""

    source: Source
    weight: float = 1.0
    from_step: int = 0
    until_step: int | None = None

    def active(self, step: int) -> bool:
        """Whether the source takes part in a step."""
        return self.from_step <= step and (self.until_step is None or step < self.until_step)


class Loader:
    """Batches for one data-parallel rank (the ranks of one ring use the same ``dp_rank`` and get the same batches).

    :meth:`next_step` gives the micro-batches of the next optimizer step; iterating gives them one by one, without end.
    ``state_dict`` is JSON-able and the same on every rank; it describes the start of the first step not yet finished.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        batch_rows: int,
        micro_rows: int = 1,
        seed: int = 0,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        if not entries:
            raise DataError("data: no sources; name at least one, for example `- {kind: python-stdlib}`")
        if batch_rows % dp_size or not 0 <= dp_rank < dp_size:
            raise DataError(
                f"data: {batch_rows} rows per step cannot be shared evenly by {dp_size} data-parallel ranks "
                f"(rank {dp_rank}); make train.batch_rows a multiple of {dp_size}"
            )
        names = [entry.source.name for entry in entries]
        if len(set(names)) != len(names):
            raise DataError(f"data: source names must differ, got {', '.join(names)}")
        self.entries, self.seed, self.batch_rows, self.micro_rows = tuple(entries), seed, batch_rows, micro_rows
        share = batch_rows // dp_size
        self._mine = range(dp_rank * share, (dp_rank + 1) * share)
        self.step = 0
        self._drawn = dict.fromkeys(names, 0)

    def next_step(self) -> list[Batch]:
        """The next optimizer step's micro-batches (of ``micro_rows`` rows, the last perhaps fewer); moves on by one step."""
        step, plan = self.step, self.plan(self.step)
        numbers = self._numbered(plan)
        rows = [self.entries[plan[r]].source.row(numbers[r]) for r in self._mine]
        for index in plan:
            self._drawn[self.entries[index].source.name] += 1
        self.step += 1
        batches = []
        for at in range(0, len(rows), self.micro_rows):
            part = self._mine[at : at + self.micro_rows]
            names = [self.entries[plan[r]].source.name for r in part]
            batches.append(Batch.of(rows[at : at + self.micro_rows], step, part, names))
        return batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self.next_step()

    def plan(self, step: int) -> list[int]:
        """Index of the entry that each row of a step is drawn from. Raises DataError when no source is active."""
        active = [i for i, entry in enumerate(self.entries) if entry.active(step) and entry.weight > 0]
        if not active:
            raise DataError(f"data: no source is active in step {step}; see from_step and until_step of data.sources")
        weights = np.array([self.entries[i].weight for i in active], dtype=np.float64)
        edges = np.cumsum(weights) / weights.sum()
        grid = (np.arange(self.batch_rows) + seeded(self.seed, "mixture", step).random()) / self.batch_rows
        places = np.minimum(np.searchsorted(edges, grid, side="right"), len(active) - 1)
        return [active[place] for place in places]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able position: after it is loaded, the same batches follow, whatever the number of ranks."""
        sources = {
            entry.source.name: {
                "rows": self._drawn[entry.source.name],
                "state": entry.source.state_dict(self._drawn[entry.source.name]),
            }
            for entry in self.entries
        }
        return {
            "version": _VERSION,
            "step": self.step,
            "seed": self.seed,
            "batch_rows": self.batch_rows,
            "sources": sources,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises DataError when seed, batch size, sources or data differ from the saved ones."""
        if state.get("version") != _VERSION:
            raise DataError(
                f"data: the checkpoint's data state has version {state.get('version')!r}, this program reads {_VERSION}"
            )
        for key, here in (("seed", self.seed), ("batch_rows", self.batch_rows)):
            if state[key] != here:
                raise DataError(
                    f"data: the checkpoint was written with {key} {state[key]}, this run has {here}; the rows would not "
                    f"continue the run. Set it back, or start afresh with checkpoint.resume=never"
                )
        if set(state["sources"]) != set(self._drawn):
            raise DataError(
                f"data: the checkpoint has the sources {', '.join(sorted(state['sources']))}; this run has "
                f"{', '.join(sorted(self._drawn))}. Restore the recipe, or start afresh with checkpoint.resume=never"
            )
        for entry in self.entries:
            saved = state["sources"][entry.source.name]
            entry.source.load_state_dict(saved["state"], int(saved["rows"]))
            self._drawn[entry.source.name] = int(saved["rows"])
        self.step = int(state["step"])

    def _numbered(self, plan: Sequence[int]) -> list[int]:
        """Row number within its source for each row of the coming step."""
        count = dict(self._drawn)
        numbers = []
        for index in plan:
            name = self.entries[index].source.name
            numbers.append(count[name])
            count[name] += 1
        return numbers


def make_loader(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    dp_rank: int = 0,
    dp_size: int | None = None,
    *,
    cache_dir: Path | str | None = None,
    progress: bool = True,
) -> Loader:
    """The training loader of a recipe for one data-parallel rank (of ``recipe.parallel.dp`` unless ``dp_size`` says otherwise).

    ``cache_dir`` (default: ``tokens`` in the recipe's output) keeps the tokens of corpora over 32 MB; of the processes of a
    machine one tokenises while the others wait. Everything that can be wrong with the place, the format or the options of
    the data is raised here, as DataError; a streamed dataset alone is checked while it is read.
    """
    context = SourceContext(
        tokenizer,
        recipe.train.seq_len,
        seed=recipe.seed,
        packing=recipe.data.packing,
        held_out=False if recipe.data.validation_rows else None,
        cache_dir=Path(recipe.output) / "tokens" if cache_dir is None else Path(cache_dir),
        progress=progress,
    )
    entries = [
        Entry(build_source(source, name, context), source.weight, source.from_step, source.until_step)
        for source, name in zip(recipe.data.sources, source_names(recipe.data.sources), strict=True)
    ]
    return Loader(
        entries,
        batch_rows=recipe.train.batch_rows,
        micro_rows=recipe.train.micro_rows,
        seed=recipe.seed,
        dp_rank=dp_rank,
        dp_size=recipe.parallel.dp if dp_size is None else dp_size,
    )


def held_out_rows(
    data: DataRecipe,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seq_len: int,
    *,
    kinds: Sequence[str] | None = None,
    single_document: bool = False,
    seed: int = 0,
    cache_dir: Path | str | None = None,
    progress: bool = True,
) -> Batch:
    """``count`` validation rows of ``seq_len`` tokens as one batch, shared out evenly over the sources.

    Their documents are never trained on: always for python-stdlib, and for other text when the training recipe sets
    ``data.validation_rows``. ``kinds`` limits the sources; by default those that read text, or all if none does.
    ``single_document``: each row is a full-length piece of one document (``doc_start`` 0 everywhere, no padding), for
    evaluation without a document mask. The rows depend on ``seed`` and not on a run's seed, so that runs compare.
    """
    if kinds is None:
        kinds = sorted({source.kind for source in data.sources} - SYNTHETIC) or sorted(SYNTHETIC)
    context = SourceContext(
        tokenizer,
        seq_len,
        seed=seed,
        packing=data.packing,
        held_out=True,
        single_document=single_document,
        cache_dir=Path(cache_dir) if cache_dir is not None else None,
        progress=progress,
    )
    named = zip(data.sources, source_names(data.sources), strict=True)
    sources = [
        build_source(replace(source, length=None), name, context) for source, name in named if source.kind in kinds
    ]
    if not sources or count < 1:
        have = ", ".join(sorted({source.kind for source in data.sources}))
        raise DataError(
            f"data: no held-out rows: count {count}, kinds {', '.join(kinds)}; the recipe's sources are {have}"
        )
    picks = [(sources[i % len(sources)], i // len(sources)) for i in range(count)]
    return Batch.of([source.row(i) for source, i in picks], 0, range(count), [source.name for source, _ in picks])
