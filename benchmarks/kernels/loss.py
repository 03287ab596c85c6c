"""The loss from hidden states to their gradient, frozen head: ours, its peers and the limit, in one run.

    python benchmarks/kernels/loss.py [--tokens 8192] [--repeats 10] [--json benchmarks/results/loss.json]

Every position has a label. "limit" is the two products alone, [tokens, hidden] @ [hidden, vocab] and back, in chunks
of ours; "torch" is the unfused head with logits of the whole batch in fp32, as Transformers' loss has them; "ce"
measures the kernel alone on one chunk against a copy of as many bytes. Candidates run in turn, round after round.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
from torch import Tensor, nn
from torch.nn import functional

from fourfold.data import supervised_positions
from fourfold.kernels.cross_entropy import cross_entropy_
from fourfold.training.loss import supervised_cross_entropy

# (model, hidden size); both have the vocabulary of Llama 3
HEADS = [("Llama-3-8B", 4096), ("Llama-3.2-1B", 2048)]
VOCAB = 128256
CHUNK = 1024

Step = Callable[[], tuple[Tensor, Tensor]]


def candidates(hidden: Tensor, labels: Tensor, head: nn.Linear) -> dict[str, Step]:
    """Name -> a step that gives the mean loss and its gradient to the hidden states."""
    width = hidden.shape[-1]
    positions, targets = supervised_positions(labels), labels[:, 1:].flatten()
    count = len(positions)

    def with_gradient(loss: Callable[[Tensor], Tensor]) -> Step:
        def step() -> tuple[Tensor, Tensor]:
            value = loss(hidden)
            return value.detach(), torch.autograd.grad(value, hidden)[0]

        return step

    def ours(x: Tensor) -> Tensor:
        return supervised_cross_entropy(x, labels, head, positions).loss_sum / count

    def shifted(x: Tensor) -> Tensor:
        return x[:, :-1].reshape(-1, width)

    liger_loss = LigerFusedLinearCrossEntropyLoss()

    def liger(x: Tensor) -> Tensor:
        value: Tensor = liger_loss(head.weight, shifted(x), targets)
        return value

    def unfused(x: Tensor) -> Tensor:
        return functional.cross_entropy(head(shifted(x)).float(), targets)

    steps = {"ours": with_gradient(ours), "liger": with_gradient(liger), "torch": with_gradient(unfused)}
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        steps["cut_cross_entropy"] = with_gradient(lambda x: linear_cross_entropy(shifted(x), head.weight, targets))
    return steps


def limit(hidden: Tensor, head: nn.Linear) -> Callable[[], None]:
    flat = hidden.detach().view(-1, hidden.shape[-1])
    logits = flat.new_empty(CHUNK, VOCAB)
    gradient = torch.empty_like(flat)

    def products() -> None:
        for start in range(0, len(flat), CHUNK):
            chunk = flat[start : start + CHUNK]
            torch.mm(chunk, head.weight.t(), out=logits[: len(chunk)])
            torch.mm(logits[: len(chunk)], head.weight, out=gradient[start : start + CHUNK])

    return products


def milliseconds(function: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def in_turn(functions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and least milliseconds of `repeats` rounds that run every function in turn, after two to warm up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            taken = milliseconds(function)
            if turn >= 2:
                times[name].append(taken)
    return {name: {"median_ms": statistics.median(each), "min_ms": min(each)} for name, each in times.items()}


def peak_mib(function: Callable[[], Any]) -> float:
    """Memory that a call takes at most beyond what was there before it, its results included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def exact(hidden: Tensor, labels: Tensor, head: nn.Linear) -> tuple[float, Tensor]:
    """Mean loss and its gradient [batch, seq, hidden] in float64, a row of the batch at a time."""
    count, total = int((labels[:, 1:] != -100).sum()), 0.0
    gradient = torch.zeros_like(hidden, dtype=torch.float64)
    weight = head.weight.double()
    for row, targets in enumerate(labels[:, 1:]):
        for start in range(0, len(targets), CHUNK):
            at = slice(start, min(start + CHUNK, len(targets)))
            wide = hidden[row, at].detach().double().requires_grad_()
            loss = functional.cross_entropy(wide @ weight.T, targets[at], reduction="sum") / count
            (gradient[row, at],) = torch.autograd.grad(loss, wide)
            total += float(loss.detach())
    return total, gradient


