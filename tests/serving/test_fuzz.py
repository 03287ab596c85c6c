"""benchmarks/serving_fuzz.py in small: schemathesis against the server's own OpenAPI."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from running import Running

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serving_fuzz.py"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("serving_fuzz", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serving_fuzz"] = module
    spec.loader.exec_module(module)
    return module


def test_fuzzed_requests_leave_the_server_whole(script: Any, tiny_server: Running) -> None:
    fuzz = script.Fuzz(tiny_server.url, tiny_server.models, concurrency=4)
    fuzz.run(200)
    fuzz.end()
    assert fuzz.failures == []
    assert fuzz.num_sent == 200
    # They reached the engine, and did not only fail at the door.
    assert fuzz.statuses["200"] > 20
    assert fuzz.statuses["400"] > 20
    assert fuzz.statuses["left"] > 5
    assert fuzz.statuses["known"] == 4
    tiny_server.wait_until_idle()
