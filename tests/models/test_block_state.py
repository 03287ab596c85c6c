"""What passes from one block's backward pass to the next."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fourfold.kernels.low_rank import new_extended
from fourfold.models.block_state import GradientRoom, parts


def through_autograd(grad: Tensor) -> Tensor:
    """As a gradient comes to the next block: reshaped to rows of tokens and back."""
    return grad.view(2, -1, grad.shape[1]).reshape(grad.shape)


def test_what_was_left_is_taken_with_its_room() -> None:
    extended = new_extended(torch.empty(0), 6, 40, 16)
    room = GradientRoom()
    grad = through_autograd(room.leave(extended, 40))
    assert room.take(grad, 16).data_ptr() == extended.data_ptr()
    # Once: the memory may be another's from then on.
    assert room.take(grad, 16).data_ptr() != extended.data_ptr()


def test_another_gradient_or_too_little_room_is_copied() -> None:
    extended = new_extended(torch.empty(0), 6, 40, 16).fill_(1.0)
    room = GradientRoom()
    other = torch.randn(6, 40)
    room.leave(extended, 40)
    for grad, rank in ((other, 16), (room.leave(extended, 40), 32)):
        taken = room.take(grad, rank)
        assert taken.shape == (6, 40 + rank)
        assert torch.equal(taken[:, :40], grad)
        taken.fill_(2.0)
    assert bool((extended == 1.0).all())
    assert room.take(other, 0) is other


def test_a_copied_model_takes_nothing_of_the_others() -> None:
    room = GradientRoom()
    grad = room.leave(new_extended(torch.empty(0), 6, 40, 16), 40)
    assert copy.deepcopy(room).take(grad, 16).data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("num_tokens", [1, 2047, 2048, 2049, 8191, 32768, 100_001])
def test_parts_are_all_tokens_in_few_parts(num_tokens: int) -> None:
    assert list(parts(num_tokens, whole=True, offload=False)) == [slice(0, num_tokens)]
    for offload, most in ((True, 2048), (False, 4096)):
        pieces = list(parts(num_tokens, whole=False, offload=offload))
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == num_tokens
        assert len(pieces) <= 8
        assert all(piece.stop - piece.start <= max(most, -(-num_tokens // 8)) for piece in pieces)
