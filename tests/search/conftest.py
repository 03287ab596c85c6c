"""A study of a function that costs nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fourfold.search.study import StudyOptions


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., StudyOptions]:
    def make(**keys: Any) -> StudyOptions:
        storage = str(tmp_path / "study.journal")
        return StudyOptions(
            **({"name": "study", "storage": storage, "directions": {"loss": "minimize"}, "n_trials": 6} | keys)
        )

    return make
