"""The keys that say how several processes share a run, and what does not fit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field

from fourfold.config.methods import Contradiction

if TYPE_CHECKING:
    from fourfold.config.run import RunConfig

__all__ = ["DistributedKeys", "distributed_contradictions"]

_ZERO_OPTIMIZERS = ("adamw", "adamw_torch", "adamw_torch_fused")
Distributed = Literal["auto", "ddp", "fsdp2", "zero1", "zero2", "zero3"]


class DistributedKeys(BaseModel):
    """The part of RunConfig that says how the processes of torchrun or accelerate share the run."""

    distributed: Distributed = Field(
        "auto",
        description="How several processes, one to a GPU, share the run: the model whole on each (ddp), or its layers "
        "sharded, the quantized base too (fsdp2); or by DeepSpeed: optimizer state parted (zero1), gradients too "
        "(zero2), the layers too, base included (zero3); auto: ddp, or what `deepspeed` says. Of one process it says "
        "nothing.",
    )
    distributed_offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="What of zero1, zero2 and zero3 waits in host memory: the optimizer's state and its step, or (all, "
        "with zero3) the parameters too, base included.",
    )
    deepspeed: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="DeepSpeed's own configuration, a JSON file, in place of the one made from this run's keys; what "
        "both say must be the same, or auto in the file.",
    )
    ddp_timeout: Annotated[int, Field(ge=1)] = Field(
        600,
        description="Seconds that a process waits for the others in a collective before the run is given up. One that "
        "has died is found within a minute, whatever this says.",
    )


def distributed_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """What of `config` does not fit the way in which processes share it."""
    if config.distributed in ("fsdp2", "zero3"):
        yield from _sharded_contradictions(config)
    if config.deepspeed is not None and config.distributed in ("ddp", "fsdp2"):
        yield Contradiction(
            ("deepspeed", "distributed"),
            f"deepspeed is given, and distributed: {config.distributed} is without it",
            "leave one of them out",
        )
    if config.distributed.startswith("zero") or config.deepspeed is not None:
        yield from _zero_contradictions(config)
    elif config.distributed_offload != "none":
        yield Contradiction(
            ("distributed_offload", "distributed"),
            f"distributed_offload is given, and distributed: {config.distributed} has none",
            "give distributed: zero1, zero2 or zero3",
        )


def _sharded_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    for key, is_set, why, hint in (
        ("stream_base", config.stream_base is not None, "is sharded instead of streamed", "leave stream_base out"),
        ("cuda_graphs", bool(config.cuda_graphs), "moves from step to step, and graphs do not", "leave it out"),
        (
            "requantize_every",
            config.requantize_every is not None,
            "cannot be quantized anew while it is sharded",
            "leave requantize_every out, or give distributed: ddp",
        ),
        (
            "eval_generate_rows",
            bool(config.eval_generate_rows),
            "gives no answers while it is sharded",
            "leave it out, and give it to `fourfold evaluate` when the run has ended",
        ),
        (
            "init_lora_weights",
            isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian",
            "cannot be written once it is sharded, and this initialisation changes it",
            "leave init_lora_weights out, or give distributed: ddp",
        ),
        (
            "optim",
            config.distributed == "fsdp2" and config.optim in ("adafactor", "adamw_torch", "adamw_torch_fused"),
            "has optimizers over shards among adamw_... and lion_... alone",
            "give optim: adamw, or leave it out",
        ),
        (
            "bnb_4bit_compute_dtype",
            config.bnb_4bit_compute_dtype == "float16",
            "is not trained with a scaled loss",
            "give bnb_4bit_compute_dtype: bfloat16",
        ),
    ):
        if is_set:
            yield Contradiction(
                (key, "distributed"),
                f"{key} is given, and with distributed: {config.distributed} the base {why}",
                hint,
            )


def _zero_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """Of DeepSpeed; those of `_sharded_contradictions` are told there."""
    whole = config.distributed != "zero3"
    key = "distributed" if config.deepspeed is None else "deepspeed"
    for other, is_set, why, hint in (
        ("adapter", config.adapter is None, "DeepSpeed trains adapters, and adapter is null", "set adapter: lora"),
        (
            "optim",
            config.optim not in (None, *_ZERO_OPTIMIZERS),
            f"DeepSpeed parts the state of AdamW alone, and optim is {config.optim}",
            "give optim: adamw; distributed_offload: optimizer moves its state to host memory",
        ),
        (
            "bnb_4bit_compute_dtype",
            config.bnb_4bit_compute_dtype == "float16" and whole,
            "DeepSpeed trains fp32 adapters unscaled, and bnb_4bit_compute_dtype is float16",
            "give bfloat16 or float32",
        ),
        (
            "stream_base",
            config.stream_base is not None and whole,
            "DeepSpeed wants the base on the GPU, and stream_base is given",
            "leave it out; distributed: zero3 with distributed_offload: all keeps the base in host memory",
        ),
        (
            "requantize_every",
            config.requantize_every is not None and whole,
            "DeepSpeed keeps copies of the adapters, which requantize_every would change beside them",
            "leave it out, or give distributed: ddp",
        ),
        (
            "cuda_graphs",
            bool(config.cuda_graphs) and whole,
            "DeepSpeed wants gradients in an order that CUDA graphs do not keep",
            "leave cuda_graphs out",
        ),
        (
            "quantize_embeddings",
            config.quantize_embeddings and not whole,
            "zero3 does not part a model that begins with a quantized embedding",
            "leave quantize_embeddings out, or give distributed: zero2",
        ),
        (
            "distributed_offload",
            config.distributed_offload == "all" and config.deepspeed is None and whole,
            f"distributed_offload: all moves parameters to host memory, which {config.distributed} does not part",
            "give distributed: zero3, or distributed_offload: optimizer",
        ),
        (
            "distributed_offload",
            config.distributed_offload != "none" and config.deepspeed is not None,
            "what is offloaded stands in the file of deepspeed",
            "leave distributed_offload out",
        ),
    ):
        if is_set:
            yield Contradiction((other, key), why, hint)
