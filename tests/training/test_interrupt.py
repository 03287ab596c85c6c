from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from fourfold.training.checkpoint import check_checkpoint, list_checkpoints
from fourfold.training.interrupt import InterruptCallback, catch_interrupts

SCRIPT = Path(__file__).parent / "interrupted_run.py"


def run_until(line: str, folder: Path, signals: list[int], *args: str) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(folder), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    seen = []
    for text in process.stdout:
        seen.append(text)
        if text.startswith(line):
            process.send_signal(signals[0])
            break
    for text in process.stdout:
        seen.append(text)
        if len(signals) > 1 and "finishing this step" in text:
            process.send_signal(signals.pop())
    return process.wait(timeout=120), "".join(seen)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint_from_which_the_run_resumes(tmp_path: Path, number: int) -> None:
    status, said = run_until("step 3", tmp_path, [number])
    assert status == 130, said
    assert "Training was interrupted after step" in said
    assert "--resume_from_checkpoint auto" in said
    (checkpoint,) = list_checkpoints(tmp_path)
    check_checkpoint(checkpoint)
    step = int(checkpoint.name.split("-")[1])
    assert step >= 3
    resumed = tiny.trainer(tmp_path, max_steps=step + 1, gradient_accumulation_steps=2)
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == step + 1


def test_signal_during_evaluation_does_not_wait_for_its_end(tmp_path: Path) -> None:
    status, said = run_until("evaluating", tmp_path, [signal.SIGINT], "evaluate")
    assert status == 130, said
    assert said.count("evaluating") < 20
    (checkpoint,) = list_checkpoints(tmp_path)
    check_checkpoint(checkpoint)
    assert checkpoint.name == "checkpoint-2"


def test_second_signal_quits_at_once(tmp_path: Path) -> None:
    status, said = run_until("step 2", tmp_path, [signal.SIGINT, signal.SIGINT], "linger")
    assert status not in (0, 130), said
    assert "KeyboardInterrupt" in said
    assert list_checkpoints(tmp_path) == []


def test_former_handlers_are_back_after_the_run() -> None:
    before = signal.getsignal(signal.SIGINT)
    callback = InterruptCallback()
    with catch_interrupts(callback):
        assert signal.getsignal(signal.SIGINT) is not before
        signal.raise_signal(signal.SIGINT)
        assert callback.signal_number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGINT) is before
