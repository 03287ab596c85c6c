"""Tokens a second of the fused step over a model of Llama-3-8B's shape, and the time of a prompt.

    python benchmarks/decode.py [--shape 8b] [--rows 1 8 32 64] [--json benchmarks/results/decode.json]
    python benchmarks/decode.py --shape tiny     the same on a CPU, where nothing is measured

Weights are random NF4 with double quantization, made on the spot, with an adapter of rank 16 on all linear layers.
Rows have 512 tokens in a cache of 1,024; a pass is a CUDA graph, its most likely token goes into the next. A prompt of
1,000 tokens, as a CUDA graph and without, is held against the same prompt in a bf16 model of Transformers. Beside each
figure stands what reading the weights once takes at the bandwidth of a copy. Logits are held against Transformers'
forward pass of the same quantized model, those of a replayed prompt against the pass's own. What fails is printed, and
leaves the rest alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from distributed import SHAPES, Drawn, empty_model
from fourfold.inference.decode_graphs import GraphedStep
from fourfold.kernels import decode_attention_triton, decode_linear_triton, decode_norm_triton
from fourfold.models.decoding import FusedStep
from fourfold.quantization.linear import QuantizedLinear
from memory import about

LENGTH, CONTEXT, PROMPT = 1024, 512, 1000
BF16 = torch.bfloat16
MODULES = (decode_attention_triton, decode_linear_triton, decode_norm_triton)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copies() -> None:
        for _ in range(10):
            target.copy_(source)

    return 20 * source.numel() / seconds(copies)


def weight_bytes(model: PeftModel) -> int:
    """What a pass of a few rows must read: all but the embedding."""
    base = model.get_base_model()
    quantized = sum(each.quantized.num_bytes for each in base.modules() if isinstance(each, QuantizedLinear))
    return quantized + base.get_output_embeddings().weight.nbytes


def empty_cache(step: FusedStep, rows: int, device: torch.device) -> Any:
    def held() -> list[torch.Tensor]:
        return [
            torch.randn(rows, heads, LENGTH, dim, device=device).to(step.dtype) * 0.1 for heads, dim, _ in step.layers
        ]

    return SimpleNamespace(keys=held(), values=held(), version=0)


def decoding(step: FusedStep, rows: int, adapter: str | None, device: torch.device, passes: int = 64) -> float:
    """Seconds of a pass."""
    graphed, cache = GraphedStep(step), empty_cache(step, rows, device)
    slots = torch.arange(rows, device=device)
    state = {"tokens": torch.randint(step.vocab_size, (rows,), device=device)}

    def run() -> None:
        positions = torch.full((rows,), CONTEXT, device=device)
        for _ in range(passes):
            state["tokens"] = graphed.decode(state["tokens"], slots, positions, cache, adapter).argmax(dim=-1)
            positions += 1

    return seconds(run) / passes


def profile(step: FusedStep, rows: int, device: torch.device) -> list[tuple[str, int, float]]:
    """Kernels of a pass over this many rows."""
    graphed, cache = GraphedStep(step), empty_cache(step, rows, device)
    inputs = [torch.arange(rows, device=device), torch.arange(rows, device=device)]
    inputs.append(torch.full((rows,), CONTEXT, device=device))
    return kernels(lambda: graphed.decode(*inputs, cache, None))


def kernels(call: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """What a call launches: name, launches, microseconds in all."""
    from torch.profiler import ProfilerActivity

    call()
    wait()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        call()
        wait()
    launches, times = Counter[str](), Counter[str]()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            launches[event.name] += 1
            times[event.name] += event.time_range.elapsed_us()
    return [(name[:60], launches[name], float(us)) for name, us in times.most_common(14)]


def agreement(model: PeftModel, step: FusedStep, device: torch.device) -> dict[str, float]:
    """Relative distance of logits from Transformers' forward pass of the same model, prompt and three tokens."""
    model.eval()
    ids = torch.randint(step.vocab_size, (40,), device=device)
    found = {}
    for adapter in (None, "default"):
        cache, slot = empty_cache(step, 2, device), torch.ones(1, dtype=torch.int64, device=device)
        ours = [step.prefill(1, ids[:37], cache, adapter)]
        for position in (37, 38, 39):
            where = torch.full((1,), position, device=device)
            ours.append(step.decode(ids[position : position + 1], slot, where, cache, adapter)[0])
        with torch.no_grad():
            if adapter is None:
                with model.disable_adapter():
                    theirs = model(input_ids=ids[None], use_cache=False).logits[0, -4:]
            else:
                theirs = model(input_ids=ids[None], use_cache=False).logits[0, -4:]
        mine = torch.stack(ours).double()
        found[str(adapter)] = float((mine - theirs.double()).norm() / theirs.double().norm())
    return found


