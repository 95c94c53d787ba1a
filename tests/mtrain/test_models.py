"""Attached models are the same functions as their plain twins, on any number of ranks."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from mtrain.attention import ring_attention
from mtrain.comm import ProcessRing, Ring, SingleRing, run_ranks
from mtrain.errors import ModelError
from mtrain.layout import RingLayout
from mtrain.models.attach import attach, detach
from mtrain.models.loss import install_loss_head, scaled_loss
from mtrain.models.statistics import mask_density
from mtrain.patterns import PatternPlan
from mtrain.patterns.index import index_lists
from mtrain.recipe.schema import AttentionRecipe, RefreshEvery
from mtrain.topology import RingTopology
from mtrain.trainer import enable_activation_checkpointing
from sparse_kernels import SparsePattern
from tests.mtrain.small_models import (
    BLOCK,
    DENSE,
    FAMILIES,
    SEQ,
    SPARSE,
    VOCAB,
    config_of,
    documents,
    model_of,
    tokens,
)


def shifted(ids: Tensor) -> Tensor:
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    labels[0, 10:30] = -100
    return labels


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def checkpointed(model: Any) -> Any:
    enable_activation_checkpointing(model)
    return model


def on_ranks(model: Any, recipe: AttentionRecipe, kind: str, outer: int, inner: int, doc: Tensor | None) -> Any:
    """Loss sum and gradients summed over ranks, and the statistics of rank 0."""
    ids = tokens()
    ranks = outer * inner
    owners = torch.randperm(ranks * -(-SEQ // (BLOCK * ranks)), generator=torch.Generator().manual_seed(2)) % ranks
    layout = RingLayout.build(kind, SEQ, ranks, BLOCK, assignment=owners if kind == "balanced" else None)

    def rank(ring: Ring) -> Any:
        mine = install_loss_head(attach(copy.deepcopy(model), recipe, ring, layout), chunk=16)
        labels = layout.shard(shifted(ids) + 100, ring.rank, 1) - 100  # padding becomes -100
        starts = None if doc is None else layout.shard(doc, ring.rank, 1)
        loss = mine(input_ids=layout.shard(ids, ring.rank, 1), shift_labels=labels, doc_start=starts).loss
        loss.backward()
        return loss.detach(), gradients(mine), mine.mtrain_context.statistics()

    results = run_ranks(rank, outer, inner)
    summed = {name: sum(result[1][name] for result in results) for name in results[0][1]}
    return sum(result[0] for result in results), summed, results[0][2]


def assert_same(got: tuple[Any, ...], want: tuple[Any, ...], tolerance: float) -> None:
    assert abs(float((got[0] - want[0]).detach())) <= tolerance * abs(float(want[0].detach()))
    for name, gradient in want[1].items():
        error = (got[1][name] - gradient).abs().max() / gradient.abs().max().clamp(min=1e-3)
        assert error <= tolerance, f"{name}: relative error {float(error):.2e}"


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_dense_is_the_plain_model(family: str) -> None:
    plain = model_of(family)
    mine = attach(copy.deepcopy(plain), DENSE, SingleRing(), RingLayout.build("striped", SEQ, 1, BLOCK))
    ids = tokens()
    got, want = mine(input_ids=ids, labels=ids), plain(input_ids=ids, labels=ids)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-5, atol=2e-5)
    got.loss.backward()
    want.loss.backward()
    assert_same((got.loss, gradients(mine)), (want.loss, gradients(plain)), 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_ring_equals_the_plain_model(family: str) -> None:
    """Two and three ranks, dense: loss and every gradient of the plain model of transformers, in float32."""
    plain = install_loss_head(model_of(family))
    ids = tokens()
    loss = plain(input_ids=ids, shift_labels=shifted(ids)).loss
    loss.backward()
    for kind, ranks in (("zigzag", 2), ("striped", 3)):
        got = on_ranks(model_of(family), DENSE, kind, 1, ranks, None)
        assert_same(got, (loss, gradients(plain)), 1e-5)


@pytest.mark.parametrize(
    ("kind", "outer", "inner", "schedule"),
    [("contiguous", 1, 2, "ring"), ("striped", 1, 3, "ring"), ("balanced", 2, 2, "ring"), ("zigzag", 1, 2, "gather")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_sparse_ring_equals_one_rank_in_float64(kind: str, outer: int, inner: int, schedule: Any, packed: bool) -> None:
    recipe = dataclasses.replace(SPARSE, schedule=schedule, dense_first_layers=1)
    doc = documents() if packed else None
    model = model_of("qwen2", torch.float64)
    want = on_ranks(model, recipe, "contiguous", 1, 1, doc)
    got = on_ranks(model, recipe, kind, outer, inner, doc)
    assert_same(got, want, 1e-10)
    assert got[2]["density_per_layer"] == want[2]["density_per_layer"]
    assert got[2]["density_per_layer"][0] == 1.0 and got[2]["density_per_layer"][1] < 0.9


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_activation_checkpointing_changes_nothing(family: str) -> None:
    want = on_ranks(model_of(family), SPARSE, "striped", 1, 2, documents())
    got = on_ranks(checkpointed(model_of(family)), SPARSE, "striped", 1, 2, documents())
    assert_same(got, want, 1e-6)


def test_documents_are_separate() -> None:
    """Changing the first document leaves the logits of the second one bit for bit as they were."""
    model = attach(model_of("llama"), DENSE, SingleRing(), RingLayout.build("striped", SEQ, 1, BLOCK)).eval()
    ids, doc = tokens(), documents()
    other = ids.clone()
    other[:, :20] = 3
    before, after = (model(input_ids=x, doc_start=doc).logits for x in (ids, other))
    assert torch.equal(before[0, 21:], after[0, 21:])
    assert not torch.equal(before[1, 21:], after[1, 21:])


def test_index_is_made_once_per_micro_batch_and_recompute_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two micro-batches in flight, then one backward: each recompute uses the index of its own forward."""
    calls: list[int] = []
    original = PatternPlan.index

    def counted(self: PatternPlan, layer: int, *args: Any, **kwargs: Any) -> Any:
        calls.append(layer)
        return original(self, layer, *args, **kwargs)

    monkeypatch.setattr(PatternPlan, "index", counted)
    layout = RingLayout.build("striped", SEQ, 1, BLOCK)
    first, second, doc = tokens(), tokens().flip(0), documents()
    results = []
    for prepare in (lambda model: model, checkpointed):
        model = attach(prepare(model_of("qwen2")), SPARSE, SingleRing(), layout)
        calls.clear()
        one = model(input_ids=first, labels=first, doc_start=doc).loss
        two = model(input_ids=second, labels=second).loss
        (one + two).backward()
        assert calls == [0, 1, 0, 1]
        results.append((one + two, gradients(model)))
    assert_same(results[1], results[0], 1e-6)


