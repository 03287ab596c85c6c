"""DPO, KTO and ORPO against TRL's own trainers, on the same tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import trl
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification

from fourfold.data import Collator
from fourfold.data.preference import REFERENCE_COLUMNS
from fourfold.errors import CheckpointError, ConfigError
from fourfold.training.loss import supervised_cross_entropy
from fourfold.training.methods import MethodOptions
from fourfold.training.options import TrainingOptions
from fourfold.training.preference import PreferenceTrainer, build_preference_trainer
from fourfold.training.preference_losses import DPO_LOSSES, odds_ratio_loss
from fourfold.training.token_losses import token_losses

disable_progress_bars()
BETA = 0.3
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
QUIET = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": None}
QUIET |= {"gradient_checkpointing": False, "per_device_train_batch_size": 8, "remove_unused_columns": False}
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["lm_head"])


def texts(count: int = 8) -> Dataset:
    """Pairs of texts; the answers differ in length."""
    rows = []
    for row, other in zip(tiny.rows(count, seed=5), tiny.rows(count, seed=6), strict=True):
        prompt = sum(label == -100 for label in row["labels"])
        words = [f"w{token - 2}" for token in row["input_ids"]]
        bad = [f"w{token - 2}" for token, label in zip(other["input_ids"], other["labels"], strict=True) if label >= 0]
        rows.append(
            {
                "prompt": " ".join(words[:prompt]),
                "chosen": " " + " ".join(words[prompt:]),
                "rejected": " " + " ".join(bad),
            }
        )
    return Dataset.from_list(rows)


def adapted(seed: int = 1) -> PeftModel:
    """An adapter over a base that TRL allows: none on the head."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny.base_model(), copy.deepcopy(LORA))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def same_adapter(theirs: Any) -> Any:
    """TRL's trainer, its fresh adapter given the weights of ours: so its reference is the base, as ours is."""
    theirs.model.load_state_dict(adapted().state_dict())
    return theirs


def pairs(dataset: Dataset) -> Dataset:
    """Our columns from those that TRL tokenized."""

    def row(one: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for side in ("chosen", "rejected"):
            made[f"{side}_input_ids"] = one["prompt_ids"] + one[f"{side}_ids"]
            made[f"{side}_labels"] = [-100] * len(one["prompt_ids"]) + one[f"{side}_ids"]
        return made

    return Dataset.from_list([row(one) for one in dataset])


def ours(
    folder: Path, rows: Dataset, model: Any = None, evaluated: Dataset | None = None, options: Any = None, **method: Any
) -> PreferenceTrainer:
    chosen = {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "logging_steps": 1, "compute_dtype": "float32"}
    chosen |= {"save_strategy": "no", "use_cpu": True} | (options or {})
    return build_preference_trainer(
        adapted() if model is None else model,
        tiny.tokenizer(),
        rows,
        evaluated,
        Collator(0),
        TrainingOptions(output_dir=folder, **chosen),
        MethodOptions(**({"method": "dpo", "beta": BETA} | method)),
    )


def gradients(loss: torch.Tensor, model: nn.Module) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


def batch_of(trainer: Any, rows: Dataset | None = None) -> dict[str, Any]:
    return trainer.data_collator(list(rows if rows is not None else trainer.train_dataset))


@pytest.fixture(scope="module")
def dpo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    args = trl.DPOConfig(output_dir=str(tmp_path_factory.mktemp("dpo")), beta=BETA, **QUIET)
    trainer = trl.DPOTrainer(
        tiny.base_model(),
        args=args,
        train_dataset=texts(),
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(LORA),
    )
    return same_adapter(trainer)


@pytest.fixture(scope="module")
def some_pairs(dpo: Any) -> Dataset:
    return pairs(dpo.train_dataset)


@pytest.mark.parametrize("loss_type", [*DPO_LOSSES, "sigmoid+sft"])
def test_every_loss_of_dpo_and_its_gradients_are_those_of_trl(dpo: Any, tmp_path: Path, loss_type: str) -> None:
    losses = loss_type.split("+")
    weights = [1.0, 0.5][: len(losses)]
    dpo.loss_types, dpo.loss_weights = losses, weights
    dpo.label_smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    dpo.model.train()
    wanted = dpo.compute_loss(dpo.model, batch_of(dpo))
    trainer = ours(
        tmp_path,
        pairs(dpo.train_dataset),
        loss_type=tuple(losses),
        loss_weights=tuple(weights),
        label_smoothing=dpo.label_smoothing,
    )
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, batch_of(trainer))
    torch.testing.assert_close(got, wanted, rtol=2e-5, atol=1e-6)
    for mine, want in zip(gradients(got, trainer.model), gradients(wanted, dpo.model), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=2e-6)


