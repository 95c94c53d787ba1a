"""The fused loss is cross entropy; the loss rule is the mean over all valid tokens, whatever rank holds them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from mtrain.errors import ModelError
from mtrain.models.loss import LossHead, fused_cross_entropy, install_loss_head, scaled_loss


def _case(rows: int, vocab: int, dtype: torch.dtype, ignored: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, 19, generator=gen, dtype=torch.float64)
    weight = torch.randn(vocab, 19, generator=gen, dtype=torch.float64)
    labels = torch.randint(0, vocab, (rows,), generator=gen)
    labels[torch.rand(rows, generator=gen) < ignored] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 7, 37, 64])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
def test_equals_cross_entropy_in_float64(chunk: int, ignored: float) -> None:
    hidden, weight, labels = _case(37, 53, torch.float64, ignored)
    loss, valid = fused_cross_entropy(hidden, weight, labels, chunk=chunk)
    (loss * 0.3).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    want = F.cross_entropy(hidden @ weight.T, labels, reduction="sum", ignore_index=-100)
    (want * 0.3).backward()
    assert valid == (labels != -100).sum()
    torch.testing.assert_close(loss, want, rtol=1e-13, atol=0)
    for got, expected in zip(grads, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_gradcheck() -> None:
    hidden, weight, labels = _case(5, 7, torch.float64, 0.3)
    assert torch.autograd.gradcheck(lambda h, w: fused_cross_entropy(h, w, labels, chunk=2)[0], (hidden, weight))


def test_large_logits_stay_finite() -> None:
    hidden, weight, labels = _case(33, 11, torch.float32, 0.1)
    loss, _ = fused_cross_entropy(hidden * 1e3, weight, labels, chunk=8)
    loss.backward()
    want = F.cross_entropy((hidden * 1e3).double() @ weight.double().T, labels, reduction="sum")
    assert torch.isfinite(hidden.grad).all() and torch.isfinite(weight.grad).all()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [0, 9])
def test_no_valid_token_is_exactly_zero_and_takes_part(rows: int) -> None:
    hidden, weight, labels = _case(rows, 23, torch.float32, 1.1)
    loss, valid = fused_cross_entropy(hidden, weight, labels, chunk=4)
    scaled_loss(loss, 0, 4).backward()
    assert loss == 0 and valid == 0
    assert hidden.grad is not None and not hidden.grad.any()
    assert weight.grad is not None and not weight.grad.any()


def test_bfloat16_sums_in_float32() -> None:
    # 4096 tokens: a running bfloat16 sum would be percents off.
    hidden, weight, labels = _case(4096, 61, torch.bfloat16, 0.1)
    loss, _ = fused_cross_entropy(hidden, weight, labels, chunk=100)
    loss.backward()
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    want = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="sum")
    want.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for got, expected in ((hidden.grad, wide[0].grad), (weight.grad, wide[1].grad)):
        assert got is not None and expected is not None and got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() / expected.norm() < 4e-3


def test_autocast_computes_in_its_dtype_and_returns_float32_gradients() -> None:
    hidden, weight, labels = _case(65, 29, torch.float32, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = fused_cross_entropy(hidden, weight, labels, chunk=16)
    loss.backward()
    low = [t.detach().bfloat16().double() for t in (hidden, weight)]
    torch.testing.assert_close(
        loss.double(), F.cross_entropy(low[0] @ low[1].T, labels, reduction="sum"), rtol=1e-5, atol=0
    )
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


def test_frozen_weight_and_no_grad() -> None:
    hidden, weight, labels = _case(13, 17, torch.float32, 0.0)
    loss, _ = fused_cross_entropy(hidden, weight.detach(), labels, chunk=5)
    loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        again, _ = fused_cross_entropy(hidden, weight, labels, chunk=5)
    assert not again.requires_grad
    assert torch.equal(again, loss.detach())


def test_logits_are_never_whole() -> None:
    rows, vocab, chunk = 600, 401, 50
    hidden, weight, labels = _case(rows, vocab, torch.float32, 0.0)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        fused_cross_entropy(hidden, weight, labels, chunk=chunk)[0].backward()
    assert chunk * vocab <= largest < rows * vocab / 5


def test_bad_arguments_say_what_to_give() -> None:
    hidden, weight, labels = _case(4, 5, torch.float32, 0.0)
    with pytest.raises(ModelError, match="one label per position"):
        fused_cross_entropy(hidden, weight, labels[:3])
    with pytest.raises(ModelError, match="at least 1"):
        fused_cross_entropy(hidden, weight, labels, chunk=0)


def test_loss_rule_over_unequal_ranks() -> None:
    """DDP's average of the scaled losses has the gradient of the mean over all valid tokens, an empty rank included."""
    torch.manual_seed(1)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(30, 6, dtype=torch.float64)
    labels = torch.randint(0, 11, (30,))
    labels[2:10] = -100  # rank 0 keeps 2 tokens
    labels[20:] = -100  # rank 2 keeps none
    F.cross_entropy(hidden @ weight.T, labels, ignore_index=-100).backward()
    want, weight.grad = weight.grad, None
    total = (labels != -100).sum()
    per_rank, logged = [], 0.0
    for rank in range(3):
        part = slice(10 * rank, 10 * rank + 10)
        loss_sum, _ = fused_cross_entropy(hidden[part], weight, labels[part], chunk=4)
        scaled_loss(loss_sum, total, 3).backward()
        per_rank.append(weight.grad)
        weight.grad = None
        logged += float(loss_sum.detach() / total)
    torch.testing.assert_close(sum(per_rank) / 3, want, rtol=1e-12, atol=1e-14)
    mean = float(F.cross_entropy(hidden @ weight.detach().T, labels, ignore_index=-100))
    assert logged == pytest.approx(mean, rel=1e-12)
    assert float(scaled_loss(torch.tensor(6.0), 3, 2)) == 4.0


def _model() -> Qwen2ForCausalLM:
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def test_head_in_a_model() -> None:
    model, plain = _model(), _model()
    names = list(model.state_dict())
    assert install_loss_head(install_loss_head(model, chunk=5), chunk=3) is model
    assert list(model.state_dict()) == names
    assert isinstance(model.lm_head, LossHead) and model.lm_head.chunk == 3
    fired = []
    model.lm_head.register_forward_hook(lambda *_: fired.append(True))
    ids = torch.randint(0, 37, (2, 13))
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    loss = model(input_ids=ids, shift_labels=labels).loss
    scaled_loss(loss, (labels != -100).sum(), 1).backward()
    want = plain(input_ids=ids, labels=ids).loss
    want.backward()
    torch.testing.assert_close(loss / 24, want, rtol=1e-6, atol=0)
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=name)
    assert fired, "module hooks of the head must fire: FSDP and ZeRO gather its weight in them"


def test_head_without_labels_is_an_ordinary_model() -> None:
    model, plain = install_loss_head(_model()), _model()
    ids = torch.randint(0, 37, (1, 9))
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(model(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss)
    with pytest.raises(ModelError):
        model(input_ids=ids, shift_labels=ids[:, :5])
    assert model(input_ids=ids).logits.shape == (1, 9, 37), "labels of a failed call must not linger"


def test_head_refuses_what_it_would_change() -> None:
    model = _model()
    model.lm_head = torch.nn.Linear(16, 37, bias=True)
    with pytest.raises(ModelError, match="without bias"):
        install_loss_head(model)


def test_head_survives_deepcopy_and_save(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = install_loss_head(_model())
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    ids = torch.randint(0, 37, (1, 9))
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(twin(input_ids=ids, shift_labels=ids).loss, model(input_ids=ids, shift_labels=ids).loss)