def test_layout_may_change_between_forward_and_backward() -> None:
    """The balancer replaces context.layout for the next step; a recompute of this one must not notice."""
    layout = RingLayout.build("striped", SEQ, 2, BLOCK)
    other = RingLayout.build("contiguous", SEQ, 2, BLOCK)
    ids, base = tokens(), checkpointed(model_of("llama"))

    def rank(ring: Ring, swap: bool) -> dict[str, Tensor]:
        model = install_loss_head(attach(copy.deepcopy(base), SPARSE, ring, layout))
        labels = layout.shard(shifted(ids) + 100, ring.rank, 1) - 100
        loss = model(input_ids=layout.shard(ids, ring.rank, 1), shift_labels=labels).loss
        if swap:
            model.mtrain_context.layout = other
            model.mtrain_context.begin(step=1)
        loss.backward()
        return gradients(model)

    for got, want in zip(
        run_ranks(lambda r: rank(r, True), 1, 2), run_ranks(lambda r: rank(r, False), 1, 2), strict=True
    ):
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_begin_by_hand() -> None:
    layout = RingLayout.build("striped", SEQ, 1, BLOCK)
    ids, doc = tokens(), documents()
    model = attach(model_of("llama"), SPARSE, SingleRing(), layout)
    by_keyword = model(input_ids=ids, doc_start=doc).logits
    context: Any = model.mtrain_context
    context.begin(doc, step=7)
    assert torch.equal(model(input_ids=ids).logits, by_keyword)
    assert context.latest.step == 7
    with pytest.raises(ModelError, match="new begin"):
        model(input_ids=ids)
    context.begin(doc)
    with pytest.raises(ModelError, match="given twice"):
        model(input_ids=ids, doc_start=doc)


