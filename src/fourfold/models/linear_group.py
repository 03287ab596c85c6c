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

from fourfold.kernels.grad_a import grad_a
from fourfold.kernels.low_rank import fill_columns, new_extended
from fourfold.kernels.low_rank_pair import low_rank_pair_
from fourfold.models.hooks import hooks_of
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import are_alike, expand_alike_

__all__ = ["AdaptedLinear", "LinearGroup", "Unsupported", "padded_rank", "refuse_hooks", "view_linear"]

# Rows of a 16-bit matrix stay 16-byte aligned, and a tile of the tensor cores is full.
_RANK_MULTIPLE = 16


def padded_rank(used_ranks: int) -> int:
    """Low-rank columns that a group with so many ranks gets."""
    return -(-used_ranks // _RANK_MULTIPLE) * _RANK_MULTIPLE


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


def view_linear(
    module: nn.Module, *, training: bool, bias: bool = False, names: Sequence[str] | None = None
) -> AdaptedLinear:
    """What the fused block needs of a linear layer that PEFT may have wrapped.

    Args:
        bias: Whether the caller adds the base layer's bias.
        names: Adapters to take, whichever are active; None for those that are.

    Raises:
        Unsupported: It does something that the fused block does not.
    """
    refuse_hooks(module)
    adapters: list[Adapter] = []
    base: Any = module
    if isinstance(module, PeftLoraLinear):
        base = module.get_base_layer()
        refuse_hooks(base)
        if names is not None and module.merged:
            raise Unsupported("an adapter is merged")
        if names is not None or not (module.disable_adapters or module.merged):
            chosen = module.active_adapters if names is None else names
            adapters = [_view_adapter(module, name, training) for name in chosen if name in module.lora_A]
    if type(base) is not QuantizedLinear and type(base) is not nn.Linear:
        raise Unsupported(f"a linear layer is a {type(base).__name__}")
    if isinstance(base, QuantizedLinear) and base.number_format.is_vectorwise:
        raise Unsupported("LLM.int8() rounds the input of each linear layer, which fused blocks do not")
    if base.bias is not None and not bias:
        raise Unsupported("a linear layer of the block other than q, k and v has a bias")
    # Whoever names adapters decodes, and computes no gradients.
    is_trained = any(parameter is not None and parameter.requires_grad for parameter in base._parameters.values())
    if names is None and is_trained:
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
    if hooks_of(module):
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
        self.rank = padded_rank(self.used_ranks)

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

    def expand(self, x: Tensor) -> ExtendedWeight:
        """The extended weight, dequantized anew, of the dtype and device of `x`."""
        rows, columns = self.out_features, self.in_features
        out = new_extended(x, rows + self.rank, columns, self.rank)
        self.expand_(out)
        return ExtendedWeight(out, rows, columns)

    def expand_(self, out: Tensor) -> None:
        """Write the extended weight to `out` [rows + rank, columns + rank], last stride 1."""
        adapters = self.joined_adapters()
        device = out.device
        quantized = [linear.base.read(device) for linear in self.linears if isinstance(linear.base, QuantizedLinear)]
        if len(quantized) == len(self.linears) and are_alike(quantized):
            lora_a, lora_b, scalings = zip(*adapters, strict=True)
            expand_alike_(out, quantized, lora_a, lora_b, scalings)
        else:
            self._expand_each(out, adapters)

    def joined_adapters(self) -> list[tuple[Tensor | None, Tensor | None, float]]:
        """A, B and scaling of each layer's adapters as one of their joint rank; None, None and 1 for none."""
        return [_joined(linear.adapters) for linear in self.linears]

    def _expand_each(self, out: Tensor, adapters: Sequence[tuple[Tensor | None, Tensor | None, float]]) -> None:
        row = rank_row = 0
        for linear, (lora_a, lora_b, scaling) in zip(self.linears, adapters, strict=True):
            place = {"row": row, "total_rows": self.out_features, "used_ranks": self.used_ranks, "rank_row": rank_row}
            if isinstance(linear.base, QuantizedLinear):
                linear.base.read(out.device).expand_(out, lora_a=lora_a, lora_b=lora_b, scaling=scaling, **place)
            else:
                _place_dense(out, linear.base.weight, lora_a, lora_b, scaling, **place)
            row, rank_row = row + linear.base.out_features, rank_row + linear.rank

    @property
    def begins(self) -> tuple[int, ...]:
        """The outputs with which each linear layer after the first begins, if all have as many ranks and there are no
        others; else none."""
        rank = self.linears[0].rank
        if any(linear.rank != rank for linear in self.linears) or self.used_ranks < self.rank:
            return ()
        return tuple(itertools.accumulate(linear.base.out_features for linear in self.linears[:-1]))

    def gradients(
        self, sums_a: Tensor | None, sums_b: Sequence[Tensor | None], *, are_gradients: bool
    ) -> list[Tensor | None]:
        """Gradients of `parameters`, in fp32; None where none is asked for. See LowRankSums for the arguments."""
        grads: list[Tensor | None] = []
        rank_row = 0
        for linear, own_b in zip(self.linears, sums_b, strict=True):
            own_column = 0
            for adapter in linear.adapters:
                of_a = of_b = None
                if adapter.lora_a.requires_grad:
                    assert sums_a is not None
                    of_a = sums_a[rank_row : rank_row + adapter.rank]
                if adapter.lora_b.requires_grad:
                    assert own_b is not None
                    of_b = own_b
                    if not are_gradients:
                        own = own_b[:, own_column : own_column + adapter.rank]
                        # Into memory of its own: a view would keep the whole sum alive.
                        of_b = torch.mul(own, adapter.scaling, out=own.new_empty(own.shape))
                grads += [of_a, of_b]
                rank_row += adapter.rank
                own_column += adapter.rank
        return grads


@dataclass(frozen=True)
class ExtendedWeight:
    """[[W, sB], [A, .]] of a group: [rows + rank, columns + rank], last stride 1."""

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
    def down(self) -> Tensor | None:
        """A, [rank, columns], what the forward pass appends products with."""
        return self.data[self.rows :, : self.columns] if len(self.data) > self.rows else None

    @property
    def up(self) -> Tensor | None:
        """(sB)^T, [rank, rows], what the backward pass appends products with."""
        return self.data[: self.rows, self.columns :].T if len(self.data) > self.rows else None


class LowRankSums:
    """Sums over tokens that the gradients of a group's A and B are made of, in fp32.

    Those for A are added up over parts of a batch; both may be put here by whoever has them.

    Args:
        norm: The weight w [in] of the RMSNorm before the group, if there is one: `add_a` is given that norm's input x,
            not its output x rstd w, since (dY sB)^T (x rstd w) = ((dY sB rstd)^T x) w.

    Attributes:
        a: [used ranks, in], for all A of the group over each other; None as long as there is none.
        b: [its out, its rank] for each linear layer of the group, or None; may be views.
        b_are_gradients: Whether those of `b` are the gradients, contiguous and times the scaling, and whatever else is
            in the memory that they are views of is a gradient, too.
        wants_a: Whether an A of the group needs a gradient.
        wants_b: Whether a B does, for each linear layer.
        scalings: Of each linear layer that has one adapter, else 1.
    """

    def __init__(self, group: LinearGroup, norm: Tensor | None = None) -> None:
        self.group = group
        self.norm = norm
        self._adapters = [linear.adapters for linear in group.linears]
        self.wants_a = any(adapter.lora_a.requires_grad for own in self._adapters for adapter in own)
        self.wants_b = [any(adapter.lora_b.requires_grad for adapter in own) for own in self._adapters]
        self.scalings = [own[0].scaling if len(own) == 1 else 1.0 for own in self._adapters]
        self.a: Tensor | None = None
        self.b: Sequence[Tensor | None] = [None] * len(self._adapters)
        self.b_are_gradients = False

    @property
    def wants_single_b(self) -> bool:
        """Whether no layer with a B that needs a gradient has a second adapter."""
        return all(len(own) == 1 for own, wants in zip(self._adapters, self.wants_b, strict=True) if wants)

    def add_a(self, x: Tensor, grad_low: Tensor, rstd: Tensor | None = None) -> None:
        """Add a part's to `a`, if it is wanted.

        Args:
            x: [tokens, in], the group's input; the input of its norm, if there is one.
            grad_low: dY sB, [tokens, rank].
            rstd: fp32 [tokens], of the norm.
        """
        if self.wants_a:
            # Without the columns that fill up a tile: a gradient is a view of the sums, and would keep theirs alive.
            self.a = grad_a(grad_low[:, : self.group.used_ranks], x, rstd, self.norm, self.a)

    def pair(self, grad_x: Tensor, weight: ExtendedWeight, low: Tensor | None) -> None:
        """Put dY sB beside dY, and make `b`, as far as it is wanted. The group's first use of its gradient.

        Args:
            grad_x: [tokens, out + rank]: dY, and room.
            low: The group's input times A^T, [tokens, rank]; None for no adapters.
        """
        if low is None or weight.up is None:
            return
        if not any(self.wants_b):
            fill_columns(grad_x, weight.rows, weight.up)
            return
        group, begins = self.group, self.group.begins
        is_even = len(begins) + 1 == len(group.linears) and group.used_ranks == group.rank
        self.b_are_gradients = is_even and all(self.wants_b) and self.wants_single_b
        scalings = self.scalings if self.b_are_gradients else [1.0] * (len(begins) + 1)
        sums = low_rank_pair_(grad_x, weight.rows, weight.up, low, begins, scalings)
        outputs = sums.split([linear.base.out_features for linear in group.linears])
        if is_even:
            self.b = outputs
        else:
            ranks = [linear.rank for linear in group.linears]
            starts = itertools.accumulate(ranks, initial=0)
            own = zip(outputs, starts, ranks, strict=False)
            self.b = [block[:, start : start + rank] for block, start, rank in own]

    def gradients(self) -> list[Tensor | None]:
        """One for each of the group's parameters."""
        return self.group.gradients(self.a, self.b, are_gradients=self.b_are_gradients)


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
