"""Would this wait for a GPU? Found out without one: values that would live on the device must never be asked for on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten
# What reads a value, or has a result whose shape depends on one.
READS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
    aten.unique_dim.default, aten.unique_consecutive.default, aten.equal.default, aten.is_nonzero.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip


class WouldWait(RuntimeError):
    """The host asked for a number that the device would still be computing."""


class PretendDevice(TorchDispatchMode):
    """Follows tensors marked as living on a device, and everything made from them; raises when the host looks at one.

    Room that kernels write into (torch.empty) counts as on the device. Operators written in Python are one step here: call what
    is inside them.
    """

    def __init__(self, *tensors: Tensor | None) -> None:
        super().__init__()
        self.there = WeakTensorKeyDictionary({t: True for t in tensors if t is not None})

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        marked = any(x in self.there for x in given)
        if marked and function in READS:
            raise WouldWait(str(function))
        if marked and function in (aten.index.Tensor, aten.index_put_.default):
            if any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])):
                raise WouldWait(f"{function} by a boolean mask")
        result = function(*args, **(kwargs or {}))
        if marked or function in (aten.empty.memory_format, aten.empty_like.default):
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self.there[x] = True
        return result
