"""The footprint that is predicted from a model's configuration alone, and what training steps then take.

    python benchmarks/memory.py [--settings 8b-4x2048-none ...] [--json FILE]
    python benchmarks/memory.py --check benchmarks/results/memory.json    no GPU: a record, and what is foretold now

Models have random weights, quantized layer by layer, so that none is ever whole in 16 bits. Predicted is the peak of
`fourfold.memory.footprint`; measured is torch's max_memory_allocated from the first training step on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import fourfold
from fourfold.data import supervised_positions
from fourfold.memory.footprint import Step, footprint
from fourfold.models.attention import Documents
from fourfold.models.attention_interface import ATTENTION_NAME, document_mask
from fourfold.models.followed_layer import followed_shape
from fourfold.models.model_shape import model_shape
from fourfold.optimizers.footprint import staging_bytes, state_bytes, working_bytes
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.swapping import dense_linears
from fourfold.training.loss import supervised_cross_entropy
from fourfold.training.options import OPTIMIZERS, OptimizerRow

# Llama's own, LLaMA-1's (whose papers name memory), and SmolLM2's.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 256},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "33b": {"hidden_size": 6656, "intermediate_size": 17920, "num_hidden_layers": 60, "num_attention_heads": 52}
    | {"num_key_value_heads": 52, "vocab_size": 32000},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 64, "vocab_size": 32000},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
}


LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Args:
        policy: Of `fourfold.models.recomputation.POLICIES`; on the generic path "none", or "full": with checkpointing.
        method: "qlora", over NF4; "lora", over 16 bits; "full".
        path: "fused" or "generic".
        optimizer: Of `fourfold.training.options.OPTIMIZERS`.
        dropout: On the adapter's input, for which layers take the generic path.
    """

    shape: str
    batch: int
    seq: int
    policy: str
    rank: int = 16
    method: str = "qlora"
    path: str = "fused"
    optimizer: str = "adamw_8bit"
    dropout: float = 0.0

    @property
    def name(self) -> str:
        more = "" if self.method == "qlora" else f"-{self.method}"
        more += "-generic" if self.path == "generic" and self.method != "full" else ""
        more += "-dropout" if self.dropout else ""
        more += f"-r{self.rank}" if self.rank != 16 else ""
        state = {"adamw_8bit": "", "adamw": "-32bit"}.get(self.optimizer, f"-{self.optimizer}")
        return f"{self.shape}-{self.batch}x{self.seq}-{self.policy}{more}{state}"

    @property
    def lora(self) -> LoraConfig | None:
        if self.method == "full":
            return None
        options: dict[str, Any] = {"lora_alpha": 16, "lora_dropout": self.dropout, "task_type": "CAUSAL_LM"}
        return LoraConfig(r=self.rank, target_modules=LINEARS, **options)

    @property
    def optimizer_row(self) -> OptimizerRow:
        row = OPTIMIZERS[self.optimizer]
        assert row is not None
        return row


def full(shape: str, batch: int, seq: int, policy: str, optimizer: str) -> Setting:
    return Setting(shape, batch, seq, policy, method="full", path="generic", optimizer=optimizer)


