"""How several GPUs share a run: what each holds of it, and what passes between them.

Traffic is that of rings, which send and receive (N - 1) / N of what is gathered or scattered, and twice that of what is
reduced on all (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/collectives.html). Sources of what each
strategy holds and passes:

- ZeRO 1, 2, 3: Rajbhandari et al., https://arxiv.org/abs/1910.02054, table 1 and section 7; of fp32 copies, buckets and
  offloading, DeepSpeed's `runtime/zero`;
- FSDP2: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html;
- tensor parallel: Shoeybi et al., https://arxiv.org/abs/1909.08053, section 3;
- pipeline parallel: Narayanan et al., https://arxiv.org/abs/2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["OFFLOADS", "ONE_GPU", "STRATEGIES", "Parallelism", "Shards"]

# What of ZeRO's is in host memory, from the least to the most.
OFFLOADS = ("none", "optimizer", "all")
_FP32 = 4
# DeepSpeed's default of `stage3_max_live_parameters`, numbers of their parameters' dtypes.
LIVE_NUMBERS = 1_000_000_000
# Layers that FSDP2 has gathered at a time: one at work, one on its way.
GATHERED_LAYERS = 2


@dataclass(frozen=True)
class Shards:
    """A strategy: what GPUs divide, and of what each holds its share only.

    Args:
        divides: "rows" of a step, for which each GPU has the whole computation; "tensors", each layer's heads and
            columns; or "layers".
        weights: The base's and the trained ones; those of decoder layers are gathered layer by layer in each pass,
            embedding and head when they are at work. Norms are whole.
        gradients: Those of trained weights.
        optimizer: Its state; each GPU updates what it has the state of.
        sums_in_fp32: Whether gradients are summed in fp32, whatever they are kept in.
        has_copies: Whether the optimizer updates fp32 copies of what is trained, a share on each GPU.
        offloads: What may be in host memory, of `OFFLOADS`.
        optimizers: That there are for it; None: every one.
        runs_by_graphs: Whether blocks may run by CUDA graphs: gathered weights lie elsewhere in each pass, GPUs do not
            speak within a graph, and DeepSpeed wants gradients in an order of its own.
        runs: Whether `fourfold train` has it; else it is a forecast only.
    """

    divides: str = "rows"
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    sums_in_fp32: bool = False
    has_copies: bool = False
    offloads: tuple[str, ...] = ("none",)
    optimizers: tuple[str, ...] | None = None
    runs_by_graphs: bool = False
    runs: bool = True


_WHOLE = Shards(runs_by_graphs=True)
# DeepSpeed gives an optimizer flat fp32 tensors, of which 8-bit blocks and factors cannot be told again.
_ZERO = Shards(
    optimizer=True,
    has_copies=True,
    offloads=OFFLOADS[:2],
    optimizers=("adamw", "adamw_torch", "adamw_torch_fused"),
)
# As `distributed` names those that run; of equally fast ones the first is taken.
STRATEGIES: dict[str, Shards] = {
    "ddp": _WHOLE,
    "fsdp2": Shards(weights=True, gradients=True, optimizer=True, sums_in_fp32=True),
    "zero1": _ZERO,
    "zero2": replace(_ZERO, gradients=True),
    "zero3": replace(_ZERO, weights=True, gradients=True, offloads=OFFLOADS),
    "tensor parallel": Shards(divides="tensors", runs=False),
    "pipeline parallel": Shards(divides="layers", runs=False),
}


@dataclass(frozen=True)
class Parallelism:
    """A strategy over so many GPUs.

    Args:
        num_gpus: How many; 1: all else says nothing.
        strategy: A key of `STRATEGIES`.
        offload: What is in host memory, of the strategy's `offloads`: with "optimizer" its state, fp32 copies and the
            shares of gradients; with "all" the shares of weights, too.
    """

    num_gpus: int = 1
    strategy: str = "ddp"
    offload: str = "none"

    @property
    def shards(self) -> Shards:
        return STRATEGIES[self.strategy] if self.num_gpus > 1 else _WHOLE

    @property
    def name(self) -> str:
        """For people."""
        return self.strategy if self.offload == "none" else f"{self.strategy}, {self.offload} in host memory"

    @property
    def row_groups(self) -> int:
        """Among how many the rows of a step are parted."""
        return self.num_gpus if self.shards.divides == "rows" else 1

    @property
    def num_stages(self) -> int:
        """Of a pipeline."""
        return self.num_gpus if self.shards.divides == "layers" else 1

    @property
    def offloads_optimizer(self) -> bool:
        return self.offload != "none"

    @property
    def offloads_weights(self) -> bool:
        return self.offload == "all"

    def share(self, num_bytes: int, is_sharded: bool = True) -> int:
        """What one GPU has of it, wherever that is."""
        return -(-num_bytes // self.num_gpus) if is_sharded else num_bytes

    def weights_held(self, num_bytes: int) -> int:
        """What a GPU's memory holds of weights that are sharded where any are, when they are not at work."""
        return 0 if self.offloads_weights else self.share(num_bytes, self.shards.weights)

    def gradients_held(self, num_bytes: int) -> int:
        """What a GPU's memory holds of gradients that are sharded where any are."""
        if self.shards.gradients and self.offloads_optimizer:
            return 0
        return self.share(num_bytes, self.shards.gradients)

    def copy_bytes(self, num_trained: int) -> int:
        """A GPU's share of fp32 copies of what is trained."""
        return self.share(_FP32 * num_trained) if self.shards.has_copies else 0

    def bucket_bytes(self, gradients: int, largest_layer: int, hidden: int, element: int) -> int:
        """What gradients are reduced in.

        DDP copies them into flat buckets, as many bytes again: Accelerate and the Trainer leave
        `gradient_as_bucket_view`, which saves that, off, as torch does. FSDP2 copies those of a layer before it
        scatters them. DeepSpeed has a bucket of hidden² numbers, which Transformers sets, however few there are.

        Args:
            gradients: Of all that is trained.
            largest_layer: Of a layer.
            hidden: Width of the residual stream.
            element: Bytes of a gradient's number.
        """
        shards = self.shards
        if self.num_gpus == 1 or shards.divides != "rows":
            return 0
        if shards.has_copies:
            return hidden * hidden * element
        return self.summed_bytes(largest_layer, element) if shards.gradients else gradients

    def live_bytes(self, layers: Sequence[int], element: int) -> int:
        """What a GPU holds of gathered weights beside its shares: FSDP2 a number of layers, ZeRO-3 as many numbers as
        are soon wanted again.

        Args:
            layers: Bytes of each layer's sharded weights.
            element: Bytes of a number of the base's, 1 of codes.
        """
        if not self.shards.weights:
            return 0
        few = GATHERED_LAYERS * max(layers)
        return max(few, min(sum(layers), LIVE_NUMBERS * element)) if self.shards.has_copies else few

    def summed_bytes(self, gradients: int, element: int) -> int:
        """Gradients as they pass."""
        return gradients * _FP32 // element if self.shards.sums_in_fp32 else gradients

    def gathered_bytes(self, num_bytes: int) -> int:
        """What a GPU receives of sharded weights in one pass."""
        return self.passed(num_bytes) if self.shards.weights else 0

    def scattered_bytes(self, gradients: int, element: int) -> int:
        """What a GPU receives of gradients in a backward pass of each microbatch."""
        return self.passed(self.summed_bytes(gradients, element)) if self.shards.gradients else 0

    def reduced_bytes(self, gradients: int) -> int:
        """What a GPU receives of whole gradients with the last microbatch: all of the sums, or its share of them."""
        if self.shards.gradients or self.shards.divides != "rows":
            return 0
        return self.passed(gradients) * (1 if self.shards.optimizer else 2)

    def renewed_bytes(self, trained: int) -> int:
        """What a GPU receives of whole trained weights that others updated."""
        return self.passed(trained) if self.shards.optimizer and not self.shards.weights else 0

    def passed(self, num_bytes: int) -> int:
        """Received of what is gathered, or scattered."""
        return num_bytes * (self.num_gpus - 1) // self.num_gpus


ONE_GPU = Parallelism()
