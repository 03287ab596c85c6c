"""What a fused block's passes hold at each moment, in bytes: `block_forward` and `block_backward`, tensor by tensor.

A moment is a point where memory may be at its highest: all tensors of the block that are alive there, by name. Those
that outlive the forward pass are in the moments, too, so that nothing is counted twice when a peak is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.kernels.host_memory import rounded_to_pages
from fourfold.kernels.low_rank import row_length
from fourfold.models.block_state import parts
from fourfold.models.following import GRADIENTS
from fourfold.models.recomputation import POLICIES, offloaded_bytes

__all__ = ["BlockMemory", "BlockShape", "Tensors"]

# Name -> bytes.
Tensors = dict[str, int]

_FP32 = 4


@dataclass(frozen=True)
class BlockShape:
    """A block's widths, and the ranks of its groups of linear layers as they stand beside their inputs.

    Args:
        hidden, intermediate: Widths of the residual stream and of the MLP.
        num_heads, num_kv_heads, head_dim: Of the attention.
        has_head_norms: Whether q and k are normed, for which qkv is kept as it was before.
        qkv_rank, out_rank, gate_up_rank, down_rank: Low-rank columns of each group.
        adapter_parameters: Trained numbers of the block.
        element_size: Bytes of a number of the activations.
    """

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_head_norms: bool
    qkv_rank: int
    out_rank: int
    gate_up_rank: int
    down_rank: int
    adapter_parameters: int
    element_size: int = 2

    @property
    def features(self) -> int:
        """Of the attention's output."""
        return self.num_heads * self.head_dim

    @property
    def gradient_bytes(self) -> int:
        return self.adapter_parameters * _FP32

    @property
    def weight_bytes(self) -> int:
        return sum(self.products.values()) * self.element_size

    def memory(self, batch: int, seq: int, policy: str) -> BlockMemory:
        return BlockMemory(self, batch * seq, policy)

    @property
    def qkv_width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def products(self) -> dict[str, int]:
        """Weights of each group of linear layers."""
        return {
            "qkv": self.qkv_width * self.hidden,
            "out": self.features * self.hidden,
            "gate_up": 2 * self.intermediate * self.hidden,
            "down": self.intermediate * self.hidden,
        }


