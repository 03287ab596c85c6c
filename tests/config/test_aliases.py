from __future__ import annotations

import pytest
import yaml

from fourfold.config import RunConfig, load_config
from fourfold.config.aliases import ALIASES, UNSUPPORTED
from fourfold.errors import ConfigError


def load(tmp_path, text: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


# In the shape of the examples that Axolotl ships: many blank keys, some that change no result.
AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: data/train.jsonl
    type: chat_template
    field_messages: conversations
dataset_prepared_path: last_run_prepared
val_set_size: 0.1
output_dir: ./outputs/qlora-out
adapter: qlora
lora_model_dir:
sequence_len: 2048
sample_packing: true
eval_sample_packing: false
pad_to_sequence_len: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules:
lora_target_linear: true
wandb_project:
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_torch_fused
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
tf32: false
gradient_checkpointing: true
resume_from_checkpoint:
logging_steps: 1
flash_attention: true
warmup_steps: 10
saves_per_epoch: 1
evals_per_epoch: 1
weight_decay: 0.0
fsdp:
special_tokens:
  pad_token: "<|end_of_text|>"
"""

LLAMA_FACTORY = """\
model_name_or_path: Qwen/Qwen2.5-0.5B-Instruct
trust_remote_code: false
quantization_bit: 4
quantization_type: nf4
quantization_method: bnb
double_quantization: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: data/train.jsonl
cutoff_len: 2048
overwrite_cache: true
preprocessing_num_workers: 2
output_dir: saves/qlora
plot_loss: true
overwrite_output_dir: true
save_steps: 500
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 500
report_to: none
"""


def test_an_axolotl_file_loads_with_its_meaning(tmp_path):
    config = load(tmp_path, AXOLOTL)
    assert config == RunConfig(
        model_name_or_path="NousResearch/Llama-3.2-1B",
        train_dataset="data/train.jsonl",
        row_format="messages",
        columns={"messages": "conversations"},
        eval_split_fraction=0.1,
        output_dir="./outputs/qlora-out",
        max_length=2048,
        packing=True,
        lora_r=32,
        lora_alpha=16,
        lora_dropout=0.05,
        target_modules="all-linear",
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        num_train_epochs=3,
        optim="adamw_torch_fused",
        logging_steps=1,
        attn_implementation="flash_attention_2",
        warmup_steps=10,
        pad_token="<|end_of_text|>",
    )


def test_a_llama_factory_file_loads_with_its_meaning(tmp_path):
    config = load(tmp_path, LLAMA_FACTORY)
    assert config == RunConfig(
        model_name_or_path="Qwen/Qwen2.5-0.5B-Instruct",
        lora_r=8,
        ddp_timeout=180_000_000,
        target_modules="all-linear",
        train_dataset="data/train.jsonl",
        max_length=2048,
        dataset_num_proc=2,
        output_dir="saves/qlora",
        overwrite_output_dir=True,
        save_steps=500,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        learning_rate=1e-4,
        num_train_epochs=3,
        warmup_ratio=0.1,
        bnb_4bit_compute_dtype="bfloat16",
        eval_split_fraction=0.1,
        eval_steps=500,
    )


@pytest.mark.parametrize(
    ("alias", "value", "key", "ours"),
    [
        ("lora_target", "q_proj, v_proj", "target_modules", ["q_proj", "v_proj"]),
        ("additional_target", "embed_tokens,lm_head", "modules_to_save", ["embed_tokens", "lm_head"]),
        ("pissa_init", True, "init_lora_weights", "pissa_niter_16"),
        ("peft_init_lora_weights", "pissa", "init_lora_weights", "pissa"),
        ("disable_gradient_checkpointing", True, "gradient_checkpointing", False),
        ("flash_attn", "disabled", "attn_implementation", "eager"),
        ("fp16", True, "bnb_4bit_compute_dtype", "float16"),
        ("bf16", False, "bnb_4bit_compute_dtype", "auto"),
        ("auto_resume_from_checkpoints", True, "resume_from_checkpoint", "auto"),
        ("use_tensorboard", True, "report_to", ["tensorboard"]),
        ("max_seq_length", 77, "max_length", 77),
        ("save_strategy", "epoch", "save_steps", None),
        ("eval_strategy", "no", "eval_dataset", None),
        ("adapter", "qlora", "adapter", "lora"),
        ("adapter", "", "adapter", None),
        ("datasets", [{"path": "p", "type": "alpaca"}], "row_format", "alpaca"),
    ],
)
def test_an_alias_stands_for_our_key(tmp_path, alias, value, key, ours):
    config = load(tmp_path, yaml.safe_dump({"model_name_or_path": "m", alias: value}))
    assert getattr(config, key) == ours


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base_model: m\nmodel_name_or_path: n\n", "base_model (model_name_or_path) are one key"),
        ("model_name_or_path: m\nadapter: qlora\nload_in_4bit: false\n", "are one key with two values"),
        ("model_name_or_path: m\neval_dataset: e\neval_strategy: no\n", "are one key with two values"),
        ("model_name_or_path: m\nquantization_bit: 3\n", "give 4 or 8"),
        ("model_name_or_path: m\nload_in_8bit: true\nload_in_4bit: true\n", "bnb_4bit_quant_type: int8"),
        ("model_name_or_path: m\nfinetuning_type: freeze\n", "give lora or full"),
        ("model_name_or_path: m\nstage: ppo\n", "give sft, pt, rm, dpo or kto"),
        ("model_name_or_path: m\nadapter: llama-adapter\n", "allowed: lora or null"),
        ("model_name_or_path: m\ntemplate: llama3\n", "template is known, and not supported"),
        ("model_name_or_path: m\nevals_per_epoch: 4\n", "give eval_steps a number"),
        ("model_name_or_path: m\nval_set_size: 100\n", "val_set_size (eval_split_fraction)"),
        ("model_name_or_path: m\neval_dataset: e\ntest_datasets: [{path: a}, {path: b}]\n", "by its path"),
        ("model_name_or_path: m\ndatasets: [{path: a}, b]\n", "list of mappings"),
        ("model_name_or_path: m\ndatasets: [{path: a, type: gpteacher}]\n", "row types read"),
        ("model_name_or_path: m\ndatasets: [{path: a, shards: 3}]\n", "not supported inside"),
        ("model_name_or_path: m\nspecial_tokens: {eos_token: x}\n", "only pad_token can be set"),
        ("model_name_or_path: m\ntrust_remote_code: true\n", "code from a checkpoint is never run"),
        ("model_name_or_path: m\nsave_safetensors: false\n", "a pickle is never written"),
        ("model_name_or_path: m\nlora_target_linear: 1\n", "give true or false"),
    ],
)
def test_what_cannot_be_honoured_is_refused_and_never_ignored(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert words in str(caught.value)


def test_an_alias_may_repeat_its_key_with_the_same_value(tmp_path):
    assert load(tmp_path, "base_model: m\nmodel_name_or_path: m\n").model_name_or_path == "m"


@pytest.mark.parametrize("key", sorted(UNSUPPORTED))
def test_an_unsupported_key_is_refused_unless_it_is_switched_off(tmp_path, key):
    for off in ("null", "false", "''", "[]"):
        assert load(tmp_path, f"model_name_or_path: m\n{key}: {off}\n").model_name_or_path == "m"
    with pytest.raises(ConfigError, match=f":2  {key} is known, and not supported"):
        load(tmp_path, f"model_name_or_path: m\n{key}: 8\n")


@pytest.mark.parametrize("key", ["optim", "optimizer"])
@pytest.mark.parametrize(
    ("given", "ours"),
    [("paged_adamw", "paged_adamw_32bit"), ("paged_lion", "paged_lion_32bit"), ("lion_32bit", "lion")],
)
def test_the_trainers_other_names_of_an_optimizer_are_taken(tmp_path, key, given, ours):
    assert load(tmp_path, f"model_name_or_path: m\n{key}: {given}\n").optim == ours


def test_the_tables_do_not_overlap():
    assert not ALIASES.keys() & UNSUPPORTED.keys()
    assert not UNSUPPORTED.keys() & RunConfig.model_fields.keys()
    # These are our own keys whose values in other systems mean more.
    assert ALIASES.keys() & RunConfig.model_fields.keys() == {
        "adapter",
        "gpu_memory_limit",
        "optim",
        "resume_from_checkpoint",
    }


@pytest.mark.parametrize("alias", sorted(ALIASES))
def test_a_blank_alias_says_nothing(tmp_path, alias):
    if alias not in RunConfig.model_fields:
        assert load(tmp_path, f"model_name_or_path: m\n{alias}:\n") == RunConfig(model_name_or_path="m")


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("rl: ipo\nrl_beta: 0.2\n", {"method": "dpo", "loss_type": "ipo", "beta": 0.2}),
        ("rl: kto\nkto_undesirable_weight: 0.5\n", {"method": "kto", "undesirable_weight": 0.5}),
        ("rl: orpo\norpo_alpha: 0.3\n", {"method": "orpo", "beta": 0.3}),
        ("reward_model: true\n", {"method": "reward"}),
        ("stage: dpo\npref_beta: 0.2\npref_loss: hinge\n", {"method": "dpo", "beta": 0.2, "loss_type": "hinge"}),
        ("stage: rm\n", {"method": "reward"}),
        ("stage: pt\nfinetuning_type: full\n", {"method": "pretrain", "adapter": None, "load_in_4bit": False}),
    ],
)
def test_methods_of_other_systems_are_ours(tmp_path, text, keys) -> None:
    (tmp_path / "run.yaml").write_text("model_name_or_path: m\n" + text)
    config = load_config(tmp_path / "run.yaml")
    assert {key: getattr(config, key) for key in keys} == keys
