"""Processes: who they are, how they form dp x outer x inner, and what they must agree on.

The only file that reads the environment (what torchrun and `accelerate launch` set), and with comm.py the only place where
training talks through torch.distributed. Rank = (dp_rank * outer + outer_index) * inner + inner_index, so a ring is a run of
neighbouring ranks and its inner part stays inside a node.

Two gradient engines (parallel.engine): "ddp", every rank holds the whole model state (DistributedDataParallel through
Accelerate); "fsdp", every rank holds 1/world_size of it (torch's `fully_shard`, FSDP2: https://arxiv.org/abs/2304.11277,
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html). Nobody else knows which: `World.prepare` hands the model
over, `backward`, `no_sync` and `grad_norm` drive it, `gather_tensors` and `as_held` go from shards to whole tensors and back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mtrain.comm import ProcessRing, Ring, SingleRing, is_lost_peer
from mtrain.errors import LaunchError, MtrainError
from mtrain.recipe import ParallelRecipe, Recipe
from mtrain.topology import RingTopology

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# What `accelerate launch` sets for the other distributed types.
_FOREIGN_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}


def launched_world_size() -> int:
    """How many processes the launcher says there are (1 without a launcher)."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether the launcher has given this process rank 0 (True without a launcher)."""
    return os.environ.get("RANK", "0") == "0"


def check_world_size(parallel: ParallelRecipe, world_size: int) -> None:
    """Refuse a launch whose processes do not make dp x outer x inner.

    Raises:
        LaunchError: names both sizes and the nearest recipe values and launch commands that fit.
    """
    dp, outer, inner = parallel.dp, parallel.outer, parallel.inner
    wanted = dp * outer * inner
    if world_size == wanted:
        return
    ring = outer * inner
    fits = [f"launch {wanted} (accelerate launch --num_processes {wanted})"]
    if world_size % ring == 0:
        fits.append(f"set parallel.dp={world_size // ring}")
    elif world_size % (dp * outer) == 0:
        fits.append(f"set parallel.inner={world_size // (dp * outer)}")
    else:
        fits.append(f"set parallel.dp=1 parallel.outer=1 parallel.inner={world_size}")
    hint = ""
    if world_size == 1:
        hint = (
            "; `accelerate launch --cpu` and MULTI_CPU files start one process only: on a CPU use a file like "
            "recipes/accelerate/cpu_2.yaml"
        )
    raise LaunchError(
        f"the recipe asks for dp {dp} x outer {outer} x inner {inner} = {wanted} processes, but {world_size} "
        f"{'is' if world_size == 1 else 'are'} running: {', or '.join(fits)}{hint}"
    )


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Start (or join) the process group and return the Accelerator on it.

    Without CUDA everything runs on the CPU over Gloo; with CUDA over NCCL, and host-side agreement still goes over Gloo.
    Mixed precision stays with the trainer (torch.autocast): the recipe decides it, not the launch file.

    Raises:
        LaunchError: the launch file asks for an engine of its own, the number of processes does not fit the recipe, or Accelerate
            did not see all of them.
    """
    _refuse_foreign_engines()
    world_size = launched_world_size()
    check_world_size(recipe.parallel, world_size)
    timeout = timedelta(seconds=recipe.parallel.timeout_s)
    _init_process_group(world_size, timeout)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    if accelerator.num_processes != world_size:
        raise LaunchError(
            f"the launcher started {world_size} processes but Accelerate sees {accelerator.num_processes}: without a GPU use "
            "`distributed_type: MULTI_GPU` in the launch file as recipes/accelerate/cpu_2.yaml does"
        )
    return accelerator


def _refuse_foreign_engines() -> None:
    """A launch file's engine would be started beside ours, or ignored without a word."""
    for variable, name in _FOREIGN_ENGINES.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise LaunchError(
                f"the launch file asks Accelerate for {name}, but who holds which part of the model is the recipe's to say: put "
                "distributed_type: MULTI_GPU into the launch file, as recipes/accelerate/gpu_8.yaml does, and parallel.engine=fsdp "
                "(sharded, FSDP2) or ddp into the recipe; DeepSpeed is not supported"
            )


