"""How fast a model trains on this machine and in how much memory, for each way to recompute activations."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fourfold.data.packing import supervised_positions
from fourfold.errors import ConfigError, TrainingError
from fourfold.memory.meter import memory_used, reset_peak
from fourfold.models.block import FusedDecoderLayer, set_recomputation
from fourfold.models.recomputation import POLICIES
from fourfold.optimizers import AdamW
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model
from fourfold.training.loss import supervised_cross_entropy

__all__ = ["SHAPES", "BenchReport", "BenchRow", "bench", "random_model", "shape_config"]

# name -> what of LlamaConfig tells it from the others; 8b is Llama-3-8B, 1b Llama-3.2-1B
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    # for trying things out on a CPU
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
}

_WARM_UP_STEPS = 2
_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class BenchRow:
    """One way to recompute.

    Attributes:
        recompute: A policy of `POLICIES`; on the generic path "none", or "full" for gradient checkpointing.
        seconds_per_step: Median over the steps.
        tokens_per_second: From that median.
        peak_memory_bytes: The most that was in use during the steps, the model included.
        error: Why there are no figures; None where there are.
    """

    recompute: str
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class BenchReport:
    """What was measured.

    Attributes:
        device: The GPU's name, or "CPU".
        fused: Whether the model's blocks are the fused ones.
        batch, seq: Rows a step, tokens a row.
        copy_bytes_per_second: Copy bandwidth of the device, bytes read and written.
        matmul_flops_per_second: Rate of a large matrix product in `dtype`.
        dtype: What the model computes in.
    """

    device: str
    fused: bool
    batch: int
    seq: int
    dtype: str
    copy_bytes_per_second: float
    matmul_flops_per_second: float
    rows: list[BenchRow]

    def lines(self) -> Iterator[str]:
        """The report as text."""
        blocks = "fused blocks" if self.fused else "generic path"
        yield f"{self.device}, {self.dtype}, {blocks}, {self.batch} x {self.seq} tokens a step"
        yield (
            f"copy {self.copy_bytes_per_second / 1e9:,.0f} GB/s, "
            f"matrix product {self.matmul_flops_per_second / 1e12:,.1f} TFLOP/s"
        )
        yield ""
        yield f"{'recompute':18} {'s/step':>9} {'tokens/s':>10} {'peak GiB':>9}"
        for row in self.rows:
            if row.seconds_per_step is None or row.peak_memory_bytes is None:
                yield f"{row.recompute:18} {row.error}"
            else:
                yield (
                    f"{row.recompute:18} {row.seconds_per_step:9.4f} {row.tokens_per_second:10,.0f} "
                    f"{row.peak_memory_bytes / 2**30:9.2f}"
                )


def shape_config(shape: str) -> LlamaConfig:
    """The configuration of a shape of `SHAPES`.

    Raises:
        ConfigError: There is no such shape.
    """
    if shape not in SHAPES:
        raise ConfigError("unknown shape", found=shape, allowed=SHAPES)
    return LlamaConfig(
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        **SHAPES[shape],
    )


def random_model(
    shape: str, quantization: FourfoldConfig | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A model with random weights, made on the device in `dtype`, then quantized layer by layer.

    Raises:
        ConfigError: There is no such shape.
        TrainingError: The device has no room for the weights before they are quantized.
    """
    config = shape_config(shape)
    try:
        with device:
            model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=dtype)
        if quantization is not None:
            model = quantize_model(model, quantization)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"no room on {device} for the random weights of shape {shape} before they are quantized",
            hint="choose a smaller shape, or name a configuration: a checkpoint is quantized while it loads",
        ) from error
    _free(device)
    return model


def bench(model: PeftModel, *, batch: int, seq: int, steps: int = 6) -> BenchReport:
    """Train a prepared model for a few steps on random tokens, all of them labelled, in each way to recompute.

    Its adapters are changed, and afterwards recompute as the last way did. A way for which the memory does not
    suffice says so in its row.

    Args:
        model: What `fourfold.prepare` gave.
        batch: Rows a step.
        seq: Tokens a row, 2 or more.
        steps: Measured steps of each way, after two that are not.

    Raises:
        ConfigError: A number out of its range.
    """
    for key, value, least in (("batch", batch, 1), ("seq", seq, 2), ("steps", steps, 1)):
        if value < least:
            raise ConfigError(f"bench: {key} is out of range", found=value, allowed=f"{least} or more")
    base = model.get_base_model()
    device, dtype = base.device, base.dtype
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (batch, seq), generator=generator).to(device)
    model.train()
    positions = supervised_positions(ids)
    rows = []
    for name, choose in _ways(base).items():
        choose()
        rows.append(_measure(model, name, ids, positions, steps))
        _free(device)
    return BenchReport(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper(),
        fused=_is_fused(base),
        batch=batch,
        seq=seq,
        dtype=str(dtype).removeprefix("torch."),
        copy_bytes_per_second=_copy_rate(device),
        matmul_flops_per_second=_matmul_rate(device, dtype),
        rows=rows,
    )


def _is_fused(base: PreTrainedModel) -> bool:
    return any(isinstance(module, FusedDecoderLayer) for module in base.modules())


def _ways(base: PreTrainedModel) -> dict[str, Callable[[], None]]:
    """Name -> what puts the model into that way."""
    if _is_fused(base):
        return {name: functools.partial(set_recomputation, base, name) for name in POLICIES}
    return {
        "none": base.gradient_checkpointing_disable,
        "full": functools.partial(base.gradient_checkpointing_enable, {"use_reentrant": False}),
    }


def _measure(model: PeftModel, name: str, ids: torch.Tensor, positions: torch.Tensor, steps: int) -> BenchRow:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=_LEARNING_RATE, state_bits=8, max_grad_norm=1.0)
    times = []
    reset_peak(ids.device)
    try:
        for _ in range(_WARM_UP_STEPS + steps):
            times.append(_seconds(functools.partial(_step, model, optimizer, ids, positions), ids.device))
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        return BenchRow(name, error="out of memory")
    seconds = statistics.median(times[_WARM_UP_STEPS:])
    return BenchRow(name, seconds, ids.numel() / seconds, memory_used(ids.device).peak_bytes)


def _step(model: PeftModel, optimizer: AdamW, ids: torch.Tensor, positions: torch.Tensor) -> None:
    base = model.get_base_model()
    hidden_states = base.base_model(input_ids=ids, use_cache=False)[0]
    loss = supervised_cross_entropy(hidden_states, ids, base.get_output_embeddings(), positions)
    (loss.loss_sum / len(positions)).backward()
    optimizer.step()
    optimizer.zero_grad()


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """What one run takes, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    """Give back what a way left in the allocator, so that the next one begins alike."""
    gc.collect()
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def _copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written."""
    size = 2**29 if device.type == "cuda" else 2**26
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device)


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a square product."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_seconds(lambda: left @ right, device)


def _best_seconds(run: Callable[[], object], device: torch.device, rounds: int = 5, runs_a_round: int = 10) -> float:
    """Of one run among many back to back: the best round's mean."""

    def some() -> None:
        for _ in range(runs_a_round):
            run()

    return min(_seconds(some, device) for _ in range(rounds)) / runs_a_round
