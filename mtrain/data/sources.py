"""From the recipe's `sources` to objects that give rows: one entry per kind.

kind            reads                                        options
python-stdlib   source files of the standard library         shuffle
text            .txt files: file, directory or glob          by (document, paragraph, line), shuffle
jsonl, parquet  the column `field`                           max_bad_fraction, shuffle
hf              a Hugging Face dataset (hub id or directory)  streaming, shuffle_buffer, shuffle, max_bad_fraction
all of these    loss only on a row's last tokens              loss_last (the number of tokens; validation ignores it)
retrieval       nothing (haystack from the library)          see mtrain.data.retrieval.RetrievalTask
induction       nothing                                      see mtrain.data.induction.InductionSource
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from mtrain.data import documents as docs
from mtrain.data.corpus import CorpusSource, StreamSource, TailLoss
from mtrain.data.induction import InductionSource
from mtrain.data.retrieval import RetrievalSource, RetrievalTask
from mtrain.data.source import Options, Source
from mtrain.data.stdlib import TokenizerKey, stdlib_store
from mtrain.data.store import TokenStore, build_store, cache_key
from mtrain.errors import DataError

if TYPE_CHECKING:
    from mtrain.recipe import SourceRecipe

SYNTHETIC = frozenset({"retrieval", "induction"})
_CACHE_FROM_BYTES = 32 << 20


@dataclass(frozen=True)
class SourceContext:
    """What every source needs to know beside its own recipe entry.

    ``held_out`` True: validation rows; False: training rows that leave the validation documents out; None: all documents.
    ``single_document``: rows are full-length pieces of one document each (text only).
    ``cache_dir``: where big corpora keep their tokens (None: in memory).
    """

    tokenizer: PreTrainedTokenizerBase
    seq_len: int
    seed: int = 0
    packing: bool = True
    single_document: bool = False
    held_out: bool | None = None
    cache_dir: Path | None = None
    progress: bool = True


def build_source(recipe: SourceRecipe, name: str, context: SourceContext) -> Source:
    """The source that a recipe entry describes. Raises DataError for missing, empty or corrupt data and wrong options."""
    if context.held_out:
        name = f"{name} (held out)"
    if recipe.kind == "retrieval":
        return RetrievalSource(
            context.tokenizer,
            RetrievalTask.read(recipe.options),
            name=name,
            seed=context.seed,
            seq_len=context.seq_len,
            packing=context.packing,
            length=recipe.length,
            held_out=bool(context.held_out),
        )
    if recipe.kind == "induction":
        return InductionSource(
            context.tokenizer,
            recipe.options,
            name=name,
            seed=context.seed,
            seq_len=context.seq_len,
            packing=context.packing,
            length=recipe.length,
        )
    options = Options(recipe.options, f"a {recipe.kind} source")
    last = options.integer("loss_last", 0)
    source = _text_source(recipe, name, context, options)
    return TailLoss(source, last) if last and not context.held_out else source


def _text_source(recipe: SourceRecipe, name: str, context: SourceContext, options: Options) -> Source:
    if recipe.kind == "hf" and options.flag("streaming", True):
        return _stream(recipe, name, context, options)
    shuffle = options.flag("shuffle", True)
    store = _store(recipe, context, options)
    return CorpusSource(
        store,
        context.tokenizer,
        name=name,
        seed=context.seed,
        seq_len=context.seq_len,
        documents=_chosen(store, recipe, context.held_out),
        packing=context.packing,
        length=recipe.length,
        shuffle=shuffle,
        full_pieces=context.single_document,
    )


def source_names(recipes: tuple[SourceRecipe, ...]) -> list[str]:
    """A unique name per source, stable when other sources are added after it: kind, path, and #2 for a second of its like."""
    seen: dict[str, int] = {}
    names = []
    for recipe in recipes:
        base = f"{recipe.kind} {recipe.path}" if recipe.path else recipe.kind
        seen[base] = seen.get(base, 0) + 1
        names.append(base if seen[base] == 1 else f"{base} #{seen[base]}")
    return names


