"""When memory runs out all the same: what is told, and what is left in good order."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.optim import Optimizer

from fourfold.errors import TrainingError
from fourfold.kernels.shards import is_sharded, local_part
from fourfold.models.sharding import held_bytes
from fourfold.models.size import model_size
from fourfold.models.streaming import stream_of

__all__ = [
    "OutOfMemory",
    "by_kind",
    "compare_parts",
    "is_out_of_memory",
    "let_go",
    "part_key",
    "parts_in_use",
    "reporting_out_of_memory",
    "standing_parts",
    "with_rest",
]

GIB = 2**30
# What a plan's parts are called -> what can be told apart in a run.
_KINDS = {
    "weights, 16 bits": "weights",
    "weights, 32 bits": "weights",
    "weights, quantized": "weights",
    "quantization state": "weights",
    "adapters": "adapters",
    "optimizer state": "optimizer state",
    "layers on their way": "weights",
}
_REST = "activations, gradients and what is worked in"


class OutOfMemory(TrainingError):  # noqa: N818 - named as torch names it
    """A step did not fit. No update was made of it; whatever was made before is in the checkpoint.

    Attributes:
        step: The last step that was made.
        checkpoint: Its checkpoint; None before the first.
        parts: Bytes in use at the peak, see `parts_in_use`.
        standing_bytes: Of them, what stays from step to step.
    """

    def __init__(self, step: int, checkpoint: Path | None, parts: Mapping[str, int], reason: str) -> None:
        self.step, self.checkpoint, self.parts = step, checkpoint, dict(parts)
        self.standing_bytes = sum(size for part, size in parts.items() if part != _REST)
        told = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts.items())
        super().__init__(
            f"memory ran out in step {step + 1}; no update was made of it",
            found=f"{reason}; at the peak {told}",
            hint="a smaller per_device_train_batch_size or max_length, or another recompute; `fourfold plan` shows them"
            + (f"; {checkpoint} holds all steps before" if checkpoint else ""),
        )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether memory of the GPU ran out: torch's allocator, or a library that has its own way to say so.

    What is loaded late, such as a kernel, lies outside the allocator; its error is Triton's, CUDA's, cuBLAS's, cuDNN's.
    """
    told = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "ALLOC_FAILED" in told


def parts_in_use(model: nn.Module, optimizer: Optimizer | None, peak_bytes: int) -> dict[str, int]:
    """What of the peak belongs to weights, adapters and optimizer; the rest is all else."""
    return with_rest(standing_parts(model, optimizer), peak_bytes)


def standing_parts(model: nn.Module, optimizer: Optimizer | None) -> dict[str, int]:
    """Bytes on the device that stay from step to step: weights, adapters, and what state the optimizer has so far."""
    # Where all of the model is trained there are no adapters.
    is_adapted = isinstance(model, PeftModel)
    adapters = [(local_part(own), own) for own in model.parameters() if own.requires_grad and is_adapted]
    # Elsewhere is what ZeRO-3 offloads.
    trained = sum(part.nbytes for part, own in adapters if part.device == own.device)
    states = [] if optimizer is None else list(optimizer.state.values())
    held = _storages(value for state in states for value in state.values() if isinstance(value, Tensor))
    are_sharded = any(is_sharded(parameter) for parameter in model.parameters())
    weights = held_bytes(model) if are_sharded else model_size(model).num_bytes
    stream = stream_of(model)
    elsewhere = 0 if stream is None else sum(stream.layers) - stream.device_bytes
    return {
        "weights": weights - trained - elsewhere,
        "adapters": trained,
        "optimizer state": held,
    }


def with_rest(parts: Mapping[str, int], peak_bytes: int) -> dict[str, int]:
    """The parts, and what the peak was beside them."""
    return {**parts, _REST: max(0, peak_bytes - sum(parts.values()))}


def part_key(part: str) -> str:
    """A part's name in a log: "memory_weights_bytes"."""
    return f"memory_{'rest' if part == _REST else part.replace(' ', '_')}_bytes"


def _storages(tensors: Iterable[Tensor]) -> int:
    """Bytes on GPUs, what several views share counted once."""
    found = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if tensor.is_cuda}
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def by_kind(planned: Mapping[str, int]) -> dict[str, int]:
    """A plan's parts as they can be told apart in a run, under the names of `parts_in_use`."""
    kinds = dict.fromkeys(("weights", "adapters", "optimizer state", _REST), 0)
    for part, size in planned.items():
        kinds[_KINDS.get(part, _REST)] += size
    return kinds


def compare_parts(planned: Mapping[str, int], measured: Mapping[str, int]) -> list[str]:
    """Lines that set a plan's parts beside what was in use."""
    kinds = by_kind(planned)
    lines = [f"{'':46}{'planned':>10}{'in use':>10}  GiB"]
    for kind, size in measured.items():
        lines.append(f"{kind:<46}{kinds[kind] / GIB:>10.2f}{size / GIB:>10.2f}")
    totals = sum(kinds.values()), sum(measured.values())
    lines.append(f"{'together':<46}{totals[0] / GIB:>10.2f}{totals[1] / GIB:>10.2f}")
    return lines


def let_go(error: BaseException) -> None:
    """Free what a failed step still holds: the frames of its traceback, and the allocator's cache."""
    while error.__context__ is not None or error.__traceback__ is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        if error.__context__ is None:
            break
        error = error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def reporting_out_of_memory(during: str, hint: str) -> Iterator[None]:
    """Says of what is in no plan, when it does not fit, what it was and what to do.

    Args:
        during: What was being done: "the model was loaded".
        hint: What to do about it.

    Raises:
        TrainingError: The GPU's memory ran out within.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0]
        let_go(error)
        raise TrainingError(f"memory ran out while {during}", found=reason, hint=hint) from None
