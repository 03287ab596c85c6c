"""Linear layers that share an input, with their adapters, as one matrix.

With W [N, K] the base weights of a group stacked over each other, A [R, K] and B [N, R] their adapters' matrices, the
group's *extended weight* is

    [ W  sB ]   [N + R, K + R]
    [ A   . ]

so that x W^T + s (x A^T) B^T = [x, x A^T] [W, sB]^T is one matrix product, summed in fp32 as a whole, and so is the
gradient dY W + s (dY B) A = [dY, dY sB] [W; A]. The low-rank products x A^T and dY sB are columns beside x and dY,
which the kernels that write x and dY append. Each adapter of a group has columns of R to itself; the rest of B is zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import Tensor, nn

from fourfold.kernels.low_rank import low_rank_grad
from fourfold.quantization.linear import QuantizedLinear

__all__ = ["AdaptedLinear", "LinearGroup", "Unsupported", "refuse_hooks", "view_linear"]

# Rows of a 16-bit matrix stay 16-byte aligned, and a tile of the tensor cores is full.
_RANK_MULTIPLE = 16


class Unsupported(Exception):  # noqa: N818  # no error: the generic path takes over
    """Why a layer takes the generic path."""


@dataclass(frozen=True)
class Adapter:
    """An active adapter of a linear layer: A [rank, in], B [out, rank]."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.lora_a)

    def fingerprint(self) -> tuple[Hashable, ...]:
        a, b = self.lora_a, self.lora_b
        return (a.data_ptr(), b.data_ptr(), a.shape, a.dtype, a.requires_grad, b.requires_grad, self.scaling)


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer, quantized or not, and its active adapters."""

    base: QuantizedLinear | nn.Linear
    adapters: tuple[Adapter, ...]

    @property
    def rank(self) -> int:
        return sum(adapter.rank for adapter in self.adapters)

    def fingerprint(self) -> tuple[Hashable, ...]:
        """Which memory and which numbers its products are made of."""
        bias = self.base.bias
        return (
            self.base.weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            *(value for adapter in self.adapters for value in adapter.fingerprint()),
        )


def view_linear(module: nn.Module, *, training: bool, bias: bool = False) -> AdaptedLinear:
    """What the fused block needs of a linear layer that PEFT may have wrapped.

    Args:
        bias: Whether the caller adds the base layer's bias.

    Raises:
        Unsupported: It does something that the fused block does not.
    """
    refuse_hooks(module)
    adapters: list[Adapter] = []
    base: Any = module
    if isinstance(module, PeftLoraLinear):
        base = module.get_base_layer()
        refuse_hooks(base)
        if not (module.disable_adapters or module.merged):
            adapters = [
                _view_adapter(module, name, training) for name in module.active_adapters if name in module.lora_A
            ]
    if type(base) is not QuantizedLinear and type(base) is not nn.Linear:
        raise Unsupported(f"a linear layer is a {type(base).__name__}")
    if base.bias is not None and not bias:
        raise Unsupported("a linear layer of the block other than q, k and v has a bias")
    if any(parameter.requires_grad for parameter in base.parameters(recurse=False)):
        raise Unsupported("a base weight is trained")
    return AdaptedLinear(base, tuple(adapters))


def _view_adapter(module: Any, name: str, training: bool) -> Adapter:
    if name in module.lora_variant:
        raise Unsupported(f"the adapter is no plain LoRA but a {type(module.lora_variant[name]).__name__.strip('_')}")
    if training and getattr(module.lora_dropout[name], "p", 0.0) > 0:
        raise Unsupported("lora_dropout is above 0")
    lora_a, lora_b = module.lora_A[name], module.lora_B[name]
    if lora_b.bias is not None:
        raise Unsupported("lora_bias is on")
    refuse_hooks(lora_a)
    refuse_hooks(lora_b)
    return Adapter(lora_a.weight, lora_b.weight, float(module.scaling[name]))


def refuse_hooks(module: nn.Module) -> None:
    """Raises Unsupported if the module has a hook."""
    # The fused block does not call the modules inside it, so their hooks would not run.
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        raise Unsupported("a module inside the block has a hook")


class LinearGroup:
    """The linear layers that share an input.

    Args:
        linears: In the order of their outputs.
    """

    def __init__(self, *linears: AdaptedLinear) -> None:
        self.linears = linears
        self.in_features = linears[0].base.in_features
        self.out_features = sum(linear.base.out_features for linear in linears)
        self.used_ranks = sum(linear.rank for linear in linears)
        self.rank = -(-self.used_ranks // _RANK_MULTIPLE) * _RANK_MULTIPLE

    def parameters(self) -> list[nn.Parameter]:
        """A and B of each adapter, in the order of `gradients`."""
        adapters = itertools.chain.from_iterable(linear.adapters for linear in self.linears)
        return list(itertools.chain.from_iterable((adapter.lora_a, adapter.lora_b) for adapter in adapters))

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """[out_features], or None where no layer has one."""
        biases = [linear.base.bias for linear in self.linears]
        if all(bias is None for bias in biases):
            return None
        device = next(bias for bias in biases if bias is not None).device
        return torch.cat(
            [
                torch.zeros(linear.base.out_features, dtype=dtype, device=device) if bias is None else bias.to(dtype)
                for linear, bias in zip(self.linears, biases, strict=True)
            ]
        )

    def expand(self, dtype: torch.dtype, device: torch.device) -> ExtendedWeight:
        """The extended weight, dequantized anew."""
        rows, columns = self.out_features, self.in_features
        out = torch.empty(rows + self.rank, columns + self.rank, dtype=dtype, device=device)
        row = rank_row = 0
        for linear in self.linears:
            lora_a, lora_b, scaling = _joined(linear.adapters)
            place = {"row": row, "total_rows": rows, "used_ranks": self.used_ranks, "rank_row": rank_row}
            if isinstance(linear.base, QuantizedLinear):
                linear.base.quantized.expand_(out, lora_a=lora_a, lora_b=lora_b, scaling=scaling, **place)
            else:
                _place_dense(out, linear.base.weight, lora_a, lora_b, scaling, **place)
            row, rank_row = row + linear.base.out_features, rank_row + linear.rank
        return ExtendedWeight(out, rows, columns)

    def gradients(self, sums_a: Tensor | None, sums_b: Tensor | None) -> list[Tensor | None]:
        """Gradients of `parameters` out of `low_rank_sums`, in fp32; None where none is asked for."""
        grads: list[Tensor | None] = []
        row = rank_row = 0
        for linear in self.linears:
            rows = slice(row, row + linear.base.out_features)
            for adapter in linear.adapters:
                ranks = slice(rank_row, rank_row + adapter.rank)
                grad_a = grad_b = None
                if adapter.lora_a.requires_grad:
                    assert sums_a is not None
                    grad_a = sums_a[ranks]
                if adapter.lora_b.requires_grad:
                    assert sums_b is not None
                    block = sums_b[ranks, rows].T
                    # Into memory of its own, in the parameter's order: a view would keep the whole sum alive.
                    grad_b = torch.mul(block, adapter.scaling, out=block.new_empty(block.shape))
                grads += [grad_a, grad_b]
                rank_row += adapter.rank
            row += linear.base.out_features
        return grads


@dataclass(frozen=True)
class ExtendedWeight:
    """[[W, sB], [A, .]] of a group: [rows + rank, columns + rank]."""

    data: Tensor
    rows: int
    columns: int

    @property
    def forward(self) -> Tensor:
        """[W, sB], [rows, columns + rank]: y = [x, x A^T] @ forward^T."""
        return self.data[: self.rows]

    @property
    def backward(self) -> Tensor:
        """[W; A], [rows + rank, columns]: dx = [dy, dy sB] @ backward."""
        return self.data[:, : self.columns]

    @property
    def base(self) -> Tensor:
        """W alone, [rows, columns]."""
        return self.data[: self.rows, : self.columns]

    @property
    def down(self) -> Tensor | None:
        """A, [rank, columns], what the forward pass appends products with."""
        return self.data[self.rows :, : self.columns] if len(self.data) > self.rows else None

    @property
    def up(self) -> Tensor | None:
        """(sB)^T, [rank, rows], what the backward pass appends products with."""
        return self.data[: self.rows, self.columns :].T if len(self.data) > self.rows else None


class LowRankSums:
    """Sums over tokens that the gradients of a group's A and B are made of, fp32, [rank, in] and [rank, out].

    They are added up over parts of a batch.

    Args:
        norm: The weight w [in] of the RMSNorm before the group, if there is one: `add` is given that norm's input x,
            not its output x rstd w, since (dY sB)^T (x rstd w) = ((dY sB rstd)^T x) w.
    """

    def __init__(self, group: LinearGroup, norm: Tensor | None = None) -> None:
        self.group = group
        self.norm = norm
        parameters = group.parameters()
        self._wants_a = any(parameter.requires_grad for parameter in parameters[::2])
        self._wants_b = any(parameter.requires_grad for parameter in parameters[1::2])
        self._a: Tensor | None = None
        self._b: Tensor | None = None

    def add(self, x: Tensor, low: Tensor, grad: Tensor, grad_low: Tensor, rstd: Tensor | None = None) -> None:
        """Add a part's.

        Args:
            x: [tokens, in], the group's input; the input of its norm, if there is one.
            low: The group's input times A^T, [tokens, rank].
            grad: dY, [tokens, out].
            grad_low: dY sB, [tokens, rank].
            rstd: fp32 [tokens], of the norm.
        """
        if self._wants_a:
            if rstd is not None:
                grad_low = torch.mul(grad_low, rstd[:, None], out=grad_low.new_empty(grad_low.shape))
            self._a = low_rank_grad(grad_low, x, self._a)
        if self._wants_b:
            self._b = low_rank_grad(low, grad, self._b)

    def gradients(self) -> list[Tensor | None]:
        """One for each of the group's parameters."""
        if self._a is not None and self.norm is not None:
            self._a *= self.norm
        return self.group.gradients(self._a, self._b)


def _joined(adapters: Sequence[Adapter]) -> tuple[Tensor | None, Tensor | None, float]:
    """Several adapters as one of their joint rank."""
    if not adapters:
        return None, None, 1.0
    if len(adapters) == 1:
        return adapters[0].lora_a.detach(), adapters[0].lora_b.detach(), adapters[0].scaling
    lora_a = torch.cat([adapter.lora_a.detach() for adapter in adapters])
    lora_b = torch.cat([adapter.lora_b.detach() * adapter.scaling for adapter in adapters], dim=1)
    return lora_a, lora_b, 1.0


def _place_dense(
    out: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    *,
    row: int,
    total_rows: int,
    used_ranks: int,
    rank_row: int,
) -> None:
    """What `QuantizedTensor.expand_` does, for a weight that is not quantized."""
    rows, columns = weight.shape
    out[row : row + rows, :columns] = weight
    out[row : row + rows, columns:] = 0
    if row == 0:
        out[total_rows + used_ranks :, :columns] = 0
    if lora_a is not None and lora_b is not None:
        rank = len(lora_a)
        out[row : row + rows, columns + rank_row : columns + rank_row + rank] = lora_b * scaling
        out[total_rows + rank_row : total_rows + rank_row + rank, :columns] = lora_a
