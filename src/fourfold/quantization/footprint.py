"""What a quantized tensor takes, from its size alone."""

from __future__ import annotations

from fourfold.quantization.formats import get_format
from fourfold.quantization.scales import NESTED_BLOCK_SIZE

__all__ = ["code_bytes", "scale_bytes", "scale_parts"]


def code_bytes(num_elements: int, format: str = "nf4") -> int:
    """Codes: bits / 8 a weight."""
    return get_format(format).num_code_bytes(num_elements)


def scale_parts(num_elements: int, block_size: int = 64, double_quant: bool = True) -> list[int]:
    """Bytes of each tensor of scales: 4 / block_size a weight; double-quantized 1 / block_size, 4 / (256 block_size),
    and an offset (QLoRA, https://arxiv.org/abs/2305.14314, section 3)."""
    blocks = -(-num_elements // block_size)
    return [blocks, 4 * -(-blocks // NESTED_BLOCK_SIZE), 4] if double_quant else [4 * blocks]


def scale_bytes(num_elements: int, block_size: int = 64, double_quant: bool = True) -> int:
    """All of `scale_parts`."""
    return sum(scale_parts(num_elements, block_size, double_quant))
