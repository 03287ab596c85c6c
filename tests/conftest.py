"""Models and tokenizers that tests share: one real, brought once per machine, and tiny random ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads it when a kernel is defined, its own ones when Transformers' models import it: without a GPU, kernels are
# interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from datasets import disable_progress_bars
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fourfold.config import RunConfig
from quickstart.model import bring_model

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = (
    "Paid Nordwind 1,249.50 euros on 7 March 2024 for 3 items.",
    '{"date":"2024-03-07","amount":1249.50,"currency":"EUR"}',
    "You are a helpful assistant. What is the capital of France? The capital of France is Paris.",
    "system user assistant",
)

# The files that take longest begin, since all wait for the worker that ends last. xdist's own order, by the number of
# tests in a file, would keep them for the end: they have few.
LONGEST_FIRST = (
    "kernels/test_compiling.py",
    "training/test_distributed.py",
    "training/test_zero.py",
    "cli/test_flow.py",
    "test_distributed_runs.py",
    "kernels/test_sanitized.py",
    "benchmarks/test_memory.py",
    "benchmarks/test_kill.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(ranks)))


@pytest.fixture(scope="module")
def one_quiet_thread() -> Iterator[None]:
    """A tiny model loses more by waking threads than it wins."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    disable_progress_bars()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct in bf16 safetensors, in the user's cache; the first run brings it."""
    return bring_model()


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE with a ChatML template; turns end with ``<|im_end|>``, padding is another token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder of a random two-layer Llama in fp32 with its tokenizer, shared: do not write to it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=len(tiny_tokenizer),
                bos_token_id=None,
                eos_token_id=tiny_tokenizer.eos_token_id,
                pad_token_id=tiny_tokenizer.pad_token_id,
            )
        )
    folder = tmp_path_factory.mktemp("tiny-llama")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, count: int) -> Path:
    """Conversations about payments, one JSON object a line."""
    names = ("Anna", "Boris", "Clara", "Dina", "Emil", "Fritz")
    rows = [
        [
            {"role": "user", "content": f"{names[index % 6]} paid {index} euros."},
            {"role": "assistant", "content": json.dumps({"amount": index})},
        ]
        for index in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_llama: Path) -> Callable[..., RunConfig]:
    """Gives the configuration of a small run in a folder, with its rows: `tiny_run(folder, key=value, ...)`.

    24 rows, of 4 to a step, for 4 optimizer steps with 2 checkpoints; 6 held-out rows; all in fp32 on the CPU.
    """

    def make(folder: Path, **keys: Any) -> RunConfig:
        for name, count in (("train.jsonl", 24), ("held_out.jsonl", 6)):
            if not (folder / name).exists():
                write_rows(folder / name, count)
        values: dict[str, Any] = {
            "model_name_or_path": str(tiny_llama),
            "output_dir": str(folder / "run"),
            "train_dataset": str(folder / "train.jsonl"),
            "eval_dataset": str(folder / "held_out.jsonl"),
            "lora_r": 4,
            "lora_alpha": 8,
            "max_length": 128,
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "gradient_checkpointing": False,
            "learning_rate": 1e-2,
            "logging_steps": 2,
            "save_steps": 2,
            "bnb_4bit_compute_dtype": "float32",
            "device": "cpu",
        }
        return RunConfig(**(values | keys))

    return make


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of Llama-3-8B, and no weights."""
    folder = tmp_path_factory.mktemp("llama-8b")
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That of Llama-3-70B."""
    folder = tmp_path_factory.mktemp("llama-70b")
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8}
    widths = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
    LlamaConfig(**heads, **widths).save_pretrained(folder)
    return folder
