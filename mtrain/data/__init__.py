"""Training data: tokenizers, documents, synthetic tasks, packing, and the loader that makes batches of them."""

from mtrain.data.loader import Batch, Entry, Loader, held_out_rows, make_loader
from mtrain.data.packing import IGNORE, Row, Sample
from mtrain.data.retrieval import Prompts, RetrievalTask, retrieval_prompts
from mtrain.data.sources import SourceContext, build_source
from mtrain.data.tokenizer import load_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "Entry",
    "Loader",
    "Prompts",
    "RetrievalTask",
    "Row",
    "Sample",
    "SourceContext",
    "make_loader",
    "build_source",
    "held_out_rows",
    "load_tokenizer",
    "retrieval_prompts",
]
