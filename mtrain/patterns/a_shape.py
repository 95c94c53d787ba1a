"""The static A-shape pattern: the first tokens of each document and a local band.

From StreamingLLM (Xiao et al., arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import Tensor

from mtrain.errors import MtrainError
from mtrain.patterns.documents import Documents
from mtrain.patterns.index import Selection
from sparse_kernels import SparsePattern


def a_shape_pattern(
    batch: int,
    heads: int,
    seq_len: int,
    block: int,
    *,
    sink: int,
    local: int,
    doc_start: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> SparsePattern:
    """The first ``sink`` keys of every document and the token distances 0..``local``, the same for every head.

    Args:
        doc_start: int64 [B, S], of the whole sequence: first position of each token's document; None: one document.
    """
    if min(batch, heads, seq_len, block) < 1 or min(sink, local) < 0:
        raise MtrainError(
            f"a_shape needs batch, heads, seq_len, block >= 1 and sink, local >= 0, got "
            f"{batch}, {heads}, {seq_len}, {block}, {sink}, {local}"
        )
    if doc_start is not None and tuple(doc_start.shape) != (batch, seq_len):
        raise MtrainError(
            f"doc_start has shape {tuple(doc_start.shape)}; expected the whole sequence, [{batch}, {seq_len}]"
        )
    return a_shape_of(Documents(seq_len, doc_start), batch, heads, block, sink=sink, local=local, device=device)


def a_shape_of(
    documents: Documents, batch: int, heads: int, block: int, *, sink: int, local: int, device: torch.device | str
) -> SparsePattern:
    """`a_shape_pattern` with the documents at hand."""
    size = documents.seq_len
    nothing = torch.zeros(batch, heads, size + -(-size // block), dtype=torch.bool, device=device)
    return Selection(nothing[..., :size], nothing[..., size:]).pattern(
        documents, block, sink=sink, local=local, most_columns=0
    )