def _init_process_group(world_size: int, timeout: timedelta) -> None:
    """Our own start, for two reasons: keys of a restarted attempt must not meet those of the dead one (with --max-restarts
    Gloo otherwise connects to ports that are gone), and CPU tensors need Gloo beside NCCL."""
    if world_size == 1 or dist.is_initialized():
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
        store.set_timeout(timeout)
        store = dist.PrefixStore(f"attempt_{attempt}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"could not start {world_size} processes within parallel.timeout_s={timeout.total_seconds():g}: "
            f"{_first_line(error)}"
        ) from error


def join_processes(timeout: timedelta) -> tuple[int, int, torch.device]:
    """For commands without a recipe: start (or join) the launched process group; (rank, world_size, device)."""
    size = launched_world_size()
    _init_process_group(size, timeout)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return (dist.get_rank() if size > 1 else 0), size, device


def leave_processes() -> None:
    """Leave the process group, if there is one (a clean end; after an error the process just exits)."""
    if dist.is_initialized():
        dist.destroy_process_group()


@dataclass(frozen=True)
class World:
    """All processes of a run and this one's place among them.

    Attributes:
        accelerator: Accelerate's handle: device, model wrapping, launcher's view.
        dp: data-parallel replicas of the ring.
        dp_rank: which replica this process belongs to.
        ring: the sequence-parallel ring this process computes attention on.
        engine: "ddp" or "fsdp" (parallel.engine).
    """

    accelerator: Accelerator
    dp: int
    dp_rank: int
    ring: Ring
    engine: str = "ddp"

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return int(self.accelerator.process_index)

    @property
    def world_size(self) -> int:
        """Processes over all rings."""
        return int(self.accelerator.num_processes)

    @property
    def is_main(self) -> bool:
        """True in the one process that prints, logs and renames."""
        return bool(self.accelerator.is_main_process)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def grad_divisor(self) -> int:
        """Ranks the gradient engine averages over: a loss s / N must be multiplied by it (design: the loss rule)."""
        return self.world_size

    @property
    def sharded(self) -> bool:
        """Whether a rank holds only its part of the model state (one process alone has nobody to share it with)."""
        return self.engine == "fsdp" and self.world_size > 1

    def prepare(self, model: nn.Module, precision: str = "fp32") -> nn.Module:
        """Place the model on the device and hand it to the gradient engine.

        Args:
            model: with the same values on every rank; attention and loss head are in place. For "fsdp" a transformers causal
                language model, whose parameters become shards in place: make the optimizer afterwards.
            precision: "fp32" or "bf16" (train.precision): in which dtype "fsdp" gathers weights.

        Returns:
            What to call; the model itself is what to look into.
        """
        with self.waiting_for("all ranks to register the model with the gradient engine"):
            if self.sharded:
                _shard(model, self.device, precision)
                return model
            prepared: nn.Module = self.accelerator.prepare_model(model)
            return prepared

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Inside it, backward need not reduce gradients (every micro-batch but the last); "fsdp" does all the same: whole
        float32 gradients kept from one micro-batch to the next are what a rank has no room for."""
        if self.sharded:
            return contextlib.nullcontext()
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def backward(self, loss: Tensor) -> None:
        """Backpropagate through the gradient engine."""
        self.accelerator.backward(loss)

    def grad_norm(self, model: nn.Module) -> Tensor:
        """Global norm of the (already averaged) gradients, the same on every rank."""
        norm = torch.nn.utils.get_total_norm([_own(p.grad) for p in model.parameters() if p.grad is not None])
        if self.sharded:  # squared in double: a norm that float32 holds must not overflow on the way
            norm = self.all_reduce(norm.double().square(), what="the gradient norm").sqrt().to(norm.dtype)
        return norm

    def bad_gradients(self, model: nn.Module) -> list[str]:
        """Names of the parameters whose gradient is not finite on some rank."""
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        mine = [name for name, grad in grads.items() if not bool(_own(grad).isfinite().all())]
        found = {name for names in self.gather_json(mine, what="the names of bad gradients") for name in names}
        return [name for name in grads if name in found]

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors on the main process, nothing elsewhere; every rank calls it with the same names.

        Shards are put together one tensor at a time and kept in the main process's host memory.
        """
        whole = {}
        with self.waiting_for("the shards of all ranks"):
            for name, tensor in tensors.items():
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.is_main:
                    whole[name] = full if full is tensor else full.cpu()
        return whole

    def as_held(self, value: Tensor, like: Tensor) -> Tensor:
        """A whole ``value`` as ``like`` is held: on its device, and if that is sharded only this rank's part, without the rest."""
        if not isinstance(like, DTensor) or value.shape != like.shape:  # a count of steps has no shards
            return value.to(like.device)
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    def all_reduce(self, x: Tensor, op: str = "sum", *, what: str = "an all-reduce") -> Tensor:
        """A new tensor: ``x`` combined over all ranks by "sum", "max" or "min"."""
        total = x.detach().clone()
        if self.world_size > 1:
            with self.waiting_for(what):
                dist.all_reduce(total, _REDUCE[op])
        return total

    def all_gather(self, x: Tensor, *, what: str = "an all-gather") -> Tensor:
        """[world_size, *x.shape]: every rank's ``x`` (same shape and dtype everywhere), in rank order."""
        if self.world_size == 1:
            return x.detach().clone()[None]
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        with self.waiting_for(what):
            dist.all_gather(parts, x.detach().contiguous())
        return torch.stack(parts)

    def gather_json(self, value: Any, *, what: str = "a message from every rank") -> list[Any]:
        """Every rank's JSON value, in rank order. JSON and not pickle, over host memory (Gloo)."""
        if self.world_size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [int(n) for n in self.all_gather(torch.tensor([data.numel()]), what=what)]
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: data.numel()] = data
        parts = self.all_gather(padded, what=what)
        return [json.loads(bytes(part[:n].tolist()).decode()) for part, n in zip(parts, sizes, strict=True)]

    def barrier(self, what: str) -> None:
        """Wait until every rank is here; ``what`` names the wait when it fails."""
        self.gather_json(None, what=what)

    def together(self, what: str, action: Callable[[], Any], *, error: type[MtrainError] = MtrainError) -> list[Any]:
        """Run an action that touches the disk on every rank, then learn how all of them fared.

        Args:
            what: names the wait.
            action: returns a JSON value.
            error: what to raise.

        Returns:
            The results in rank order.

        Raises:
            error: on all ranks alike, when any rank met an MtrainError or the operating system said no.
        """
        result, problem = None, None
        try:
            result = action()
        except MtrainError as failure:
            problem = str(failure)
        except (OSError, SafetensorError) as failure:
            problem = f"{type(failure).__name__}: {failure}"
        answers = self.gather_json([result, problem], what=what)
        problems = [
            text if self.world_size == 1 else f"rank {rank}: {text}" for rank, (_, text) in enumerate(answers) if text
        ]
        if problems:
            raise error("; ".join(problems))
        return [result for result, _ in answers]

    def require_same(self, name: str, value: str | bytes) -> None:
        """Refuse to go on when ranks disagree on ``value`` (a recipe, a version, an input).

        Raises:
            LaunchError: names the ranks that differ from rank 0.
        """
        fingerprints = self.gather_json(fingerprint(value), what=f"all ranks to compare their {name}")
        odd = [rank for rank, other in enumerate(fingerprints) if other != fingerprints[0]]
        if odd:
            raise LaunchError(
                f"{name} differs between processes: rank(s) {odd} do not agree with rank 0; start every process with the same "
                "recipe, overrides and code"
            )

    def require_same_in_ring(self, name: str, value: str | bytes) -> None:
        """Refuse to go on when the ranks of one ring disagree on ``value``, for example on the sample they are to share.

        Raises:
            LaunchError: names the ring and the ranks that differ from its first one.
        """
        fingerprints = self.gather_json(fingerprint(value), what=f"all ranks to compare their {name}")
        size = self.ring.world_size
        for ring in range(self.dp):
            members = fingerprints[ring * size : (ring + 1) * size]
            odd = [ring * size + i for i, other in enumerate(members) if other != members[0]]
            if odd:
                raise LaunchError(
                    f"{name} differs inside ring {ring}: rank(s) {odd} do not hold what rank {ring * size} holds; every rank of "
                    "a ring must be fed the same samples (a streaming loader that deals batches out to processes breaks this)"
                )

    @contextlib.contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        """Turn the transport's error inside the block into one that says who was waiting for what.

        Raises:
            LaunchError: a peer died or did not answer within parallel.timeout_s. Other errors pass unchanged.
        """
        try:
            yield
        except RuntimeError as error:
            if not is_lost_peer(error):
                raise
            raise LaunchError(
                f"rank {self.rank} lost a peer while waiting for {what}: {_first_line(error)}; look for the first error among "
                "the other ranks, then start again (the newest complete checkpoint is resumed)"
            ) from error

    def close(self) -> None:
        """Leave the process group (a clean end; after an error the process just exits)."""
        leave_processes()


