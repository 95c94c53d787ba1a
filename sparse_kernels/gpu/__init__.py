"""The Triton backend: structured kernels for columns and diagonals, general ones for lists of blocks.

Importing this package does not import Triton; the kernels' modules do, when they are first asked for.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import ClassVar

import torch
from torch import Tensor

from sparse_kernels.backends import Backend, State
from sparse_kernels.gpu.config import DTYPES, HEAD_DIMS
from sparse_kernels.view import ShardView


class TritonBackend(Backend):
    """Runs on CUDA tensors; on CPU tensors in Triton's interpreter, for tests.

    Out, lse and gradients are float32 and the same bit by bit in every run. float32 inputs are multiplied as three tf32 products
    (tf32x3), which keeps about float32's accuracy.
    """

    name: ClassVar[str] = "triton"

    def unusable(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Usable on CUDA devices of capability 8.0 or newer, for head_dim 64, 96 and 128 in bfloat16, float16 and float32,
        and 256 in bfloat16 and float16."""
        if device.type == "cpu":
            if not interpreting():
                return (
                    "it needs CUDA tensors and got CPU tensors (Triton's interpreter runs on those: set TRITON_INTERPRET=1 and "
                    "import triton first)"
                )
            fault = interpreter_fault()
            if fault:
                return fault
        if device.type not in ("cpu", "cuda"):
            return f"it needs CUDA tensors, not {device.type}"
        if device.type == "cuda":
            if importlib.util.find_spec("triton") is None:
                return "triton is not installed; pip install 'triton>=3.4'"
            if not torch.cuda.is_available():
                return "torch finds no CUDA device here"
            capability = torch.cuda.get_device_capability(device)
            if torch.version.hip is None and capability < (8, 0):
                return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
        if dtype not in DTYPES:
            return f"{dtype} is not bfloat16, float16 or float32"
        if head_dim not in HEAD_DIMS:
            return f"head_dim {head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
        if head_dim == 256 and dtype == torch.float32:
            return "head_dim 256 in float32 takes more registers than there are; bfloat16 and float16 run"
        return None

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, view: ShardView, scale: float, carry: State | None = None
    ) -> State:
        """See `Backend.forward`."""
        check(view, scale, q.device)
        with torch.no_grad():
            if view.pattern.blocks is not None:
                from sparse_kernels.gpu import general

                return general.forward(q, k, v, view, scale, carry)
            from sparse_kernels.gpu import launch

            return launch.forward(q, k, v, view, scale, carry)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, view: ShardView, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.backward`."""
        check(view, scale, q.device)
        with torch.no_grad():
            if view.pattern.blocks is not None:
                from sparse_kernels.gpu import general

                return general.backward(dout, q, k, v, out, lse, view, scale)
            from sparse_kernels.gpu import launch

            return launch.backward(dout, q, k, v, out, lse, view, scale)


def interpreting() -> bool:
    """Has Triton been imported in interpreter mode? Never imports it."""
    triton = sys.modules.get("triton")
    return triton is not None and bool(triton.knobs.runtime.interpret)


def interpreter_fault() -> str | None:
    """Why Triton's interpreter cannot run with the numpy here; None: it can. Imports Triton."""
    import numpy
    import triton

    # Its loops make an index of an array of one element, which numpy first deprecated and then refused; Triton 3.7 mends that.
    if _release(triton.__version__) < (3, 7) and _release(numpy.__version__) >= (2, 4):
        return (
            f"the interpreter of triton {triton.__version__} cannot run loops with numpy {numpy.__version__}: "
            "pip install 'numpy<2.4', or triton 3.7 where torch takes it"
        )
    return None


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def check(view: ShardView, scale: float, device: torch.device) -> None:
    """ValueError for what the kernels cannot do. Nothing is fetched from another device, which would wait for that device."""
    block = view.pattern.block
    if block < 16 or block & (block - 1):
        raise ValueError(
            f"the triton backend needs a pattern block that is a power of two from 16 on, best 64 or 128; got {block}"
        )
    if scale <= 0:
        raise ValueError(f"the triton backend needs a positive scale, got {scale}")
    held = (("the pattern", view.pattern), ("doc_start", view.doc_start), ("column_positions", view.column_positions))
    for name, part in held:
        if part is not None and part.device != device:
            raise ValueError(f"{name} is on {part.device} and q on {device}; use .to({str(device)!r})")
