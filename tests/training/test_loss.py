from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

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
    return hidden, labels, head


def plain_sum(hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module) -> torch.Tensor:
    logits = head(hidden[:, :-1]).flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("chunk_logits", [1, 150, 2**25])
@pytest.mark.parametrize("trainable_head", [False, True])
def test_loss_and_gradients_equal_plain_cross_entropy_in_float64(
    monkeypatch: pytest.MonkeyPatch, chunk_logits: int, trainable_head: bool
) -> None:
    monkeypatch.setattr(loss_module, "_LOGITS_PER_CHUNK", chunk_logits)
    hidden, labels, head = batch(torch.float64, head_bias=True)
    head.requires_grad_(trainable_head)
    ours = supervised_cross_entropy(hidden, labels, head)
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


def test_bfloat16_loss_is_no_further_from_float64_than_plain_cross_entropy() -> None:
    hidden, labels, head = batch(torch.bfloat16)
    reference = nn.Linear(8, 50, bias=False).double()
    reference.load_state_dict({"weight": head.weight.double()})
    exact = plain_sum(hidden.double(), labels, reference)
    ours = supervised_cross_entropy(hidden, labels, head).loss_sum
    plain = functional.cross_entropy(
        head(hidden[:, :-1]).flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum"
    )
    assert ours.dtype == torch.float32
    assert abs(ours - exact) <= abs(plain - exact) + 1e-4 * exact


def test_counts_are_those_of_supervised_positions() -> None:
    hidden, labels, head = batch(torch.float32)
    result = supervised_cross_entropy(hidden, labels, head)
    targets = labels[:, 1:]
    ranked_first = head(hidden[:, :-1]).argmax(-1)
    assert result.num_tokens == (targets != -100).sum()
    assert result.num_correct == (ranked_first == targets).sum()


def test_batch_without_a_label_is_a_differentiable_zero() -> None:
    hidden, labels, head = batch(torch.float32)
    head.requires_grad_(False)
    result = supervised_cross_entropy(hidden, torch.full_like(labels, -100), head)
    assert result.loss_sum.item() == 0
    assert torch.autograd.grad(result.loss_sum, hidden)[0].abs().sum() == 0
