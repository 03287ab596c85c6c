"""From runs and models to what is served, and to vLLM's command."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.errors import AdapterError, CheckpointError, ConfigError
from fourfold.hosted import find_hosted
from fourfold.hosting import load_hosted, vllm_hand_over
from fourfold.inference import EngineOptions, Request
from fourfold.serving import ServerOptions

OPTIONS = EngineOptions(max_sequences=2, max_length=128)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(tiny_run: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run named `run`."""
    config = tiny_run(tmp_path_factory.mktemp("hosting"), eval_dataset=None, max_steps=2)
    pipeline.train(config)
    return Path(config.output_dir)


def test_a_run_is_its_adapter_and_its_base_by_their_names(run: Path, tiny_llama: Path) -> None:
    hosted = find_hosted(str(run))
    assert hosted.base == str(tiny_llama)
    assert (list(hosted.adapters), hosted.base_name) == (["run"], tiny_llama.name)
    assert list(find_hosted(str(run), name="payments").adapters) == ["payments"]


def test_what_is_loaded_answers_as_fourfold_chat_does(run: Path) -> None:
    served = load_hosted(find_hosted(str(run), {"again": str(run)}), OPTIONS)
    session = pipeline.chat(str(run), max_new_tokens=12)
    messages = [{"role": "user", "content": "Anna paid 6 euros."}]
    expected = "".join(session.reply(messages))
    ids = session.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    texts = {}
    for name, adapter in served.models.items():
        sequence = served.engine.submit(Request(tuple(ids), max_new_tokens=12, adapter=adapter))
        while served.engine.has_work:
            served.engine.step()
        texts[name] = sequence.text
    assert texts["run"] == texts["again"] == expected
    assert texts[find_hosted(str(run)).base_name or ""] != expected


def test_names_are_unlike_and_adapters_of_the_same_base(
    run: Path, tiny_llama: Path, tiny_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="two models of one name"):
        find_hosted(str(run), {"run": str(run)})
    with pytest.raises(ConfigError, match="two models of one name"):
        find_hosted(str(run), name=tiny_llama.name)
    with pytest.raises(CheckpointError, match="no run at"):
        find_hosted(str(run), {"other": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError, match="load-in-4bit"):
        find_hosted(str(run), load_in_4bit=True)
    other = tmp_path / "other"
    shutil.copytree(tiny_llama, other)
    with pytest.raises(ConfigError, match="belongs to another base"):
        find_hosted(str(other), {"run": str(run)})


def test_an_adapter_without_its_run_is_taken_and_of_another_shape_refused(
    run: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    served = load_hosted(find_hosted(str(tiny_llama), {"alone": str(alone)}, name="base"), OPTIONS)
    assert dict(served.models) == {"alone": "default", "base": None}
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps(config | {"r": 2 * config["r"]}))
    with pytest.raises(AdapterError, match="another base"):
        load_hosted(find_hosted(str(tiny_llama), {"alone": str(alone)}), OPTIONS)


def test_a_base_that_its_adapter_changed_is_no_model_of_its_own(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(run, changed)
    shutil.copytree(tiny_llama, changed / "base")
    hosted = find_hosted(str(changed))
    assert hosted.base_name is None
    assert hosted.base == str(changed / "base")
    assert list(load_hosted(hosted, OPTIONS).models) == ["changed"]


def test_a_models_own_name_is_its_folders_or_the_hubs(tiny_llama: Path) -> None:
    assert find_hosted(str(tiny_llama)).base_name == tiny_llama.name
    assert find_hosted("someone/some-model").base_name == "someone/some-model"


def test_vllm_gets_what_was_exported_and_one_command(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    hosted = find_hosted(str(run), {"again": str(run)}, name="pay")
    command = shlex.split(vllm_hand_over(hosted, tmp_path / "out dir", OPTIONS, ServerOptions(port=9000)))
    assert command[:3] == ["vllm", "serve", str(tiny_llama)]
    start = command.index("--lora-modules") + 1
    for name in ("pay", "again"):
        folder = tmp_path / "out dir" / name
        assert f"{name}={folder}" in command[start : start + 2]
        # Read back and compared, as every export.
        readers = json.loads((folder / "verification.json").read_text())["readers"]
        assert readers["peft"]["agreement"]["top1_agreement"] == 1
    words = dict(itertools.pairwise(command))
    assert words["--max-lora-rank"] == "8"
    assert words["--max-loras"] == "2"
    assert (words["--max-model-len"], words["--max-num-seqs"]) == ("128", "2")
    assert (words["--host"], words["--port"]) == ("127.0.0.1", "9000")
    assert words["--served-model-name"] == tiny_llama.name


def test_vllm_needs_no_export_of_a_model_alone(tiny_llama: Path, tmp_path: Path) -> None:
    command = vllm_hand_over(find_hosted(str(tiny_llama)), tmp_path / "out", OPTIONS, ServerOptions())
    assert "lora" not in command
    assert not (tmp_path / "out").exists()
