from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

# Lets the tests of this folder share `running`.
sys.path.insert(0, str(Path(__file__).parent))
# The clients of this machine's own servers.
os.environ["NO_PROXY"] = "127.0.0.1,localhost"

from running import Running, running

from fourfold.hosted import find_hosted
from fourfold.hosting import load_hosted
from fourfold.inference import EngineOptions
from fourfold.serving import Served


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny models lose more by waking threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_adapter(base: Path, folder: Path, seed: int) -> Path:
    """An adapter that changes what the base answers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear", lora_alpha=16)
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_served(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The tiny Llama as `base`, with two adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    adapters = {name: str(write_adapter(tiny_llama, folder / name, seed)) for seed, name in enumerate(("red", "v1.2"))}
    hosted = find_hosted(str(tiny_llama), adapters, name="base")
    hosted = replace(hosted, load_options={"dtype": torch.float32, "device": "cpu"})
    return load_hosted(hosted, EngineOptions(max_sequences=4, max_length=256))


@pytest.fixture(scope="session")
def tiny_server(tiny_served: Served) -> Iterator[Running]:
    """A server of the tiny models; all that a test asks of it is to have ended when the test does."""
    with running(tiny_served, max_tokens=128) as server:
        yield server
