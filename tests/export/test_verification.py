from __future__ import annotations

import math

import pytest
import torch

from fourfold.errors import VerificationError
from fourfold.export.verification import compare_logits


def test_difference_agrees_with_plain_arithmetic() -> None:
    reference = [torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, -2.0]]), torch.tensor([[3.0, -3.0, 0.0]])]
    candidate = [torch.tensor([[1.5, -0.5, -1.0], [0.0, 2.0, -2.0]]), torch.tensor([[-3.0, 3.0, 0.0]])]
    difference = compare_logits(reference, candidate)
    assert (difference.num_texts, difference.num_tokens) == (2, 3)
    assert difference.relative_error == pytest.approx(math.sqrt((0.5 + 72) / (2 + 8 + 18)))
    assert difference.max_abs_difference == 6.0
    assert difference.top1_agreement == pytest.approx(2 / 3)
    kl = sum(
        torch.nn.functional.kl_div(theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="sum")
        for ours, theirs in zip(reference, candidate, strict=True)
    )
    assert difference.mean_kl == pytest.approx(float(kl) / 3, rel=1e-5)


def test_a_constant_added_to_all_logits_is_no_difference() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert compare_logits([logits], [logits + 7]).relative_error < 1e-6


def test_logits_that_are_not_finite_never_pass() -> None:
    logits = torch.eye(3)
    difference = compare_logits([logits], [logits * float("nan")])
    with pytest.raises(VerificationError, match="nan"):
        difference.require(1e9, "the model", "look again")
