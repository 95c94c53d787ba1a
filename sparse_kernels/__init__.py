"""Block-and-column sparse attention: patterns as data, the truth in plain torch, and backends that skip what a pattern skips.

Usable alone: ``from sparse_kernels import SparsePattern, sparse_attention``. Knows torch; knows no ranks and no models.
"""

from sparse_kernels.attention import sparse_attention
from sparse_kernels.backends import backends, resolve_backend
from sparse_kernels.block_rows import BlockRows
from sparse_kernels.errors import PatternError
from sparse_kernels.pattern import SparsePattern
from sparse_kernels.reference import merge_states, reference_attention
from sparse_kernels.view import ShardView

__all__ = [
    "BlockRows",
    "PatternError",
    "ShardView",
    "SparsePattern",
    "backends",
    "merge_states",
    "reference_attention",
    "resolve_backend",
    "sparse_attention",
]
