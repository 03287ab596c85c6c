"""What a checkpoint holds of weights and optimizer, where each process has them whole."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Size, Tensor, nn
from transformers import PreTrainedModel

from fourfold.adapters.weighing import weighed_parameters
from fourfold.kernels.shards import local_part
from fourfold.training.parameter_groups import names_by_group

__all__ = ["WholeState"]


class WholeState:
    """Weights and optimizer state as a checkpoint holds them: of one process, and of DDP.

    All processes call each method, together. What is returned counts on the main process alone.
    """

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        """The `state_dict` for `model.save_pretrained`; None: the model's own."""
        return None

    def load_weights(self, model: nn.Module, folder: Path) -> bool:
        """Give the model the weights of a checkpoint; False where that is left to the Trainer."""
        return False

    def weigh(self, model: nn.Module, weight: float) -> None:
        """Multiply the trained adapters, in their own type, each number rounded once."""
        with torch.no_grad():
            for parameter in weighed_parameters(model):
                local_part(parameter).mul_(weight)

    def shapes(self, model: nn.Module) -> dict[str, Size]:
        """Name and shape of each trained parameter, in the model's order."""
        return {name: value.shape for name, value in model.named_parameters() if value.requires_grad}

    def groups(self, optimizer: Any, model: nn.Module) -> list[list[str]] | None:
        """Names of the parameters of each of the optimizer's groups; None: one group of all, whatever it is."""
        return names_by_group(model, optimizer)

    def head(self, base: PreTrainedModel) -> AbstractContextManager[nn.Module]:
        """The output layer of a model, whole within, for whoever reads its weight."""
        return nullcontext(base.get_output_embeddings())

    def optimizer(self, optimizer: Any, model: nn.Module) -> dict[str, Any]:
        """The optimizer's `state_dict`, with the state of whole parameters."""
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def load_optimizer(self, optimizer: Any, model: nn.Module, state: dict[str, Any]) -> None:
        """Give the optimizer what `optimizer` returned, tensors on the CPU."""
        optimizer.load_state_dict(state)
