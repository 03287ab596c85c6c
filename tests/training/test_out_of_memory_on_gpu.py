"""Memory that runs out on a real GPU: others fill it, a cap is too low, the host refuses what paging needs."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.errors import TrainingError
from fourfold.kernels import paging
from fourfold.memory.gpus import CONTEXT_BYTES, Gpu, context_bytes, gpu_present
from fourfold.memory.planner import Plan
from fourfold.models import streaming
from fourfold.planning import plan_for_training
from fourfold.training.out_of_memory import OutOfMemory
from fourfold.training.run_folder import read_metrics
from fourfold.training.trainer import FourfoldTrainer

# Others that are at work there run out of memory, or are taken for what fills it.
pytestmark = [pytest.mark.gpu, pytest.mark.whole_gpu]

GIB = 2**30
LIMIT = "2GB"
# Takes all of the GPU but so many bytes, says so, and holds it until its input ends.
HOLDER = """
import sys, torch
torch.cuda.init()
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("full", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """134M weights in 8 layers: what a step keeps can be ten times what stays."""
    folder = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16}
    config = LlamaConfig(
        **shape,
        vocab_size=len(tiny_tokenizer),
        bos_token_id=None,
        eos_token_id=tiny_tokenizer.eos_token_id,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = LlamaForCausalLM(config).to(torch.bfloat16)
    made.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def empty_gpu() -> Iterator[None]:
    gc.collect()
    # A run before has left them, and plans count them.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    # Whatever a run did, it is not to stand afterwards.
    assert torch.cuda.get_per_process_memory_fraction() == 1.0


@pytest.fixture
def run_of(tmp_path: Path, tiny_run: Callable[..., RunConfig], model: Path) -> Callable[..., RunConfig]:
    """A run of 4 steps, of 8 rows of exactly 512 tokens each."""
    rows = [{"messages": [{"role": "user", "content": f"Anna paid {index} euros. " * 200}]} for index in range(40)]
    for row in rows:
        row["messages"].append({"role": "assistant", "content": "yes"})
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**keys: Any) -> RunConfig:
        values: dict[str, Any] = {
            "model_name_or_path": str(model),
            "train_dataset": str(tmp_path / "long.jsonl"),
            "eval_dataset": None,
            "max_length": 512,
            "overlong": "truncate",
            "train_on_prompt": True,
            "per_device_train_batch_size": 8,
            "lora_r": 16,
            "lora_alpha": 16,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "save_steps": 100,
            "bnb_4bit_compute_dtype": "bfloat16",
            "device": "auto",
            # Their pool would keep what others are to take.
            "cuda_graphs": False,
        }
        return tiny_run(tmp_path, **(values | keys))

    return make


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that runs begin with."""
    made: list[Plan] = []

    def plan_it(config: RunConfig, gpu: Gpu | None, host_bytes: int | None, *_: Any) -> Plan | None:
        one = plan_for_training(config, gpu, host_bytes)
        assert one is not None
        made.append(one)
        return one

    monkeypatch.setattr(pipeline, "plan_for_training", plan_it)
    return made


class Others:
    """Fill the GPU before step 3, but for half of what the planned step would work in."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.tensor: torch.Tensor | None = None
        self.process: subprocess.Popen[str] | None = None

    def fill(self, planned: Plan) -> None:
        assert planned.chosen is not None
        left = (planned.chosen.footprint.peak_bytes - torch.cuda.memory_allocated()) // 2
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if self.kind == "tensor":
            _, total = torch.cuda.mem_get_info()
            allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
            size = allowed - torch.cuda.memory_reserved() - left
            self.tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
        else:
            command = [sys.executable, "-c", HOLDER, str(left)]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.process.stdout is not None
            assert self.process.stdout.readline() == "full\n"

    def leave(self) -> None:
        self.tensor = None
        if self.process is not None:
            self.process.communicate()
        torch.cuda.empty_cache()


