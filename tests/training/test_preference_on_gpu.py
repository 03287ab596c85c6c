from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig

from fourfold.data import Collator
from fourfold.models.preparing import prepare
from fourfold.training.methods import MethodOptions
from fourfold.training.options import TrainingOptions
from fourfold.training.preference import PreferenceTrainer, build_preference_trainer

pytestmark = pytest.mark.gpu


def trainer(folder: Path, method: str, *, fused: bool, cuda_graphs: bool) -> PreferenceTrainer:
    torch.manual_seed(1)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    model = prepare(
        tiny.base_model(torch.bfloat16).cuda(), lora, fused=fused, cuda_graphs=cuda_graphs if fused else None
    )
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    rows = [
        {
            f"{side}_{key}": row[key]
            for side, row in (("chosen", one), ("rejected", other))
            for key in ("input_ids", "labels")
        }
        for one, other in zip(tiny.rows(8, seed=5), tiny.rows(8, seed=6), strict=True)
    ]
    options = TrainingOptions(
        output_dir=folder,
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        compute_dtype="float32",
    )
    collator = Collator(0, width=64)
    return build_preference_trainer(
        model, tiny.tokenizer(), Dataset.from_list(rows), None, collator, options, MethodOptions(method=method)
    )


@pytest.mark.parametrize("method", ["dpo", "orpo"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_fused_blocks_learn_preferences_as_plain_layers_do(tmp_path: Path, method: str, cuda_graphs: bool) -> None:
    losses = []
    for fused in (True, False):
        one = trainer(tmp_path / str(fused), method, fused=fused, cuda_graphs=cuda_graphs)
        one.train()
        losses.append([record["loss"] for record in one.state.log_history if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=0.03)
