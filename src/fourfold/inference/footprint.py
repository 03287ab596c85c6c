"""What serving a model takes: its weights, the cache of its sequences, and what a pass works with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from fourfold.errors import InferenceError
from fourfold.inference.cache import FIRST_BUCKET, CacheShape
from fourfold.inference.options import EngineOptions
from fourfold.kernels.host_memory import spare_bytes
from fourfold.models.size import model_size
from fourfold.models.underlying import underlying
from fourfold.quantization.linear import QuantizedWeight

__all__ = ["ServingFootprint", "fitting_options", "free_bytes", "serving_footprint"]

MIB = 2**20

# Sequences and tokens that are aimed at where neither is named.
MOST_SEQUENCES = 64
_LEAST_LENGTH = 128

# Bytes that sampling holds of one logit at its peak: fp32 scores, sorted and filtered, an order and noise in int64, and
# what a slot remembers of its answer's tokens, which is gathered for the rows of a pass.
_SAMPLING_BYTES = 54


@dataclass(frozen=True)
class ServingFootprint:
    """Bytes on the device of the model.

    Args:
        sequences, length: How many at a time, of how many tokens at most.
        base: The model's weights, quantized as they are.
        adapters: All adapters it has.
        cache: Keys and values of all sequences at their full length.
        temporary: What a pass and sampling take at most, beside these, and what CUDA graphs of prompts keep.
    """

    sequences: int
    length: int
    base: int
    adapters: int
    cache: int
    temporary: int

    @property
    def total(self) -> int:
        return self.base + self.adapters + self.cache + self.temporary

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total}

    def lines(self) -> list[str]:
        parts = ("base", "adapters", "cache", "temporary")
        told = ", ".join(f"{name} {getattr(self, name) / MIB:,.0f}" for name in parts if getattr(self, name))
        return [
            f"memory for {_counted(self.sequences, 'sequence')} of up to {self.length:,} tokens: "
            f"{self.total / MIB:,.0f} MiB",
            f"  {told}",
        ]


def serving_footprint(
    model: nn.Module,
    shape: CacheShape,
    options: EngineOptions,
    sequences: int,
    length: int,
    captured_bytes: Callable[[int], int] = lambda _: 0,
) -> ServingFootprint:
    """What so many sequences of so many tokens take, each at its full length. `captured_bytes` is the step's."""
    total = model_size(model).num_bytes
    adapters = _adapter_bytes(model)
    return ServingFootprint(
        sequences=sequences,
        length=length,
        base=total - adapters,
        adapters=adapters,
        cache=shape.num_bytes(sequences, length),
        temporary=temporary_bytes(model, shape, options, sequences, length) + captured_bytes(length),
    )


def temporary_bytes(model: nn.Module, shape: CacheShape, options: EngineOptions, sequences: int, length: int) -> int:
    """An upper bound of what a step takes beside weights, cache and CUDA graphs.

    The larger of growing the cache and of a pass; a pass reads a part of a prompt, or a token of each sequence. Keys
    and values of one layer may be gathered, and repeated for the query heads that share them; a weight, or the three of
    an MLP, are expanded to 16 bits; masks, activations and logits are there, and what sampling makes of these.
    """
    config: Any = underlying(model).config.get_text_config(decoder=True)
    element = shape.dtype.itemsize
    hidden = int(config.hidden_size)
    widths = getattr(config, "intermediate_size", None) or 4 * hidden
    intermediate = max(widths) if isinstance(widths, list | tuple) else int(widths)
    heads = int(getattr(config, "num_attention_heads", 1))
    kv_heads = min((layer.kv_heads for layer in shape.layers if layer is not None), default=heads)
    chunk = min(max(options.prefill_chunk, options.prefill_alone), length)
    expanded = [module.quantized.num_elements for module in model.modules() if isinstance(module, QuantizedWeight)]
    layer = length * shape.layer_token_bytes
    repeated = max(1, heads // kv_heads) * layer

    def working(tokens: int, rows: int) -> int:
        activations = tokens * (8 * hidden + 4 * intermediate) * element
        mask = tokens * length * element
        return activations + mask + rows * repeated + 3 * max(expanded, default=0) * element

    logits = int(config.vocab_size) * _SAMPLING_BYTES
    read = working(chunk, 1) + logits
    decode = working(sequences, sequences) + sequences * (layer + logits)
    return max(read, decode, shape.growing_bytes(sequences, length))


def fitting_options(
    model: nn.Module,
    shape: CacheShape,
    options: EngineOptions,
    context: int | None,
    free: int | None,
    captured_bytes: Callable[[int], int] = lambda _: 0,
) -> tuple[int, int]:
    """Sequences and tokens of each: as asked for, and where that is left open, what fits.

    Args:
        model: The model, on its device already.
        shape: What it keeps of a token.
        options: What is asked for.
        context: Tokens the model can read; None for no bound.
        free: Bytes beside the model; None to take what is asked for.
        captured_bytes: The step's.

    Raises:
        InferenceError: What is asked for does not fit; it names what does.
    """
    longest = min(one for one in (options.max_length, context, 2**31) if one is not None)
    if options.max_length is None and context is None:
        longest = FIRST_BUCKET * 4
    sequences = options.max_sequences or MOST_SEQUENCES
    if free is None:
        return sequences, longest

    def needs(count: int, length: int) -> int:
        temporary = temporary_bytes(model, shape, options, count, length) + captured_bytes(length)
        return shape.num_bytes(count, length) + temporary

    def fits(count: int, length: int) -> bool:
        return needs(count, length) <= free

    if fits(sequences, longest):
        return sequences, longest
    # Fewer sequences where their number is open, and shorter ones where their length is.
    if options.max_sequences is None:
        count = _most(lambda count: fits(count, longest), sequences)
        if count:
            return count, longest
    if options.max_length is None:
        count = options.max_sequences or 1
        length = _most(lambda length: fits(count, length), longest)
        if length >= _LEAST_LENGTH:
            return count, length
    count = _most(lambda count: fits(count, longest), sequences)
    length = _most(lambda length: fits(sequences, length), longest)
    one = _most(lambda length: fits(1, length), longest)
    possible = [
        f"{_counted(count, 'sequence')} of {longest:,} tokens" if count else "",
        f"{_counted(sequences, 'sequence')} of {length:,} tokens" if length >= _LEAST_LENGTH else "",
        f"1 sequence of {one:,} tokens" if one >= _LEAST_LENGTH and not count else "",
    ]
    needed = needs(sequences, longest)
    raise InferenceError(
        "the cache does not fit the memory that the model leaves",
        found=f"{_counted(sequences, 'sequence')} of {longest:,} tokens take {needed / MIB:,.1f} MiB of "
        f"{free / MIB:,.1f}",
        allowed=" or ".join(filter(None, possible)) or "nothing: the model itself leaves too little",
        hint="fewer sequences (max_sequences), shorter ones (max_length), or a base in 4 bits",
    )


def free_bytes(device: torch.device) -> int | None:
    """What is left on a device for this process, with what PyTorch holds and does not use; None if unknown."""
    if device.type == "cpu":
        return spare_bytes()
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number up to the limit that fits, where all smaller ones do; 0 for none."""
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        if fits(middle):
            least = middle
        else:
            most = middle - 1
    return least


def _adapter_bytes(model: nn.Module) -> int:
    if not isinstance(model, PeftModel):
        return 0
    prefix = model.base_model.prefix
    return sum(value.nbytes for name, value in model.named_parameters() if prefix in name)