def fill_before_step_3(monkeypatch: pytest.MonkeyPatch, others: Others, plans: list[Plan]) -> None:
    own = FourfoldTrainer.training_step

    def training_step(self: FourfoldTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2 and others.tensor is None and others.process is None:
            others.fill(plans[0])
        return own(self, *args, **kwargs)

    monkeypatch.setattr(FourfoldTrainer, "training_step", training_step)


def losses(config: RunConfig) -> dict[int, float]:
    records = read_metrics(Path(config.output_dir) / "metrics.jsonl")
    return {record["step"]: record["loss"] for record in records if "loss" in record}


@pytest.mark.parametrize("kind", ["tensor", "process"])
def test_a_gpu_that_others_fill_makes_the_run_step_down_and_go_on_from_the_same_step(
    run_of: Callable[..., RunConfig],
    plans: list[Plan],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    config = run_of(gpu_memory_limit=LIMIT if kind == "tensor" else None)
    others = Others(kind)
    fill_before_step_3(monkeypatch, others, plans)
    try:
        run = pipeline.train(config, progress="plain")
    finally:
        others.leave()
    told = capsys.readouterr().out
    assert "memory ran out in step 3" in told
    assert told.count("plan for") >= 2
    # Planned beside in use, once where it ran out and once at the end.
    assert told.count("planned    in use  GiB") >= 2
    assert (run.output_dir / "checkpoint-2").is_dir()
    found = losses(config)
    assert list(found) == [1, 2, 3, 4]
    assert all(map(math.isfinite, found.values()))
    (first,) = plans
    assert first.chosen is not None
    assert run.metrics["planned_peak_bytes"] <= 0.9 * first.chosen.footprint.peak_bytes


def test_a_run_that_is_told_to_stop_leaves_a_checkpoint_from_which_it_finishes(
    run_of: Callable[..., RunConfig], plans: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_of(gpu_memory_limit=LIMIT, on_out_of_memory="stop")
    others = Others("tensor")
    with monkeypatch.context() as patch:
        fill_before_step_3(patch, others, plans)
        with pytest.raises(OutOfMemory) as error:
            pipeline.train(config, progress="silent")
    assert error.value.step == 2
    assert error.value.checkpoint == Path(config.output_dir) / "checkpoint-2"
    assert error.value.standing_bytes < error.value.parts["weights"] * 2
    del error
    others.leave()
    gc.collect()
    pipeline.train(config.model_copy(update={"resume_from_checkpoint": "auto"}), progress="silent")
    found = losses(config)
    assert list(found) == [1, 2, 3, 4]
    assert all(map(math.isfinite, found.values()))


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("weights were loaded")


def test_a_cap_below_any_plan_is_refused_before_weights_are_loaded(
    run_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "load_model", never)
    # The libraries alone take more than this leaves.
    limit = f"{(context_bytes() + 60 * 2**20) / GIB:.4f}GB"
    with pytest.raises(TrainingError, match=r"nothing fits(.|\n)*usable on \S+ GB of an NVIDIA(.|\n)*would fit"):
        pipeline.train(run_of(gpu_memory_limit=limit), progress="silent")


def test_a_run_with_evaluation_and_answers_stays_below_its_limit(
    run_of: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"eval_dataset": str(tmp_path / "held_out.jsonl"), "eval_generate_rows": 2, "eval_max_new_tokens": 4}
    run = pipeline.train(run_of(gpu_memory_limit=LIMIT, cuda_graphs=None, **keys), progress="plain")
    assert torch.cuda.max_memory_reserved() <= 2 * GIB - CONTEXT_BYTES
    told = capsys.readouterr().out
    assert "plan for 2 GB of an NVIDIA" in told
    assert "memory ran out" not in told
    assert run.metrics["planned_peak_bytes"] <= 2 * GIB - CONTEXT_BYTES
    # Several runs in one process: the next one may take all again.
    whole = gpu_present()
    assert whole is not None
    assert whole.memory_bytes > 2 * GIB


def test_the_parts_of_the_peak_are_what_is_there(
    run_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    standing: list[int] = []
    peaks: list[int] = []
    account = pipeline.account_memory

    def look(*args: Any, **kwargs: Any) -> dict[str, int]:
        peaks.append(torch.cuda.max_memory_allocated())
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        standing.append(torch.cuda.memory_allocated())
        return account(*args, **kwargs)

    monkeypatch.setattr(pipeline, "account_memory", look)
    before = torch.cuda.memory_allocated()
    run = pipeline.train(run_of(), progress="silent")
    names = ("weights", "adapters", "optimizer_state")
    stays = sum(run.metrics[f"memory_{name}_bytes"] for name in names)
    # Beside them, what passes between blocks waits for the next step.
    assert stays == pytest.approx(standing[0] - before, abs=0.03 * peaks[0])
    assert stays + run.metrics["memory_rest_bytes"] == pytest.approx(peaks[0], rel=0.03)
    assert run.metrics["planned_peak_bytes"] == pytest.approx(peaks[0] - before, rel=0.05)
    for name in names:
        planned, found = run.metrics[f"planned_memory_{name}_bytes"], run.metrics[f"memory_{name}_bytes"]
        assert planned == pytest.approx(found, rel=0.03), name


class Refusing:
    """The CUDA runtime on a machine that locks no memory."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def cudaHostRegister(self, *_: Any) -> int:  # noqa: N802
        return 2


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"stream_base": "host"}, r"refused: \d+ MiB for layer 0 of 8, 0\.\d GiB in all(.|\n)*error 2(.|\n)*ulimit -l"),
        (
            {"optim": "paged_adamw_8bit", "recompute": "none"},
            r"refused: .*paged state(.|\n)*error 2, for [\d,]+ bytes(.|\n)*adamw_8bit",
        ),
    ],
)
def test_pinned_memory_that_is_refused_ends_the_run_by_saying_how_much_for_what_and_what_to_do(
    run_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], said: str
) -> None:
    runtime = Refusing(torch.cuda.cudart())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(TrainingError, match=said):
        pipeline.train(run_of(**keys), progress="silent")
    # The error that CUDA remembers is not the next launch's.
    assert torch.ones(2, device="cuda").sum().item() == 2


def test_pinned_memory_that_is_refused_to_activations_is_no_reason_to_step_down(
    run_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Refusing(torch.cuda.cudart())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    said = r"refused: \d+ MiB for activations(.|\n)*does not offload"
    with pytest.raises(TrainingError, match=said) as error:
        pipeline.train(run_of(recompute="mlp_offload"), progress="silent")
    assert not isinstance(error.value, OutOfMemory)


@pytest.mark.parametrize("keys", [{"stream_base": "host"}, {"optim": "paged_adamw_32bit"}])
def test_host_memory_that_is_short_is_foreseen_before_weights_are_loaded(
    run_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    monkeypatch.setattr(pipeline, "load_model", never)
    monkeypatch.setattr(pipeline, "spare_bytes", lambda: 2**20)
    with pytest.raises(TrainingError, match=r"more of host memory than the 0\.0 GiB there are(.|\n)*would fit: \w"):
        pipeline.train(run_of(**keys), progress="silent")


@pytest.mark.parametrize(
    ("room", "keys", "said"),
    [
        (streaming, {"stream_base": "host"}, r"too little host memory(.|\n)*0\.0 GiB left(.|\n)*stream_base: disk"),
        (paging, {"optim": "paged_adamw_32bit"}, r"no [\d,]+ bytes of memory left(.|\n)*1,024 bytes(.|\n)*adamw_8bit"),
    ],
)
def test_host_memory_that_went_after_the_plan_was_made_ends_the_run_by_saying_so(
    run_of: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, room: Any, keys: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(room, "available_bytes", lambda: 1024)
    with pytest.raises(TrainingError, match=said):
        pipeline.train(run_of(**keys), progress="silent")
