from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from fourfold.data import supervised_positions
from fourfold.quantization.linear import QuantizedLinear
from fourfold.training import loss as loss_module
from fourfold.training.loss import supervised_cross_entropy


def batch(dtype: torch.dtype, head_bias: bool = False) -> tuple[torch.Tensor, torch.Tensor, nn.Linear]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 17, 8, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, 50, (3, 17), generator=generator)
    labels[torch.rand(3, 17, generator=generator) < 0.6] = -100
    head = nn.Linear(8, 50, bias=head_bias).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(50, 8, generator=generator))
        if head_bias:
            head.bias.copy_(torch.randn(50, generator=generator))
    return hidden, labels, head


def plain_sum(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits = head(hidden[:, :-1]).flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_logits", [1, 150, 2**25])
@pytest.mark.parametrize("trainable_head", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy_in_float64(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int, trainable_head: bool, told: bool
) -> None:
    monkeypatch.setattr(loss_module, "AUTOGRAD_LOGITS", chunk_logits)
    hidden, labels, head = batch(torch.float64, head_bias=True)
    head.requires_grad_(trainable_head)
    positions = supervised_positions(labels) if told else None
    ours = supervised_cross_entropy(hidden, labels, head, positions)
    wanted = plain_sum(hidden, labels, head)
    inputs = [hidden, *(head.parameters() if trainable_head else [])]
    torch.testing.assert_close(ours.loss_sum, wanted, rtol=1e-13, atol=0)
    for got, want in zip(
        torch.autograd.grad(ours.loss_sum / 7, inputs), torch.autograd.grad(wanted / 7, inputs), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_gradient_passes_gradcheck() -> None:
    hidden, labels, head = batch(torch.float64)
    head.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda h: supervised_cross_entropy(h, labels, head).loss_sum, (hidden,))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
def test_sixteen_bit_loss_and_gradient_are_no_further_from_float64_than_those_of_autograd(
    dtype: torch.dtype, bias: bool
) -> None:
    hidden, labels, head = batch(dtype, head_bias=bias)
    head.requires_grad_(False)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact = plain_sum(exact_hidden, labels, copy.deepcopy(head).double())
    (exact_grad,) = torch.autograd.grad(exact / 21, exact_hidden)
    ours = supervised_cross_entropy(hidden, labels, head).loss_sum
    (grad,) = torch.autograd.grad(ours / 21, hidden)
    logits = head(hidden[:, :-1]).flatten(0, 1).float()
    plain = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    (plain_grad,) = torch.autograd.grad(plain / 21, hidden)
    assert ours.dtype == torch.float32
    assert grad.dtype == dtype
    rounding = torch.finfo(dtype).eps
    # With a bias, the logits of the two products may round to different neighbours, none of them the better.
    assert error(ours, exact) <= error(plain, exact) + (0.05 * rounding if bias else 1e-6)
    # Both round the logits, their gradient and the result once each, though not the same way.
    assert error(grad, exact_grad) <= error(plain_grad, exact_grad) + 0.1 * rounding


class _Wrapped(nn.Module):
    """A head that no short way knows."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_frozen_linear_head_has_the_numbers_of_the_same_head_under_autograd(dtype: torch.dtype) -> None:
    hidden, labels, head = batch(dtype)
    head.requires_grad_(False)
    short = supervised_cross_entropy(hidden, labels, head)
    long = supervised_cross_entropy(hidden, labels, _Wrapped(head))
    torch.testing.assert_close(short.loss_sum, long.loss_sum, rtol=1e-6, atol=0)
    assert short.num_correct == long.num_correct
    (short_grad,) = torch.autograd.grad(short.loss_sum / 7, hidden)
    (long_grad,) = torch.autograd.grad(long.loss_sum / 7, hidden)
    torch.testing.assert_close(short_grad, long_grad)


def test_quantized_head_has_the_numbers_of_its_dense_one() -> None:
    hidden, labels, _ = batch(torch.float32)
    dense = nn.Linear(8, 48, bias=False)
    labels = labels.clamp(max=47)
    quantized = QuantizedLinear.from_linear(dense, format="nf4", block_size=64)
    hidden_too = hidden.detach().clone().requires_grad_()
    ours = supervised_cross_entropy(hidden, labels, quantized).loss_sum
    wanted = plain_sum(hidden_too, labels, quantized.dense())
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(ours, hidden)[0], torch.autograd.grad(wanted, hidden_too)[0], rtol=1e-4, atol=1e-6
    )


def test_autocast_head_computes_in_the_dtype_of_autocast() -> None:
    hidden, labels, head = batch(torch.float32)
    head.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        ours = supervised_cross_entropy(hidden, labels, head).loss_sum
        wrapped = supervised_cross_entropy(hidden, labels, _Wrapped(head)).loss_sum
    torch.testing.assert_close(ours, wrapped, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(ours, hidden)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, torch.autograd.grad(wrapped, hidden)[0])


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_frozen_head_still_run(hook: str) -> None:
    hidden, labels, head = batch(torch.float32)
    head.requires_grad_(False)
    called = []
    getattr(head, hook)(lambda *_: called.append(True))
    supervised_cross_entropy(hidden, labels, head)
    assert called


def test_backward_may_run_twice() -> None:
    hidden, labels, head = batch(torch.float32)
    head.requires_grad_(False)
    loss = supervised_cross_entropy(hidden, labels, head).loss_sum / 5
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden)
    assert torch.equal(first, second)


def test_no_gradient_is_computed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []
    plain = loss_module.cross_entropy_
    monkeypatch.setattr(loss_module, "cross_entropy_", lambda *args: wanted.append(args[2]) or plain(*args))
    hidden, labels, head = batch(torch.float32)
    head.requires_grad_(False)
    with torch.no_grad():
        supervised_cross_entropy(hidden, labels, head)
    supervised_cross_entropy(hidden.detach(), labels, head)
    assert wanted == [False, False]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_microbatches_of_unequal_counts_add_up_to_the_batch(dtype: torch.dtype) -> None:
    hidden, labels, head = batch(dtype)
    head.requires_grad_(False)
    labels[0, 3:] = -100
    labels[2] = 7
    whole = supervised_cross_entropy(hidden, labels, head)
    (wanted,) = torch.autograd.grad(whole.loss_sum / whole.num_tokens, hidden)
    parts = [supervised_cross_entropy(hidden[i : i + 1], labels[i : i + 1], head) for i in range(3)]
    total = sum(part.num_tokens for part in parts)
    assert total == whole.num_tokens
    (got,) = torch.autograd.grad(sum(part.loss_sum / total for part in parts), hidden)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("frozen", [False, True])
def test_counts_are_those_of_supervised_positions(frozen: bool) -> None:
    hidden, labels, head = batch(torch.float32)
    head.requires_grad_(not frozen)
    result = supervised_cross_entropy(hidden, labels, head)
    targets = labels[:, 1:]
    ranked_first = head(hidden[:, :-1]).argmax(-1)
    assert result.num_tokens == (targets != -100).sum()
    assert result.num_correct == (ranked_first == targets).sum()


@pytest.mark.parametrize("frozen", [False, True])
def test_batch_without_a_label_is_a_differentiable_zero(frozen: bool) -> None:
    hidden, labels, head = batch(torch.float32)
    head.requires_grad_(not frozen)
    result = supervised_cross_entropy(hidden, torch.full_like(labels, -100), head)
    assert result.loss_sum.item() == 0
    assert torch.autograd.grad(result.loss_sum, hidden)[0].abs().sum() == 0
