from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fourfold.kernels.cross_entropy import cross_entropy_, cross_entropy_reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def problem(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits whose rows start on 128 bytes, with NaN between them, as the loss lays them out."""
    generator = torch.Generator("cuda").manual_seed(vocab)
    padded = torch.full((rows, -(-vocab // 64) * 64), float("nan"), dtype=dtype, device="cuda")
    logits = padded[:, :vocab]
    logits.copy_(4 * torch.randn(rows, vocab, generator=generator, device="cuda"))
    targets = torch.randint(0, vocab, (rows,), generator=generator, device="cuda")
    targets[1::3] = -100
    return logits, targets


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.to(torch.float64, copy=True).requires_grad_()
    loss = functional.cross_entropy(wide, targets, ignore_index=-100, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), wide)[0]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


# Each dtype with a vocabulary of whole vectors and with an odd one.
@pytest.mark.parametrize(
    ("dtype", "rows", "vocab"),
    [
        (torch.bfloat16, 1, 1),
        (torch.bfloat16, 7, 50257),
        (torch.bfloat16, 130, 128256),
        (torch.bfloat16, 3, 262144),
        (torch.float16, 7, 50257),
        (torch.float16, 33, 32000),
        (torch.float32, 5, 123),
        (torch.float32, 130, 128256),
    ],
)
def test_kernel_is_no_further_from_float64_than_torch(dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits, targets = problem(rows, vocab, dtype)
    want_loss, want_gradient = exact(logits, targets)
    their_gradient = logits.clone()
    their_loss, their_rank = cross_entropy_reference(their_gradient, targets, True)
    for gradient in (False, True):
        mine = logits if gradient else logits.clone()
        before = mine.clone()
        # What the allocator hands out next: an element that no kernel writes shows.
        poison = torch.full((rows,), float("nan"), device="cuda")
        del poison
        loss, ranked_first = cross_entropy_(mine, targets, gradient)
        torch.testing.assert_close(loss.double(), want_loss, rtol=2e-6, atol=4e-6)
        assert torch.all((ranked_first == their_rank) | _ties(before))
        if not gradient:
            assert torch.equal(mine, before)
    assert torch.all(logits[targets == -100] == 0)
    if vocab == 1:  # what is certain has no loss, and an error relative to nothing has no size
        assert not loss.any()
        assert not logits.any()
    else:
        assert error(logits, want_gradient) <= 1.01 * error(their_gradient, want_gradient) + 1e-6
        assert error(loss, want_loss) <= error(their_loss, want_loss) + 1e-6


def _ties(logits: Tensor) -> Tensor:
    """Rows whose greatest logit stands more than once: which one torch.argmax finds on a GPU is not said."""
    return (logits == logits.amax(dim=1, keepdim=True)).sum(dim=1) > 1


def test_first_of_equal_logits_is_ranked_first() -> None:
    logits = torch.zeros(5, 128256, dtype=torch.bfloat16, device="cuda")
    logits[:, [3, 9000, 128000]] = 2.0
    targets = torch.tensor([3, 9000, 128000, 4, -100], device="cuda")
    assert cross_entropy_(logits, targets, False)[1].tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_those_of_liger(dtype: torch.dtype) -> None:
    from liger_kernel.ops.cross_entropy import cross_entropy_forward

    logits, targets = problem(64, 32000, dtype)
    want_loss, want_gradient = exact(logits, targets)
    theirs = logits.contiguous().clone().requires_grad_()
    their_gradient = cross_entropy_forward(theirs, targets, None, -100, 0.0, 0.0, "sum", None, False)[4]
    loss, _ = cross_entropy_(logits, targets, True)
    assert error(logits, want_gradient) <= 1.01 * error(their_gradient.detach(), want_gradient) + 1e-6
    assert error(loss, want_loss) < 1e-6


def test_rows_past_two_to_the_31_elements_are_reached() -> None:
    rows, vocab = 16800, 128256
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-1, 5] = 20.0
    targets = torch.full((rows,), 5, device="cuda")
    loss, ranked_first = cross_entropy_(logits, targets, True)
    torch.testing.assert_close(loss[0], torch.tensor(float(vocab), device="cuda").log())
    assert loss[-1] < 1e-3
    assert ranked_first[-1]
    assert not ranked_first[:-1].any()
    assert logits[-2, 5] == -1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_and_targets_make_a_loss_that_is_no_number(bad: float) -> None:
    logits, targets = problem(3, 1000, torch.bfloat16)
    targets = torch.tensor([1, 2, 1000], device="cuda")
    logits[0, 77] = bad
    loss, _ = cross_entropy_(logits, targets, True)
    assert torch.isfinite(loss).tolist() == [False, True, False]


def test_float64_takes_the_reference() -> None:
    logits, targets = problem(3, 100, torch.float64)
    want_loss, want_gradient = exact(logits, targets)
    loss, _ = cross_entropy_(logits, targets, True)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(logits, want_gradient)
