"""What would fit where a plan does not, and strategies side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fourfold.config import RunConfig
from fourfold.memory.gpus import Gpu
from fourfold.memory.parallel import Parallelism
from fourfold.memory.plan import Plan
from fourfold.models.recomputation import POLICIES
from fourfold.run_plan import optimizer_row, parallelisms_of, run_plan, run_shape
from fourfold.training.options import OPTIMIZERS

__all__ = ["Remedy", "Strategy", "compare", "remedies"]

# GPUs that are tried where nothing fits fewer.
_MOST_GPUS = 64
# Beside load_in_4bit, whichever way that goes.
_NO_INT8: dict[str, Any] = {"load_in_8bit": False, "llm_int8_threshold": 6.0}


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration after which something fits.

    Args:
        what: For people.
        change: Keys and their values.
        plan: What then fits.
        num_gpus: How many of them it takes, where that is the change.
    """

    what: str
    change: dict[str, Any]
    plan: Plan
    num_gpus: int | None = None

    def __str__(self) -> str:
        values = {key: "null" if value is None else str(value).lower() for key, value in self.change.items()}
        keys = " ".join(f"--{key} {value}" for key, value in values.items())
        return f"{self.what} ({keys})" if self.num_gpus is None else f"{self.what} (--gpus {self.num_gpus} {keys})"


@dataclass(frozen=True)
class Strategy:
    """A row of a comparison: the fastest way of its kind that fits, or, where none does, the smallest."""

    name: str
    plan: Plan


def remedies(config: RunConfig, gpu: Gpu, host_bytes: int | None = None, num_gpus: int = 1) -> Iterator[Remedy]:
    """Where nothing fits: each change, from the easiest to the hardest, after which something does; where none is
    enough alone, as many of them together as it takes; where all are not, more GPUs."""

    def fitting(change: dict[str, Any]) -> Plan | None:
        changed = config.model_copy(update=change)
        made = run_plan(changed, gpu, host_bytes, parallelisms=parallelisms_of(changed, num_gpus))
        return made if made.chosen is not None else None

    changes = list(_changes(config, num_gpus))
    found = [(what, change, made) for what, change in changes if (made := fitting(change)) is not None]
    yield from itertools.starmap(Remedy, found)
    together: dict[str, Any] = {}
    for what, change in [] if found else changes:
        together |= change
        made = fitting(together)
        if made is not None:
            yield Remedy(f"{what}, with all before", together, made)
            return
    if not found:
        yield from _more_gpus(config, gpu, host_bytes, num_gpus)


def _more_gpus(config: RunConfig, gpu: Gpu, host_bytes: int | None, num_gpus: int) -> Iterator[Remedy]:
    """The least number of the same GPUs over which the run fits when the base is sharded."""
    stays = config.model_copy(update={"stream_base": None})
    shape = run_shape(stays)
    for number in range(num_gpus + 1, _MOST_GPUS + 1):
        made = run_plan(stays, gpu, host_bytes, parallelisms=[Parallelism(number, "fsdp2")], shape=shape)
        if made.chosen is not None:
            change = {"distributed": "fsdp2"} | ({} if config.stream_base is None else {"stream_base": None})
            yield Remedy(f"{number} GPUs, the base sharded over them", change, made, number)
            return


def _changes(config: RunConfig, num_gpus: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if config.bnb_4bit_compute_dtype == "float32":
        yield "bf16", {"bnb_4bit_compute_dtype": "bfloat16"}
    if config.recompute is not None:
        yield "recompute as planned", {"recompute": None}
    if config.optim is not None:
        in_8_bits = optimizer_row(config.optim)._replace(state_bits=8)
        name = next((name for name, row in OPTIMIZERS.items() if row == in_8_bits), config.optim)
        if name != config.optim:
            yield "8-bit optimizer state", {"optim": name}
    # What is frozen in 4 bits is trained by an adapter.
    quantized: dict[str, Any] = {"load_in_4bit": True, **(_NO_INT8 if config.load_in_8bit else {})}
    if config.adapter is None:
        quantized["adapter"] = "lora"
        yield "LoRA: adapters instead of all weights", {"adapter": "lora"}
    if not config.load_in_4bit:
        yield "QLoRA: the base in 4 bits", quantized
    if config.adapter is not None and config.lora_r > 16:
        yield "rank 16", {"lora_r": 16}
    if not config.quantize_lm_head:
        yield "the output head in 4 bits", {"quantize_lm_head": True, **quantized}
    if not config.quantize_embeddings:
        yield "the embeddings in 4 bits", {"quantize_embeddings": True, **quantized}
    if config.optim is not None and optimizer_row(config.optim).placement == "resident":
        yield "paged optimizer state", {"optim": "paged_adamw_8bit"}
    else:
        # Where host memory is what is short.
        yield "optimizer state on the GPU", {"optim": "adamw_8bit"}
    if config.load_in_8bit:
        quantized = {}
    if config.stream_base is not None:
        yield "the base on the GPU", {"stream_base": None}
    elif num_gpus == 1:
        yield "the base streams from host memory", {"stream_base": "host", **quantized}
    if config.stream_base != "disk" and num_gpus == 1:
        checkpoint = "the base streams from the disk, out of a checkpoint of `fourfold quantize`"
        yield checkpoint, {"stream_base": "disk", **quantized}
    length = config.max_length // 2
    while length >= 256:
        yield f"rows of {length} tokens", {"max_length": length}
        length //= 2


def compare(config: RunConfig, gpu: Gpu, host_bytes: int | None = None, num_gpus: int = 1) -> list[Strategy]:
    """LoRA over 16 bits and over 4, before them full fine-tuning where that is asked for: of one GPU, each with every
    way to recompute, and over 4 that stream from host memory; of several, each with every way to share the run."""
    rows = []
    bases: dict[str, dict[str, Any]] = {
        "LoRA": {"load_in_4bit": False, **_NO_INT8, "stream_base": None},
        "QLoRA": {"load_in_4bit": True, **_NO_INT8, "stream_base": None},
    }
    if num_gpus == 1:
        bases["QLoRA, streaming"] = {**bases["QLoRA"], "stream_base": "host"}
    if config.adapter is None:
        adapted = {name: {**update, "adapter": "lora"} for name, update in bases.items()}
        bases = {"full fine-tuning": bases["LoRA"], **adapted}
    for base, update in bases.items():
        changed = config.model_copy(update=update)
        shape = run_shape(changed)
        if num_gpus > 1:
            ways = parallelisms_of(config, num_gpus)
            together = run_plan(changed, gpu, host_bytes, parallelisms=ways, shape=shape)
            made = list((together.by_strategy or {ways[0].strategy: together}).items())
        else:
            # A base streams where there is no memory to keep much else.
            stays = changed.stream_base is None
            names = [name for name in shape.policies if POLICIES[name].offload or stays] or ["full"]
            made = [(name, run_plan(changed, gpu, host_bytes, [name], shape=shape)) for name in names]
        rows += [Strategy(f"{base}, {name}", one) for name, one in made]
    return rows
