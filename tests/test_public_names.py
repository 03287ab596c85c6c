from __future__ import annotations

import json
import subprocess
import sys

import fourfold

PROBE = """
import json, logging, os, sys
before, handlers = dict(os.environ), list(logging.getLogger().handlers)
import fourfold
heavy = [name for name in ("torch", "transformers", "peft", "trl", "datasets") if name in sys.modules]
print(json.dumps([heavy, dict(os.environ) == before, logging.getLogger().handlers == handlers]))
"""

GPU_PROBE = """
import torch
import fourfold
for name in fourfold.__all__:
    getattr(fourfold, name)
print(torch.cuda.is_initialized())
"""


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_no_library_and_changes_nothing() -> None:
    assert json.loads(run(PROBE)) == [[], True, True]


def test_resolving_every_name_touches_no_gpu() -> None:
    assert run(GPU_PROBE).splitlines()[-1] == "False"


def test_every_public_name_resolves_to_what_bears_it() -> None:
    for name in fourfold.__all__:
        assert getattr(fourfold, name).__name__ == name


def test_dir_lists_the_public_names() -> None:
    assert set(dir(fourfold)) == {*fourfold.__all__, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(fourfold, "quantise")
