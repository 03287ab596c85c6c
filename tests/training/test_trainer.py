from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    Trainer,
    TrainerCallback,
)
from trl import SFTTrainer

from fourfold.data import Collator, pack
from fourfold.errors import ConfigError, DataError, TrainingError
from fourfold.models.attention_interface import documents_from_mask, register_attention
from fourfold.training.batches import boundary_mask, looks_back_only
from fourfold.training.trainer import FourfoldTrainer


class GradientKeeper(TrainerCallback):
    """Copies the gradients of the first step, before they are clipped by nothing and applied."""

    def __init__(self) -> None:
        self.grads: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.grads:
            self.grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def first_step(tmp_path: Path, dtype: torch.dtype, **options) -> tuple[dict[str, torch.Tensor], float]:
    keeper = GradientKeeper()
    model = tiny.peft_model(dtype)
    trainer = tiny.trainer(
        tmp_path, model, dataset=tiny.rows(8), callbacks=(keeper,), max_steps=1, max_grad_norm=0.0, **options
    )
    trainer.train()
    return keeper.grads, trainer.state.log_history[0]["loss"]


def reference_step(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], float]:
    """Plain PyTorch over the eight rows one by one: sum over tokens, divided by their number."""
    model = tiny.peft_model(dtype)
    total, count = torch.zeros((), dtype=dtype), 0
    for row in tiny.rows(8):
        labels = torch.tensor(row["labels"])[1:]
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    (total / count).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, (total / count).item()


@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (1, 8), (3, 3)])
def test_loss_and_gradients_do_not_depend_on_accumulation(tmp_path: Path, batch: int, accumulation: int) -> None:
    grads, loss = first_step(
        tmp_path,
        torch.float32,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    wanted_grads, wanted_loss = reference_step(torch.float32)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert grads.keys() == wanted_grads.keys()
    for name, want in wanted_grads.items():
        torch.testing.assert_close(grads[name], want, rtol=2e-4, atol=2e-6)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    plain, loss = first_step(tmp_path / "plain", torch.float32)
    recomputed, same_loss = first_step(tmp_path / "recomputed", torch.float32, gradient_checkpointing=True)
    assert loss == same_loss
    for name, grad in plain.items():
        assert torch.equal(grad, recomputed[name])


@pytest.mark.parametrize(("dtype", "compute_dtype"), [(torch.float32, "float32"), (torch.bfloat16, "bfloat16")])
def test_adapters_keep_their_dtype_and_learn(tmp_path: Path, dtype: torch.dtype, compute_dtype: str) -> None:
    model = tiny.peft_model(dtype)
    before = tiny.adapter_weights(model)
    trainer = tiny.trainer(
        tmp_path, model, compute_dtype=compute_dtype, num_train_epochs=3.0, gradient_checkpointing=True
    )
    trainer.train()
    after = tiny.adapter_weights(model)
    assert all(after[name].dtype == before[name].dtype == torch.float32 for name in before)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_loss_equals_that_of_trl(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    batch = tiny.collate(list(tiny.rows(8)))
    items = (batch["labels"][:, 1:] != -100).sum()
    trainer.model.train()
    ours = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    theirs = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=items)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def small_model(family: str, **config: object) -> PeftModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": tiny.VOCAB, "pad_token_id": 0}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **config)).float()
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    return model.train()


ALIKE = pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 4}),
        ("qwen3", {}),
        ("gemma3_text", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    ],
)


@ALIKE
def test_mask_of_padding_on_the_right_is_left_out_and_no_number_changes(
    tmp_path: Path, family: str, config: dict[str, object]
) -> None:
    model = small_model(family, **config)
    trainer = tiny.trainer(tmp_path, model)
    ours, foreign = Collator(0)(list(tiny.rows(6))), tiny.collate(list(tiny.rows(6)))
    masks = []
    model.get_base_model().base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    results = []
    for batch in (ours, foreign):
        model.zero_grad()
        loss = trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(31))
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert masks[0] is None
    assert torch.equal(masks[1], foreign["attention_mask"])
    assert len(results[0]) > 10
    for left_out, kept in zip(*results, strict=True):
        torch.testing.assert_close(left_out, kept, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@ALIKE
def test_own_attention_is_told_the_documents_and_no_mask_is_made(
    tmp_path: Path, family: str, config: dict[str, object], packed: bool
) -> None:
    rows = tiny.rows(6)
    batch = Collator(0, width=48 if packed else 28)(list(pack(rows, 40) if packed else rows))
    made, seen, results = [], [], []
    AttentionMaskInterface.register(register_attention(), lambda *_args, **kwargs: made.append(kwargs))
    try:
        for attention in ("fourfold", "sdpa"):
            model = small_model(family, **config)
            base = model.get_base_model()
            base.set_attn_implementation(attention)
            base.model.layers[-1].register_forward_pre_hook(
                lambda _module, _args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
            )
            loss = tiny.trainer(tmp_path, model).compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(31))
            loss.backward()
            results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    finally:
        register_attention()
    assert made == []
    documents = documents_from_mask(seen[0])
    assert documents is not None
    assert documents.cu_seqlens.tolist() == (batch["cu_seq_lens_q"].tolist() if packed else list(range(0, 169, 28)))
    assert documents.max_length == (batch["max_length_q"] if packed else 28)
    assert len(results[0]) > 10
    for told, masked in zip(*results, strict=True):
        torch.testing.assert_close(told, masked, rtol=1e-4, atol=1e-6)