def make_world(recipe: Recipe) -> World:
    """Start the processes of a recipe and check that they agree on it.

    Raises:
        LaunchError: wrong number of processes, a peer that does not come, or ranks with different recipes or versions.
    """
    accelerator = make_accelerator(recipe)
    parallel = recipe.parallel
    topology = RingTopology(parallel.outer, parallel.inner)
    size = topology.world_size
    dp_rank = accelerator.process_index // size
    ring: Ring
    if size == 1:
        ring = SingleRing()
    else:
        ring = ProcessRing.create(topology, timedelta(seconds=parallel.timeout_s))
    world = World(accelerator, parallel.dp, dp_rank, ring, parallel.engine)
    world.require_same("the torch version", torch.__version__)
    world.require_same("the recipe", json.dumps(recipe.to_dict(), sort_keys=True))
    return world


def _shard(model: Any, device: torch.device, precision: str) -> None:
    """FSDP2 over all processes, on one flat mesh: every parameter is split along its first dimension, gathered when its unit runs
    and freed after, forward and backward. A unit is a decoder layer, the input embedding, or final norm and head; tied embeddings
    stay with the root, whose forward spans both uses. Units go to the device one by one, so it never holds the whole model.

    With "bf16" weights are rounded before they are gathered, not after: half the bytes, and the operands that autocast would make.
    The input embedding (tied ones too) stays as it is, for a residual stream in float32 as under DDP, so only the gains of norms
    are rounded where DDP would not. Gradients are reduced in float32.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))

    def unit(modules: Any, gathered: torch.dtype | None = None) -> None:
        # Inputs are left to autocast: RoPE's cosines would not survive 512K positions in bfloat16.
        policy = MixedPrecisionPolicy(gathered, reduce_dtype=torch.float32, cast_forward_inputs=False)
        # Freed after forward also where that is not the default, the root: a forward without a backward leaves nothing whole.
        fully_shard(modules, mesh=mesh, mp_policy=policy, reshard_after_forward=True)

    rounded = torch.bfloat16 if precision == "bf16" else None
    decoder, embedding, head = model.base_model, model.get_input_embeddings(), model.get_output_embeddings()
    for layer in decoder.layers:
        unit(layer, rounded)
    if head.weight is not embedding.weight:
        unit(embedding)
        unit([decoder.norm, head], rounded)
    unit(model)
    if device.type == "cpu":  # Gloo of torch 2.8 sums where it is asked for the mean
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)


def _own(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fingerprint(value: str | bytes) -> str:
    """SHA-256 of a text or of bytes, in hex."""
    return hashlib.sha256(value.encode() if isinstance(value, str) else value).hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
