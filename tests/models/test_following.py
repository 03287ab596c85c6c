"""What is seen of a computation that is followed, against sizes that can be told by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fourfold.models.following import GRADIENTS, INPUT, follow

TOKENS, WIDTH, WIDE = 32, 16, 64


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDE, bias=False)
        self.down = nn.Linear(WIDE, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).sigmoid()
        out: Tensor = self.down(hidden)
        return out


def meta_mlp() -> tuple[Mlp, Tensor]:
    with torch.device("meta"):
        return Mlp(), torch.empty(TOKENS, WIDTH)


def test_what_is_kept_is_what_autograd_saves() -> None:
    module, like = meta_mlp()
    kept = follow(module, module, like).forward.after
    # The input for the gradient of `up`, and the sigmoid's output, for its own and for that of `down`.
    assert kept.pop(INPUT) == 4 * TOKENS * WIDTH
    assert kept == {"layer, sigmoid": 4 * TOKENS * WIDE}


def test_the_highest_moment_of_each_pass_is_found() -> None:
    module, like = meta_mlp()
    followed = follow(module, module, like)
    # Forward: the sigmoid beside what it is taken of.
    assert sum(followed.forward.peak.values()) == 4 * TOKENS * (WIDTH + 2 * WIDE)
    # Backward: what was kept, the sigmoid's gradient beside that of its input, and the gradient of `down`.
    assert sum(followed.backward.peak.values()) == 4 * (TOKENS * (WIDTH + 3 * WIDE) + WIDTH * WIDE)
    assert followed.backward.after[GRADIENTS] == 2 * 4 * WIDTH * WIDE


def test_gradients_of_frozen_weights_are_not_made() -> None:
    module, like = meta_mlp()
    module.requires_grad_(False)
    followed = follow(module, module, like)
    assert INPUT not in followed.forward.after
    assert GRADIENTS not in followed.backward.after
    assert all(parameter.grad is None for parameter in module.parameters())


def test_with_checkpointing_the_input_alone_is_kept_and_the_rest_is_there_again_in_the_backward_pass() -> None:
    module, like = meta_mlp()

    def run(x: Tensor) -> Tensor:
        out: Tensor = checkpoint(module, x, use_reentrant=False, preserve_rng_state=False)
        return out

    plain, again = follow(module, module, like), follow(module, run, like)
    assert again.forward.after == {INPUT: 4 * TOKENS * WIDTH}
    assert again.backward.peak["backward, sigmoid"] == plain.forward.after["layer, sigmoid"]
    assert again.backward.operations + again.backward.wide_operations > plain.backward.wide_operations


def test_products_and_bytes_are_counted() -> None:
    module, like = meta_mlp()
    followed = follow(module, module, like)
    assert followed.forward.wide_operations == 2 * 2 * TOKENS * WIDTH * WIDE
    assert followed.backward.wide_operations == 2 * followed.forward.wide_operations
    assert followed.forward.operations == 0
    assert followed.forward.moved_bytes >= 2 * 4 * TOKENS * WIDE
