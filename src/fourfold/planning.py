"""From a run's configuration to its plan: what fits a GPU and is the fastest of that, and what would help if nothing
does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import ConfigError, TrainingError
from fourfold.kernels.host_memory import available_bytes
from fourfold.memory.footprint import GRAPH_LIBRARY_BYTES, LIBRARY_BYTES
from fourfold.memory.gpus import Gpu, gpu_by_name, gpu_present, parse_bytes, split_count
from fourfold.memory.parallel import ONE_GPU, STRATEGIES, Parallelism
from fourfold.memory.plan import FORECAST
from fourfold.memory.planner import OptimizerBytes, Plan, make_plan
from fourfold.models.families import FAMILIES
from fourfold.models.loading import read_config
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.models.recomputation import POLICIES
from fourfold.models.shape_check import shape_differences
from fourfold.optimizers import AdamW
from fourfold.optimizers.footprint import staging_bytes, state_bytes
from fourfold.training.options import OPTIMIZERS, OptimizerRow, TrainingOptions

__all__ = [
    "PLANNED_OPTIMIZERS",
    "Remedy",
    "Strategy",
    "compare",
    "find_gpus",
    "find_host",
    "kept_to",
    "left_for",
    "plan",
    "plan_for_training",
    "remedies",
    "require_planned_shape",
    "step_down",
]

_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Where `optim` is null. Of equally fast ones the first: the more exact before the smaller, and of the same numbers the
# one that passes over no link.
PLANNED_OPTIMIZERS = ("adamw", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit")
# GPUs that are tried where nothing fits fewer.
_MOST_GPUS = 64


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
        if self.num_gpus is not None:
            return f"{self.what} (fourfold plan --gpus {self.num_gpus}, {FORECAST})"
        values = {key: "null" if value is None else str(value).lower() for key, value in self.change.items()}
        keys = " ".join(f"--{key} {value}" for key, value in values.items())
        return f"{self.what} ({keys})"


@dataclass(frozen=True)
class Strategy:
    """A row of a comparison: the fastest way of its kind that fits, or, where none does, the smallest."""

    name: str
    plan: Plan


def find_gpus(name: str | None, count: int | None = None, limit: int | None = None) -> tuple[Gpu, int]:
    """GPUs of that name or size, or such as the one that is present, and how many.

    Args:
        name: "H200", "24GB", "2xH200"; None: the one that is present.
        count: How many; None: as the name says, or one.
        limit: Bytes that may be taken of the one that is present; None: all.

    Raises:
        ConfigError: An unknown name, two numbers that differ, none at all, no name and no GPU, or a limit that it
            cannot have.
    """
    named, only = (1, None) if name is None else split_count(name)
    number = named if count is None else count
    if number < 1 or (count is not None and named not in (1, count)):
        found = f"{name}, {count} GPUs" if count is not None else name
        raise ConfigError("it is not clear how many GPUs to plan for", found=found, allowed="2xH200, or --gpus 2")
    if only is not None:
        return gpu_by_name(only), number
    present = gpu_present(limit=limit)
    if present is None:
        raise ConfigError("there is no GPU here to plan for", hint="name one: --gpu 24GB, or --gpu H200")
    return present, number


def find_host(amount: str | None, *, is_here: bool) -> int | None:
    """Host memory that a run may use: what is named, or what is free here; None, any, for a GPU that is elsewhere.

    Raises:
        ConfigError: No amount of memory.
    """
    if amount is not None:
        return parse_bytes(amount)
    return available_bytes() if is_here else None


def plan(
    config: RunConfig, gpu: Gpu | str | None = None, host_bytes: int | None = None, num_gpus: int | None = None
) -> Plan:
    """The plan of a run.

    Args:
        config: The run.
        gpu: Where to: a GPU, its name or its memory, "2xH200"; None: the one that is present, up to `gpu_memory_limit`.
        host_bytes: Host memory that may be used; None: any.
        num_gpus: How many of them; None: as `gpu` says, or one.

    The number of rows of an optimizer step is the configuration's, for all GPUs together; how many of them make a
    microbatch is chosen. So is the optimizer, of `PLANNED_OPTIMIZERS`, where `optim` is null, and how several GPUs
    share the run.

    Raises:
        CheckpointError: There is no such model.
        ConfigError: What no formula is known of: a model without fused blocks, full fine-tuning; or rows that cannot be
            parted among the GPUs.
    """
    card, number = (
        (gpu, num_gpus or 1) if isinstance(gpu, Gpu) else find_gpus(gpu, num_gpus, choices.memory_limit(config))
    )
    return _plan(config, card, host_bytes, parallelisms=_parallelisms(number))


def plan_for_training(config: RunConfig, gpu: Gpu | None, host_bytes: int | None = None) -> Plan | None:
    """The plan that a run keeps to: microbatches of at most the configuration's rows, as fast as what fits.

    Args:
        config: The run.
        gpu: Where it trains; None: not on a GPU.
        host_bytes: Host memory that may be used; None: any.

    Returns:
        None where nothing is planned: off GPUs, where `recompute` is given, and where no formula is known.

    Raises:
        TrainingError: Nothing fits.
    """
    if gpu is None or config.recompute is not None:
        return None
    try:
        made = _plan(config, gpu, host_bytes, most=config.per_device_train_batch_size)
    except ConfigError:
        return None
    if made.chosen is not None:
        return made
    helps = [str(remedy) for remedy in remedies(config, gpu, host_bytes)]
    raise TrainingError(
        made.lines()[-1],
        found=f"{gpu.usable_bytes / 2**30:.2f} GiB usable on {gpu.name}"
        + ("" if host_bytes is None else f", {host_bytes / 2**30:.1f} GiB of host memory"),
        allowed=f"what would fit: {'; '.join(helps) or 'nothing known here'}",
        hint="see `fourfold plan`; with recompute given, the run starts without a plan",
    )


def step_down(config: RunConfig, failed: Plan, now: Gpu | None = None) -> Plan | None:
    """The next plan that takes at least a tenth less, and fits what is left; None where there is none.

    Args:
        config: The run, as it was asked for.
        failed: What did not fit. Where its optimizer was planned, the next one keeps state of the same bits, which goes
            on from a checkpoint, on the GPU or paged.
        now: What others leave of the GPU now; None: not looked at.
    """
    assert failed.chosen is not None
    usable = failed.chosen.footprint.peak_bytes * 9 // 10
    if now is not None:
        usable = min(usable, now.usable_bytes)
    optimizers = _optimizers_of_the_same_state(failed.chosen.optimizer) if config.optim is None else None
    most = config.per_device_train_batch_size
    made = _plan(config, failed.gpu.with_usable(usable), failed.host_bytes, most=most, optimizers=optimizers)
    return made if made.chosen is not None else None


def require_planned_shape(config: RunConfig, model: PeftModel) -> None:
    """Raises TrainingError, naming what differs, for a model that is not the one that was planned for.

    Args:
        config: The run that was planned.
        model: What was loaded for it, with its adapter.
    """
    differences = [str(one) for one in shape_differences(_shape(config), model)]
    if differences:
        raise TrainingError(
            "the plan does not describe the model that was loaded",
            found="; ".join(differences),
            allowed=f"what {config.model_name_or_path} says in its config.json",
            hint="with recompute given (recompute: full), the run starts without a plan",
        )


def left_for(config: RunConfig, device: torch.device, standing_bytes: int) -> Gpu | None:
    """The GPU as others leave it to a run that is under way; None off GPUs.

    Args:
        config: The run.
        device: Where it is.
        standing_bytes: What it holds between its steps: weights, adapters, optimizer state.
    """
    if device.type != "cuda":
        return None
    # What the libraries work in is never given back, and part of each plan.
    own = standing_bytes + LIBRARY_BYTES + GRAPH_LIBRARY_BYTES
    return gpu_present(device, choices.memory_limit(config), held_bytes=own)


def kept_to(config: RunConfig, plan: Plan | None) -> RunConfig:
    """The configuration with what was planned; without a plan, with the default optimizer where none is given."""
    if plan is None:
        return config.model_copy(update={"optim": config.optim or TrainingOptions.optim})
    assert plan.chosen is not None
    return config.model_copy(
        update={
            "per_device_train_batch_size": plan.chosen.batch,
            "gradient_accumulation_steps": plan.chosen.accumulation,
            "recompute": plan.chosen.recompute,
            "optim": plan.chosen.optimizer,
        }
    )


def _plan(
    config: RunConfig,
    gpu: Gpu,
    host_bytes: int | None = None,
    policies: list[str] | None = None,
    most: int | None = None,
    optimizers: Sequence[str] | None = None,
    parallelisms: Sequence[Parallelism] = (ONE_GPU,),
) -> Plan:
    shape = _shape(config)
    has_evaluation = config.eval_dataset is not None or config.eval_split_fraction > 0
    wanted = config.recompute
    if policies is None and wanted is not None:
        policies = [wanted] if isinstance(wanted, str) else None
    names = optimizers or (PLANNED_OPTIMIZERS if config.optim is None else (config.optim,))
    return make_plan(
        shape,
        gpu,
        rows=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        seq=config.max_length,
        optimizers=[_optimizer(name, shape) for name in names],
        batches=range(1, most + 1) if most else None,
        policies=policies,
        host_bytes=host_bytes,
        eval_batch=config.per_device_eval_batch_size if has_evaluation else 0,
        # Packed rows run without them: their documents lie differently in each batch.
        cuda_graphs=False if config.packing else config.cuda_graphs,
        streams=config.stream_base,
        parallelisms=parallelisms,
    )


def _parallelisms(num_gpus: int) -> list[Parallelism]:
    return [Parallelism(num_gpus, name) for name in STRATEGIES] if num_gpus > 1 else [ONE_GPU]


def remedies(config: RunConfig, gpu: Gpu, host_bytes: int | None = None, num_gpus: int = 1) -> Iterator[Remedy]:
    """Where nothing fits: each change, from the easiest to the hardest, after which something does.

    Changes are looked at one by one, and then each on top of those before it. Where none helps, more GPUs.
    """
    together: dict[str, Any] = {}
    found = False
    for what, change in _changes(config):
        together |= change
        for update in (change, together):
            changed = config.model_copy(update=update)
            made = _plan(changed, gpu, host_bytes, parallelisms=_parallelisms(num_gpus))
            if made.chosen is not None:
                found = True
                yield Remedy(what if update is change else f"{what}, with all before", dict(update), made)
                break
        if found and together != change:
            # What is harder would fit as well, and is not asked for.
            return
    if not found:
        yield from _more_gpus(config, gpu, host_bytes, num_gpus)


def _more_gpus(config: RunConfig, gpu: Gpu, host_bytes: int | None, num_gpus: int) -> Iterator[Remedy]:
    """The least number of the same GPUs over which the run fits when the base is sharded."""
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    stays = config.model_copy(update={"stream_base": None})
    for number in range(num_gpus + 1, min(rows, _MOST_GPUS) + 1):
        if rows % number == 0:
            made = _plan(stays, gpu, host_bytes, parallelisms=[Parallelism(number, "sharded")])
            if made.chosen is not None:
                yield Remedy(f"{number} GPUs, the base sharded over them", {}, made, number)
                return


def _changes(config: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    if config.bnb_4bit_compute_dtype == "float32":
        yield "bf16", {"bnb_4bit_compute_dtype": "bfloat16"}
    if config.recompute is not None:
        yield "recompute as planned", {"recompute": None}
    if config.optim is not None:
        in_8_bits = _optimizer_row(config.optim)._replace(state_bits=8)
        name = next((name for name, row in OPTIMIZERS.items() if row == in_8_bits), config.optim)
        if name != config.optim:
            yield "8-bit optimizer state", {"optim": name}
    if not config.load_in_4bit:
        yield "QLoRA: the base in 4 bits", {"load_in_4bit": True}
    if config.lora_r > 16:
        yield "rank 16", {"lora_r": 16}
    if config.optim is not None and _optimizer_row(config.optim).placement == "resident":
        yield "paged optimizer state", {"optim": "paged_adamw_8bit"}
    else:
        # Where host memory is what is short.
        yield "optimizer state on the GPU", {"optim": "adamw_8bit"}
    if config.stream_base is None:
        yield "the base streams from host memory", {"stream_base": "host", "load_in_4bit": True}
    else:
        yield "the base on the GPU", {"stream_base": None}
    if config.stream_base != "disk":
        checkpoint = "the base streams from the disk, out of a checkpoint of `fourfold quantize`"
        yield checkpoint, {"stream_base": "disk", "load_in_4bit": True}
    length = config.max_length // 2
    while length >= 256:
        yield f"rows of {length} tokens", {"max_length": length}
        length //= 2


def compare(config: RunConfig, gpu: Gpu, host_bytes: int | None = None, num_gpus: int = 1) -> list[Strategy]:
    """LoRA over 16 bits, over 4, and over 4 that stream from host memory: of one GPU, each with every way to recompute;
    of several, each with every way to share the run."""
    rows = []
    bases: dict[str, dict[str, Any]] = {
        "LoRA": {"load_in_4bit": False, "stream_base": None},
        "QLoRA": {"load_in_4bit": True, "stream_base": None},
        "QLoRA, streaming": {"load_in_4bit": True, "stream_base": "host"},
    }
    for base, update in bases.items():
        changed, streams = config.model_copy(update=update), update["stream_base"] is not None
        if num_gpus > 1:
            ways = [way for way in _parallelisms(num_gpus) if not (streams and way.shards.weights)]
            made = [(way.strategy, _plan(changed, gpu, host_bytes, parallelisms=[way])) for way in ways]
        else:
            # A base streams where there is no memory to keep much else.
            names = [name for name, policy in POLICIES.items() if policy.offload or not streams]
            made = [(name, _plan(changed, gpu, host_bytes, [name])) for name in names]
        rows += [Strategy(f"{base}, {name}", one) for name, one in made]
    return rows


def _shape(config: RunConfig) -> ModelShape:
    is_gguf = config.model_name_or_path.endswith(".gguf")
    model = None if is_gguf else read_config(config.model_name_or_path, config.model_revision)
    reason = "a GGUF file, which has no config.json" if is_gguf else _no_formula(config, model)
    if reason is not None:
        raise ConfigError(
            "there is no plan for this run", found=reason, allowed="LoRA over fused blocks, see docs/engine.md"
        )
    dtype = _DTYPES[config.bnb_4bit_compute_dtype]
    return model_shape(model, choices.quantization(config), config.lora_r, config.target_modules, dtype.itemsize)


def _no_formula(config: RunConfig, model: Any) -> str | None:
    """Why it is not known what the run takes; `model`: its Transformers configuration."""
    if config.adapter is None:
        return "adapter: null (full fine-tuning)"
    for key, is_generic in (
        ("fused_blocks", config.fused_blocks is False),
        ("lora_dropout", config.lora_dropout > 0),
        ("use_dora", config.use_dora),
        ("modules_to_save", bool(config.modules_to_save)),
    ):
        if is_generic:
            return f"{key}: {getattr(config, key)} (layers take the generic path)"
    family = FAMILIES.get(model.model_type)
    if family is None or family.fused_layer is None:
        return f"{model.model_type} (layers take the generic path)"
    if getattr(model, "quantization_config", None) is not None:
        return "a checkpoint that is quantized already"
    return None


def _optimizer_row(name: str) -> OptimizerRow:
    # What the Trainer makes keeps the state of `adamw`.
    return OPTIMIZERS[name] or OptimizerRow(AdamW, "adamw")


def _optimizer(name: str, shape: ModelShape) -> OptimizerBytes:
    row = _optimizer_row(name)
    state = state_bytes(row.rule, row.state_bits, shape.adapter_shapes)
    if row.placement == "resident":
        return OptimizerBytes(name, state)
    return OptimizerBytes(name, 0, staging_bytes(row.rule, row.state_bits, shape.adapter_shapes), state)


def _optimizers_of_the_same_state(name: str) -> list[str]:
    """Those planned ones that go on from its checkpoints: with the same rule and bits, wherever state is."""
    state = _optimizer_row(name)[:3]
    return [other for other in PLANNED_OPTIMIZERS if _optimizer_row(other)[:3] == state]