def test_the_figures_of_dpo_are_those_of_trl(dpo: Any, tmp_path: Path) -> None:
    dpo.loss_types, dpo.loss_weights = ["sigmoid"], [1.0]
    dpo._metrics["train"].clear()
    dpo.model.train()
    dpo.compute_loss(dpo.model, batch_of(dpo))
    trainer = ours(tmp_path, pairs(dpo.train_dataset))
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch_of(trainer))
    figures = trainer._means["train"].take(trainer.accelerator, trainer.args.device)
    shared = figures.keys() & dpo._metrics["train"].keys()
    assert {"rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/rejected"} <= shared
    for name in shared:
        assert figures[name] == pytest.approx(dpo._metrics["train"][name][0], rel=1e-4, abs=1e-5), name


def test_orpo_is_that_of_trl(dpo: Any, tmp_path: Path) -> None:
    orpo = pytest.importorskip("trl.experimental.orpo")
    args = orpo.ORPOConfig(output_dir=str(tmp_path / "trl"), beta=BETA, **(QUIET | {"max_length": 64}))
    theirs = orpo.ORPOTrainer(
        tiny.base_model(), args=args, train_dataset=texts(), processing_class=tiny.tokenizer(), peft_config=LORA
    )
    theirs.model.load_state_dict(adapted().state_dict())
    theirs.model.train()
    rows = pairs(dpo.train_dataset)
    collate, batch = Collator(0), {}
    for side in ("chosen", "rejected"):
        made = collate([{"input_ids": r[f"{side}_input_ids"], "labels": r[f"{side}_labels"]} for r in rows])
        batch |= {f"{side}_{name}": made[name] for name in ("input_ids", "labels", "attention_mask")}
    wanted, _ = theirs.get_batch_loss_metrics(theirs.model, batch)
    trainer = ours(tmp_path, rows, method="orpo")
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, batch_of(trainer))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for mine, want in zip(gradients(got, trainer.model), gradients(wanted, theirs.model), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_is_that_of_trl(tmp_path: Path, loss_type: str) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if number % 3 else "rejected"], "label": bool(number % 3)}
        for number, row in enumerate(texts())
    ]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.75}
    args = trl.KTOConfig(output_dir=str(tmp_path / "trl"), beta=BETA, loss_type=loss_type, **weights, **QUIET)
    theirs = trl.KTOTrainer(
        tiny.base_model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny.tokenizer(),
        peft_config=copy.deepcopy(LORA),
    )
    same_adapter(theirs).model.train()
    wanted = theirs.compute_loss(theirs.model, batch_of(theirs))
    made = [
        {
            "input_ids": row["prompt_ids"] + row["completion_ids"],
            "labels": [-100] * len(row["prompt_ids"]) + row["completion_ids"],
            "label": row["label"],
        }
        for row in theirs.train_dataset
    ]
    trainer = ours(tmp_path, Dataset.from_list(made), method="kto", loss_type=(loss_type,), **weights)
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, batch_of(trainer))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for mine, want in zip(gradients(got, trainer.model), gradients(wanted, theirs.model), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("coefficient", [None, 0.1])
def test_reward_modelling_is_that_of_trl(some_pairs: Dataset, tmp_path: Path, coefficient: float | None) -> None:
    def scorer() -> PeftModel:
        torch.manual_seed(0)
        config = tiny.base_model().config
        config.num_labels = 1
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["score"])
        return get_peft_model(LlamaForSequenceClassification(config), lora)

    args = trl.RewardConfig(output_dir=str(tmp_path / "trl"), center_rewards_coefficient=coefficient, **QUIET)
    columns = {"chosen_input_ids": "chosen_ids", "rejected_input_ids": "rejected_ids"}
    rows = some_pairs.rename_columns(columns).select_columns(list(columns.values()))
    theirs = trl.RewardTrainer(scorer(), args=args, train_dataset=rows, processing_class=tiny.tokenizer())
    theirs.model.train()
    wanted = theirs.compute_loss(theirs.model, batch_of(theirs))
    trainer = ours(tmp_path, some_pairs, scorer(), method="reward", center_rewards_coefficient=coefficient)
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, batch_of(trainer))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    for mine, want in zip(gradients(got, trainer.model), gradients(wanted, theirs.model), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=2e-6)
    figures = trainer._means["train"].take(trainer.accelerator, trainer.args.device)
    for name in ("accuracy", "margin", "mean_reward"):
        assert figures[name] == pytest.approx(theirs._metrics["train"][name][0], rel=1e-4, abs=1e-6)
    with pytest.raises(ConfigError, match="gives no score"):
        ours(tmp_path, some_pairs, method="reward")