# For a look at the command on a CPU, where nothing is measured.
TINY = [
    Setting("tiny", 2, 64, "none"),
    Setting("tiny", 2, 64, "selective", method="lora", optimizer="adamw"),
    full("tiny", 2, 64, "full", "adafactor"),
    Setting("tiny", 2, 64, "none", path="generic", dropout=0.1),
]
SETTINGS = [
    Setting("135m", 8, 512, "none"),
    Setting("135m", 16, 2048, "none"),
    Setting("135m", 8, 2048, "selective"),
    Setting("135m", 8, 1024, "mlp", method="lora"),
    Setting("1b", 4, 2048, "full", method="lora"),
    Setting("1b", 1, 16384, "full", optimizer="adamw"),
    Setting("1b", 8, 1024, "mlp"),
    Setting("8b", 1, 512, "none"),
    Setting("8b", 1, 2048, "none"),
    Setting("8b", 1, 2048, "selective", method="lora"),
    Setting("8b", 1, 4096, "mlp", rank=64, optimizer="adamw"),
    Setting("8b", 2, 8192, "none", rank=32),
    Setting("8b", 1, 16384, "selective_offload"),
    Setting("8b", 2, 8192, "full_offload", rank=64),
    Setting("8b", 1, 65536, "mlp_offload"),
    Setting("33b", 1, 2048, "full", rank=64),
    Setting("33b", 2, 2048, "selective"),
    Setting("65b", 1, 2048, "full_offload"),
    Setting("70b", 1, 2048, "selective"),
    Setting("70b", 1, 8192, "selective_offload", optimizer="adamw"),
    full("135m", 8, 1024, "none", "adamw"),
    full("135m", 8, 1024, "none", "adamw_8bit"),
    full("1b", 1, 2048, "full", "adamw"),
    full("1b", 1, 2048, "full", "adafactor"),
    full("1b", 4, 2048, "full", "adamw_8bit"),
    full("1b", 4, 2048, "full", "paged_adamw_32bit"),
    Setting("1b", 4, 1024, "none", method="lora", path="generic", dropout=0.1),
    Setting("8b", 1, 2048, "full", path="generic"),
]


def random_model(
    config: LlamaConfig, is_quantized: bool, device: torch.device, layers_on: str | None = None
) -> PreTrainedModel:
    """A bf16 model with random weights, its decoder's linear layers in NF4 and, if given, on `layers_on`."""
    with torch.device("meta"):
        model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    head = model.get_output_embeddings()
    for name, linear in list(dense_linears(model)):
        if linear is head:
            continue
        dense = nn.Linear(linear.in_features, linear.out_features, bias=False, device=device, dtype=torch.bfloat16)
        nn.init.normal_(dense.weight, std=0.02)
        dense.requires_grad_(False)
        linear = QuantizedLinear.from_linear(dense) if is_quantized else dense
        model.set_submodule(name, linear.to(layers_on or device))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                nn.init.ones_(values) if values.dim() == 1 else nn.init.normal_(values, std=0.02)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model


def measure(model: PreTrainedModel, setting: Setting, device: torch.device) -> dict[str, Any]:
    is_fused = setting.path == "fused"
    trainee: PeftModel | PreTrainedModel = model
    if setting.lora is None:
        model.requires_grad_(True)
    else:
        trainee = fourfold.prepare(model, setting.lora, fused=is_fused, recompute=setting.policy if is_fused else None)
    if not is_fused and setting.policy == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    trainee.train()
    trained = [parameter for parameter in trainee.parameters() if parameter.requires_grad]
    row = setting.optimizer_row
    optimizer = row.optimizer(trained, lr=1e-5, max_grad_norm=1.0, **row.arguments())
    step = make_step(trainee, optimizer, setting.batch, setting.seq, device)
    tokens = setting.batch * setting.seq
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    # Graphs are captured in the third step; without them, state is there from the second step on.
    seconds = []
    for _ in range(4 if tokens <= 8192 else 2):
        start = time.perf_counter()
        loss = float(step())
        seconds.append(time.perf_counter() - start)
    result = {"loss": loss, "step_seconds": min(seconds)}
    if device.type == "cuda":
        result["measured_bytes"] = torch.cuda.max_memory_allocated()
        result["reserved_bytes"] = torch.cuda.max_memory_reserved()
    return result


