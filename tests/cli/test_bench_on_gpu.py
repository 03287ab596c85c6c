"""`fourfold bench` on a GPU: the fused blocks under every policy."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from fourfold.cli import app
from fourfold.models.recomputation import POLICIES

pytestmark = pytest.mark.gpu


def test_every_policy_is_measured_on_fused_blocks() -> None:
    result = CliRunner().invoke(app, ["bench", "--shape", "tiny", "--batch", "2", "--seq", "128", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["device"] == torch.cuda.get_device_name()
    assert report["fused"]
    assert report["copy_bytes_per_second"] > 1e11
    assert [row["recompute"] for row in report["rows"]] == list(POLICIES)
    assert [row["error"] for row in report["rows"]] == [None] * len(POLICIES)
