"""A run's record, made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from fourfold.report import Answer, Event, RunRecord, Setting, TextSample

HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\"> & \ud800"
BEGAN = datetime(2026, 11, 29, 9, 0, tzinfo=UTC)


@pytest.fixture(scope="session")
def make_record() -> Callable[..., RunRecord]:
    """Gives a whole record of so many logs, with hostile texts wherever a run's own text goes."""

    def make(count: int = 40, **fields: Any) -> RunRecord:
        metrics: list[dict[str, Any]] = []
        for step in range(1, count + 1):
            loss = 1 + 2 * math.exp(-step / 10)
            metrics.append({"step": step, "loss": loss, "learning_rate": 1e-4, "grad_norm": 0.5})
            metrics[-1] |= {"tokens_per_second": 900.0 + step % 7, "memory_peak_bytes": 2**30, "num_tokens": step * 64}
            if step % 10 == 0:
                metrics.append({"step": step, "eval_loss": loss + 0.1, f"eval_{HOSTILE}_loss": loss + 0.2})
        prompt = ({"role": "user", "content": HOSTILE},)
        whole: dict[str, Any] = {
            "name": HOSTILE,
            "model": HOSTILE,
            "data": HOSTILE,
            "method": "QLoRA",
            "metrics": metrics,
            "figures": {"train_seconds": 75.0, "exact_match": 0.5, "exact_match_rows": 2},
            "planned": {"planned_peak_bytes": 2**30, "planned_memory_weights_bytes": 2**29},
            "events": [
                Event("begin", BEGAN, 0),
                Event("interrupted", BEGAN + timedelta(minutes=5), 20, {"message": HOSTILE}),
                Event("resume", BEGAN + timedelta(minutes=9), 20),
                Event("end", BEGAN + timedelta(minutes=11), count),
            ],
            "samples": [TextSample(step, prompt, f"{step} {HOSTILE}", HOSTILE) for step in (0, 10, 20)],
            "answers": [Answer(prompt, HOSTILE, HOSTILE, True), Answer(prompt, "yes", "no", False)],
            "settings": [
                Setting("Model", "model_name_or_path", HOSTILE, None),
                Setting("Model", "seed", "0", "0"),
            ],
            "data_reports": [("Training rows", {"rows_read": 3, "row_format": HOSTILE})],
            "versions": {"torch": HOSTILE},
            "machine": {"processor": HOSTILE},
            "faults": [HOSTILE],
        }
        return RunRecord(**(whole | fields))

    return make
