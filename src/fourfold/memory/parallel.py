"""How several GPUs share a run: what each holds of it, and what passes between them.

Every GPU works on rows of its own. What a strategy does not shard is whole on each of them.

Traffic is that of rings, which send and receive (N - 1) / N of what is gathered or scattered, and twice that of what is
reduced on all (https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/collectives.html).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ONE_GPU", "STRATEGIES", "Parallelism", "Shards"]


@dataclass(frozen=True)
class Shards:
    """Of what each GPU holds its share only.

    Args:
        weights: Of decoder layers, the base's and the trained ones; gathered layer by layer in each pass. The rest,
            such as embeddings, is whole everywhere.
        gradients: Those of trained weights.
        optimizer: Its state; each GPU updates what it has the state of.
    """

    weights: bool = False
    gradients: bool = False
    optimizer: bool = False


# name -> what is sharded; in the order of their simplicity.
STRATEGIES: dict[str, Shards] = {
    # torch's DistributedDataParallel
    "data parallel": Shards(),
    # torch's FSDP2, layer by layer
    "sharded": Shards(weights=True, gradients=True, optimizer=True),
}


@dataclass(frozen=True)
class Parallelism:
    """A strategy over so many GPUs.

    Args:
        num_gpus: How many; 1: all else says nothing.
        strategy: A key of `STRATEGIES`.
    """

    num_gpus: int = 1
    strategy: str = "data parallel"

    @property
    def shards(self) -> Shards:
        return STRATEGIES[self.strategy] if self.num_gpus > 1 else Shards()

    @property
    def text(self) -> str:
        """For people: nothing of one GPU."""
        return f"{self.num_gpus} GPUs, {self.strategy}" if self.num_gpus > 1 else ""

    def share(self, num_bytes: int, is_sharded: bool) -> int:
        """What one GPU holds."""
        return -(-num_bytes // self.num_gpus) if is_sharded else num_bytes

    def bucket_bytes(self, gradients: int) -> int:
        """What gradients are reduced in: DDP copies them into flat buckets, as many bytes again. Accelerate and the
        Trainer leave `gradient_as_bucket_view`, which saves that, off, as torch does."""
        return gradients if self.num_gpus > 1 and not self.shards.gradients else 0

    def gathered_bytes(self, layer: int) -> int:
        """What a GPU receives of a layer's weights in one pass."""
        return self._passed(layer) if self.shards.weights else 0

    def reduced_bytes(self, gradients: int) -> int:
        """What a GPU receives to have all of the gradients summed, or its share of them."""
        return self._passed(gradients) * (1 if self.shards.gradients else 2)

    def traffic_bytes(self, layers: int, gradients: int, accumulation: int) -> int:
        """What each GPU receives, and sends, in an optimizer step.

        Args:
            layers: Bytes of all layers' weights.
            gradients: Bytes of all gradients.
            accumulation: Microbatches of a step. Shards are gathered twice and gradients scattered in each; whole
                gradients are reduced with the last.
        """
        each = 2 * self.gathered_bytes(layers)
        if self.shards.gradients:
            return accumulation * (each + self.reduced_bytes(gradients))
        return accumulation * each + self.reduced_bytes(gradients)

    def _passed(self, num_bytes: int) -> int:
        return num_bytes * (self.num_gpus - 1) // self.num_gpus


ONE_GPU = Parallelism()
