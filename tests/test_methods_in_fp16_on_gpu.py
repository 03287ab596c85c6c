"""Runs of every method in fp16, its loss scaled, over a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fourfold import pipeline

pytestmark = pytest.mark.gpu


def row(method: str, number: int) -> dict[str, Any]:
    good, bad = json.dumps({"amount": number}), f"Anna paid for {number} items?"
    if method == "kto":
        return {"prompt": "How much?", "completion": good if number % 2 else bad, "label": bool(number % 2)}
    if method == "sft":
        return {"prompt": "How much?", "completion": good}
    return {"prompt": "How much?", "chosen": good, "rejected": bad}


@pytest.mark.parametrize(
    "keys",
    [
        {"method": "dpo"},
        {"method": "orpo"},
        {"method": "kto"},
        {"method": "reward"},
        {"method": "sft", "adapter": None, "load_in_4bit": False},
    ],
    ids=["dpo", "orpo", "kto", "reward", "full"],
)
def test_a_run_in_fp16_learns_and_is_measured_again_alike(tiny_run, tmp_path: Path, keys: dict[str, Any]) -> None:
    for name, numbers in (("train", range(24)), ("held_out", range(40, 46))):
        lines = (json.dumps(row(keys["method"], number)) + "\n" for number in numbers)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    config = tiny_run(tmp_path, **keys, device="cuda", bnb_4bit_compute_dtype="float16", learning_rate=1e-3)
    run = pipeline.train(config, progress="silent")
    assert math.isfinite(run.metrics["train_loss"])
    measured = pipeline.evaluate(config, progress="silent")["eval_loss"]
    assert measured == pytest.approx(run.metrics["eval_loss"], rel=0.03)
