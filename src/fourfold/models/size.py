"""What a model's weights take."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fourfold.quantization.experts import quantized_parameters
from fourfold.quantization.linear import QuantizedWeight

__all__ = ["ModelSize", "model_size"]

MIB = 2**20


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model's weights.

    Args:
        num_parameters: All weights, a shared one counted once.
        num_quantized: Those that are quantized.
        num_bytes: What the weights take as they are.
        num_bytes_16bit: What they would take in 16 bits.
        bits_per_quantized_weight: Codes and scales; None where nothing is quantized.
        formats: The number formats there are.
    """

    num_parameters: int
    num_quantized: int
    num_bytes: int
    num_bytes_16bit: int
    bits_per_quantized_weight: float | None
    formats: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        text = f"weights: {self.num_parameters / 1e6:,.1f}M parameters, {self.num_bytes / MIB:,.0f} MiB"
        if self.bits_per_quantized_weight is None:
            return [text]
        share = self.num_quantized / self.num_parameters
        return [
            f"{text} ({self.num_bytes_16bit / MIB:,.0f} MiB in 16 bits)",
            f"  {share:.0%} of them in {', '.join(self.formats)}, {self.bits_per_quantized_weight:.3f} bits each; "
            "the rest stays in 16 bits",
        ]


def model_size(model: nn.Module) -> ModelSize:
    """Count a model's weights."""
    held = [module.quantized for module in model.modules() if isinstance(module, QuantizedWeight)]
    for module in model.modules():
        held += quantized_parameters(module).values()
    # A head that shares the embedding's codes is counted once.
    quantized = list({tensor.codes.data_ptr(): tensor for tensor in held}.values())
    code_addresses = {tensor.codes.data_ptr() for tensor in quantized}
    dense = [parameter for parameter in model.parameters() if parameter.data_ptr() not in code_addresses]
    num_quantized = sum(tensor.num_elements for tensor in quantized)
    quantized_bytes = sum(tensor.num_bytes for tensor in quantized)
    num_dense = sum(parameter.numel() for parameter in dense)
    return ModelSize(
        num_parameters=num_quantized + num_dense,
        num_quantized=num_quantized,
        num_bytes=quantized_bytes + sum(parameter.nbytes for parameter in dense),
        num_bytes_16bit=2 * (num_quantized + num_dense),
        bits_per_quantized_weight=8 * quantized_bytes / num_quantized if num_quantized else None,
        formats=sorted({tensor.format.name for tensor in quantized}),
    )
