"""One system in one setting, in a process of its own; end_to_end.py starts it.

    python benchmarks/peers/worker.py JOB OUT [--profile FILE]

JOB is `systems.Job` as JSON. OUT becomes a JSON object with its `status`: "measured", "skipped" (the system is not
installed here) or "out_of_memory"; any other failure ends the process with its traceback.

It has a folder of its own because Python looks for modules beside a script first, and `benchmarks/kernels` would be
taken for the package of that name, which the peers look for.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import re
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from systems import Job, Training
    from torch import Tensor, nn

# What a system needs beyond Transformers. Imported before torch and Transformers, as Unsloth wants it.
PACKAGES: dict[str, tuple[str, ...]] = {
    "fourfold": ("fourfold",),
    "fourfold-generic": ("fourfold",),
    "unsloth": ("unsloth",),
    "peft-bnb": ("bitsandbytes", "peft"),
    "peft-bnb-liger": ("liger_kernel", "bitsandbytes", "peft"),
}
# Uniform within this of zero: an adapter's product is then about 3% of its layer's output.
START_OF_B = 0.03
VERSIONS = ("torch", "triton", "transformers", "peft", "bitsandbytes", "trl", "unsloth", "unsloth_zoo", "liger_kernel")


def measure(job: Job, profile_to: Path | None) -> dict[str, Any]:
    import torch
    from systems import SYSTEMS, trainable

    on_gpu = job.device == "cuda"
    torch.manual_seed(0)
    start = time.perf_counter()
    adapt = SYSTEMS[job.system](job)
    wait(job)
    result: dict[str, Any] = {"load_seconds": time.perf_counter() - start}
    training = adapt()
    training.model.train()
    result["num_alike"] = start_alike(training.model)
    result["num_trainable"] = sum(parameter.numel() for parameter in trainable(training.model))
    ids = token_ids(job, training.model.config.vocab_size)
    times, losses = [], []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(job.warm_up + job.steps):
        wait(job)
        start = time.perf_counter()
        loss = step(training, ids)
        wait(job)
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
    if on_gpu:
        # Before the profiler, whose buffers are no part of training.
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    if profile_to is not None:
        profile_to.write_text(profile(training, ids, job))
    return result | {"losses": losses, "warm_up_seconds": times[: job.warm_up], "step_seconds": times[job.warm_up :]}


def step(training: Training, ids: Tensor) -> Tensor:
    loss = training.loss(ids)
    loss.backward()
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def wait(job: Job) -> None:
    import torch

    if job.device == "cuda":
        torch.cuda.synchronize()


def token_ids(job: Job, vocab_size: int) -> Tensor:
    """[batch, seq], the same in every process; the same batch each step, so that there is something to learn."""
    import torch

    generator = torch.Generator().manual_seed(1)
    return torch.randint(10, min(49000, vocab_size), (job.batch, job.seq), generator=generator).to(job.device)


def start_alike(model: nn.Module) -> int:
    """Give every A and B the numbers that its layer's name stands for, the same in every system, and count the As.

    A has PEFT's own distribution, which is torch's for a linear layer. B is as if it had been trained for a while. From
    B = 0, a system that adds an adapter's product to a layer's output which is rounded already loses what is less than
    half a unit in the last place of that output, and its losses fall later than those of the others (docs/numbers.md).
    """
    import torch

    count = 0
    for name, parameter in model.named_parameters():
        place = re.search(r"layers\.(\d+)\.(?:\w+\.)*(\w+)\.(lora_[AB])\.", name)
        if place is None:
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(".".join(place.groups()).encode()))
        is_a = place.group(3) == "lora_A"
        bound = parameter.shape[-1] ** -0.5 if is_a else START_OF_B
        parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
        count += is_a
    return count


def profile(training: Training, ids: Tensor, job: Job) -> str:
    """One step by PyTorch's profiler: kernels by the time they take, and how often each was launched."""
    import torch
    from torch.profiler import ProfilerActivity

    on_gpu = job.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with torch.profiler.profile(activities=activities) as trace:
        step(training, ids)
        wait(job)
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    kernels: dict[str, list[float]] = {}
    for event in trace.events():
        if event.device_type == wanted:
            entry = kernels.setdefault(event.name[:120], [0, 0.0])
            entry[0] += 1
            entry[1] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(microseconds for _, microseconds in kernels.values())
    launches = sum(count for count, _ in kernels.values())
    lines = [f"{job.system} {job.batch}x{job.seq}: {total / 1e3:.1f} ms in {launches:.0f} launches"]
    lines += [
        f"{microseconds / 1e3:9.2f} ms {count:6.0f}  {name}"
        for name, (count, microseconds) in sorted(kernels.items(), key=lambda item: -item[1][1])[:60]
    ]
    return "\n".join(lines) + "\n"


def installed_versions() -> dict[str, str]:
    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def run(values: dict[str, Any], profile_to: Path | None) -> dict[str, Any]:
    for package in PACKAGES[values["system"]]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return {"status": "skipped", "reason": f"{package}: {error}"}
    import torch
    from systems import Job

    job = Job(**values)
    about = {
        "versions": installed_versions(),
        "device": torch.cuda.get_device_name() if job.device == "cuda" else "CPU",
    }
    try:
        return {"status": "measured", **about, **measure(job, profile_to)}
    except torch.OutOfMemoryError as error:
        return {"status": "out_of_memory", "reason": str(error).splitlines()[0], **about}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=json.loads)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", type=Path)
    args = parser.parse_args()
    args.out.write_text(json.dumps(run(args.job, args.profile)))


if __name__ == "__main__":
    main()