# ---- Steps ----


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 2), (3, 3)])
def test_a_step_is_the_mean_over_its_pairs_however_they_are_parted(
    some_pairs: Dataset, tmp_path: Path, batch: int, accumulation: int
) -> None:
    def after(folder: str, **options: Any) -> dict[str, torch.Tensor]:
        trainer = ours(
            tmp_path / folder, some_pairs, options={"max_steps": 1, "max_grad_norm": 0.0, "optim": "lion"} | options
        )
        trainer.train()
        return tiny.adapter_weights(trainer.model) | {"loss": torch.tensor(trainer.state.log_history[0]["loss"])}

    whole = after("whole")
    parted = after("parted", per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    torch.testing.assert_close(parted["loss"], whole["loss"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method", [{"method": "dpo"}, {"method": "dpo", "precompute_ref_log_probs": True}, {"method": "orpo"}]
)
def test_training_learns_the_preference_and_resumes_exactly(
    some_pairs: Dataset, tmp_path: Path, method: dict[str, Any]
) -> None:
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}
    options |= {"eval_strategy": "steps", "eval_steps": 6, "per_device_eval_batch_size": 3, "save_total_limit": None}
    straight = ours(tmp_path, some_pairs, evaluated=some_pairs, options=options, **method)
    straight.train()
    history = straight.state.log_history
    evaluated = next(record for record in history if "eval_loss" in record)
    assert evaluated["eval_rewards/accuracies"] > 0.8
    first, last = ([r for r in history if "loss" in r][place] for place in (0, -1))
    assert last["loss"] < first["loss"]
    assert {"rewards/margins", "num_tokens", "tokens_per_second", "mean_token_accuracy"} <= first.keys()
    resumed = ours(tmp_path, some_pairs, evaluated=some_pairs, options=options, **method)
    resumed.train(tmp_path / "checkpoint-3")
    wanted = tiny.adapter_weights(straight.model)
    assert all(torch.equal(value, wanted[name]) for name, value in tiny.adapter_weights(resumed.model).items())


def test_what_was_computed_before_is_what_the_reference_says_in_each_step(some_pairs: Dataset, tmp_path: Path) -> None:
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    trainer = ours(tmp_path, some_pairs, model, precompute_ref_log_probs=True, options={"max_steps": 1})
    trainer._add_reference(None)
    assert set(REFERENCE_COLUMNS) <= set(trainer.train_dataset.column_names)
    computed = trainer.compute_loss(model, batch_of(trainer))
    asked = trainer.compute_loss(model, batch_of(trainer, some_pairs))
    torch.testing.assert_close(computed, asked, rtol=1e-6, atol=0)
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "reference.safetensors").unlink()
    with pytest.raises(CheckpointError):
        trainer._add_reference(tmp_path / "checkpoint-1")


def test_all_weights_learn_from_a_reference_that_was_computed_before(some_pairs: Dataset, tmp_path: Path) -> None:
    model = tiny.base_model()
    before = model.lm_head.weight.detach().clone()
    trainer = ours(tmp_path, some_pairs, model, precompute_ref_log_probs=True, options={"max_steps": 3})
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
    with pytest.raises(ConfigError, match="without its adapter"):
        ours(tmp_path, some_pairs, tiny.base_model())


# ---- Token losses ----


@pytest.mark.parametrize("trained", [False, True])
def test_token_losses_sum_up_to_the_loss_and_weigh_each_token(trained: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, tiny.VOCAB, bias=False, dtype=torch.float64).requires_grad_(trained)
    hidden = torch.randn(3, 7, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, tiny.VOCAB, (3, 7))
    labels[:, :3] = -100
    losses = token_losses(hidden, labels, head)
    assert losses.losses.sum().item() == pytest.approx(supervised_cross_entropy(hidden, labels, head).loss_sum.item())
    log_probs, lengths = losses.by_row()
    assert lengths.tolist() == [4.0, 4.0, 4.0]
    weights = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    inputs = [hidden, *([head.weight] if trained else [])]
    got = torch.autograd.grad((log_probs * weights).sum(), inputs)
    plain = head(hidden)[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    wanted = torch.autograd.grad(((plain * (labels[:, 1:] >= 0)).sum(1) * weights).sum(), inputs)
    for mine, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, want)


def test_the_odds_of_nearly_certain_answers_have_gradients() -> None:
    chosen = torch.tensor([-1e-7, -0.5, -30.0], requires_grad=True)
    odds_ratio_loss(chosen, torch.tensor([-2.0, -2.0, -2.0])).sum().backward()
    assert chosen.grad is not None
    assert chosen.grad.isfinite().all()