@dataclass(frozen=True)
class BlockMemory:
    """One block's tensors for so many tokens under one policy."""

    shape: BlockShape
    tokens: int
    policy: str

    def _rows(self, rows: int, width: int, rank: int = 0) -> int:
        """Bytes of `rows` of `width` numbers with room for `rank` more."""
        return rows * row_length(width, rank) * self.shape.element_size

    def _weight(self, rows: int, columns: int, rank: int) -> int:
        """The extended weight of a group, see `linear_group`."""
        return self._rows(rows + rank, columns, rank)

    @property
    def _weights(self) -> Tensors:
        shape = self.shape
        return {
            "weight of q, k, v": self._weight(shape.qkv_width, shape.hidden, shape.qkv_rank),
            "weight of o": self._weight(shape.hidden, shape.features, shape.out_rank),
            "weight of gate, up": self._weight(2 * shape.intermediate, shape.hidden, shape.gate_up_rank),
            "weight of down": self._weight(shape.hidden, shape.intermediate, shape.down_rank),
        }

    @property
    def _attention_workspace(self) -> int:
        """What cuDNN sums the gradient of q in, and, where heads of q share k and v, these gradients for each head."""
        shape = self.shape
        shared = 0 if shape.num_kv_heads == shape.num_heads else 2 * shape.element_size
        return self.tokens * shape.features * (_FP32 + shared)

    @property
    def part(self) -> int:
        """Tokens that the MLP works on at once."""
        policy = POLICIES[self.policy]
        sizes = parts(self.tokens, whole="gate_up" in policy.keeps, offload=policy.offload)
        return max((part.stop - part.start for part in sizes), default=0)

    @property
    def _all(self) -> Tensors:
        """Every activation of the block by name."""
        shape, tokens = self.shape, self.tokens
        low = {
            "low_qkv": shape.qkv_rank,
            "low_out": shape.out_rank,
            "low_gate_up": shape.gate_up_rank,
            "low_down": shape.down_rank,
        }
        return {
            "x": self._rows(tokens, shape.hidden),
            "qkv": self._rows(tokens, shape.qkv_width),
            "attention": self._rows(tokens, shape.features),
            "lse": tokens * shape.num_heads * _FP32,
            "mid": self._rows(tokens, shape.hidden),
            "gate_up": self._rows(tokens, 2 * shape.intermediate, shape.gate_up_rank),
            **{name: tokens * rank * shape.element_size for name, rank in low.items()},
            "rstd1": tokens * _FP32,
            "rstd2": tokens * _FP32,
        }

    def kept(self) -> Tensors:
        """What waits for the backward pass; see `block_state.Saved`."""
        keeps = POLICIES[self.policy].keeps
        names = ["x", "low_out", "low_down"]
        for kept, more in (
            ("qkv", ["qkv", "rstd1", "low_qkv"]),
            ("attention", ["attention", "lse"]),
            ("mid", ["mid"]),
            ("gate_up", ["gate_up", "rstd2", "low_gate_up"]),
        ):
            if kept in keeps:
                names += more
        every = self._all
        return {name: every[name] for name in names}

    def offloaded(self) -> Tensors:
        """Of `kept`, what waits in host memory."""
        if not POLICIES[self.policy].offload:
            return {}
        return {name: size for name, size in self.kept().items() if name in ("x", "qkv", "mid", "attention", "lse")}

    def host_bytes(self) -> int:
        """What that takes there: one buffer of whole pages."""
        return rounded_to_pages(offloaded_bytes(self.offloaded().values()))

    def forward_moments(self) -> list[Tensors]:
        """The forward pass: after the attention, after the output projection, and in the MLP."""
        shape, tokens, weights, every = self.shape, self.tokens, self._weights, self._all
        kept = self.kept()
        normed1 = {"normed input": self._rows(tokens, shape.hidden, shape.qkv_rank), "rstd1": every["rstd1"]}
        attended: Tensors = {name: every[name] for name in ("x", "low_qkv", "qkv", "attention", "lse")}
        if shape.has_head_norms:
            attended["qkv, rotated"] = every["qkv"]
        first: Tensors = {**attended, **normed1, "weight of q, k, v": weights["weight of q, k, v"]}
        so_far: Tensors = {
            name: kept[name] for name in ("x", "qkv", "rstd1", "low_qkv", "attention", "lse") if name in kept
        }
        second: Tensors = {
            **so_far,
            **{name: every[name] for name in ("attention", "lse", "low_out", "mid")},
            "attention, extended": self._rows(tokens, shape.features, shape.out_rank),
            "weight of o": weights["weight of o"],
        }
        third: Tensors = {
            **so_far,
            **{name: every[name] for name in ("low_out", "low_down", "low_gate_up", "rstd2", "mid")},
            "output": every["x"],
            "normed mid": self._rows(tokens, shape.hidden, shape.gate_up_rank),
            "gate_up": self._rows(self.part, 2 * shape.intermediate, shape.gate_up_rank),
            "activation": self._rows(self.part, shape.intermediate, shape.down_rank),
            **{name: weights[name] for name in ("weight of gate, up", "weight of down")},
        }
        return [first, second, third]

    def backward_moments(self) -> list[Tensors]:
        """The backward pass: in the MLP, in the attention, and at the end."""
        shape, tokens, weights, every = self.shape, self.tokens, self._weights, self._all
        keeps, kept = POLICIES[self.policy].keeps, self.kept()
        early = not {"mid", "attention"} <= keeps
        incoming = {"gradient of the output": self._rows(tokens, shape.hidden, shape.down_rank)}
        sums = {GRADIENTS: shape.gradient_bytes}
        half = {name: every[name] for name in ("low_qkv", "qkv", "attention", "lse", "rstd1")}
        half |= {"weight of q, k, v": weights["weight of q, k, v"]}
        if shape.has_head_norms:
            half["qkv, rotated"] = every["qkv"]
        mlp = {
            **kept,
            **incoming,
            **sums,
            "mid": every["mid"],
            "rstd2": every["rstd2"],
            "low_gate_up": every["low_gate_up"],
            "gate_up": self._rows(self.part, 2 * shape.intermediate, shape.gate_up_rank),
            "gradient of the activation": self._rows(self.part, shape.intermediate),
            "gradient of normed mid": every["x"],
            **{name: weights[name] for name in ("weight of gate, up", "weight of down")},
        }
        if early:
            mlp |= half
        if "mid" not in keeps:
            mlp["weight of o"] = weights["weight of o"]
        if "gate_up" not in keeps:
            mlp["normed mid"] = self._rows(tokens, shape.hidden, shape.gate_up_rank)
        rest = {name: size for name, size in kept.items() if name not in ("mid", "gate_up", "rstd2", "low_gate_up")}
        grad_mid = {"gradient of mid": self._rows(tokens, shape.hidden, shape.out_rank)}
        grads = {
            "gradient of attention": every["attention"],
            "gradient of q, k, v by head": every["qkv"],
            "workspace of attention": self._attention_workspace,
        }
        attention = {**rest, **incoming, **sums, **half, **grad_mid, **grads, "weight of o": weights["weight of o"]}
        grad_qkv = {"gradient of q, k, v": self._rows(tokens, shape.qkv_width, shape.qkv_rank)}
        end = {**rest, **incoming, **sums, **half, **grad_mid, **grad_qkv}
        end |= {"gradient of normed input": every["x"], "gradient of the input": incoming["gradient of the output"]}
        return [mlp, attention, end]