def _store(recipe: SourceRecipe, context: SourceContext, options: Options) -> TokenStore:
    """Tokens of everything that fits on a disk."""
    tokenizer, path = context.tokenizer, recipe.path or ""
    if recipe.kind == "python-stdlib":
        options.done()
        return stdlib_store(TokenizerKey(tokenizer))
    bad = docs.BadRows()
    by = options.choice("by", ("document", "paragraph", "line"), "document") if recipe.kind == "text" else ""
    if recipe.kind != "text":
        bad.max_fraction = options.fraction("max_bad_fraction", 0.0) or 0.0
    options.done()
    if recipe.kind == "hf":
        return _downloaded(recipe, context, bad)
    readers: dict[str, Callable[[], Iterator[docs.Document]]] = {
        "text": lambda: docs.read_text(path, by),
        "jsonl": lambda: docs.read_jsonl(path, recipe.field, bad),
        "parquet": lambda: docs.read_parquet(path, recipe.field, bad),
    }
    if recipe.kind not in readers:
        raise DataError(
            f"data: no source of kind {recipe.kind!r}; expected python-stdlib, retrieval, induction, hf, {', '.join(readers)}"
        )
    files = docs.find_files(path, recipe.kind)
    size = sum(file.stat().st_size for file in files)
    cache = None
    if context.cache_dir is not None and size >= _CACHE_FROM_BYTES:
        cache = context.cache_dir / cache_key(tokenizer, files, recipe.kind, recipe.field, by, bad.max_fraction)
    return build_store(readers[recipe.kind](), tokenizer, what=path, cache=cache, total=size, progress=context.progress)


def _downloaded(recipe: SourceRecipe, context: SourceContext, bad: docs.BadRows) -> TokenStore:
    """A Hugging Face dataset with `streaming: false`: all of it, tokenised."""
    path = recipe.path or ""
    rows = docs.open_hf(path, recipe.name, recipe.split, streaming=False)
    cache = None
    if context.cache_dir is not None:
        cache = context.cache_dir / cache_key(
            context.tokenizer, [], path, recipe.name, recipe.split, recipe.field, rows._fingerprint
        )
    found = docs.hf_documents(iter(rows), path, recipe.field, bad=bad)
    return build_store(found, context.tokenizer, what=path, cache=cache, progress=context.progress)


def _stream(recipe: SourceRecipe, name: str, context: SourceContext, options: Options) -> Source:
    """A Hugging Face dataset read in order, never as a whole."""
    buffer = options.integer("shuffle_buffer", 0)
    limit = options.fraction("max_bad_fraction", 0.0) or 0.0
    options.done()
    path = recipe.path or ""
    dataset = docs.open_hf(path, recipe.name, recipe.split, streaming=True)

    def open_at(epoch: int, first: int) -> Iterator[docs.Document]:
        rows = dataset.shuffle(seed=context.seed + epoch, buffer_size=buffer) if buffer else dataset
        return docs.hf_documents(iter(rows.skip(first)), path, recipe.field, first, docs.BadRows(limit))

    return StreamSource(
        open_at,
        context.tokenizer,
        name=name,
        seq_len=context.seq_len,
        packing=context.packing,
        length=recipe.length,
        held_out=context.held_out,
    )


def _chosen(store: TokenStore, recipe: SourceRecipe, held_out: bool | None) -> np.ndarray:
    """Documents of this side of the held-out split."""
    if held_out is None and recipe.kind == "python-stdlib":
        # Its validation files are never trained on, so that runs compare whatever their recipes say.
        held_out = False
    if held_out is None:
        return np.arange(len(store.hashes))
    chosen = np.flatnonzero(store.held_out() == held_out)
    if len(chosen) == 0:
        raise DataError(
            f"data: {recipe.path} is a single document, so none can be held out; set data.validation_rows=0 "
            "log.validate_every=0 log.validate_dense=false, or split it (`options: {by: paragraph}` for text)"
        )
    return chosen
