"""RunConfig: every key of a run, flat, with the field's own names (Hugging Face, PEFT, bitsandbytes)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal, Self

import yaml
from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from fourfold.config.datasets import Datasets, EvalDatasets, RowFormat
from fourfold.config.distributed import DistributedKeys, distributed_contradictions
from fourfold.config.evaluation import EvaluationKeys, evaluation_contradictions
from fourfold.config.life import LifeKeys, life_contradictions
from fourfold.config.methods import Contradiction, MethodKeys, method_contradictions
from fourfold.config.precision import precision_contradictions
from fourfold.config.streaming import STREAMING_BUFFER_SIZE, streaming_contradictions
from fourfold.config.types import (
    Amount,
    ChatTemplate,
    Count,
    CountOrZero,
    CudaDevice,
    PiSSAIterations,
    as_list,
    default_4bit,
    default_epochs,
    default_warmup,
)

__all__ = ["EXCLUSIVE_KEYS", "GROUPS", "Contradiction", "RunConfig", "contradictions"]

RecomputePolicy = Literal["none", "mlp", "selective", "full", "mlp_offload", "selective_offload", "full_offload"]
Optimizer = Literal[
    "adamw",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "adafactor",
    "adamw_torch",
    "adamw_torch_fused",
]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class RunConfig(EvaluationKeys, DistributedKeys, LifeKeys, MethodKeys):
    """All choices of one run. Frozen; an unknown key or a wrong type is refused, nothing is coerced.

    Raises:
        pydantic.ValidationError: A field of a wrong type or value, or keys that contradict one another.
            `load_config` reports the same faults as one ConfigError with file and line.
    """

    # Keys such as model_revision are the field's own names: pydantic's guard on `model_` is off.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    # Model
    model_name_or_path: str = Field(
        min_length=1, description="Folder of the base model's checkpoint, or its name on the hub."
    )
    model_revision: str | None = Field(None, description="Branch, tag or commit of a model on the hub.")
    load_in_8bit: bool = Field(
        False, description="LLM.int8() as the base: rows of int8, inputs rounded too but for their outliers."
    )
    llm_int8_threshold: float = Field(
        6.0, ge=0, description="Magnitude from which a column of an input is an outlier of LLM.int8(); 0: none is."
    )
    load_in_4bit: bool = Field(
        default_factory=default_4bit,
        description="Store the base model quantized, by the bnb_4bit_ keys; true unless load_in_8bit is. With both "
        "false it keeps its 16 bits.",
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4", "int4", "int8"] = Field(
        "nf4", description="Number format of the base model's weights."
    )
    bnb_4bit_use_double_quant: bool = Field(
        True, description="Quantize the blocks' scales too (saves about 0.37 bits a weight)."
    )
    bnb_4bit_blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096] = Field(
        64, description="Weights that share one scale."
    )
    bnb_4bit_compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of activations and matrix products; auto: bfloat16 where it is fast."
    )
    quantize_lm_head: bool = Field(False, description="Quantize the output layer as well.")
    quantize_embeddings: bool = Field(
        False, description="Quantize the input embedding, and the output layer that shares its weight."
    )
    calibration: Literal["absmax", "percentile", "mse", "kl"] = Field(
        "absmax", description="How blocks of int4 and int8 are scaled; the other formats know absmax alone."
    )
    modules_to_not_convert: list[str] = Field(
        [], description="Modules that stay in 16 bits, by name, part of a path, or glob."
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = Field(
        None, description="Attention of Transformers; null leaves the choice to it."
    )
    device: Literal["auto", "cpu"] | CudaDevice = Field(
        "auto", description="Where the model lives; auto: the GPU if there is one."
    )
    gpu_memory_limit: Amount | None = Field(
        None,
        description="What the process may take of the GPU, as if the card were that large; null: all.",
    )
    stream_base: Literal["host", "disk"] | None = Field(
        None,
        description="Where a base larger than the GPU waits, layer by layer: host memory, or the quantized checkpoint "
        "on the disk; null: it stays on the GPU.",
    )

    # Adapter
    adapter: Literal["lora"] | None = Field(
        "lora", description="What is trained on top of the base model; null: nothing, all of its own weights are."
    )
    lora_r: Count = Field(16, description="Rank of the adapter.")
    lora_alpha: Count = Field(32, description="Scale of the adapter: alpha / r, or alpha / sqrt(r) with use_rslora.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    use_rslora: bool = Field(False, description="Rank-stabilized scaling.")
    use_dora: bool = Field(False, description="Weight-decomposed adapter (DoRA).")
    init_lora_weights: Literal[True, "gaussian", "pissa", "loftq"] | PiSSAIterations = Field(
        True, description="How the adapter starts; true: as the identity (B is zero)."
    )
    loftq_iterations: Count = Field(1, description="Alternating steps of the LoftQ initialisation.")
    target_modules: str | list[str] | None = Field(
        None,
        description="Layers that get an adapter: all-linear, a list of names, or one regular expression; "
        "null: the model family's default.",
    )
    modules_to_save: list[str] = Field([], description="Layers trained in full and saved with the adapter.")

    # Data
    train_dataset: Annotated[str, Field(min_length=1)] | Datasets | None = Field(
        None, description="File, folder or glob of files, or a data set's name on the hub; or a list of them to mix."
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"] = Field(
        "all_exhausted", description="When a mixture with weights ends; all_exhausted: small data sets are repeated."
    )
    eval_dataset: Annotated[str, Field(min_length=1)] | EvalDatasets | None = Field(
        None, description="File, folder, glob or name on the hub of the held-out rows; several by a name for each."
    )
    eval_split_fraction: float = Field(
        0.0, ge=0, lt=1, description="Share of train_dataset to hold out when there is no eval_dataset."
    )
    row_format: RowFormat = Field("auto", description="What a row looks like; auto: told by its columns.")
    columns: dict[str, str] = Field({}, description="Names of the row format's fields in the data: {prompt: question}.")
    streaming: bool = Field(
        False,
        description="Read the training rows while they are trained on, in constant memory, and not before; it takes "
        "max_steps. A stream that ends begins again, in another order.",
    )
    streaming_buffer_size: Count = Field(
        STREAMING_BUFFER_SIZE,
        description="Rows of a stream that are shuffled and packed together, one block in memory.",
    )
    max_length: int = Field(1024, ge=2, description="Longest conversation, in tokens.")
    packing: bool = Field(
        False, description="Fill each row of max_length with several conversations that never see each other."
    )
    train_on_prompt: bool = Field(False, description="Learn the prompts too, not the answers only.")
    overlong: Literal["drop", "error", "truncate"] = Field(
        "drop", description="What happens to a conversation longer than max_length; it is always reported."
    )
    chat_template: ChatTemplate | None = Field(
        None, description="Jinja text or .jinja file in place of the tokenizer's own chat template."
    )
    pad_token: str | None = Field(None, min_length=1, description="Padding token, for a tokenizer that has none.")
    dataset_num_proc: Count | None = Field(
        None, description="Processes that tokenize; null: one for each 20,000 rows, up to one a core and eight."
    )

    # Training
    output_dir: str = Field("run", min_length=1, description="Folder of the run: everything it leaves.")
    overwrite_output_dir: bool = Field(False, description="Start anew in an output_dir that holds a run.")
    resume_from_checkpoint: str | None = Field(
        None, min_length=1, description="auto: the newest whole checkpoint of output_dir; or a checkpoint."
    )
    max_steps: Count | None = Field(None, description="Optimizer steps to train, instead of epochs.")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(
        default_factory=default_epochs, description="Passes over the data; 1 unless max_steps is given."
    )
    per_device_train_batch_size: Count = Field(4, description="Rows in one forward pass on one device.")
    per_device_eval_batch_size: Count = Field(8, description="The same, in evaluation.")
    gradient_accumulation_steps: Count = Field(4, description="Forward passes to one optimizer step.")
    gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass: less memory, about a third slower."
    )
    plan: bool = Field(
        True, description="On a GPU, train as planned for its memory, where there is a plan; false: as configured."
    )
    recompute: RecomputePolicy | list[RecomputePolicy] | None = Field(
        None,
        description="What fused blocks compute again, and what waits in host memory; a list has one for each layer; "
        "null: as planned, the fastest that fits the GPU; without a plan, full with gradient_checkpointing, else none.",
    )
    cuda_graphs: bool | None = Field(
        None,
        description="Fused blocks replayed as CUDA graphs where all batches have one shape; null: batches of at most "
        "8192 tokens.",
    )
    on_out_of_memory: Literal["step_down", "stop"] = Field(
        "step_down",
        description="When memory runs out in a planned run: go on from the same step with a plan that takes less, or "
        "stop; the steps before are in a checkpoint.",
    )
    fused_blocks: bool | None = Field(
        None, description="Decoder layers as one function each; null: where a GPU has the kernels."
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="Course of the learning rate after warm-up."
    )
    warmup_steps: CountOrZero | None = Field(None, description="Optimizer steps of warm-up, as a number.")
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        default_factory=default_warmup,
        description="Steps of warm-up as a share of all steps; 0.03 unless warmup_steps is given.",
    )
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    requantize_every: Count | None = Field(
        None, description="Optimizer steps after which the adapter is merged into the quantized base; null: never."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are clipped to this norm; 0: never.")
    optim: Optimizer | None = Field(
        None,
        description="Optimizer; 8bit: state in 8 bits; paged: state in the host's memory, brought in pieces; null: as "
        "planned, of AdamW's the fastest that fits, the more exact of equally fast ones; without a plan, adamw.",
    )
    logging_steps: Count = Field(10, description="Optimizer steps between two lines of metrics.")
    eval_steps: Count | None = Field(
        None, description="Optimizer steps between two evaluations; null: once an epoch, streamed ten times a run."
    )
    save_steps: Count | None = Field(
        None, description="Optimizer steps between two checkpoints; null: once an epoch, streamed ten times a run."
    )
    save_total_limit: Count | None = Field(2, description="Checkpoints to keep; null: all.")
    seed: CountOrZero = Field(42, description="Seed of data order, adapters, dropout and held-out rows.")
    dataloader_num_workers: CountOrZero = Field(
        0, description="Processes that load batches; of a stream one at most, which reads ahead."
    )
    group_by_length: bool = Field(
        False, description="Batch rows of like length: less padding, and an order less random."
    )
    report_to: Annotated[list[Tracker], BeforeValidator(as_list)] = Field(
        [], description="Trackers that get the metrics besides the run folder."
    )

    @model_validator(mode="after")
    def _without_contradictions(self) -> Self:
        found = [f"{contradiction.what}; {contradiction.hint}" for contradiction in contradictions(self)]
        if found:
            raise ValueError("\n".join(found))
        return self

    @property
    def quantizes(self) -> bool:
        """Whether the base is quantized."""
        return self.load_in_4bit or self.load_in_8bit

    def to_yaml(self) -> str:
        """The resolved configuration: every key with its value. `load_config` reads back an equal object."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
        return text


