"""The examples for clusters: what can be checked of them without one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fourfold.config import load_config

FOLDER = Path(__file__).parents[2] / "examples" / "distributed"


def test_the_run_is_one():
    assert load_config(FOLDER / "run.yaml").distributed == "fsdp2"


def test_the_kubernetes_job_starts_torchrun_on_pods_that_find_the_first():
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 2
    assert container["command"][0] == "torchrun"
    assert f"--nnodes={job['spec']['completions']}" in container["command"]
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']}" in container["command"]
    name = job["metadata"]["name"]
    assert f"--master-addr={name}-0.{service['metadata']['name']}" in container["command"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]


def test_the_slurm_script_is_sound():
    script = FOLDER / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert script.stat().st_mode & 0o111
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", str(script)], check=True)