def test_steps_are_counted_for_plain_loops() -> None:
    recipe = dataclasses.replace(SPARSE, refresh=RefreshEvery(2), dense_warmup_steps=1)
    model = attach(model_of("llama"), recipe, SingleRing(), RingLayout.build("striped", SEQ, 1, BLOCK))
    context: Any = model.mtrain_context
    densities = []
    for seed in range(3):
        ids = torch.randint(3, VOCAB, (1, SEQ), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids)
        densities.append(context.statistics()["density"])
        model.eval()(input_ids=ids)  # an evaluation is no step
        model.train()
    assert context.step == 2
    assert densities[0] == 1.0 and densities[1] < 1.0 and densities[2] == densities[1]


def test_statistics() -> None:
    model = model_of("qwen2", torch.float64)
    layouts = [RingLayout.build("striped", SEQ, ranks, BLOCK) for ranks in (1, 2)]
    ids, doc = tokens(), documents()

    def rank(ring: Ring) -> Any:
        layout = layouts[ring.world_size - 1]
        mine = attach(copy.deepcopy(model), SPARSE, ring, layout)
        mine.mtrain_context.measure_recall = True
        starts = layout.shard(doc, ring.rank, 1)
        mine(input_ids=layout.shard(ids, ring.rank, 1), doc_start=starts)
        return mine.mtrain_context.statistics(), mine.mtrain_context.latest.index

    alone, index = run_ranks(rank)[0]
    both = [result[0] for result in run_ranks(rank, 1, 2)]
    pairs = (torch.arange(SEQ) - doc + 1).sum(1)
    expected = [float((index[layer].to_dense(doc).sum((2, 3)) / pairs[:, None]).mean()) for layer in (0, 1)]
    assert alone["density_per_layer"] == pytest.approx(expected, rel=1e-6)
    assert alone["density"] < alone["tile_density"]
    assert alone["worker_imbalance"] == alone["step_imbalance"] == 1.0
    assert 0.5 < alone["recall"] <= 1.0
    for result in both:
        assert result["density_per_layer"] == alone["density_per_layer"]
        assert result["recall_per_layer"] == pytest.approx(alone["recall_per_layer"], rel=1e-9)
        assert result["work"].shape == (2, 3) and result["work"].sum() == alone["work"].sum()
        assert result["step_imbalance"] >= result["worker_imbalance"] >= 1.0


@pytest.mark.parametrize("recipe", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_other_lengths_alone(recipe: AttentionRecipe) -> None:
    """A ring of one takes any length; the numbers do not depend on the layout it was attached with."""
    model = model_of("qwen2").eval()
    for length in (1, BLOCK, 19, SEQ, 101):
        ids = tokens(length=length)
        logits = []
        for made_for in (SEQ, length):
            attach(model, recipe, SingleRing(), RingLayout.build("striped", made_for, 1, BLOCK))
            logits.append(model(input_ids=ids).logits)
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family: str) -> None:
    plain = model_of(family).eval()
    mine = attach(copy.deepcopy(plain), DENSE, SingleRing(), RingLayout.build("striped", SEQ, 1, BLOCK))
    ids, mask = tokens(length=21), torch.ones(2, 21, dtype=torch.int64)
    mask[0, :6] = 0
    options = {"max_new_tokens": 6, "do_sample": False}
    for extra in ({}, {"attention_mask": mask}, {"attention_mask": mask, "cache_implementation": "static"}):
        assert torch.equal(mine.generate(ids, **options, **extra), plain.generate(ids, **options, **extra))