# The first key of each group, for the reference page.
GROUPS: dict[str, str] = {
    "method": "Method",
    "load_best_model_at_end": "During training",
    "distributed": "Several GPUs",
    "model_name_or_path": "Model",
    "adapter": "Adapter",
    "train_dataset": "Data",
    "output_dir": "Training",
    "eval_generate_rows": "Evaluation",
}

# Two ways to say one thing: an override of one displaces the other when that stands in the file.
EXCLUSIVE_KEYS: tuple[tuple[str, str], ...] = (
    ("max_steps", "num_train_epochs"),
    ("warmup_steps", "warmup_ratio"),
    ("eval_dataset", "eval_split_fraction"),
    ("load_in_8bit", "load_in_4bit"),
    ("resume_from_checkpoint", "overwrite_output_dir"),
)


def contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """Everything in `config` that does not fit together."""
    if config.max_steps is not None and config.num_train_epochs is not None:
        yield Contradiction(
            ("max_steps", "num_train_epochs"),
            "max_steps and num_train_epochs both say how long to train",
            "give one of them",
        )
    if config.max_steps is None and config.num_train_epochs is None:
        yield Contradiction(
            ("max_steps", "num_train_epochs"),
            "max_steps and num_train_epochs are both null",
            "give one of them",
        )
    if config.warmup_steps is not None and config.warmup_ratio is not None:
        yield Contradiction(
            ("warmup_steps", "warmup_ratio"),
            "warmup_steps and warmup_ratio both say how long to warm up",
            "give one of them",
        )
    if config.lr_scheduler_type == "constant":
        for key in ("warmup_steps", "warmup_ratio"):
            if getattr(config, key):
                yield Contradiction(
                    ("lr_scheduler_type", key),
                    f"{key} is given, and lr_scheduler_type constant has no warm-up",
                    f"set lr_scheduler_type: constant_with_warmup or leave {key} out",
                )
    if config.resume_from_checkpoint is not None and config.overwrite_output_dir:
        yield Contradiction(
            ("resume_from_checkpoint", "overwrite_output_dir"),
            "resume_from_checkpoint goes on with a run that overwrite_output_dir would delete",
            "give one of them",
        )
    if config.output_dir == config.model_name_or_path:
        yield Contradiction(
            ("output_dir", "model_name_or_path"),
            "output_dir is the folder of the base model",
            "choose another folder for the run",
        )
    yield from _data_contradictions(config)
    yield from (Contradiction(*each) for each in evaluation_contradictions(config))
    yield from (Contradiction(*each) for each in precision_contradictions(config))
    yield from (Contradiction(*each) for each in streaming_contradictions(config))
    yield from _adapter_contradictions(config)
    yield from method_contradictions(config)
    yield from life_contradictions(config)
    yield from distributed_contradictions(config)


