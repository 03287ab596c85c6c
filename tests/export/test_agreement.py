from __future__ import annotations

import pytest
import torch

from fourfold.errors import VerificationError
from fourfold.export.agreement import Bounds, agreement, agreement_of_likeliest, require_same_texts


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(5, 20, generator=torch.Generator().manual_seed(seed))


def likeliest(rows: torch.Tensor, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = rows.double().log_softmax(-1).topk(count)
    return list(zip(found.indices, found.values, strict=True))


def test_with_all_tokens_known_the_two_ways_to_compare_agree_with_pytorch() -> None:
    ours, theirs = logits(0), logits(1)
    each = torch.nn.functional.kl_div(
        theirs.log_softmax(-1), ours.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    for found in (agreement([ours], [theirs]), agreement_of_likeliest([ours], [likeliest(theirs, 20)])):
        assert found.mean_kl == pytest.approx(float(each.mean()), rel=1e-5)
        assert found.max_kl == pytest.approx(float(each.max()), rel=1e-5)
        assert found.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
        assert (found.num_texts, found.num_tokens) == (1, 5)


def test_of_fewer_tokens_the_kl_is_a_lower_bound_and_none_of_the_same_predictions() -> None:
    ours, theirs = logits(0), logits(1)
    part = agreement_of_likeliest([ours], [likeliest(theirs, 6)])
    assert 0 < part.mean_kl <= agreement([ours], [theirs]).mean_kl
    assert agreement_of_likeliest([ours], [likeliest(ours, 6)]).mean_kl == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bounds", [Bounds(kl=1e-6, top1=0), Bounds(kl=9, top1=1)])
def test_past_either_bound_nothing_stands(bounds) -> None:
    found = agreement([logits(0)], [logits(1)])
    with pytest.raises(VerificationError, match="the export does not answer"):
        found.require(bounds, "the export")
    found.require(Bounds(kl=9, top1=0), "the export")


def test_numbers_that_are_not_finite_never_pass() -> None:
    found = agreement([logits(0)], [logits(0) * float("nan")])
    with pytest.raises(VerificationError):
        found.require(Bounds(kl=1e9, top1=0), "the export")


def test_a_text_that_becomes_other_tokens_is_shown(tiny_tokenizer) -> None:
    def wrong(text: str) -> list[int]:
        ids = tiny_tokenizer(text)["input_ids"]
        return [*ids[:4], 7, *ids[5:]]

    with pytest.raises(VerificationError, match=r"other tokens(.|\n)*at token 4"):
        require_same_texts(tiny_tokenizer, [], wrong, "a reader")
    same = require_same_texts(tiny_tokenizer, [[1, 5, 6]], lambda t: tiny_tokenizer(t)["input_ids"], "a reader")
    assert same["texts"] == 4