def make_step(
    model: PeftModel | PreTrainedModel, optimizer: torch.optim.Optimizer, batch: int, seq: int, device: torch.device
) -> Callable[[], Tensor]:
    """A whole training step over random rows, every token labelled; it gives the loss."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    ids = torch.randint(10, base.config.vocab_size, (batch, seq), device=device)
    positions = supervised_positions(torch.zeros(batch, seq, dtype=torch.int64)).to(device)
    tokens = batch * seq
    mask = None
    if base.config._attn_implementation == ATTENTION_NAME:
        # As the trainer tells layers that are fused what a row is; others need no mask.
        mask = document_mask(Documents(torch.arange(0, tokens + 1, seq, dtype=torch.int32, device=device), seq))

    def step() -> Tensor:
        hidden = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
        loss = supervised_cross_entropy(hidden, ids, base.get_output_embeddings(), positions).loss_sum / tokens
        del hidden
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def predict(config: LlamaConfig, setting: Setting) -> dict[str, Any]:
    quantization = fourfold.FourfoldConfig() if setting.method == "qlora" else None
    row = setting.optimizer_row
    if setting.path == "fused":
        shape = model_shape(config, quantization, setting.rank)
    else:
        shape = followed_shape(config, quantization, setting.lora)
    state = state_bytes(row.rule, row.state_bits, shape.adapter_shapes)
    is_paged = row.placement == "paged"
    step = Step(
        setting.batch,
        setting.seq,
        [setting.policy] * len(shape.blocks),
        optimizer_bytes=0 if is_paged else state,
        staging_bytes=staging_bytes(row.rule, row.state_bits, shape.adapter_shapes) if is_paged else 0,
        update_bytes=working_bytes(row.rule, shape.adapter_shapes, 2 if setting.method == "full" else 4),
    )
    held = footprint(shape, step)
    return {"predicted_bytes": held.peak_bytes, "moment": held.moment, "parts": held.parts}


def run(setting: Setting, device: torch.device) -> dict[str, Any]:
    """One setting, in this process."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[setting.shape], max_position_embeddings=131072)
    result = {"name": setting.name, "setting": asdict(setting), **predict(config, setting)}
    model = random_model(config, setting.method == "qlora", device)
    try:
        return result | measure(model, setting, device)
    except torch.OutOfMemoryError as error:
        return result | {"error": str(error).splitlines()[0]}


def run_apart(name: str) -> dict[str, Any]:
    """One setting in a process of its own, so that none meets what the libraries keep of another's streams."""
    command = [sys.executable, __file__, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def shown(row: dict[str, Any]) -> str:
    measured = row.get("measured_bytes")
    off = "" if measured is None else f"{100 * (row['predicted_bytes'] / measured - 1):+.2f}%"
    taken = "" if measured is None else f"{measured / 2**30:.3f}"
    predicted = row["predicted_bytes"] / 2**30
    return f"{row['name']:<34} {predicted:>14.3f} {taken:>13} {off:>8}  {row['moment']} {row.get('error', '')}"


def about(command: str) -> dict[str, Any]:
    """What stands above a record: by what it was made, when, on what, with which versions."""
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
    }


def check(record: Path, settings: dict[str, Setting]) -> int:
    """Foretell again what was measured once; how many peaks are off by more than 3%."""
    far = 0
    for row in json.loads(record.read_text())["rows"]:
        setting = settings[row["name"]]
        config = LlamaConfig(**SHAPES[setting.shape], max_position_embeddings=131072)
        now = row | predict(config, setting)
        far += abs(now["predicted_bytes"] / row["measured_bytes"] - 1) > 0.03
        print(shown(now), flush=True)
    return far


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {setting.name: setting for setting in (*SETTINGS, *TINY)}
    default = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, default=default, metavar="SETTING")
    parser.add_argument("--jobs", type=int, default=1, help="settings at a time, where the GPU has room for them")
    parser.add_argument("--only", choices=names, metavar="SETTING", help="measure one here, and print it as JSON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--check", type=Path, metavar="RECORD", help="compare a record with what is foretold now")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.only is not None:
        print(json.dumps(run(names[args.only], device)))
        return
    print(f"{'setting':<34} {'predicted GiB':>14} {'measured GiB':>13} {'off by':>8}  peak in")
    if args.check is not None:
        sys.exit(check(args.check, names))
    results = []
    record = about(f"python benchmarks/memory.py --json {args.json}")
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(run_apart, args.settings):
            results.append(row)
            print(shown(row), flush=True)
            if args.json is not None:
                # Written after each: what was measured is not lost with what was not.
                args.json.write_text(json.dumps({**record, "rows": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
