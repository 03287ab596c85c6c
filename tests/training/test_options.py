from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fourfold.errors import ConfigError
from fourfold.optimizers import AdamW
from fourfold.training.options import LR_SCHEDULERS, OPTIMIZERS, TrainingOptions, optimizer_arguments, to_sft_config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim", "adam"),
        ("lr_scheduler_type", "cosin"),
        ("compute_dtype", "float8"),
        ("eval_strategy", "sometimes"),
        ("save_strategy", "never"),
        ("gradient_accumulation_steps", 0),
        ("learning_rate", 0.0),
        ("warmup_ratio", 1.0),
        ("max_grad_norm", -1.0),
        ("save_total_limit", 0),
        ("num_train_epochs", 0.0),
    ],
)
def test_bad_value_is_refused_by_its_key(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        TrainingOptions(output_dir=Path("run"), **{key: value})


def test_warm_up_that_would_be_ignored_is_refused() -> None:
    with pytest.raises(ConfigError, match="constant_with_warmup"):
        TrainingOptions(output_dir=Path("run"), lr_scheduler_type="constant", warmup_steps=5)
    with pytest.raises(ConfigError, match="both set"):
        TrainingOptions(output_dir=Path("run"), warmup_ratio=0.1, warmup_steps=5)


def arguments_of(options: TrainingOptions):
    return optimizer_arguments(options, torch.nn.Linear(2, 2), to_sft_config(options))


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", LR_SCHEDULERS)
def test_every_row_of_the_tables_makes_a_config(tmp_path: Path, optim: str, scheduler: str) -> None:
    config = to_sft_config(TrainingOptions(output_dir=tmp_path, optim=optim, lr_scheduler_type=scheduler))
    assert config.optim == ("adamw_torch" if OPTIMIZERS[optim] else optim)
    assert config.lr_scheduler_type == scheduler


def test_own_optimizers_are_handed_over_with_their_options(tmp_path: Path) -> None:
    options = TrainingOptions(output_dir=tmp_path, optim="adamw_8bit", learning_rate=1e-3, max_grad_norm=0.5)
    optimizer, arguments = arguments_of(options)
    assert optimizer is AdamW
    assert arguments == {"lr": 1e-3, "state_bits": 8, "placement": "resident", "max_grad_norm": 0.5}
    assert arguments_of(TrainingOptions(output_dir=tmp_path, optim="adamw_torch")) is None


@pytest.mark.parametrize("optim", [name for name, row in OPTIMIZERS.items() if row is not None])
def test_a_name_says_rule_bits_and_placement(tmp_path: Path, optim: str) -> None:
    optimizer, arguments = arguments_of(TrainingOptions(output_dir=tmp_path, optim=optim))
    made = optimizer([torch.nn.Parameter(torch.zeros(2))], **arguments)
    assert type(made).__name__.lower() in optim
    assert OPTIMIZERS[optim].rule in optim
    if optim != "adafactor":
        assert made.state_bits == (8 if "8bit" in optim else 32)
        assert made.placement == ("paged" if "paged" in optim else "resident")


def test_trl_neither_truncates_nor_packs_nor_prepares(tmp_path: Path) -> None:
    config = to_sft_config(TrainingOptions(output_dir=tmp_path))
    assert config.max_length is None
    assert not config.packing
    assert config.dataset_kwargs == {"skip_prepare_dataset": True}
    assert config.report_to == []


def test_gradient_checkpointing_is_off_unless_asked_for_and_never_reentrant(tmp_path: Path) -> None:
    assert not to_sft_config(TrainingOptions(output_dir=tmp_path)).gradient_checkpointing
    config = to_sft_config(TrainingOptions(output_dir=tmp_path, gradient_checkpointing=True))
    assert config.gradient_checkpointing
    assert config.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_warm_up_ratio_becomes_a_share_of_all_steps(tmp_path: Path) -> None:
    config = to_sft_config(TrainingOptions(output_dir=tmp_path, warmup_ratio=0.1))
    assert config.get_warmup_steps(200) == 20