def kernel_alone(repeats: int) -> dict[str, Any]:
    logits = torch.randn(CHUNK, VOCAB, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, VOCAB, (CHUNK,), device="cuda")
    target = torch.empty_like(logits)
    times = in_turn(
        {
            "loss and gradient": lambda: cross_entropy_(logits, targets, True),
            "loss": lambda: cross_entropy_(logits, targets, False),
            "copy": lambda: target.copy_(logits),
        },
        5 * repeats,
    )
    size = logits.numel() * logits.element_size()
    return {
        "rows": CHUNK,
        "vocab": VOCAB,
        **times,
        "copy_gb_per_s": 2 * size / times["copy"]["median_ms"] / 1e6,
        # One reading and one writing: what the second reading costs beyond the cache counts as loss of rate.
        "kernel_gb_per_s": 2 * size / times["loss and gradient"]["median_ms"] / 1e6,
    }


def versions() -> dict[str, str]:
    packages = ["torch", "triton", "liger-kernel", "cut-cross-entropy"]
    found = {
        name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name.replace("-", "_"))
    }
    return {"python": platform.python_version(), **found}


def commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="positions, in rows of 2048 (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=10, help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the JSON goes")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU")

    rows = []
    print(f"{'head':>14} {'what':>18} {'ms':>9} {'of limit':>9} {'peak MiB':>9} {'loss error':>11} {'grad error':>11}")
    for model, width in HEADS:
        torch.manual_seed(0)
        seq = min(2048, arguments.tokens)
        shape = (arguments.tokens // seq, seq, width)
        hidden = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(0, VOCAB, shape[:2], device="cuda")
        head = nn.Linear(width, VOCAB, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
        nn.init.normal_(head.weight, std=0.02)
        steps = candidates(hidden, labels, head)
        products = limit(hidden, head)
        times = in_turn({**steps, "limit": products}, arguments.repeats)
        want_loss, want_gradient = exact(hidden, labels, head)
        for name, step in steps.items():
            loss, gradient = step()
            error = float((gradient.double() - want_gradient).norm() / want_gradient.norm())
            del gradient
            row = {
                "model": model,
                "hidden": width,
                "vocab": VOCAB,
                "tokens": shape[0] * shape[1],
                "what": name,
                **times[name],
                "over_limit": times[name]["median_ms"] / times["limit"]["median_ms"],
                "peak_mib": peak_mib(step),
                "loss_error": abs(float(loss) - want_loss) / want_loss,
                "gradient_error": error,
            }
            rows.append(row)
            print(
                f"{model:>14} {name:>18} {row['median_ms']:9.2f} {row['over_limit']:9.3f} {row['peak_mib']:9.0f}"
                f" {row['loss_error']:11.1e} {row['gradient_error']:11.1e}"
            )
        rows.append({"model": model, "hidden": width, "vocab": VOCAB, "what": "limit", **times["limit"]})
        print(f"{model:>14} {'limit':>18} {times['limit']['median_ms']:9.2f}")
        del hidden, head, steps, products, want_gradient

    kernel = kernel_alone(arguments.repeats)
    print(f"ce: {kernel['kernel_gb_per_s']:.0f} GB/s read once and written, copy {kernel['copy_gb_per_s']:.0f} GB/s")
    if arguments.json is not None:
        report = {
            "command": shlex.join(["python", *sys.argv]),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "rows": rows,
            "kernel": kernel,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
