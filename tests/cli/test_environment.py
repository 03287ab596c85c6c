from __future__ import annotations

import importlib.metadata
import os
import stat
from dataclasses import asdict

import pytest
import torch
from typer.testing import CliRunner

from fourfold import environment
from fourfold.cli import app
from fourfold.cli.environment import ALLOCATOR_SETTINGS, let_segments_grow
from fourfold.environment import Gpu, gather

H200 = "NVIDIA H200, 143771, 9.0, 570.124.06"
V100 = "Tesla V100-SXM2-16GB, 16384, 7.0, 570.124.06"
GB10 = "NVIDIA GB10, [N/A], 12.1, 580.0"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """An nvidia-smi of our own, first in the path."""

    def answer(text: str, exit_code: int = 0) -> None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {exit_code}\n", encoding="utf-8")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return answer


def test_versions_are_those_of_the_installed_packages():
    versions = gather().versions
    for name in ("torch", "transformers", "peft", "trl", "datasets"):
        assert versions[name] == importlib.metadata.version(name)


def test_gpus_are_read_from_the_driver(nvidia_smi):
    nvidia_smi(f"{H200}\n{V100}")
    gpus = gather().gpus
    assert gpus == [
        Gpu("NVIDIA H200", 143771 * 2**20, "9.0", "570.124.06"),
        Gpu("Tesla V100-SXM2-16GB", 16384 * 2**20, "7.0", "570.124.06"),
    ]


def test_a_gpu_that_shares_the_memory_reports_the_machines(nvidia_smi):
    nvidia_smi(GB10)
    found = gather()
    assert found.gpus[0].memory_bytes == found.memory_bytes


def test_a_driver_that_fails_means_no_gpu(nvidia_smi):
    nvidia_smi("NVIDIA-SMI has failed", exit_code=9)
    if not torch.cuda.is_available():
        assert gather().gpus == []


@pytest.mark.parametrize(("line", "is_fast"), [(H200, True), (V100, False), (GB10, True)])
def test_bfloat16_is_fast_from_compute_capability_8(nvidia_smi, line, is_fast):
    nvidia_smi(line)
    assert gather().bfloat16_is_fast is is_fast


@pytest.mark.parametrize(
    ("torch_cuda", "cuda_is_available", "words"),
    [
        (None, False, "torch is a CPU build"),
        ("13.0", False, "update the driver (now 570.124.06)"),
    ],
)
def test_a_gpu_that_torch_cannot_use_gets_advice(torch_cuda, cuda_is_available, words):
    versions = dict.fromkeys(environment.PACKAGES, "1.0")
    gpus = [Gpu("NVIDIA H200", 2**37, "9.0", "570.124.06")]
    (advice,) = environment._advice(versions, gpus, torch_cuda, cuda_is_available)
    assert words in advice


def test_what_is_missing_gets_advice():
    versions = dict.fromkeys(environment.PACKAGES, "1.0") | {
        "trl": None,
        "triton": None,
        "bitsandbytes": None,
    }
    gpus = [Gpu("NVIDIA H200", 2**37, "9.0", "570")]
    advice = environment._advice(versions, gpus, "13.0", True)
    assert [text.split()[0] for text in advice] == ["trl"]


def test_the_table_shows_every_package_and_gpu(nvidia_smi):
    nvidia_smi(H200)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 0
    # However wide the terminal is.
    told = "".join(result.stdout.split())
    for words in (*environment.PACKAGES, "GPU 0", "140.4 GiB, compute capability 9.0, driver 570.124.06"):
        assert words.replace(" ", "") in told


def test_an_environment_is_plain_data():
    assert asdict(gather())["cpu_cores"] >= 1


@pytest.mark.parametrize("given", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", None])
def test_the_allocator_grows_its_segments_unless_its_settings_are_given(
    monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    for name in ALLOCATOR_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(given, "max_split_size_mb:512")
    let_segments_grow()
    found = {name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ}
    expected = {given: "max_split_size_mb:512"} if given else {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert found == expected
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
