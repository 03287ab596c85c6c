# ruff: noqa: T201 - the test reads what is printed
"""A run for a test that sends it a signal: interrupted_run.py OUTPUT_DIR [evaluate | linger]."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import tiny
import torch
from transformers import TrainerCallback

from fourfold.errors import FourfoldError


class Announce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print("step", state.global_step, flush=True)

    def on_substep_end(self, args, state, control, **kwargs):
        # So that a signal comes in the middle of a step; where two are sent, in the middle of the same.
        time.sleep(60 if "linger" in sys.argv and state.global_step >= 2 else 0.2)

    def on_prediction_step(self, args, state, control, **kwargs):
        print("evaluating", flush=True)
        time.sleep(0.2)


# A shell that runs the tests in the background has them ignore SIGINT, and what they start too.
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
evaluate = sys.argv[2:] == ["evaluate"]
trainer = tiny.trainer(
    Path(sys.argv[1]),
    eval_dataset=tiny.rows(64) if evaluate else None,
    callbacks=(Announce(),),
    max_steps=10_000,
    gradient_accumulation_steps=2,
    **({"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1} if evaluate else {}),
)
try:
    trainer.train()
except FourfoldError as error:
    print(error, flush=True)
    sys.exit(130)
