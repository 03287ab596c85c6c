"""The parts of a footprint: what of a GPU's and the host's memory is for what."""

from __future__ import annotations

from dataclasses import dataclass, field

from fourfold.models.block_memory import Tensors
from fourfold.models.following import GRADIENTS

__all__ = ["Footprint"]

# Of parts that are no activations, which kind of memory they are.
_KINDS = {
    **dict.fromkeys(
        ("weights, 16 bits", "weights, 32 bits", "weights, quantized", "quantization state", "adapters"), "weights"
    ),
    **dict.fromkeys(
        (GRADIENTS, "gradients in graphs", "fp32 copies", "optimizer state", "pages of optimizer state"),
        "gradients and optimizer",
    ),
    **dict.fromkeys(("layers on their way", "buckets of gradients", "between stages"), "communication"),
}


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step.

    Args:
        parts: On the GPU at the peak, by name; they add up to it.
        moment: When the peak is.
        moments: The height of each moment.
        host: Bytes in host memory, by name.
        detail: Of the part "working memory", every tensor.
    """

    parts: dict[str, int]
    moment: str
    moments: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    detail: Tensors = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def kinds(self) -> dict[str, int]:
        """The parts in four: what is stored, what training it takes, activations and what is worked on, and what GPUs
        receive and send in."""
        kinds = dict.fromkeys(("weights", "gradients and optimizer", "activations", "communication"), 0)
        for part, size in self.parts.items():
            kinds[_KINDS.get(part, "activations")] += size
        return kinds
