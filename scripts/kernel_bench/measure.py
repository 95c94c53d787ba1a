"""Correctness first, then interleaved medians."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scripts.kernel_bench import contestants
from scripts.kernel_bench.cases import SINK, Shape, causal_cells, inputs, vertical_slash
from sparse_kernels import ShardView, SparsePattern, reference_attention
from sparse_kernels.accuracy import dense_by_rows, two_rules

ROUNDS = 3, 25  # least and most
SHORT = 2048  # tokens of the copy that is compared as a whole
LARGE = 8192  # rows of the matrices that show a device's ceilings
HEAD_START = 4_000_000  # clock cycles, about 2 ms, that a device waits before it begins what is timed


@dataclass(frozen=True)
class Settings:
    """One shape at one length."""

    shape: Shape
    length: int
    densities: list[float]
    device: torch.device
    backward: bool
    flex: bool
    seconds: float


# ---------------------------------------------------------------------------------------------------------------- correctness


def check(settings: Settings) -> list[str]:
    """What is wrong with our kernels in these settings; empty when all is right."""
    problems = []
    for density in settings.densities:
        short = replace(settings, length=min(SHORT, settings.length))
        problems += [f"density {density:.0%}, short copy: {p}" for p in _check_short(short, density)]
        problems += [f"density {density:.0%}, last rows: {p}" for p in _check_rows(settings, density)]
    return problems


def _check_short(settings: Settings, density: float) -> list[str]:
    pattern, _ = vertical_slash(settings.shape, settings.length, density)
    pattern = pattern.to(settings.device)
    q, k, v, dout = inputs(settings.shape, settings.length, settings.device)
    out = contestants.ours(pattern)(q, k, v)
    found = (out, *torch.autograd.grad(out, (q, k, v), dout))
    truth, plain = (dense_by_rows(q, k, v, dout, pattern, dtype=dtype) for dtype in (torch.float64, torch.bfloat16))
    problems = []
    for name, a, at in zip(("out", "dq", "dk", "dv"), found, (0, 2, 3, 4), strict=True):
        problem = two_rules(a, truth[at], plain[at], gradient=at > 0)
        if problem:
            problems.append(f"{name}: {problem}")
    return problems


def _check_rows(settings: Settings, density: float) -> list[str]:
    """out and dq of the last query block at full length, for the query heads of the last key-value head."""
    shape, length = settings.shape, settings.length
    group = shape.heads // shape.kv_heads
    pattern, _ = vertical_slash(shape, length, density)
    pattern = pattern.to(settings.device)
    q, k, v, dout = inputs(shape, length, settings.device)
    out = contestants.ours(pattern)(q, k, v)
    found = [out.detach()]
    if settings.backward:
        found.append(torch.autograd.grad(out, q, dout)[0])
    rows, heads = slice(length - shape.block, length), slice(shape.heads - group, shape.heads)
    every = torch.arange(pattern.num_blocks)
    view = ShardView(pattern.select(heads), every[-1:], k_blocks=every, inline_columns=True)
    leaf = q.detach()[:, rows, heads].double().requires_grad_()
    truth, _ = reference_attention(leaf, k.detach()[:, :, -1:].double(), v.detach()[:, :, -1:].double(), view.mask())
    wanted = [truth.detach(), torch.autograd.grad(truth, leaf, dout[:, rows, heads].double())[0]]
    problems = []
    for name, a, b in zip(("out", "dq"), found, wanted, strict=False):
        error, limit = float((a[:, rows, heads].double() - b).abs().max()), 2**-6 * float(b.abs().max())
        if not error <= limit:
            problems.append(f"{name}: largest error {error:.3g}, allowed {limit:.3g}")
    return problems


# ---------------------------------------------------------------------------------------------------------------------- timing


def clock(device: torch.device, work: Callable[[], Any]) -> tuple[Callable[[], float], Any]:
    """(milliseconds when asked, result). On CUDA by events, so asking waits and running does not.

    The device starts late, so that launches queue up behind it and their cost on the host is no part of its time, as in a
    training step, where the host is ahead.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        result = work()
        spent = (time.perf_counter() - start) * 1e3
        return lambda: spent, result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    result = work()
    end.record()

    def read() -> float:
        end.synchronize()
        return begin.elapsed_time(end)

    return read, result


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device does at best through torch, medians of some runs: bytes per second of a copy on it (bytes read plus bytes
    written), and FLOP per second of a product of two bf16 matrices, random as real data is."""
    size = LARGE if device.type == "cuda" else 64
    source = torch.randn(8, size, size, dtype=torch.bfloat16, device=device)
    target, (a, b) = torch.empty_like(source), source[:2]

    def rate(work: Callable[[], Any], amount: float) -> float:
        taken = []
        for _ in range(12):
            read, _ = clock(device, work)
            taken.append(read())
        return amount / statistics.median(taken[2:]) * 1e3

    copied = rate(lambda: target.copy_(source), 2 * source.nbytes)
    return {"copy_bytes_per_s": copied, "matmul_flop_per_s": rate(lambda: a @ b, 2 * size**3)}


def one_round(attend: contestants.Attend, tensors: tuple[Tensor, ...], backward: bool) -> tuple[float, float | None]:
    """(forward, backward) in milliseconds."""
    q, k, v, dout = tensors
    forward, out = clock(q.device, lambda: attend(q, k, v))
    if not backward:
        return forward(), None
    gradient, _ = clock(q.device, lambda: torch.autograd.grad(out, (q, k, v), dout))
    return forward(), gradient()


def usable(attend: contestants.Attend, tensors: tuple[Tensor, ...], backward: bool) -> str | None:
    """Run once, which also compiles; None or why it cannot run."""
    try:
        one_round(attend, tensors, backward)
        one_round(attend, tensors, backward)
    except Exception as error:  # kernels of many makes refuse in many ways; Triton's errors are not RuntimeErrors
        return told(error)
    return None


def told(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def measure(settings: Settings) -> list[dict[str, Any]]:
    """One record per contestant and density."""
    shape, length, device = settings.shape, settings.length, settings.device
    tensors = inputs(shape, length, device)
    entries: list[tuple[dict[str, Any], contestants.Attend]] = []
    for name, attend in contestants.dense(device).items():
        entries.append((_record(settings, name, 1.0, causal_cells(shape, length)), attend))
    for density in settings.densities:
        pattern, cells = vertical_slash(shape, length, density)
        pattern = pattern.to(device)
        record = _record(settings, "ours", density, cells)
        record.update(index_cost(pattern, tensors, settings))
        entries.append((record, contestants.ours(pattern)))
        if density < 1 and settings.flex:
            record = _record(settings, "flex_attention", density, cells)
            if device.type == "cpu":
                record["not_run"] = "it has no backward on the CPU"
                entries.append((record, contestants.ours(pattern)))
            else:
                entries.append((record, contestants.flex(pattern)))
    for record, attend in entries:
        reason = record.get("not_run") or usable(attend, tensors, settings.backward)
        if reason:
            record["not_run"] = reason
            if record["name"] == "ours":
                raise RuntimeError(
                    f"our kernels did not run at {length} tokens, density {record['wanted']:.0%}: {reason}"
                )
    take_turns([entry for entry in entries if "not_run" not in entry[0]], tensors, settings)
    if device.type == "cuda":
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return [record for record, _ in entries]


def _record(settings: Settings, name: str, density: float, cells: int) -> dict[str, Any]:
    shape = settings.shape
    dense = causal_cells(shape, settings.length)
    return {
        "shape": str(shape), "length": settings.length, "name": name, "wanted": density, "density": cells / dense,
        "forward_flop": 4 * shape.head_dim * cells, "backward_flop": 10 * shape.head_dim * cells,
    }  # fmt: skip


def take_turns(
    entries: list[tuple[dict[str, Any], contestants.Attend]], tensors: tuple[Tensor, ...], settings: Settings
) -> None:
    """Round by round everybody once; medians are written into the records."""
    times: list[list[tuple[float, float | None]]] = [[] for _ in entries]
    begin = time.perf_counter()
    least, most = ROUNDS if settings.seconds else (1, 1)
    for number in range(most):
        if number >= least and time.perf_counter() - begin > settings.seconds:
            break
        for taken, (_, attend) in zip(times, entries, strict=True):
            taken.append(one_round(attend, tensors, settings.backward))
    for taken, (record, _) in zip(times, entries, strict=True):
        record["rounds"] = len(taken)
        record["forward_ms"] = statistics.median(forward for forward, _ in taken)
        gradients = [gradient for _, gradient in taken if gradient is not None]
        record["backward_ms"] = statistics.median(gradients) if gradients else None


def index_cost(pattern: SparsePattern, tensors: tuple[Tensor, ...], settings: Settings) -> dict[str, Any]:
    """Milliseconds of estimation and of the index, bytes of the index, and whether a step waits for the device."""
    from mtrain.patterns import TopK, estimate_vertical_slash
    from sparse_kernels.gpu.index import DeviceIndex

    q, k, v, dout = tensors
    every = torch.arange(pattern.num_blocks)
    assert pattern.columns is not None and pattern.diagonals is not None
    budget = TopK(
        min(pattern.columns.shape[2], settings.length // 2), min(pattern.diagonals.shape[2], pattern.num_blocks)
    )

    def estimate() -> SparsePattern:
        with torch.no_grad():
            return estimate_vertical_slash(q, k, budget=budget, block=pattern.block, sink=SINK, local=pattern.block)

    def build() -> list[Any]:
        view = ShardView(pattern, every, k_blocks=every, inline_columns=True)
        index = DeviceIndex(view, q.device)
        columns = index.columns if index.has_columns else None
        return [index, columns, index.tiles(by_key=False), index.tiles(by_key=True)]

    spent = {}
    for name, work in (("estimate_ms", estimate), ("index_ms", build)):
        taken = []
        for _ in range(5 if settings.seconds else 1):
            read, result = clock(q.device, work)
            taken.append(read())
        spent[name] = statistics.median(taken[1:] or taken)
    size = bytes_of([pattern, result], set(), q.device)
    whole = 2 * k.numel() * k.element_size()
    return {
        **spent,
        "index_bytes": size,
        "index_share": size / whole,
        "host_syncs": host_syncs(estimate, tensors, settings),
    }


def bytes_of(thing: Any, seen: set[int], device: torch.device) -> int:
    """Bytes of the tensors on the device reachable from an object's attributes, each storage once."""
    if isinstance(thing, Tensor):
        key = thing.untyped_storage().data_ptr()
        if thing.device != device or key in seen:
            return 0
        seen.add(key)
        return thing.untyped_storage().nbytes()
    if isinstance(thing, (list, tuple)):
        return sum(bytes_of(x, seen, device) for x in thing)
    if hasattr(thing, "__dict__") and id(thing) not in seen:
        seen.add(id(thing))
        return sum(bytes_of(x, seen, device) for x in vars(thing).values())
    return 0


def host_syncs(estimate: Callable[[], SparsePattern], tensors: tuple[Tensor, ...], settings: Settings) -> str:
    """ "none" when estimation, index, forward and backward run with waiting forbidden, else the first complaint."""
    if settings.device.type == "cpu":
        return "not on CUDA"
    q, k, v, dout = tensors

    def step() -> None:
        out = contestants.ours(estimate())(q, k, v)
        if settings.backward:
            torch.autograd.grad(out, (q, k, v), dout)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return told(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"