def dense_prefill(shape: str, device: torch.device) -> float:
    """Seconds of the prompt in a bf16 model of Transformers, logits of its last token."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=BF16)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    Drawn(device, BF16).fill(model)
    ids = torch.randint(config.vocab_size, (1, PROMPT), device=device)
    model.eval()
    with torch.no_grad():
        return seconds(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1))


def fused_prefill(step: FusedStep, adapter: str | None, device: torch.device) -> float:
    cache, ids = empty_cache(step, 1, device), torch.randint(step.vocab_size, (PROMPT,), device=device)
    return seconds(lambda: step.prefill(0, ids, cache, adapter))


def replayed(step: FusedStep, adapter: str | None, device: torch.device) -> tuple[Callable[[], torch.Tensor], Any]:
    """The prompt by a graph that is there already, and the same without one."""
    graphed, cache = GraphedStep(step), empty_cache(step, 1, device)
    ids = torch.randint(step.vocab_size, (PROMPT,), device=device)
    for _ in range(2):  # a length is captured when it comes for the second time
        graphed.prefill(0, ids, cache, adapter)
    return partial(graphed.prefill, 0, ids, cache, adapter), partial(step.prefill, 0, ids, cache, adapter)


def replayed_prefill(step: FusedStep, adapter: str | None, device: torch.device) -> float:
    return seconds(replayed(step, adapter, device)[0])


def replayed_distance(step: FusedStep, device: torch.device) -> dict[str, float]:
    """Relative distance of a replayed prompt's logits from those of the pass."""
    found = {}
    for adapter in (None, "default"):
        ours, plain = (call().double() for call in replayed(step, adapter, device))
        found[str(adapter)] = float((ours - plain).norm() / plain.norm())
    return found


def changed(part: str) -> Callable[[], None]:
    """Changes a part of the kernels; the function returned changes it back."""
    held, lookup = [(module, module.launches_early) for module in MODULES], decode_linear_triton.LOOKUP
    if part == "no early launch":
        for module in MODULES:
            module.launches_early = lambda _device: False
    elif part == "shuffles":
        decode_linear_triton.LOOKUP = "shuffle"

    def back() -> None:
        decode_linear_triton.LOOKUP = lookup
        for module, function in held:
            module.launches_early = function

    return back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "1b", "8b"], default="8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--profile", type=int, nargs="*", default=[1], help="rows whose pass is profiled")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    bandwidth = copy_bandwidth(device)
    model = empty_model(args.shape, BF16, False, device)
    Drawn(device, BF16).fill(model)
    model.eval()
    step = FusedStep(model)
    read = weight_bytes(model) / bandwidth
    record: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "read_seconds": read, "rows": [], "failed": []}

    def attempt(name: str, call: Callable[[], Any]) -> Any:
        try:
            result = call()
        except Exception as error:
            traceback.print_exc()
            record["failed"].append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            return None
        print(f"{name}: {result}", flush=True)
        return result

    def write() -> None:
        """After each measurement: a run that is cut short leaves what it has."""
        if args.json:
            args.json.write_text(json.dumps({"about": about("benchmarks/decode.py"), **record}, indent=1) + "\n")

    print(f"kernels serve: {step._view(None)[0].served}; model made in {time.perf_counter() - start:.0f} s", flush=True)
    record["agreement"] = attempt("distance from Transformers", partial(agreement, model, step, device))
    cases = [(rows, adapter, "") for rows in args.rows for adapter in (None, "default")]
    if device.type == "cuda":
        cases += [(rows, None, "no early launch") for rows in args.rows]
        cases += [(1, None, "shuffles")] if 1 in args.rows else []
    for rows, adapter, part in cases:
        back = changed(part)
        took = attempt(f"{rows} rows, {adapter or 'base'} {part}", partial(decoding, step, rows, adapter, device))
        back()
        if took is not None:
            record["rows"].append({"rows": rows, "adapter": adapter, "changed": part, "seconds": took})
        write()
    record["replayed"] = attempt("distance of a replayed prompt", partial(replayed_distance, step, device))
    prompts = {
        "prefill": partial(fused_prefill, step, None, device),
        "prefill with adapter": partial(fused_prefill, step, "default", device),
        "replayed prefill": partial(replayed_prefill, step, None, device),
        "replayed prefill with adapter": partial(replayed_prefill, step, "default", device),
        "prefill in bf16": partial(dense_prefill, args.shape, device),
    }
    for name, call in prompts.items():
        record[name] = attempt(f"{PROMPT} tokens, {name}", call)
        write()
    if device.type == "cuda":
        profiled = {f"{rows} rows": partial(profile, step, rows, device) for rows in args.profile}
        for adapter in (None, "default") if args.profile else ():
            call = partial(lambda adapter: kernels(replayed(step, adapter, device)[0]), adapter)
            profiled[f"a replayed prompt, {adapter or 'base'}"] = call
        for name, call in profiled.items():
            record[f"profile {name}"] = found = attempt(f"profile, {name}", call)
            for name, count, us in found or ():
                print(f"  {us:9.1f} us {count:5} {name}")
    write()
    print(f"\ncopy {bandwidth / 1e12:.2f} TB/s; reading the weights once {read * 1e3:.2f} ms; ", end="")
    print(f"{time.perf_counter() - start:.0f} s in all")
    for row in record["rows"]:
        each, part = row["seconds"], f", {row['changed']}" if row["changed"] else ""
        name = f"{row['rows']} rows, {row['adapter'] or 'base'}{part}"
        print(
            f"{name:48} {each * 1e3:7.3f} ms a pass {row['rows'] / each:9.0f} tokens/s  limit / pass {read / each:.0%}"
        )
    for name in prompts:
        if record[name] is not None:
            beside = f", {record[name] / record['prefill in bf16']:.2f} times bf16" if record["prefill in bf16"] else ""
            print(f"{PROMPT} tokens, {name}: {record[name] * 1e3:.1f} ms{beside}")
    for failure in record["failed"]:
        print(f"FAILED {failure}")


if __name__ == "__main__":
    main()