def _data_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    if config.eval_dataset is not None and config.eval_split_fraction > 0:
        yield Contradiction(
            ("eval_dataset", "eval_split_fraction"),
            "eval_dataset and eval_split_fraction both say which rows are held out",
            "give one of them",
        )
    if config.eval_split_fraction > 0 and config.train_dataset is None:
        yield Contradiction(
            ("eval_split_fraction", "train_dataset"),
            "eval_split_fraction has no train_dataset to hold rows out of",
            "give train_dataset",
        )
    has_held_out = config.eval_dataset is not None or config.eval_split_fraction > 0
    if config.eval_steps and not has_held_out:
        yield Contradiction(
            ("eval_steps", "eval_dataset", "eval_split_fraction"),
            "eval_steps is given, but no rows are held out",
            "give eval_dataset or eval_split_fraction",
        )
    if config.packing and config.group_by_length:
        yield Contradiction(
            ("packing", "group_by_length"),
            "packed rows are all of one length, and group_by_length sorts by length",
            "give one of them",
        )


def _adapter_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    if config.adapter is None:
        for key, is_set in {
            "use_rslora": config.use_rslora,
            "use_dora": config.use_dora,
            "init_lora_weights": config.init_lora_weights is not True,
            "target_modules": config.target_modules is not None,
            "modules_to_save": bool(config.modules_to_save),
        }.items():
            if is_set:
                yield Contradiction(
                    (key, "adapter"),
                    f"{key} is given, and adapter is null",
                    f"set adapter: lora or leave {key} out",
                )
    if config.loftq_iterations != 1 and config.init_lora_weights != "loftq":
        yield Contradiction(
            ("loftq_iterations", "init_lora_weights"),
            "loftq_iterations is given, and init_lora_weights is not loftq",
            "set init_lora_weights: loftq",
        )
