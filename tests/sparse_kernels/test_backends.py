"""The registry: who can run where, and the errors of people who ask for something else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sparse_kernels import SparsePattern, backends, gpu, resolve_backend, sparse_attention
from sparse_kernels.gpu import config, general_tiles, probe


def test_every_backend_is_listed_with_a_reason() -> None:
    here = backends("cpu", torch.float32, 64)
    assert here["cpu"] is None and here["reference"] is None
    for name, reason in backends("cuda", torch.float32, 64).items():
        assert reason is None or len(reason) > 10, name
    assert "cuda" in str(backends("cuda", torch.float32, 64)["cpu"])


def test_auto_takes_the_fast_one() -> None:
    assert resolve_backend("auto", "cpu", torch.bfloat16, 64).name == "cpu"
    assert resolve_backend("reference", "cpu", torch.float32, 64).name == "reference"


def test_what_cannot_run_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"unknown attention backend 'cup'; choose auto or one of .*cpu"):
        resolve_backend("cup", "cpu", torch.float32, 64)
    with pytest.raises(ValueError, match="cannot run here.*cuda"):
        resolve_backend("cpu", "cuda", torch.float32, 64)
    with pytest.raises(ValueError, match="no attention backend can run torch.int64"):
        resolve_backend("auto", "cpu", torch.int64, 64)


def test_inputs_that_do_not_fit_the_pattern() -> None:
    pattern = SparsePattern.dense(1, 4, 10, 4)
    q, k = torch.zeros(1, 10, 4, 8), torch.zeros(1, 10, 2, 8)
    with pytest.raises(ValueError, match="the pattern was made for"):
        sparse_attention(q[:, :9], k[:, :9], k[:, :9], pattern)
    with pytest.raises(ValueError, match="num_kv_heads dividing 4"):
        sparse_attention(q, torch.zeros(1, 10, 3, 8), torch.zeros(1, 10, 3, 8), pattern)
    with pytest.raises(ValueError, match="must both be"):
        sparse_attention(q, k, k[..., :4], pattern)
    with pytest.raises(ValueError, match="q, k, v have 3, 4, 4 dimensions"):
        sparse_attention(q[0], k, k, pattern)
    starts = torch.zeros(1, 10, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"doc_start is on meta and q on cpu; use doc_start.to\('cpu'\)"):
        sparse_attention(q, k, k, pattern, doc_start=starts.to("meta"))
    with pytest.raises(ValueError, match=r"doc_start has shape \(1, 9\)"):
        sparse_attention(q, k, k, pattern, doc_start=starts[:, :9])
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="scale .* must be above 0"):
            sparse_attention(q, k, k, pattern, scale=scale)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_changes_nothing(backend: str) -> None:
    """Forward and backward under bfloat16 autocast: bit for bit those of float32."""
    pattern = SparsePattern(10, 4, columns=torch.tensor([[[0, 3, 10]] * 4], dtype=torch.int32))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 10, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = sparse_attention(q, k, v, pattern, backend=backend)
            assert isinstance(out, torch.Tensor)
            results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))])
    assert results[1][0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_second_derivatives_are_refused(backend: str) -> None:
    pattern = SparsePattern.dense(1, 2, 7, 4)
    q = torch.randn(1, 7, 2, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    out = sparse_attention(q, q, q, pattern, backend=backend)
    assert isinstance(out, torch.Tensor)
    (slope,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()


def test_lse_comes_on_request() -> None:
    pattern = SparsePattern.dense(1, 2, 7, 4)
    q = torch.randn(1, 7, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, lse = sparse_attention(q, q, q, pattern, return_lse=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, q) * 8**-0.5
    wanted = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, wanted, rtol=0, atol=1e-12)
    assert out.shape == q.shape


def test_triton_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reason of its own, on a machine with a GPU made up."""
    monkeypatch.setattr(gpu, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    usable, cuda = gpu.TritonBackend().unusable, torch.device("cuda")
    assert usable(cuda, torch.bfloat16, 128) is None and usable(cuda, torch.float32, 96) is None
    assert "CUDA tensors" in str(usable(torch.device("cpu"), torch.bfloat16, 128))
    assert "head_dim 80" in str(usable(cuda, torch.bfloat16, 80))
    assert "float64" in str(usable(cuda, torch.float64, 128))
    assert usable(cuda, torch.float16, 256) is None and "256 in float32" in str(usable(cuda, torch.float32, 256))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (7, 5))
    assert "7.5 is below 8.0" in str(usable(cuda, torch.bfloat16, 128))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in str(usable(cuda, torch.bfloat16, 128))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "not installed" in str(usable(cuda, torch.bfloat16, 128))


