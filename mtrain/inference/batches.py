"""What an attention layer meets in inference: a prefill that remembers keys and values, and a decoding step."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtrain.comm import Ring
from mtrain.inference.cache import KeyValueCache
from mtrain.models.context import MicroBatch
from mtrain.models.statistics import mask_density
from sparse_kernels.reference import accumulation_dtype

# A cache in bfloat16 is widened so many elements at a time, so that its float32 twin never exists whole.
WIDEN_ELEMENTS = 1 << 24


@dataclass(eq=False)
class PrefillBatch(MicroBatch):
    """A forward over a whole prompt.

    Patterns are not kept: there is no backward pass, and those of a long prompt are large.

    Attributes:
        cache: takes each layer's keys and values; None: nobody will decode.
        real: tokens of this rank that are not padding; they come first (layouts keep positions in order).
        densities: of every layer that has run.
    """

    cache: KeyValueCache | None = None
    real: int = 0
    densities: list[float] = field(default_factory=list)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """See `MicroBatch.attend`."""
        out = super().attend(layer, q, k, v, scale)
        pattern = self.index.pop(layer)
        self.densities.append(1.0 if pattern.full else mask_density(pattern, ring=self.context.ring))
        if self.cache is not None:
            self.cache.fill(layer, k[:, : self.real], v[:, : self.real])
        return out


@dataclass(eq=False)
class DecodeBatch:
    """A forward over one new token, which every rank has.

    Attributes:
        ring: the ranks that hold the cache.
        cache: this rank's part.
        position: of the token, in the whole sequence.
    """

    ring: Ring
    cache: KeyValueCache
    position: int

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Attention of the token to all cached tokens of all ranks and to itself.

        Args:
            q: [1, 1, H, D] rotated query.
            k, v: [1, 1, K, D].
            scale: of the scores; default D^-0.5.

        Returns:
            [1, 1, H, D] in the dtype of q, the same on all ranks.
        """
        if self.position % self.ring.world_size == self.ring.rank:
            self.cache.append(layer, k, v)
        out, lse = attend_cached(q[0, 0], *self.cache.get(layer), q.shape[-1] ** -0.5 if scale is None else scale)
        if self.ring.world_size > 1:
            parts = self.ring.all_gather(torch.cat([out, lse[:, None]], 1))
            out = merge_partial(torch.stack(parts))
        return out.to(q.dtype)[None, None]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention of one query to the keys held here, in float32 (float64 stays).

    Args:
        q: [H, D].
        k, v: [K, n, D], H a multiple of K; n may be 0.
        scale: of the scores.

    Returns:
        out [H, D] and lse [H], natural log. Without keys: 0 and -inf.
    """
    wide = accumulation_dtype(q.dtype)
    heads, head_dim = q.shape
    kv_heads, n, _ = k.shape
    if n == 0:
        return q.new_zeros(heads, head_dim, dtype=wide), q.new_full((heads,), -torch.inf, dtype=wide)
    query = q.to(wide).view(kv_heads, heads // kv_heads, head_dim) * scale
    step = n if k.dtype == wide else max(1, WIDEN_ELEMENTS // (kv_heads * head_dim))
    pieces = [slice(start, start + step) for start in range(0, n, step)]
    # Keys on the left: a CPU multiplies tall by thin twice as fast as thin by tall.
    scores = (
        torch.cat([k[:, piece].to(wide) @ query.transpose(1, 2) for piece in pieces], 1).transpose(1, 2).contiguous()
    )
    lse = scores.logsumexp(-1)
    probs = scores.sub_(lse[..., None]).exp_()
    out = torch.zeros_like(query)
    for piece in pieces:
        out += probs[..., piece] @ v[:, piece].to(wide)
    return out.reshape(heads, head_dim), lse.reshape(heads)


def merge_partial(parts: Tensor) -> Tensor:
    """Attention over all keys from attention over disjoint parts of them.

    Args:
        parts: [W, H, D + 1], each an out and behind it its lse; -inf marks a part without keys. At least one has some.

    Returns:
        [H, D]: sum_r exp(lse_r - lse) out_r with lse = log sum_r exp(lse_r).
    """
    out, lse = parts[..., :-1], parts[..., -1]
    weight = torch.exp(lse - lse.logsumexp(0))
    return (weight[..., None] * out).sum(0)
