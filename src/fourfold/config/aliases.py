"""The keys of Axolotl, LLaMA-Factory, TRL and the Transformers Trainer that mean one of ours.

ALIASES maps such a key to a function of its value that gives our keys and values; a ValueError from it is
reported as a fault of that key. A value of null says nothing in those files and is skipped. UNSUPPORTED maps
keys that we know and do not have to what to do instead; they are refused unless switched off by their value.

Sources: axolotl `src/axolotl/utils/schemas/`, LLaMA-Factory `src/llamafactory/hparams/`, TRL `SFTConfig` and
`ModelConfig`, Transformers `TrainingArguments`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fourfold.config.dataset_aliases import axolotl_datasets, dataset_names, pretraining_dataset

__all__ = ["ALIASES", "UNSUPPORTED", "Conversion", "is_switched_off"]

Conversion = Callable[[Any], dict[str, Any]]


def _same_value(key: str) -> Conversion:
    return lambda value: {key: value}


def _chosen(values: dict[Any, dict[str, Any]], hint: str) -> Conversion:
    """Each value stands for keys and values of ours; any other value is refused with the hint."""

    def convert(value: Any) -> dict[str, Any]:
        # True and 1 are one dictionary key; here they are two values.
        for known, ours in values.items():
            if type(value) is type(known) and value == known:
                return ours
        raise ValueError(hint)

    return convert


def _on(ours: dict[str, Any]) -> Conversion:
    return _chosen({True: ours, False: {}}, "give true or false")


def _no_effect(_: Any) -> dict[str, Any]:
    """For keys that only ask for what happens anyway, or for speed: no result depends on them."""
    return {}


def _names(key: str, **special: str) -> Conversion:
    """LLaMA-Factory writes lists as text with commas."""

    def convert(value: Any) -> dict[str, Any]:
        if not isinstance(value, str):
            return {key: value}
        if value in special:
            return {key: special[value]}
        return {key: [name.strip() for name in value.split(",")]}

    return convert


def _adapter(value: Any) -> dict[str, Any]:
    """Our own key too; Axolotl's qlora says two things."""
    if value == "qlora":
        return {"adapter": "lora", "load_in_4bit": True}
    return {"adapter": value or None}


def _resume(value: Any) -> dict[str, Any]:
    """Our own key too; the Trainer's true and false are accepted."""
    if isinstance(value, bool):
        value = "auto" if value else None
    return {"resume_from_checkpoint": value}


def _optim(value: Any) -> dict[str, Any]:
    """Our own key too; the Trainer has several names for some."""
    names = {"paged_adamw": "paged_adamw_32bit", "paged_lion": "paged_lion_32bit", "lion_32bit": "lion"}
    return {"optim": names.get(value, value) if isinstance(value, str) else value}


def _memory_limit(value: Any) -> dict[str, Any]:
    """Our own key too; in Axolotl a number without a unit is gigabytes."""
    is_number = re.fullmatch(r"[0-9]+(\.[0-9]+)?", str(value)) is not None
    return {"gpu_memory_limit": f"{value}GB" if is_number else value}


def _pref_loss(value: Any) -> dict[str, Any]:
    """LLaMA-Factory's stage dpo has orpo among its losses."""
    if value == "orpo":
        return {"method": "orpo"}
    if value not in ("sigmoid", "hinge", "ipo"):
        raise ValueError("give sigmoid, hinge, ipo or orpo; see loss_type for the others there are")
    return {"loss_type": value}