@pytest.mark.parametrize(
    ("triton", "numpy", "runs"),
    [("3.6.0", "2.5.2", False), ("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.1", "2.5.2", True),
     ("3.10.0+git0", "2.10.0", True), ("3.4.0", "1.26.4", True)],
)  # fmt: skip
def test_an_interpreter_that_cannot_run_with_this_numpy_is_named(
    triton: str, numpy: str, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=True))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=triton, __spec__=object(), knobs=knobs))
    monkeypatch.setattr("numpy.__version__", numpy)
    for reason in (
        gpu.TritonBackend().unusable(torch.device("cpu"), torch.float32, 64),
        probe.unusable(torch.device("cpu"), torch.float32, 64, 64),
    ):
        assert reason is None if runs else f"triton {triton} cannot run loops with numpy {numpy}" in str(reason)


@pytest.mark.parametrize(
    ("major", "shared", "wanted"),
    [(8, 166912, config.AMPERE), (8, 101376, config.SMALL), (9, 232448, config.HOPPER), (10, 232448, config.HOPPER),
     (12, 101376, config.SMALL)],
)  # fmt: skip
def test_devices_with_little_shared_memory_use_the_small_rows_and_every_usable_input_has_one(
    major: int, shared: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the rows fit is measured in tests/triton_compile."""
    monkeypatch.setattr(gpu, "interpreting", lambda: True)
    monkeypatch.setattr(gpu, "interpreter_fault", lambda: None)
    device = SimpleNamespace(major=major, shared_memory_per_block_optin=shared)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert config.generation_of(torch.device("cuda")) == wanted
    usable = gpu.TritonBackend().unusable
    kinds = [(d, t) for d in config.HEAD_DIMS for t in config.DTYPES if usable(torch.device("cpu"), t, d) is None]
    assert len(kinds) == 3 * len(config.HEAD_DIMS) - 1
    for table in (config.TABLE, general_tiles.TABLE):
        assert set(table) == {"forward", "dq", "dkdv", "columns"}
        for rows in table.values():
            assert all(config.row_key(wanted, head_dim, dtype.itemsize) in rows for head_dim, dtype in kinds)


@pytest.mark.slow
def test_import_loads_no_backend_and_nothing_of_mtrain() -> None:
    """Importing the package costs torch only; a backend is imported when it is asked for."""
    code = "import sparse_kernels, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(done.stdout.split())
    assert "sparse_kernels.attention" in loaded
    assert not loaded & {"mtrain", "triton", "transformers", "sparse_kernels.cpu", "sparse_kernels.reference_backend"}


@pytest.mark.slow
def test_asking_what_can_run_here_loads_no_triton() -> None:
    code = "import sparse_kernels, sys, torch; print(sparse_kernels.backends('cpu', torch.float32, 64)); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    reasons, loaded = done.stdout.strip().split("\n")
    assert "triton" not in loaded.split() and "needs CUDA tensors" in reasons


def test_falling_back_to_the_reference_is_said_once(monkeypatch, caplog) -> None:
    kept = {name: None if name == "reference" else "not here" for name in backends("cpu", torch.float32, 64)}
    monkeypatch.setattr(sys.modules["sparse_kernels.backends"], "backends", lambda *_: dict(kept))
    for _ in range(2):
        assert resolve_backend("auto", "cpu", torch.float32, 77).name == "reference"
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "head_dim 77 on cpu" in caplog.text
