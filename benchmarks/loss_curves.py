"""Loss curves of the generic path and of the fused blocks over a real model: do they overlap?

    python benchmarks/loss_curves.py MODEL [--text FILE] [--steps 200] [--batch 4] [--seq 512] [--together]
        [--json FILE]

Three runs over the same batches in the same order: the generic path; the fused blocks with the same initial adapter;
and the generic path with another initial adapter. The two paths compute the same function, so that their curves may
differ only by what rounding does over the steps, which grows as in every training. How much is too much is told by the
third run: a user takes its curve for the same as the first one's, since only a seed differs. The command fails if the
mean distance of the smoothed curves of the two paths is above that of the two seeds, or if the first losses, before any
step, differ by more than `FIRST_LOSS_BOUND`.

With --together they run at once, each in a process of its own: so small a model waits for its host, not for the GPU.

The text is that of this repository's documents and sources unless --text names another.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

import fourfold
from end_to_end import commit
from fourfold.data.packing import supervised_positions
from fourfold.models.loading import load_tokenizer
from fourfold.optimizers import AdamW
from fourfold.training.loss import supervised_cross_entropy
from fourfold.training.run_folder import installed_versions

ROOT = Path(__file__).resolve().parents[1]
SMOOTHED_STEPS = 20
# Of a loss of about 3, in bf16: a tenth of a percent.
FIRST_LOSS_BOUND = 3e-3


@dataclass(frozen=True)
class Run:
    """A run: on fused blocks or not, from the initial adapter of a seed."""

    fused: bool
    seed: int


RUNS = {"generic": Run(False, 0), "fused": Run(True, 0), "generic, another seed": Run(False, 1)}


def batches(model: str, text: str, num_batches: int, batch: int, seq: int) -> Tensor:
    """[num_batches, batch, seq]: windows of the text without overlap, in an order that a seed gives.

    A text that is too short begins anew.
    """
    ids = torch.tensor(load_tokenizer(model)(text)["input_ids"])
    windows = ids[: len(ids) // seq * seq].view(-1, seq)
    if not len(windows):
        raise SystemExit(f"the text has {len(ids)} tokens, fewer than --seq {seq}")
    generator = torch.Generator().manual_seed(0)
    wanted, orders = num_batches * batch, []
    while sum(map(len, orders)) < wanted:
        orders.append(torch.randperm(len(windows), generator=generator))
    return windows[torch.cat(orders)[:wanted]].view(num_batches, batch, seq)


def losses_of(run: Run, data: Tensor, args: argparse.Namespace) -> list[float]:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = fourfold.load_model(args.model, quantization=fourfold.FourfoldConfig(), dtype=dtype, device=device)
    torch.manual_seed(run.seed)
    config = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = fourfold.prepare(model, config, fused=run.fused, recompute=args.policy if run.fused else None)
    adapted.train()
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = AdamW(parameters, lr=args.learning_rate, state_bits=8)
    losses = []
    for ids in data:
        positions = supervised_positions(ids).to(device)
        ids = ids.to(device)
        hidden_states = model.base_model(input_ids=ids, use_cache=False)[0]
        loss = supervised_cross_entropy(hidden_states, ids, model.get_output_embeddings(), positions)
        mean = loss.loss_sum / len(positions)
        mean.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(mean.detach())
    return torch.stack(losses).tolist()


def all_losses(data: Tensor, args: argparse.Namespace) -> Iterator[list[float]]:
    """Those of each of `RUNS`, in their order."""
    if not args.together:
        for run in RUNS.values():
            yield losses_of(run, data, args)
        return
    with ProcessPoolExecutor(len(RUNS), mp_context=get_context("spawn")) as pool:
        started = [pool.submit(losses_of, run, data, args) for run in RUNS.values()]
        for one in started:
            yield one.result()


def smoothed(losses: list[float], steps: int = SMOOTHED_STEPS) -> list[float]:
    """Running means over `steps` losses, or over all if there are fewer."""
    steps = min(steps, len(losses))
    return [statistics.fmean(losses[start : start + steps]) for start in range(len(losses) - steps + 1)]


def distance(one: list[float], other: list[float]) -> float:
    """Mean absolute difference of the smoothed curves."""
    return statistics.fmean(abs(a - b) for a, b in zip(smoothed(one), smoothed(other), strict=True))


def verdict(curves: dict[str, list[float]]) -> dict[str, Any]:
    """What the curves say, by the criterion above. A loss that is not a number overlaps with nothing."""
    generic, fused, another = (curves[name] for name in RUNS)
    result = {
        "first_losses_differ_by": abs(generic[0] - fused[0]),
        "distance_of_paths": distance(generic, fused),
        "distance_of_seeds": distance(generic, another),
    }
    overlap = (
        result["first_losses_differ_by"] <= FIRST_LOSS_BOUND
        and result["distance_of_paths"] <= result["distance_of_seeds"]
    )
    return result | {"overlap": overlap}


def own_text() -> str:
    files = [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "src").rglob("*.py"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a 16-bit checkpoint with its tokenizer")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--policy", default="selective", help="recomputation policy of the fused blocks")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--together", action="store_true", help="all runs at once, each in a process of its own")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="what is measured, where the code lies outside a git repository")
    args = parser.parse_args()
    text = args.text.read_text(encoding="utf-8") if args.text else own_text()
    data = batches(args.model, text, args.steps, args.batch, args.seq)
    curves: dict[str, list[float]] = {}
    for name, losses in zip(RUNS, all_losses(data, args), strict=True):
        curves[name] = losses
        print(f"{name:22} first {curves[name][0]:.4f}, last {smoothed(curves[name])[-1]:.4f} (smoothed)", flush=True)
    result = verdict(curves)
    record = {
        "command": shlex.join(["python", "benchmarks/loss_curves.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or commit(),
        "versions": installed_versions(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU",
        "verdict": result,
        "losses": curves,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    print(
        f"first losses {result['first_losses_differ_by']:.2g} apart; smoothed curves of the two paths "
        f"{result['distance_of_paths']:.2g} apart, of two seeds {result['distance_of_seeds']:.2g}: "
        + ("they overlap" if result["overlap"] else "THEY DO NOT OVERLAP")
    )
    sys.exit(not result["overlap"])


if __name__ == "__main__":
    main()
