"""One plan of a run: what a configuration says of the model, the optimizers and the rows, given to the planner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.config.distributed import distributed_contradictions
from fourfold.errors import ConfigError
from fourfold.memory.gpus import Gpu
from fourfold.memory.parallel import ONE_GPU, STRATEGIES, Parallelism
from fourfold.memory.planner import OptimizerBytes, Plan, fastest_of, make_plan
from fourfold.models.families import FAMILIES
from fourfold.models.followed_layer import followed_shape
from fourfold.models.loading import read_config
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.models.tensor_parts import divided_config, with_divided_ends
from fourfold.optimizers import AdamW
from fourfold.optimizers.footprint import staging_bytes, state_bytes, working_bytes
from fourfold.training.deepspeed_config import stage_of_file
from fourfold.training.options import OPTIMIZERS, OptimizerRow

__all__ = [
    "PLANNED_OPTIMIZERS",
    "optimizer_row",
    "optimizers_of_the_same_state",
    "parallelism_in_force",
    "parallelisms_of",
    "run_plan",
    "run_shape",
    "sequences_of",
    "takes_generic_path",
]

_DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Where `optim` is null. Of equally fast ones the first: the more exact before the smaller, and of the same numbers the
# one that passes over no link.
PLANNED_OPTIMIZERS = ("adamw", "paged_adamw_32bit", "adamw_8bit", "paged_adamw_8bit")


def run_plan(
    config: RunConfig,
    gpu: Gpu,
    host_bytes: int | None = None,
    policies: Sequence[str] | None = None,
    most: int | None = None,
    optimizers: Sequence[str] | None = None,
    parallelisms: Sequence[Parallelism] = (ONE_GPU,),
    shape: ModelShape | None = None,
) -> Plan:
    """The plan of a run.

    Args:
        config: The run.
        gpu: Where to; of several, each.
        host_bytes: Host memory that may be used; None: any.
        policies: Recomputation policies to choose from; None: as the configuration has it, or all.
        most: Rows of a microbatch at most; None: any.
        optimizers: To choose from; None: as the configuration has it, or `PLANNED_OPTIMIZERS`.
        parallelisms: How GPUs may share the run. With several strategies, the plan has that of each, and of a strategy
            that is not possible the reason. Of one strategy's the first that fits is taken: less waits in host memory.
        shape: The model's, where it is known already.

    Raises:
        CheckpointError: There is no such model.
        ConfigError: What cannot be planned; see `fourfold.planning.plan`.
    """
    whole = run_shape(config) if shape is None else shape
    strategies = list(dict.fromkeys(way.strategy for way in parallelisms))
    made: dict[str, Plan] = {}
    refused: dict[str, str] = {}
    for strategy in strategies:
        ways = [way for way in parallelisms if way.strategy == strategy]
        try:
            is_divided = ways[0].shards.divides == "tensors"
            own = run_shape(config, ways[0].num_gpus) if is_divided else whole
            for way in ways:
                plan = _plan_of(config, gpu, host_bytes, policies, most, optimizers, way, own)
                made[strategy] = replace(plan, not_run=_not_run(config, way))
                if plan.chosen is not None:
                    break
        except ConfigError as error:
            if not made and strategy == strategies[-1]:
                raise
            refused[strategy] = str(error)
    return made[strategies[0]] if len(strategies) == 1 else fastest_of(made, refused)


def _plan_of(
    config: RunConfig,
    gpu: Gpu,
    host_bytes: int | None,
    policies: Sequence[str] | None,
    most: int | None,
    optimizers: Sequence[str] | None,
    parallelism: Parallelism,
    shape: ModelShape,
) -> Plan:
    """With one way to share the run. Args are those of `run_plan`."""
    each, num_gpus = sequences_of(config), parallelism.num_gpus
    # Rows that are paired with one another need company.
    least = 2 if config.method == "kto" else 1
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    most = most or rows
    batches = range(each * least, each * most + 1, each)
    has_evaluation = config.eval_dataset is not None or config.eval_split_fraction > 0
    wanted = config.recompute
    if policies is None and wanted is not None:
        policies = [wanted] if isinstance(wanted, str) else None
    names = optimizers or (PLANNED_OPTIMIZERS if config.optim is None else (config.optim,))
    return make_plan(
        shape,
        gpu,
        rows=each * rows * num_gpus,
        seq=config.max_length,
        optimizers=[_optimizer(name, shape) for name in names],
        batches=batches,
        policies=policies,
        host_bytes=host_bytes,
        eval_batch=each * config.per_device_eval_batch_size if has_evaluation else 0,
        # Packed rows run without them: their documents lie differently in each batch.
        cuda_graphs=False if config.packing else config.cuda_graphs,
        streams=config.stream_base,
        parallelisms=[parallelism],
    )


def parallelism_in_force(config: RunConfig, num_gpus: int) -> Parallelism:
    """How so many processes of a run share it. What a file of `deepspeed` offloads is not looked at.

    Raises:
        ConfigError: That file cannot be read, or names no stage.
    """
    if config.deepspeed is not None:
        return Parallelism(num_gpus, f"zero{stage_of_file(Path(config.deepspeed))}")
    strategy = next(iter(STRATEGIES)) if config.distributed == "auto" else config.distributed
    return Parallelism(num_gpus, strategy, config.distributed_offload) if num_gpus > 1 else ONE_GPU


def parallelisms_of(config: RunConfig, num_gpus: int) -> list[Parallelism]:
    """The ways in which so many GPUs may share a run: every one, or the one that is configured. Raises as
    `parallelism_in_force`."""
    if num_gpus == 1 or config.distributed != "auto" or config.deepspeed is not None:
        return [parallelism_in_force(config, num_gpus)]
    return [Parallelism(num_gpus, name, offload) for name, row in STRATEGIES.items() for offload in row.offloads]


def _not_run(config: RunConfig, parallelism: Parallelism) -> str | None:
    """Why `fourfold train` does not share the run so; None where it does."""
    if parallelism.num_gpus == 1:
        return None
    if not parallelism.shards.runs:
        return "fourfold train has no such strategy"
    asked = config.model_copy(update={"distributed": parallelism.strategy})
    fault = next(iter(distributed_contradictions(asked)), None)
    return None if fault is None else fault.what


def run_shape(config: RunConfig, degree: int = 1) -> ModelShape:
    """The model of a run, with what of it is trained; or one GPU's part of it where tensors are divided.

    Args:
        degree: Among how many GPUs they are.

    Raises:
        ConfigError: What cannot be planned, or divided.
        CheckpointError: There is no such model.
    """
    is_gguf = config.model_name_or_path.endswith(".gguf")
    model = None if is_gguf else read_config(config.model_name_or_path, config.model_revision)
    reason = "a GGUF file, which has no config.json" if is_gguf else _no_formula(config, model)
    if reason is not None:
        raise ConfigError("there is no plan for this run", found=reason, hint="see docs/planning.md")
    if degree > 1:
        return with_divided_ends(_shape(config, divided_config(model, degree)), degree)
    return _shape(config, model)


def _shape(config: RunConfig, model: Any) -> ModelShape:
    """As `run_shape`; `model`: its Transformers configuration."""
    dtype, quantization = _DTYPES[config.bnb_4bit_compute_dtype], choices.quantization(config)
    if not _is_generic(config, model):
        return model_shape(model, quantization, config.lora_r, config.target_modules, dtype.itemsize)
    lora = None if config.adapter is None else choices.lora_config(config)
    return followed_shape(model, quantization, lora, dtype, config.attn_implementation)


def sequences_of(config: RunConfig) -> int:
    """Sequences that a row of the run's data is: of pairs two, beside which no pass without gradients takes more."""
    return 2 if config.method in ("dpo", "orpo", "reward") else 1


