from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fourfold.kernels.cross_entropy import cross_entropy_, cross_entropy_reference

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU", allow_module_level=True)

from fourfold.kernels.cross_entropy_triton import cross_entropy_triton

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def problem(rows: int, vocab: int, dtype: torch.dtype, scale: float = 4.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    targets[1::3] = -100
    return logits, targets


def exact(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    wide = logits.double().requires_grad_()
    loss = functional.cross_entropy(wide, targets, ignore_index=-100, reduction="none")
    return loss.detach(), torch.autograd.grad(loss.sum(), wide)[0]


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("take", [cross_entropy_, cross_entropy_reference, cross_entropy_triton])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (5, 37), (3, 16384), (4, 20011)])
def test_loss_and_gradient_are_those_of_float64(take, dtype: torch.dtype, rows: int, vocab: int) -> None:
    logits, targets = problem(rows, vocab, dtype)
    want_loss, want_gradient = exact(logits, targets)
    mine = logits.clone()
    loss, _ = take(mine, targets, True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want_loss, rtol=2e-6, atol=4e-6)
    # Rounded once, by half a unit of the last place (the interpreter cuts bf16 off instead), after forming in fp32.
    rounding = torch.finfo(dtype).eps * (1 if dtype == torch.bfloat16 else 0.5)
    tolerance = want_gradient.abs() * (rounding + 2e-6) + 3e-7
    assert torch.all((mine.double() - want_gradient).abs() <= tolerance)
    assert torch.all(mine[targets == -100] == 0)
    assert torch.all(loss[targets == -100] == 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernel_is_no_further_from_float64_than_torch(dtype: torch.dtype) -> None:
    logits, targets = problem(8, 3001, dtype)
    want_loss, want_gradient = exact(logits, targets)
    ours = logits.clone()
    loss, _ = cross_entropy_triton(ours, targets, True)
    theirs = logits.float().requires_grad_()
    their_loss = functional.cross_entropy(theirs, targets, reduction="none")
    (their_gradient,) = torch.autograd.grad(their_loss.sum(), theirs)
    assert error(ours, want_gradient) <= 1.01 * error(their_gradient.to(dtype), want_gradient) + 1e-7
    assert error(loss, want_loss) <= error(their_loss, want_loss) + 1e-7


@pytest.mark.parametrize("take", [cross_entropy_, cross_entropy_triton])
def test_evaluation_leaves_the_logits(take) -> None:
    logits, targets = problem(6, 501, torch.bfloat16)
    before = logits.clone()
    loss, ranked_first = take(logits, targets, False)
    assert torch.equal(logits, before)
    mine = logits.clone()
    same_loss, same_rank = take(mine, targets, True)
    assert torch.equal(loss, same_loss)
    assert torch.equal(ranked_first, same_rank)


@pytest.mark.parametrize("take", [cross_entropy_reference, cross_entropy_triton])
def test_of_equal_logits_the_first_is_ranked_first(take) -> None:
    logits = torch.zeros(5, 20000, dtype=torch.bfloat16)
    logits[:, [3, 9000, 19000]] = 2.0
    targets = torch.tensor([3, 9000, 19000, 4, -100])
    _, ranked_first = take(logits, targets, False)
    assert ranked_first.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("take", [cross_entropy_reference, cross_entropy_triton])
@pytest.mark.parametrize("vocab", [300, 20000])
def test_words_masked_by_minus_infinity_have_no_probability(take, vocab: int) -> None:
    logits, _ = problem(3, vocab, torch.float32)
    logits[:, : vocab - 40] = float("-inf")
    targets = torch.full((3,), vocab - 3)
    want_loss, _ = exact(logits, targets)
    loss, _ = take(logits, targets, True)
    torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-5)
    assert torch.all(logits[:, : vocab - 40] == 0)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("take", [cross_entropy_reference, cross_entropy_triton])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_makes_a_loss_that_is_none(take, bad: float) -> None:
    logits, targets = problem(1, 600, torch.bfloat16)
    logits[0, 77] = bad
    loss, _ = take(logits, targets, True)
    assert not torch.isfinite(loss).any()


def test_a_target_that_no_column_has_makes_a_loss_that_is_no_number() -> None:
    logits, _ = problem(2, 64, torch.bfloat16)
    loss, ranked_first = cross_entropy_triton(logits, torch.tensor([64, -3]), True)
    assert loss.isnan().all()
    assert not ranked_first.any()


def test_rows_may_be_further_apart_than_they_are_long() -> None:
    logits, targets = problem(4, 250, torch.bfloat16)
    padded = torch.full((4, 256), float("nan"), dtype=torch.bfloat16)
    mine = padded[:, :250]
    mine.copy_(logits)
    loss, _ = cross_entropy_triton(mine, targets, True)
    want = logits.clone()
    want_loss, _ = cross_entropy_triton(want, targets, True)
    assert torch.equal(loss, want_loss)
    assert torch.equal(mine, want)
    assert padded[:, 250:].isnan().all()


def test_no_rows_make_no_losses() -> None:
    for take in (cross_entropy_, cross_entropy_triton):
        loss, ranked_first = take(torch.empty(0, 8), torch.empty(0, dtype=torch.int64), True)
        assert loss.shape == ranked_first.shape == (0,)


@pytest.mark.parametrize("gradient", [False, True])
def test_operator_passes_opcheck(gradient: bool) -> None:
    logits, targets = problem(4, 33, torch.float32)
    torch.library.opcheck(torch.ops.fourfold.cross_entropy_.default, (logits, targets, gradient))
