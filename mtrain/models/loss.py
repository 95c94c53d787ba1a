"""Next-token loss without the logits: cross entropy fused with the output projection, a chunk of rows at a time.

For 512K tokens and a vocabulary of 152K the logits alone would be 297 GiB in float32. Here a chunk of rows is
projected, its loss taken, its gradient formed at once, and the chunk forgotten, so extra memory is chunk x vocab plus
the gradients themselves. Forming the gradient in the forward pass is the idea of Liger-Kernel's fused linear cross
entropy (https://github.com/linkedin/Liger-Kernel).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtrain.errors import ModelError
from sparse_kernels.reference import accumulation_dtype

IGNORE = -100


def fused_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Sum of the token losses of ``hidden @ weight.T`` against ``labels``, and how many tokens were counted.

    Args:
        hidden: [..., E] final hidden states, any float dtype (under autocast they are cast to its dtype).
        weight: [V, E] output projection.
        labels: int64 [...], already shifted (labels[i] is the token after position i); -100 is ignored.
        chunk: rows projected at a time.

    Returns:
        (loss_sum, valid): a scalar, float32 (float64 for float64 inputs), differentiable in hidden and weight; and an
        int64 scalar. Without a valid token the sum is exactly 0, and so are the gradients.

    Raises:
        ModelError: labels whose shape is not that of the hidden states, or chunk < 1.
    """
    if labels.shape != hidden.shape[:-1]:
        raise ModelError(
            f"labels {tuple(labels.shape)} do not fit hidden states {tuple(hidden.shape)}: give one label per position"
        )
    if chunk < 1:
        raise ModelError(f"loss_chunk must be at least 1 row, got {chunk}")
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    labels = labels.reshape(-1)
    with torch.autocast(device, enabled=False):
        rows = hidden.reshape(-1, hidden.shape[-1])
        # Inside a Function inputs look as if they wanted gradients even under no_grad, so the mode is looked up here.
        loss = _FusedCrossEntropy.apply(rows, weight, labels, chunk, torch.is_grad_enabled())
    return loss, (labels != IGNORE).sum()


def scaled_loss(loss_sum: Tensor, total_valid: int | Tensor, num_averaged_ranks: int) -> Tensor:
    """What a rank backpropagates: ``loss_sum / total_valid * num_averaged_ranks``.

    Args:
        loss_sum: sum of the token losses of this rank's micro-batch.
        total_valid: valid target tokens of the whole optimizer step, over all ranks and micro-batches, each counted
            once.
        num_averaged_ranks: ranks over which the gradient engine (DDP, FSDP, ZeRO) averages; 1 when it sums or there is
            none.

    Returns:
        A scalar; summed over ranks and divided by ``num_averaged_ranks`` it is the mean loss per token. A step without
        a valid token gives 0, not NaN.
    """
    if isinstance(total_valid, Tensor):
        return loss_sum / total_valid.clamp(min=1) * num_averaged_ranks
    return loss_sum / max(total_valid, 1) * num_averaged_ranks


class _FusedCrossEntropy(torch.autograd.Function):
    """Loss and, when anybody will ask for them, both gradients, in one pass over the rows."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, training: bool) -> Tensor:
        need_hidden, need_weight = (training and need for need in ctx.needs_input_grad[:2])
        wide = accumulation_dtype(hidden.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # Wide, because a bfloat16 running sum over many chunks loses the small terms.
        grad_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            valid = labels[rows] != IGNORE
            target = labels[rows].masked_fill(~valid, 0)[:, None]
            logits = _product(hidden[rows], weight.T, wide)
            lse = torch.logsumexp(logits, 1, keepdim=True)
            loss += (lse - logits.gather(1, target))[:, 0].masked_fill(~valid, 0).sum()
            if not (need_hidden or need_weight):
                continue
            # The gradient of the chunk takes the place of its logits: softmax - one_hot, ignored rows exactly 0.
            probs = logits.sub_(lse).exp_()
            probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0)).masked_fill_(~valid[:, None], 0)
            slope = probs.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = _product(slope, weight, wide)
            if grad_weight is not None:
                grad_weight += _product(slope.T, hidden[rows], wide)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The factor stays on the device as a tensor: no host sync.
        grad_hidden, grad_weight = (None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors)
        return grad_hidden, grad_weight, None, None, None


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """a @ b, summed and returned in the wide dtype: a plain bfloat16 product would round every logit to 8 bits."""
    if a.dtype == wide:
        return a @ b
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=wide)
    return a.to(wide) @ b.to(wide)


class LossHead(nn.Linear):
    """An output projection that answers with the sum of token losses while labels are set, and with logits otherwise.

    The *class* of the model's own head is swapped, so parameters, names and module hooks stay: DDP, FSDP2 (which keeps
    the head in a unit of its own) and ZeRO-3 gather the weight when the module is called, and the fused loss runs
    inside that call.
    """

    labels: Tensor | None = None
    chunk: int = 1024

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., E] -> logits [..., V], or the scalar sum of token losses."""
        if self.labels is None:
            return super().forward(hidden)
        return fused_cross_entropy(hidden, self.weight, self.labels, chunk=self.chunk)[0]


class FusedLoss:
    """The model's ``loss_function``: passes the fused sum on; anything else goes to the loss the model had before."""

    def __init__(self, ordinary: Any) -> None:
        self.ordinary = ordinary

    def __call__(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        """Called by transformers with what `LossHead` returned; a scalar is the sum of token losses."""
        if logits.dim() == 0:
            return logits
        loss: Tensor = self.ordinary(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return loss


def install_loss_head(model: Any, chunk: int = 1024) -> Any:
    """Let ``model(..., shift_labels=labels)`` return the sum of token losses as ``.loss``; logits are never whole.

    ``shift_labels`` are already shifted (a shard cannot shift its own labels: the next token may live on another rank).
    The caller divides, see `scaled_loss`. ``model(...)`` without ``shift_labels`` behaves as before. Installing twice
    changes only the chunk.

    Args:
        model: a transformers causal language model.
        chunk: rows projected at a time. Extra memory is about 3 * chunk * vocab_size * 4 bytes, and the gradients of
            the head's weight and input from the forward pass on.

    Returns:
        The same model.
    """
    head: Any = model.get_output_embeddings()
    if type(head) not in (nn.Linear, LossHead) or head.bias is not None:
        raise ModelError(f"the fused loss needs an output projection nn.Linear without bias, this model has {head!r}")
    if type(head) is nn.Linear:
        head.__class__ = LossHead
        model.loss_function = FusedLoss(model.loss_function)
        model.register_forward_pre_hook(_set_labels, with_kwargs=True)
        # always_call: an error inside the forward must not leave labels behind for the next call.
        model.register_forward_hook(_clear_labels, always_call=True)
    head.chunk = chunk
    return model


def _set_labels(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    labels = kwargs.get("shift_labels")
    if labels is None:
        return args, kwargs
    model.get_output_embeddings().labels = labels
    # transformers calls the loss function only when it is given labels.
    return args, {**kwargs, "labels": labels}


def _clear_labels(model: Any, _args: Any, _output: Any) -> None:
    model.get_output_embeddings().labels = None