class Asked(TorchDispatchMode):
    """Counts the operators that hand a tensor's numbers to the host, which on a GPU waits for them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("attention", "waits"), [("fourfold", False), ("sdpa", True)])
def test_no_forward_pass_with_own_attention_waits_for_the_device(tmp_path: Path, attention: str, waits: bool) -> None:
    register_attention()
    model = small_model("llama")
    model.get_base_model().set_attn_implementation(attention)
    trainer = tiny.trainer(tmp_path, model)
    batch, counts = Collator(0)(list(tiny.rows(6))), []
    trainer.compute_loss(model, dict(batch))  # the first looks whether the head is a plain one
    model.get_base_model().model.register_forward_hook(lambda *_: counts.append(asked.count))
    with Asked() as asked:
        trainer.compute_loss(model, dict(batch))
    assert (counts[0] > 0) is waits


def test_layers_that_do_not_name_their_window_are_told_no_documents() -> None:
    batch = Collator(0)(list(tiny.rows(2)))
    config = AutoConfig.for_model("starcoder2", sliding_window=4, attn_implementation="fourfold")
    assert boundary_mask(batch, config) is None
    config.sliding_window = None
    assert boundary_mask(batch, config) is not None


@pytest.mark.parametrize(
    ("config", "may"),
    [
        (LlamaConfig(), True),
        (AutoConfig.for_model("gemma3_text", layer_types=["sliding_attention"] * 26), True),
        (AutoConfig.for_model("gemma3_text", use_bidirectional_attention=True), False),
        (AutoConfig.for_model("qwen3_next"), False),
        (AutoConfig.for_model("mamba2"), False),
        (AutoConfig.for_model("bamba"), False),
        (AutoConfig.for_model("falcon_h1"), False),
    ],
)
def test_mask_is_left_out_only_where_all_layers_look_back(config: PretrainedConfig, may: bool) -> None:
    assert looks_back_only(config) is may


def test_evaluation_keeps_the_mask(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path)
    model = trainer.model.eval()
    masks = []
    model.get_base_model().base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    trainer.compute_loss(model, Collator(0)(list(tiny.rows(3))))
    assert masks[0] is not None


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (3, 3)])
def test_our_batches_have_the_exact_loss_and_gradients_under_accumulation(
    tmp_path: Path, packed: bool, batch: int, accumulation: int
) -> None:
    rows, keeper = tiny.rows(8), GradientKeeper()
    trainer = tiny.trainer(
        tmp_path,
        dataset=pack(rows, 40) if packed else rows,
        callbacks=(keeper,),
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    trainer.data_collator = Collator(0)
    trainer.train()
    wanted_grads, wanted_loss = reference_step(torch.float32)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted_loss, rel=1e-6)
    for name, want in wanted_grads.items():
        torch.testing.assert_close(keeper.grads[name], want, rtol=2e-4, atol=2e-6)


def test_packed_batch_has_the_loss_of_its_rows(tmp_path: Path) -> None:
    rows = list(tiny.rows(6))
    packed = {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "labels": torch.tensor([[label for row in rows for label in row["labels"]]]),
        "position_ids": torch.tensor([[at for row in rows for at in range(len(row["input_ids"]))]]),
    }
    trainer = tiny.trainer(tmp_path)
    trainer.model.train()
    together = trainer.compute_loss(trainer.model, packed)
    apart = trainer.compute_loss(trainer.model, tiny.collate(rows))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=0)


def test_model_that_caps_its_logits_gets_the_loss_of_its_own_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=tiny.VOCAB,
        final_logit_softcapping=0.5,
        pad_token_id=0,
        initializer_range=0.5,
        attn_implementation="eager",
    )
    model = get_peft_model(Gemma2ForCausalLM(config), LoraConfig(target_modules="all-linear"))
    trainer = tiny.trainer(tmp_path, model)
    batch = tiny.collate(list(tiny.rows(4)))
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        wanted = model(**batch).loss
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


def test_evaluation_loss_is_the_mean_over_tokens_not_over_batches(tmp_path: Path) -> None:
    model = tiny.peft_model()
    held_out = tiny.rows(7, seed=11)
    trainer = tiny.trainer(tmp_path, model, eval_dataset=held_out, per_device_eval_batch_size=2)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in held_out:
            labels = torch.tensor(row["labels"])[1:]
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
            count += int((labels != -100).sum())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_logs_carry_speed_memory_and_accuracy(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, max_steps=3, eval_dataset=tiny.rows(4), eval_strategy="steps", eval_steps=2)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert {"loss", "grad_norm", "learning_rate", "epoch", "step", "mean_token_accuracy"} <= entry.keys()
    assert entry["tokens_per_second"] > 0
    assert entry["memory_peak_bytes"] >= entry["memory_current_bytes"] > 0
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    json.dumps(trainer.state.log_history)


def test_non_finite_loss_stops_the_run_and_names_step_and_checkpoint(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                model.get_base_model().model.norm.weight.data[0] = math.nan

    trainer = tiny.trainer(tmp_path, callbacks=(Poison(),), save_strategy="steps", save_steps=2)
    with pytest.raises(TrainingError, match=r"not finite at step 4(.|\n)*loss nan(.|\n)*checkpoint-2"):
        trainer.train()
    assert all(torch.isfinite(value).all() for value in tiny.adapter_weights(trainer.model).values())


@pytest.mark.parametrize("optim", ["adamw", "adamw_8bit", "paged_lion_8bit", "adafactor", "adamw_torch"])
def test_non_finite_loss_names_the_rows_of_its_microbatch(tmp_path: Path, optim: str) -> None:
    rows = [dict(row) for row in tiny.rows(12)]
    rows = [{key: [4 if token == 3 else token for token in row[key]] for key in row} for row in rows]
    rows[5] = {"input_ids": [3, 5, 6, 7], "labels": [-100, 5, 6, 7]}
    model = tiny.peft_model()
    model.get_input_embeddings().weight.data[3] = math.nan
    before = tiny.adapter_weights(model)
    trainer = tiny.trainer(
        tmp_path, model, dataset=Dataset.from_list(rows), gradient_accumulation_steps=6, optim=optim, max_steps=2
    )
    with pytest.raises(TrainingError, match=r"not finite at step 1(.|\n)*microbatch \d, rows (6, \d+|\d+, 6) of"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in tiny.adapter_weights(model).items())


def test_loss_that_is_not_finite_is_no_step_though_the_gradients_are(tmp_path: Path) -> None:
    class Infinite(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer.optimizer.watched_loss.fill_(math.inf)

    model = tiny.peft_model()
    before = tiny.adapter_weights(model)
    trainer = tiny.trainer(tmp_path, model, max_steps=1)
    trainer.add_callback(Infinite())
    trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in tiny.adapter_weights(model).items())


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.05])
def test_own_optimizer_clips_logs_and_learns_as_that_of_torch(tmp_path: Path, max_grad_norm: float) -> None:
    runs = {}
    for optim in ("adamw", "adamw_torch"):
        trainer = tiny.trainer(
            tmp_path, tiny.peft_model(), optim=optim, max_steps=6, max_grad_norm=max_grad_norm, weight_decay=0.1
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        runs[optim] = ([entry["grad_norm"] for entry in logs], [entry["loss"] for entry in logs])
    assert runs["adamw"][0] == pytest.approx(runs["adamw_torch"][0], rel=1e-4)
    assert runs["adamw"][1] == pytest.approx(runs["adamw_torch"][1], rel=1e-5)


def test_rows_without_any_label_are_refused(tmp_path: Path) -> None:
    masked = Dataset.from_list([{"input_ids": [3, 4], "labels": [-100, -100]}])
    with pytest.raises(DataError, match="All labels of the training data set are masked"):
        tiny.trainer(tmp_path, dataset=masked)
    with pytest.raises(DataError, match="no rows"):
        tiny.trainer(tmp_path, dataset=masked.select([]))


def test_evaluation_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_strategy"):
        tiny.trainer(tmp_path, eval_strategy="steps")


def test_every_private_hook_that_is_overridden_exists_in_the_trainer() -> None:
    ours = {name for name in vars(FourfoldTrainer) if name.startswith("_") and not name.startswith("__")}
    own = {"_out_of_memory", "_take", "_takes_logits_to_keep", "_supervised_loss", "_shared_folder", "_total_norm"}
    assert all(hasattr(Trainer, name) for name in ours - own)
    assert {"_save_checkpoint", "_load_optimizer_and_scheduler", "_load_rng_state"} <= ours
