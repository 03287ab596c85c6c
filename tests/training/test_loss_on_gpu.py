from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fourfold.data import supervised_positions
from fourfold.kernels import cross_entropy
from fourfold.quantization.linear import QuantizedLinear
from fourfold.training.loss import supervised_cross_entropy

pytestmark = pytest.mark.gpu


def problem(dtype: torch.dtype, vocab: int, hidden_size: int = 256) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(vocab)
    hidden = torch.randn(3, 301, hidden_size, device="cuda").to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (3, 301), device="cuda")
    labels[torch.rand(3, 301, device="cuda") < 0.4] = -100
    head = nn.Linear(hidden_size, vocab, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    nn.init.normal_(head.weight, std=0.1)
    return hidden, labels, head


def exact(hidden: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide = hidden.detach().double().requires_grad_()
    logits = (wide[:, :-1] @ weight.double().T).flatten(0, 1)
    loss = functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, wide)[0]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("dtype", "vocab", "rows_per_chunk"),
    [
        (torch.bfloat16, 1000, None),
        (torch.bfloat16, 32000, 100),
        (torch.bfloat16, 50257, 100),
        (torch.float16, 32000, None),
        (torch.float16, 50257, 100),
        (torch.float32, 1000, 100),
        (torch.float32, 50257, None),
    ],
)
def test_loss_and_gradient_are_no_further_from_float64_than_under_autograd(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, vocab: int, rows_per_chunk: int | None
) -> None:
    if rows_per_chunk is not None:
        monkeypatch.setattr(cross_entropy, "BYTES_AT_ONCE", rows_per_chunk * vocab * dtype.itemsize)
    hidden, labels, head = problem(dtype, vocab)
    want_loss, want_grad = exact(hidden, labels, head.weight)
    ours = supervised_cross_entropy(hidden, labels, head, supervised_positions(labels))
    (grad,) = torch.autograd.grad(ours.loss_sum / 300, hidden)
    theirs = supervised_cross_entropy(hidden, labels, nn.Sequential(head))
    (their_grad,) = torch.autograd.grad(theirs.loss_sum / 300, hidden)
    assert ours.num_tokens == theirs.num_tokens
    assert error(ours.loss_sum, want_loss) <= error(theirs.loss_sum, want_loss) + 1e-6
    # How the products sum up differs by the size of a chunk.
    assert error(grad, want_grad / 300) <= 1.02 * error(their_grad, want_grad / 300) + 1e-6
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_host_never_waits_for_the_device(quantized: bool) -> None:
    hidden, labels, head = problem(torch.bfloat16, 32000)
    if quantized:
        head = QuantizedLinear.from_linear(head, format="nf4", block_size=64, double_quant=True)
    positions = supervised_positions(labels)
    supervised_cross_entropy(hidden, labels, head, positions).loss_sum.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = supervised_cross_entropy(hidden, labels, head, positions)
        (result.loss_sum / result.num_tokens).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_logits_take_no_more_memory_than_stated() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 1024, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 128256, (4, 1024), device="cuda")
    head = nn.Linear(512, 128256, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    positions = supervised_positions(labels)
    for _ in range(2):
        hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        supervised_cross_entropy(hidden, labels, head, positions).loss_sum.backward()
        extra = torch.cuda.max_memory_allocated() - before
    gradient = hidden.numel() * hidden.element_size()
    # cuBLAS may take a workspace of 32 MiB besides.
    # A narrow model's chunk of logits is twice as long as a wide one's.
    assert extra <= 2**29 + 3 * gradient + 2**25 + 2**22
