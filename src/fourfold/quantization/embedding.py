"""An embedding whose table is quantized and frozen."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fourfold.kernels.blockwise import dequantize_blockwise
from fourfold.quantization.formats import get_format
from fourfold.quantization.linear import QuantizedWeight
from fourfold.quantization.number_format import NumberFormat

__all__ = ["QuantizedEmbedding"]


class QuantizedEmbedding(QuantizedWeight, nn.Embedding):  # type: ignore[misc]  # as QuantizedLinear
    """Rows of a quantized table [num_embeddings, embedding_dim]; only the rows asked for are dequantized.

    That needs rows of whole blocks; of a table with other rows the whole is dequantized each time.

    Args:
        num_embeddings: Rows.
        embedding_dim: Elements of a row.
        padding_idx: As in `nn.Embedding`; without meaning here, since nothing is trained.
        number_format: Format of the table, by name or itself.
        device: Device of the empty codes, "meta" when a checkpoint will fill them.
        dtype: What the model computes in: the dtype of the rows.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        number_format: str | NumberFormat = "nf4",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with torch.device("meta"):
            super().__init__(num_embeddings, embedding_dim, padding_idx)
        if isinstance(number_format, str):
            number_format = get_format(number_format)
        num_bytes = number_format.num_code_bytes(num_embeddings * embedding_dim)
        self.weight = nn.Parameter(torch.empty((num_bytes, 1), dtype=torch.uint8, device=device), requires_grad=False)
        self.number_format = number_format
        self.compute_dtype = dtype
        self._rest = None

    def forward(self, input: Tensor) -> Tensor:
        table = self.quantized
        dtype = self.compute_dtype or table.dtype
        if self.embedding_dim % table.block_size:
            return nn.functional.embedding(input, table.dequantize(dtype))
        rows = input.reshape(-1)
        codes = table.codes.view(self.num_embeddings, -1)[rows]
        absmax = table.scales.dequantize().view(self.num_embeddings, -1)[rows]
        dense: Tensor = dequantize_blockwise(
            codes.reshape(-1, 1),
            table.codebook,
            absmax.reshape(-1),
            table.block_size,
            [rows.numel(), self.embedding_dim],
            dtype,
        )
        return dense.view(*input.shape, self.embedding_dim)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An ordinary embedding with the dequantized table, in `dtype` (default: the model's)."""
        with torch.device("meta"):
            layer = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx)
        layer.weight = nn.Parameter(self.quantized.dequantize(dtype or self.compute_dtype), requires_grad=False)
        return layer
