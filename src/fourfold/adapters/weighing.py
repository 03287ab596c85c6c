"""Trained adapters multiplied by a number, which weighs what was learned against what the base had.

W + w s B A, with w between 0 and 1, is the straight line from the base to the fine-tuned weight: WiSE-FT (Wortsman et
al. 2022, https://arxiv.org/abs/2109.01903), which keeps much of the task and gives back much of the rest. LoRA's change
of a weight is a product, so that on this line one factor is multiplied and nothing else.
"""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["weighed_parameters"]

# B of a linear layer, with its bias if it has one, and of an embedding.
_LAST_FACTORS = frozenset({"lora_B", "lora_embedding_B"})


def weighed_parameters(model: nn.Module) -> list[Tensor]:
    """What of a model's trained parameters is multiplied for its adapters to be: B of each of them.

    Right where the adapter is all that is trained and starts from zero, as LoRA and rsLoRA do. DoRA's norm is not
    linear in B, and PiSSA's adapter is a part of the base.
    """
    return [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _LAST_FACTORS.isdisjoint(name.split("."))
    ]
