"""Learning rates of their own: LoRA+ against PEFT's grouping, groups by name, and one norm over all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from fourfold.errors import CheckpointError, ConfigError
from fourfold.optimizers import AdamW
from fourfold.training.options import OPTIMIZERS
from fourfold.training.parameter_groups import GroupOptions, LrGroup, names_by_group, parameter_groups

LORA_PLUS = GroupOptions(loraplus_lr_ratio=16.0)
MIXED = GroupOptions(loraplus_lr_ratio=4.0, lr_groups=(LrGroup(("layers.1.self_attn",), 3e-3, "late attention"),))


def rates(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    names = {id(value): name for name, value in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_lora_plus_gives_each_parameter_the_rate_that_peft_gives_it() -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], modules_to_save=["norm"], bias="all"
    )
    base = tiny.base_model()
    base.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(64))
    model = get_peft_model(base, config)
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_lr_embedding=2e-6, loraplus_weight_decay=0.1
    )
    ours = parameter_groups(model, GroupOptions(loraplus_lr_ratio=16.0, loraplus_lr_embedding=2e-6), 1e-3, 0.1)
    wanted, given = rates(model, theirs.param_groups), rates(model, ours)
    assert {name: rate for name, (rate, _) in given.items()} == {name: rate for name, (rate, _) in wanted.items()}
    assert {rate for rate, _ in given.values()} == {1e-3, 16e-3, 2e-6}
    # PEFT takes a norm that is saved with the adapter for a matrix: the Trainer's rule for decay stands.
    matrices = [name for name in given if "lora_" in name]
    assert {name: given[name] for name in matrices} == {name: wanted[name] for name in matrices}
    assert ours[0]["lr"] == 1e-3


def test_decay_is_where_the_trainer_has_it(tmp_path: Path) -> None:
    base = tiny.base_model()
    base.model.layers[0].self_attn.q_proj.bias = nn.Parameter(torch.zeros(64))
    options = GroupOptions(lr_groups=(LrGroup(("*mlp*",), 5e-4, "mlp"),))
    given = rates(base, parameter_groups(base, options, 1e-3, 0.1))
    decaying = tiny.trainer(tmp_path, base, optim="adamw").get_decay_parameter_names(base)
    assert {name for name, (_, decay) in given.items() if decay} == set(decaying)
    assert "model.norm.weight" not in decaying
    assert {name for name, (rate, _) in given.items() if rate == 5e-4} == {n for n in given if "mlp" in n}
    assert given.keys() == dict(base.named_parameters()).keys()


def test_the_first_group_that_names_a_parameter_has_it_and_one_without_any_is_refused() -> None:
    model = tiny.peft_model()
    first, second = LrGroup(("q_proj",), 1e-5, "q"), LrGroup(("lora_A",), 1e-4, "a")
    given = rates(model, parameter_groups(model, GroupOptions(lr_groups=(first, second)), 1e-3, 0.0))
    for name, (rate, _) in given.items():
        assert rate == (1e-5 if "q_proj" in name else 1e-4 if "lora_A" in name else 1e-3)
    for modules in (("k_prog",), ("q_proj.lora_A",)):
        options = GroupOptions(lr_groups=(first, LrGroup(modules, 1e-4, "lost")))
        with pytest.raises(ConfigError, match=r"group lost names nothing that is trained(.|\n)*lora_A"):
            parameter_groups(model, options, 1e-3, 0.0)


def run(folder: Path, groups: GroupOptions, resume: Path | None = None, model: Any = None, **options: Any):
    model = tiny.peft_model(r=64) if model is None else model
    chosen = {"max_steps": 5, "weight_decay": 0.1, "max_grad_norm": 0.05, "groups": groups}
    trainer = tiny.trainer(folder, model, **(chosen | options))
    trainer.train(resume_from_checkpoint=resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return logs, tiny.adapter_weights(model), trainer


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_every_optimizer_takes_groups_clips_them_as_one_and_goes_on_exactly(tmp_path: Path, optim: str) -> None:
    logs, weights, trainer = run(tmp_path, MIXED, optim=optim, save_strategy="steps", save_steps=3)
    plain, without, _ = run(tmp_path / "plain", GroupOptions(), optim=optim)
    # Of the first step: the same gradients, whose norm is over all groups.
    assert logs[0]["grad_norm"] == pytest.approx(plain[0]["grad_norm"], rel=1e-5)
    assert logs[0]["grad_norm"] > 0.05
    assert not any(torch.equal(weights[name], without[name]) for name in weights if "lora_B" in name)
    assert [entry["learning_rate/lora_B"] / entry["learning_rate"] for entry in logs] == pytest.approx([4.0] * 5)
    assert logs[0]["learning_rate/late attention"] == pytest.approx(3e-3)
    assert names_by_group(trainer.model, trainer.optimizer)[-1][0].startswith(
        "base_model.model.model.layers.1.self_attn"
    )
    again, resumed, _ = run(tmp_path, MIXED, tmp_path / "checkpoint-3", optim=optim)
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in logs]
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)


def test_own_adamw_steps_its_groups_as_that_of_torch(tmp_path: Path) -> None:
    ours, weights, _ = run(tmp_path / "ours", MIXED, optim="adamw")
    theirs, wanted, _ = run(tmp_path / "theirs", MIXED, optim="adamw_torch")
    assert [entry["loss"] for entry in ours] == pytest.approx([entry["loss"] for entry in theirs], rel=1e-5)
    for name, value in wanted.items():
        assert (weights[name] - value).norm() < 1e-4 * value.norm()


def test_clipping_is_by_the_norm_over_all_groups() -> None:
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    optimizer = AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 1.0}], max_grad_norm=0.5)
    for parameter, value in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([value, 0.0, 0.0])
    optimizer.step()
    assert optimizer.grad_norm.item() == 5.0
    assert optimizer.grad_scale.item() == pytest.approx(0.1, rel=1e-5)


def test_a_checkpoint_of_other_groups_is_refused(tmp_path: Path) -> None:
    run(tmp_path, LORA_PLUS, max_steps=2, save_strategy="steps", save_steps=2)
    for groups in (GroupOptions(), MIXED):
        with pytest.raises(CheckpointError, match="written with other groups of parameters"):
            run(tmp_path, groups, tmp_path / "checkpoint-2")


def test_rates_that_are_none_are_refused() -> None:
    for options in ({"loraplus_lr_ratio": 0.0}, {"lr_groups": (LrGroup(("a",), -1.0, "a"),)}):
        with pytest.raises(ConfigError, match="out of range"):
            GroupOptions(**options)