def _pad_token(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() - {"pad_token"}:
        raise ValueError("of special_tokens only pad_token can be set; the others are the tokenizer's own")
    return {"pad_token": value["pad_token"]} if value.get("pad_token") is not None else {}


def _inverse(key: str) -> Conversion:
    return _chosen({True: {key: False}, False: {key: True}}, "give true or false")


def _per_epoch(key: str) -> Conversion:
    return _chosen({1: {key: None}}, f"once an epoch is {key}: null; for more, give {key} a number")


def _strategy(key: str) -> Conversion:
    return _chosen({"epoch": {key: None}, "steps": {}}, f"give {key} a number, or null for once an epoch")


# YAML reads a bare `no` as false. Held-out rows are always evaluated, so `no` means that there are none.
_NOT_EVALUATED: dict[str, Any] = {"eval_dataset": None, "eval_split_fraction": 0.0}
_EVAL_STRATEGY = _chosen(
    {"epoch": {"eval_steps": None}, "steps": {}, "no": _NOT_EVALUATED, False: _NOT_EVALUATED},
    "give eval_steps a number, or null for once an epoch",
)
_COMPUTE_DTYPE = _same_value("bnb_4bit_compute_dtype")

ALIASES: dict[str, Conversion] = {
    # Axolotl
    "base_model": _same_value("model_name_or_path"),
    "revision_of_model": _same_value("model_revision"),
    "adapter": _adapter,
    "rl": _chosen(
        {
            "dpo": {"method": "dpo"},
            "ipo": {"method": "dpo", "loss_type": "ipo"},
            "kto": {"method": "kto"},
            "orpo": {"method": "orpo"},
        },
        "give dpo, ipo, kto or orpo",
    ),
    "rl_beta": _same_value("beta"),
    "dpo_beta": _same_value("beta"),
    "orpo_alpha": _same_value("beta"),
    "dpo_label_smoothing": _same_value("label_smoothing"),
    "kto_desirable_weight": _same_value("desirable_weight"),
    "kto_undesirable_weight": _same_value("undesirable_weight"),
    "reward_model": _on({"method": "reward"}),
    "lora_target_modules": _same_value("target_modules"),
    "lora_target_linear": _on({"target_modules": "all-linear"}),
    "lora_modules_to_save": _same_value("modules_to_save"),
    "peft_use_dora": _same_value("use_dora"),
    "peft_use_rslora": _same_value("use_rslora"),
    "peft_init_lora_weights": _same_value("init_lora_weights"),
    "datasets": axolotl_datasets("train_dataset"),
    "pretraining_dataset": pretraining_dataset,
    "test_datasets": axolotl_datasets("eval_dataset"),
    "val_set_size": _same_value("eval_split_fraction"),
    "sequence_len": _same_value("max_length"),
    "sample_packing": _same_value("packing"),
    "train_on_inputs": _same_value("train_on_prompt"),
    "chat_template_jinja": _same_value("chat_template"),
    "special_tokens": _pad_token,
    "dataset_processes": _same_value("dataset_num_proc"),
    "streaming_multipack_buffer_size": _same_value("streaming_buffer_size"),
    "micro_batch_size": _same_value("per_device_train_batch_size"),
    "eval_batch_size": _same_value("per_device_eval_batch_size"),
    "num_epochs": _same_value("num_train_epochs"),
    "lr_scheduler": _same_value("lr_scheduler_type"),
    "optimizer": _optim,
    "optim": _optim,
    "gpu_memory_limit": _memory_limit,
    "auto_resume_from_checkpoints": _on({"resume_from_checkpoint": "auto"}),
    "evals_per_epoch": _per_epoch("eval_steps"),
    "saves_per_epoch": _per_epoch("save_steps"),
    "use_tensorboard": _on({"report_to": ["tensorboard"]}),
    "noisy_embedding_alpha": _same_value("neftune_noise_alpha"),
    "wandb_project": _same_value("project"),
    "wandb_name": _same_value("run_name"),
    "mlflow_experiment_name": _same_value("project"),
    "mlflow_run_name": _same_value("run_name"),
    "trackio_project_name": _same_value("project"),
    "trackio_run_name": _same_value("run_name"),
    "flash_attention": _on({"attn_implementation": "flash_attention_2"}),
    "flex_attention": _on({"attn_implementation": "flex_attention"}),
    "sdp_attention": _on({"attn_implementation": "sdpa"}),
    "eager_attention": _on({"attn_implementation": "eager"}),
    "model_type": _no_effect,
    "tokenizer_type": _no_effect,
    "strict": _no_effect,
    "dataset_prepared_path": _no_effect,
    "pad_to_sequence_len": _no_effect,
    "shuffle_merged_datasets": _no_effect,
    # LLaMA-Factory
    "stage": _chosen(
        {
            "sft": {"method": "sft"},
            "pt": {"method": "pretrain"},
            "rm": {"method": "reward"},
            "dpo": {"method": "dpo"},
            "kto": {"method": "kto"},
        },
        "give sft, pt, rm, dpo or kto",
    ),
    "pref_beta": _same_value("beta"),
    "pref_loss": _pref_loss,
    "kto_chosen_weight": _same_value("desirable_weight"),
    "kto_rejected_weight": _same_value("undesirable_weight"),
    "do_train": _on({}),
    "do_eval": _on({}),
    "finetuning_type": _chosen(
        {"lora": {"adapter": "lora"}, "full": {"adapter": None, "load_in_4bit": False}}, "give lora or full"
    ),
    "quantization_method": _chosen({"bnb": {}, "bitsandbytes": {}}, "only bnb is supported"),
    "quantization_bit": _chosen({4: {"load_in_4bit": True}, 8: {"load_in_8bit": True}}, "give 4 or 8"),
    "quantization_type": _same_value("bnb_4bit_quant_type"),
    "double_quantization": _same_value("bnb_4bit_use_double_quant"),
    "lora_rank": _same_value("lora_r"),
    "lora_target": _names("target_modules", all="all-linear"),
    "additional_target": _names("modules_to_save"),
    "pissa_init": _on({"init_lora_weights": "pissa_niter_16"}),
    "dataset": dataset_names("train_dataset"),
    "mix_strategy": _chosen(
        {
            "concat": {},
            "interleave_under": {"stopping_strategy": "first_exhausted"},
            "interleave_over": {"stopping_strategy": "all_exhausted"},
        },
        "give concat, interleave_under or interleave_over, and each data set of train_dataset a weight",
    ),
    "cutoff_len": _same_value("max_length"),
    "val_size": _same_value("eval_split_fraction"),
    "neat_packing": _same_value("packing"),
    "preprocessing_num_workers": _same_value("dataset_num_proc"),
    "buffer_size": _same_value("streaming_buffer_size"),
    "disable_gradient_checkpointing": _inverse("gradient_checkpointing"),
    "flash_attn": _chosen(
        {
            "auto": {},
            "disabled": {"attn_implementation": "eager"},
            "sdpa": {"attn_implementation": "sdpa"},
            "fa2": {"attn_implementation": "flash_attention_2"},
        },
        "give auto, disabled, sdpa or fa2",
    ),
    "plot_loss": _no_effect,
    "overwrite_cache": _no_effect,
    "include_num_input_tokens_seen": _no_effect,
    # The Transformers Trainer and TRL
    "bf16": _chosen(
        {
            True: {"bnb_4bit_compute_dtype": "bfloat16"},
            False: {},
            "auto": {"bnb_4bit_compute_dtype": "auto"},
        },
        "give true, false or auto",
    ),
    "fp16": _on({"bnb_4bit_compute_dtype": "float16"}),
    "dtype": _COMPUTE_DTYPE,
    "torch_dtype": _COMPUTE_DTYPE,
    "eval_strategy": _EVAL_STRATEGY,
    "evaluation_strategy": _EVAL_STRATEGY,
    "save_strategy": _strategy("save_steps"),
    "logging_strategy": _chosen({"steps": {}}, "give logging_steps a number"),
    "save_safetensors": _chosen({True: {}}, "a pickle is never written: leave it out"),
    "resume_from_checkpoint": _resume,
    "pad_to_multiple_of": _no_effect,
    "tf32": _no_effect,
    "use_peft": _on({"adapter": "lora"}),
    "use_bnb_nested_quant": _same_value("bnb_4bit_use_double_quant"),
    "dataset_name": _same_value("train_dataset"),
    "max_seq_length": _same_value("max_length"),
}

_ONE_DEVICE = "layers are not split among devices: leave it out"
_SEVERAL = "give distributed, and start with torchrun; see docs/distributed.md"
_OPTIMIZERS = "see optim for the optimizers there are"
_OPTIMIZER_DEFAULTS = "the optimizer's defaults are used: leave it out"
_OWN_KERNELS = "faster layers are chosen without a key: leave it out"
_TRACKERS = "name the tracker in report_to, and set it up by its own environment variables"
_PASTE_HUB = "upload the run folder with the hub's own command"

UNSUPPORTED: dict[str, str] = {
    # Axolotl
    "lora_model_dir": "to go on with a run, give resume_from_checkpoint",
    "lora_target_parameters": "adapters go on linear layers: give target_modules",
    "lora_fan_in_fan_out": "it is told from the layer: leave it out",
    "lora_mlp_kernel": _OWN_KERNELS,
    "lora_qkv_kernel": _OWN_KERNELS,
    "lora_o_kernel": _OWN_KERNELS,
    "peft_layers_to_transform": "name the layers in target_modules, as a regular expression",
    "peft": "for LoftQ, give init_lora_weights: loftq",
    "bnb_config_kwargs": "give the bnb_4bit_* keys themselves",
    "gptq": "the base model is quantized here: give its 16-bit checkpoint",
    "relora": "adapters are merged once, after training",
    "batch_size": "give gradient_accumulation_steps",
    "eval_sample_packing": "held-out rows are never packed: leave it out",
    "unfrozen_parameters": "name layers to train in full in modules_to_save",
    "tokens": "new tokens are not added: use a tokenizer that has them",
    "plugins": "there are no plugins: leave it out",
    "fsdp": _SEVERAL,
    "fsdp_config": _SEVERAL,
    "device_map": "give device",
    "tensor_parallel_size": _ONE_DEVICE,
    "context_parallel_size": _ONE_DEVICE,
    "sequence_parallel_degree": _ONE_DEVICE,
    "wandb_entity": _TRACKERS,
    "wandb_watch": _TRACKERS,
    "wandb_log_model": _TRACKERS,
    "mlflow_tracking_uri": _TRACKERS,
    "hub_model_id": _PASTE_HUB,
    "hub_strategy": _PASTE_HUB,
    "push_to_hub": _PASTE_HUB,
    "push_dataset_to_hub": _PASTE_HUB,
    "xformers_attention": "give attn_implementation",
    "s2_attention": "give attn_implementation",
    "trust_remote_code": "code from a checkpoint is never run: use a model that Transformers has",
    # LLaMA-Factory
    "template": "the tokenizer's own chat template is used; for another, give chat_template",
    "dataset_dir": "give the file's path in train_dataset",
    "adapter_name_or_path": "to go on with a run, give resume_from_checkpoint",
    "pissa_iter": "give init_lora_weights: pissa_niter_N",
    "pissa_convert": "the adapter is saved in PEFT's own format: leave it out",
    "create_new_adapter": "each run makes its own adapter: leave it out",
    "use_galore": _OPTIMIZERS,
    "use_apollo": _OPTIMIZERS,
    "use_badam": _OPTIMIZERS,
    "use_adam_mini": _OPTIMIZERS,
    "use_muon": _OPTIMIZERS,
    "use_llama_pro": "give adapter: lora",
    "use_unsloth": _OWN_KERNELS,
    "use_unsloth_gc": "give gradient_checkpointing",
    "enable_liger_kernel": _OWN_KERNELS,
    "mask_history": "the loss is on every answer of a conversation",
    "max_samples": "give a file with fewer rows, or max_steps",
    "interleave_probs": "give each data set of train_dataset a weight",
    "rope_scaling": "it is read from the model's config.json",
    "resize_vocab": "new tokens are not added: use a tokenizer that has them",
    "predict_with_generate": "give eval_generate_rows",
    "do_predict": "give eval_generate_rows",
    "export_dir": "merge is a verb of its own: fourfold merge ADAPTER OUT",
    "use_swanlab": "see report_to for the trackers there are",
    # Both, the Transformers Trainer and TRL
    "torch_compile": "layers are not compiled: leave it out",
    "auto_find_batch_size": "give per_device_train_batch_size",
    "adam_beta1": _OPTIMIZER_DEFAULTS,
    "adam_beta2": _OPTIMIZER_DEFAULTS,
    "adam_epsilon": _OPTIMIZER_DEFAULTS,
    "optim_args": _OPTIMIZER_DEFAULTS,
    "lr_scheduler_kwargs": "see lr_scheduler_type for the schedules there are",
    "gradient_checkpointing_kwargs": "give gradient_checkpointing: true or false",
    "use_liger_kernel": _OWN_KERNELS,
    "assistant_only_loss": "give train_on_prompt: false",
    "completion_only_loss": "give train_on_prompt: false",
}


def is_switched_off(value: object) -> bool:
    """Whether a value of an unsupported key asks for nothing: null, false, or empty."""
    return value is None or value is False or value in ("", [], {})
