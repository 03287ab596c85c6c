from __future__ import annotations

import peft
import pydantic
import pytest
import yaml

from fourfold.config import RunConfig, load_config
from fourfold.config.run import EXCLUSIVE_KEYS, GROUPS

# Every group of keys away from its default, values of every type among them.
FULL = {
    "model_name_or_path": "folder/of a model",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_blocksize": 128,
    "modules_to_not_convert": ["layers.0.*"],
    "device": "cuda:1",
    "init_lora_weights": "pissa_niter_4",
    "target_modules": ["q_proj", "v_proj"],
    "train_dataset": "train.jsonl",
    "eval_split_fraction": 0.1,
    "columns": {"prompt": "question", "completion": "answer"},
    "chat_template": "{% for m in messages %}{{ m.content }}: 'é' #\n{% endfor %}",
    "pad_token": "<|pad|>",
    "max_steps": 7,
    "learning_rate": 1e-5,
    "warmup_steps": 0,
    "report_to": ["tensorboard"],
    "output_dir": "2024",
    "eval_generate_rows": 3,
    "group_by_length": True,
}


@pytest.mark.parametrize("values", [{"model_name_or_path": "m"}, FULL], ids=["defaults", "full"])
def test_resolved_yaml_loads_again_to_an_equal_object(tmp_path, values):
    config = RunConfig(**values)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    # A run's folder: the same, where it is now.
    assert load_config(tmp_path) == config.model_copy(update={"output_dir": str(tmp_path)})
    assert load_config(tmp_path, ["--output_dir=x"]).output_dir == "x"
    assert yaml.safe_load(config.to_yaml()).keys() == RunConfig.model_fields.keys()


def test_a_config_is_frozen():
    config = RunConfig(model_name_or_path="m")
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        config.lora_r = 8


def test_unknown_keys_are_refused():
    with pytest.raises(pydantic.ValidationError, match="lora_rang"):
        RunConfig(model_name_or_path="m", lora_rang=8)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_r", "16"),
        ("lora_r", 16.0),
        ("lora_r", True),
        ("learning_rate", "2e-4"),
        ("learning_rate", float("nan")),
        ("packing", 1),
        ("packing", "yes"),
        ("model_revision", 4),
        ("bnb_4bit_blocksize", 48),
        ("bnb_4bit_blocksize", 16),
        ("init_lora_weights", False),
        ("init_lora_weights", "pissa_niter_0"),
        ("device", "tpu"),
        ("chat_template", "chatml"),
        ("eval_split_fraction", 1.0),
        ("lora_dropout", 1.0),
        ("columns", {"prompt": 1}),
        ("max_length", 1),
    ],
)
def test_values_are_not_coerced(key, value):
    with pytest.raises(pydantic.ValidationError, match=key):
        RunConfig(model_name_or_path="m", **{key: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_steps": 5, "num_train_epochs": 1.0}, "max_steps and num_train_epochs"),
        ({"max_steps": None, "num_train_epochs": None}, "both null"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_steps and warmup_ratio"),
        (
            {"resume_from_checkpoint": "auto", "overwrite_output_dir": True},
            "overwrite_output_dir would delete",
        ),
        ({"output_dir": "m"}, "output_dir is the folder of the base model"),
        ({"train_dataset": "t", "eval_dataset": "e", "eval_split_fraction": 0.1}, "which rows are held out"),
        ({"eval_split_fraction": 0.1}, "no train_dataset"),
        ({"eval_steps": 5}, "no rows are held out"),
        ({"eval_generate_rows": 5}, "no rows are held out"),
        ({"eval_metrics": ["bleu"]}, "eval_metrics is given, but no rows are answered"),
        ({"eval_pattern": "a"}, "eval_pattern is given, but no rows are answered"),
        ({"eval_pattern": "(", "eval_generate_rows": 1, "eval_dataset": "e"}, "no regular expression"),
        ({"multiple_choice_rows": 5}, "no rows to take them of"),
        ({"harness_limit": 5}, "no task of the harness"),
        ({"perplexity_stride": 600, "perplexity_max_length": 512}, "perplexity_stride is not below"),
        ({"load_in_4bit": False, "bnb_4bit_quant_type": "int8"}, "load_in_4bit is false"),
        ({"load_in_4bit": False, "quantize_lm_head": True}, "load_in_4bit is false"),
        ({"load_in_4bit": False, "init_lora_weights": "loftq"}, "load_in_4bit is false"),
        ({"load_in_4bit": False, "stream_base": "host"}, "load_in_4bit is false"),
        ({"cuda_graphs": True, "stream_base": "disk"}, "have no place of their own"),
        ({"quantize_lm_head": True, "modules_to_save": ["lm_head"]}, "modules_to_save lists lm_head"),
        ({"quantize_lm_head": True, "modules_to_not_convert": ["lm_head"]}, "lists lm_head"),
        ({"adapter": None, "use_dora": True}, "adapter is null"),
        ({"adapter": None, "target_modules": "all-linear"}, "adapter is null"),
        ({"loftq_iterations": 2}, "init_lora_weights is not loftq"),
    ],
)
def test_contradictions_are_refused(values, words):
    with pytest.raises(pydantic.ValidationError, match=words):
        RunConfig(**{"model_name_or_path": "m"} | values)


@pytest.mark.parametrize(
    "values",
    [
        {"bnb_4bit_quant_type": "int8", "bnb_4bit_use_double_quant": True},
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "loftq", "loftq_iterations": 5},
        {"warmup_steps": 0},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "constant", "warmup_steps": 0},
        {"load_in_4bit": False},
        {"adapter": None},
    ],
)
def test_what_fits_together_is_accepted(values):
    RunConfig(**{"model_name_or_path": "m"} | values)


def test_length_of_training_and_of_warm_up_have_one_default():
    assert RunConfig(model_name_or_path="m").num_train_epochs == 1.0
    assert RunConfig(model_name_or_path="m", max_steps=3).num_train_epochs is None
    assert RunConfig(model_name_or_path="m").warmup_ratio == 0.03
    assert RunConfig(model_name_or_path="m", warmup_steps=3).warmup_ratio is None
    assert RunConfig(model_name_or_path="m", lr_scheduler_type="constant").warmup_ratio == 0.0


# Without loftq: PEFT asks for scipy as soon as that is named.
@pytest.mark.parametrize("initialisation", [True, "gaussian", "pissa", "pissa_niter_16"])
def test_peft_accepts_the_adapter_keys_as_they_are(initialisation):
    config = RunConfig(model_name_or_path="m", init_lora_weights=initialisation)
    lora = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights,
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
    )
    assert lora.init_lora_weights == initialisation


@pytest.mark.parametrize("key", ["lr_scheduler_type", "optim"])
def test_the_trainer_knows_every_schedule_and_optimizer(key):
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    known = {"lr_scheduler_type": SchedulerType, "optim": OptimizerNames}[key]
    schema = RunConfig.model_json_schema()["properties"][key]
    choices = next(part["enum"] for part in schema.get("anyOf", [schema]) if "enum" in part)
    own = {"adamw", "lion"} if key == "optim" else set()
    assert set(choices) - own <= {member.value for member in known}


def test_every_key_has_a_description_and_the_tables_name_real_keys():
    assert all(field.description for field in RunConfig.model_fields.values())
    named = set(GROUPS) | {key for pair in EXCLUSIVE_KEYS for key in pair}
    assert named <= RunConfig.model_fields.keys()