def test_padding_masks_alone() -> None:
    plain = model_of("llama").eval()
    mine = attach(copy.deepcopy(plain), DENSE, SingleRing(), RingLayout.build("striped", SEQ, 1, BLOCK))
    ids, keep = tokens(), torch.ones(2, SEQ, dtype=torch.int64)
    keep[0, :13], keep[1, 60:] = 0, 0
    got, want = (model(input_ids=ids, attention_mask=keep).logits for model in (mine, plain))
    torch.testing.assert_close(got[0, 13:], want[0, 13:], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got[1, :60], want[1, :60], rtol=1e-5, atol=2e-5)
    keep[0, 30] = 0
    with pytest.raises(ModelError, match="holes"):
        mine(input_ids=ids, attention_mask=keep)
    with pytest.raises(ModelError, match="not modelled"):
        mine(input_ids=ids, attention_mask=torch.ones(2, 1, SEQ, SEQ, dtype=torch.bool))


def test_bfloat16_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """q and k leave RoPE in float32 while v is bfloat16: all three arrive as bfloat16, and results stay near float32."""
    seen: list[torch.dtype] = []

    def watched(*qkv: Any, **kwargs: Any) -> Any:
        seen.extend(x.dtype for x in qkv[:3])
        assert not torch.is_autocast_enabled("cpu")
        return ring_attention(*qkv, **kwargs)

    monkeypatch.setattr("mtrain.models.context.ring_attention", watched)
    layout, ids = RingLayout.build("striped", SEQ, 1, BLOCK), tokens()
    want, got = (attach(model_of("qwen2"), SPARSE, SingleRing(), layout) for _ in range(2))
    loss = want(input_ids=ids, labels=ids).loss
    loss.backward()
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        low = checkpointed(got)(input_ids=ids, labels=ids).loss
    low.backward()
    assert seen == [torch.bfloat16] * 12  # two layers, forward and recompute
    assert abs(low - loss) < 0.03 * loss
    flat = [torch.cat([g.flatten() for g in gradients(model).values()]) for model in (got, want)]
    assert F.cosine_similarity(flat[0], flat[1], 0) > 0.98


def test_distributed_data_parallel_wraps_an_attached_model(tmp_path: Any) -> None:
    ids, layout = tokens(), RingLayout.build("striped", SEQ, 1, BLOCK)
    plain = install_loss_head(attach(model_of("qwen2"), SPARSE, SingleRing(), layout))
    mine = install_loss_head(attach(model_of("qwen2"), SPARSE, SingleRing(), layout))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(mine)
        losses = [m(input_ids=ids, shift_labels=shifted(ids), doc_start=documents()).loss for m in (wrapped, plain)]
        sum(losses).backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same((losses[0], gradients(mine)), (losses[1], gradients(plain)), 0)


def _fully_sharded(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=2)
    ring = ProcessRing.create(RingTopology(1, 2))
    layout = RingLayout.build("striped", SEQ, 2, BLOCK)
    model: Any = install_loss_head(attach(checkpointed(model_of("qwen2")), SPARSE, ring, layout), chunk=16)
    for unit in (*model.model.layers, [model.model.norm, model.lm_head], model):
        fully_shard(unit)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # asked for means, Gloo's reduce_scatter gives sums in torch 2.8
            module.set_force_sum_reduction_for_comms(True)
    labels = layout.shard(shifted(tokens()) + 100, process, 1) - 100
    model.mtrain_context.begin(layout.shard(documents(), process, 1), step=0)
    loss = model(input_ids=layout.shard(tokens(), process, 1), shift_labels=labels).loss
    scaled_loss(loss, 1, num_averaged_ranks=2).backward()
    total = ring.all_reduce(loss.detach())
    whole = {name: gradient.full_tensor() for name, gradient in gradients(model).items()}
    if process == 0:
        torch.save((total, whole), f"{folder}/result")
    torch.distributed.destroy_process_group()