def takes_generic_path(config: RunConfig) -> bool:
    """Whether layers are Transformers' own. Raises CheckpointError where there is no such model."""
    return _is_generic(config, read_config(config.model_name_or_path, config.model_revision))


def _is_generic(config: RunConfig, model: Any) -> bool:
    """As `takes_generic_path`; `model`: its Transformers configuration."""
    family = FAMILIES.get(model.model_type)
    has_fused_layer = family is not None and family.fused_layer is not None and config.fused_blocks is not False
    if config.load_in_8bit:
        return True
    trains_more = config.adapter is None or config.use_dora or bool(config.modules_to_save)
    return not has_fused_layer or trains_more or config.lora_dropout > 0


def _no_formula(config: RunConfig, model: Any) -> str | None:
    """Why it is not known what the run takes; `model`: its Transformers configuration."""
    if getattr(model, "quantization_config", None) is not None:
        return "a checkpoint that is quantized already"
    if config.adapter is None and config.quantizes:
        return "adapter: null with a quantized base, whose weights are frozen (--no-load_in_4bit)"
    if config.adapter is None and config.bnb_4bit_compute_dtype == "float16":
        return "adapter: null in float16, which trains copies in fp32 (--bnb_4bit_compute_dtype bfloat16)"
    if not _is_generic(config, model):
        return None
    if config.recompute is not None:
        return f"recompute: {config.recompute}, where layers take the generic path (gradient_checkpointing is theirs)"
    if config.packing:
        return "packing: true, where layers take the generic path (Transformers' mask of packed rows is not counted)"
    return None


def optimizer_row(name: str) -> OptimizerRow:
    """What `optim` names; what the Trainer makes keeps the state of `adamw`."""
    return OPTIMIZERS[name] or OptimizerRow(AdamW, "adamw")


def optimizers_of_the_same_state(name: str) -> list[str]:
    """Those planned ones that go on from its checkpoints: with the same rule and bits, wherever state is."""
    state = optimizer_row(name)[:3]
    return [other for other in PLANNED_OPTIMIZERS if optimizer_row(other)[:3] == state]


def _optimizer(name: str, shape: ModelShape) -> OptimizerBytes:
    row = optimizer_row(name)
    # A base that is trained is so in its own dtype, and beside it nothing is; adapters are fp32.
    element = 4 if shape.adapter_bytes else shape.element_size
    working = working_bytes(row.rule, shape.adapter_shapes, element)
    state = state_bytes(row.rule, row.state_bits, shape.adapter_shapes)
    if row.placement == "resident":
        return OptimizerBytes(name, state, working=working)
    staging = staging_bytes(row.rule, row.state_bits, shape.adapter_shapes)
    return OptimizerBytes(name, 0, staging, state, working)
