"""The keys that say how several processes share a run, and what does not fit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field

from fourfold.config.methods import Contradiction

if TYPE_CHECKING:
    from fourfold.config.run import RunConfig

__all__ = ["DistributedKeys", "distributed_contradictions"]

Distributed = Literal["auto", "ddp", "fsdp2"]


class DistributedKeys(BaseModel):
    """The part of RunConfig that says how the processes of torchrun or accelerate share the run."""

    distributed: Distributed = Field(
        "auto",
        description="How several processes, one to a GPU, share the run: the model whole on each (ddp), or its layers "
        "sharded, the quantized base too (fsdp2); auto: ddp. Of one process it says nothing.",
    )
    ddp_timeout: Annotated[int, Field(ge=1)] = Field(
        600,
        description="Seconds that a process waits for the others in a collective before the run is given up. One that "
        "has died is found within a minute, whatever this says.",
    )


def distributed_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """What of `config` does not fit the way in which processes share it."""
    if config.distributed != "fsdp2":
        return
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
            config.optim in ("adafactor", "adamw_torch", "adamw_torch_fused"),
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
                f"{key} is given, and with distributed: fsdp2 the base {why}",
                hint,
            )
