"""Inference on one rank or a ring of them: prefill, greedy decoding, per-token log-likelihoods; exact either way.

A long prompt does not fit one device, and evaluating it there would be another computation than the training was. So the
prompt is laid out over the ranks like a training row and runs through the very attention that training uses (sparse or
dense, ring or gather). What each rank then holds stays there:

    prefill    every layer's rotated keys and values of this rank's tokens go to its part of the cache; padding does not
    decoding   a new token's query is on every rank, each attends densely to what it holds, and the partial results are
               merged by their log-sum-exp: one all-gather of [H, D + 1] numbers per layer and token. The new token's own
               key and value go to rank (position mod W), so the cache stays even. All cached keys are in the past of the
               query, so no mask is needed, and no positions either: RoPE has put them into the keys.
    head       only the rows that are asked for meet the output projection, a chunk at a time: [N, vocab] never exists

Decoding is dense after sparse prefill, as MInference and the long-context suites do it: the first generated token comes from
the last row of the prefill. One rank decides each token, and whether to stop, and tells the others: rounding may differ
between devices, and ranks that continue different texts would hang or answer nonsense.

The merge of partial softmaxes over key splits is that of Flash-Decoding (Dao et al. 2023,
https://pytorch.org/blog/flash-decoding/) and tree attention (Shyam et al., arXiv 2408.04093); a cache that stays where
context-parallel prefill left it follows Yang et al., "Context Parallelism for Scalable Million-Token Inference" (arXiv
2411.01783). Sparse prefill with dense decoding is the protocol of MInference (Jiang et al., arXiv 2407.02490).
"""

from mtrain.inference.engine import Engine, Generation, TokenScores
from mtrain.inference.load import load_engine

__all__ = ["Engine", "Generation", "TokenScores", "load_engine"]
