"""What a run whose model is sharded cannot do is refused by name; what it can, is not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from fourfold.config import RunConfig


@pytest.mark.parametrize(
    "keys",
    [
        {"stream_base": "host"},
        {"cuda_graphs": True},
        {"requantize_every": 10},
        {"eval_generate_rows": 4, "eval_dataset": "rows.jsonl"},
        {"init_lora_weights": "pissa"},
        {"optim": "adafactor"},
        {"optim": "adamw_torch"},
        {"bnb_4bit_compute_dtype": "float16"},
    ],
    ids=lambda keys: next(iter(keys)) + str(next(iter(keys.values()))),
)
def test_what_does_not_go_with_shards_is_refused_by_name(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(keys))} is given, and with distributed: fsdp2 the base"):
        RunConfig(model_name_or_path="m", distributed="fsdp2", **keys)
    assert RunConfig(model_name_or_path="m", distributed="ddp", **keys).distributed == "ddp"


def test_most_goes_with_shards() -> None:
    keys: dict[str, Any] = {"optim": "paged_lion_8bit", "recompute": "mlp_offload", "init_lora_weights": "gaussian"}
    RunConfig(model_name_or_path="m", distributed="fsdp2", method="dpo", **keys)