def test_fully_sharded_data_parallel_over_two_processes(tmp_path: Any) -> None:
    """FSDP2 with activation checkpointing on a real ring: the gradients of one rank, the head in a unit of its own."""
    mp.start_processes(_fully_sharded, args=(str(tmp_path),), nprocs=2, start_method="fork")
    want = on_ranks(model_of("qwen2"), SPARSE, "contiguous", 1, 1, documents())
    assert_same(torch.load(tmp_path / "result"), want, 1e-5)


def test_models_of_one_config_object_stay_apart() -> None:
    config = config_of("qwen2")
    first, second = (AutoModelForCausalLM.from_config(config, attn_implementation="sdpa") for _ in range(2))
    attach(first, DENSE, SingleRing(), RingLayout.build("striped", SEQ, 1, BLOCK))
    assert (first.config._attn_implementation, second.config._attn_implementation) == ("mtrain", "sdpa")
    second(input_ids=tokens())


def test_attach_again_copy_detach_save(tmp_path: Any) -> None:
    plain = model_of("qwen3")
    ids, layout = tokens(), RingLayout.build("striped", SEQ, 1, BLOCK)
    names = list(plain.state_dict())
    mine = attach(attach(copy.deepcopy(plain), SPARSE, SingleRing(), layout), DENSE, SingleRing(), layout)
    assert len(mine.model._forward_pre_hooks) == 1 and list(mine.state_dict()) == names
    twin = copy.deepcopy(mine)
    assert twin.mtrain_context is twin.model.mtrain_context is not mine.mtrain_context
    assert torch.equal(twin(input_ids=ids).logits, mine(input_ids=ids).logits)
    detach(twin)
    assert not twin.model._forward_pre_hooks and mine.model._forward_pre_hooks
    assert torch.equal(detach(twin)(input_ids=ids).logits, plain(input_ids=ids).logits)
    mine.save_pretrained(tmp_path)
    assert "mtrain" not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_whole_sequences_need_no_mask_and_no_cache() -> None:
    """No tensor of N x N elements, no copy of keys and values, whatever the order of the positions."""
    length = 640
    layout = RingLayout.build("zigzag", length, 2, BLOCK)
    ids, base = tokens(1, length), model_of("llama", max_position_embeddings=1024)
    recipe = AttentionRecipe(pattern="a_shape", block=BLOCK, sink=1, local=8, backend="cpu")

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.largest = max(self.largest, result.numel())
            return result

    def rank(ring: Ring) -> int:
        model = attach(copy.deepcopy(base), recipe, ring, layout)
        with Watch() as watch:
            out = model(input_ids=layout.shard(ids, ring.rank, 1), logits_to_keep=1)
        assert out.past_key_values is None
        return watch.largest

    assert max(run_ranks(rank, 1, 2)) < layout.local_len**2


@pytest.mark.parametrize("seed", range(20))
def test_mask_density_is_exact(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    size, block = int(torch.randint(1, 200, (1,), generator=gen)), int(torch.randint(1, 17, (1,), generator=gen))
    blocks = -(-size // block)
    columns = torch.rand(2, 3, size, generator=gen) < 0.1
    offsets = torch.rand(2, 3, blocks, generator=gen) < 0.3
    offsets[..., 0] = True
    pattern = SparsePattern(
        size,
        block,
        columns=index_lists(columns, size, fill=size),
        diagonals=index_lists(offsets, blocks, fill=-1),
    )
    begins = torch.rand(2, size, generator=gen) < 0.05
    starts = torch.where(begins, torch.arange(size), 0).cummax(1).values
    for doc in (None, starts):
        assert mask_density(pattern, doc) == pytest.approx(float(pattern.density(doc).double().mean()), rel=1e-6)
