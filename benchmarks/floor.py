"""The floor of a QLoRA step: the products with the base weights and attention alone, in 16 bits, on random data.

    python benchmarks/floor.py MODEL --batch 4 --seq 2048 [--kinds none selective mlp full all] [--out FILE]

MODEL is a folder with a Llama's config.json. A step is, in this order: the forward pass of every layer, the LM head
with its input's gradient, and from the last layer to the first what is computed again, attention's backward pass and
the products of the gradient with the weights (frozen weights have no gradient of their own). Nothing else is counted:
no dequantization, adapter, norm, rotation, activation, loss or optimizer, so that a step can come near it and never
below.
Attention is cuDNN's on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# kind -> (the products that the backward pass computes again, whether attention too)
KINDS: dict[str, tuple[tuple[str, ...], bool]] = {
    "none": ((), False),
    "mlp": (("gate", "up"), False),
    "selective": (("q", "k", "v", "gate", "up"), False),
    "full": (("q", "k", "v", "o", "gate", "up"), True),
    "all": (("q", "k", "v", "o", "gate", "up", "down"), True),
}
# Weights of so many layers take turns, so that none waits in the cache for its next use.
DISTINCT_LAYERS = 4
HEAD_CHUNK = 1024


class Step:
    """The operands of a step, and its parts.

    Args:
        config: A Llama's config.json.
        dtype: 16 bits on a GPU.
    """

    def __init__(self, config: dict[str, Any], batch: int, seq: int, device: str, dtype: torch.dtype) -> None:
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        attended, kv = heads * head_dim, kv_heads * head_dim
        self.num_layers: int = config["num_hidden_layers"]
        shapes = {
            "q": (attended, hidden),
            "k": (kv, hidden),
            "v": (kv, hidden),
            "o": (hidden, attended),
            "gate": (inner, hidden),
            "up": (inner, hidden),
            "down": (hidden, inner),
        }

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        self.layers = [
            {name: random(*shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
            for _ in range(min(DISTINCT_LAYERS, self.num_layers))
        ]
        self.head = random(config["vocab_size"], hidden) * hidden**-0.5
        self.by_width = {width: random(batch * seq, width) for width in {hidden, inner, attended, kv}}
        self.qkv = [random(batch, count, seq, head_dim).requires_grad_() for count in (heads, kv_heads, kv_heads)]
        self.is_on_gpu = device == "cuda"
        self.attended = self.attention()
        self.grad = torch.randn_like(self.attended)
        self.hidden = hidden

    def attention(self) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if self.is_on_gpu else contextlib.nullcontext():
            return scaled_dot_product_attention(*self.qkv, is_causal=True, enable_gqa=True)

    def attention_backward(self) -> None:
        torch.autograd.grad(self.attended, self.qkv, self.grad, retain_graph=True)

    @torch.no_grad()
    def products(self, layer: int, names: tuple[str, ...]) -> None:
        weights = self.layers[layer % len(self.layers)]
        for name in names:
            torch.mm(self.by_width[weights[name].shape[1]], weights[name].t())

    @torch.no_grad()
    def gradients(self, layer: int) -> None:
        for weight in self.layers[layer % len(self.layers)].values():
            torch.mm(self.by_width[weight.shape[0]], weight)

    @torch.no_grad()
    def lm_head(self) -> None:
        for chunk in self.by_width[self.hidden].split(HEAD_CHUNK):
            torch.mm(torch.mm(chunk, self.head.t()), self.head)

    def run(self, kind: str) -> None:
        again, attention_again = KINDS[kind]
        for layer in range(self.num_layers):
            self.products(layer, tuple(self.layers[0]))
            self.attention()
        self.lm_head()
        for layer in reversed(range(self.num_layers)):
            self.products(layer, again)
            if attention_again:
                self.attention()
            self.attention_backward()
            self.gradients(layer)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(run: Callable[[], None], device: str, least: float, runs: int) -> list[float]:
    """Seconds of at least `runs` runs, and of as many as fill `least` seconds."""
    times: list[float] = []
    while len(times) < runs or sum(times) < least:
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - start)
    return times


def seconds(run: Callable[[], None], device: str, least: float = 3.0, runs: int = 3) -> float:
    """Median of runs that fill `least` seconds, after two thirds as long that are not counted.

    A GPU that meets its power limit gets slower in its first seconds, and training steps are measured after some that
    are not counted, too.
    """
    timed(run, device, least * 2 / 3, 1)
    return statistics.median(timed(run, device, least, runs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    config = json.loads((args.model / "config.json").read_text())
    dtype, least = (torch.bfloat16, 3.0) if args.device == "cuda" else (torch.float32, 0.0)
    step = Step(config, args.batch, args.seq, args.device, dtype)
    floors = {}
    for kind in args.kinds:
        floors[kind] = seconds(lambda kind=kind: step.run(kind), args.device, least)
        print(f"{kind:10} {floors[kind]:.4f} s  {args.batch * args.seq / floors[kind]:,.0f} tokens/s", flush=True)
    if args.out:
        args.out.write_text(json.dumps(floors))


if __name__ == "__main__":
    main()
