"""Launches every Triton kernel a few times at odd shapes, for compute-sanitizer: it looks, nothing is compared.

    python tests/kernels/sanitized.py    # compiles all there is to compile; without a GPU, kernels are interpreted
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 python tests/kernels/sanitized.py
    compute-sanitizer --tool racecheck --report-api-errors no --error-exitcode 9 \
        $(python tests/kernels/sanitized.py --filters) python tests/kernels/sanitized.py --apart

Without the caching allocator each tensor is an allocation of its own, so that a byte beyond its end is noticed. The
device is waited for after each family of kernels: what is reported after a family's name is that family's. API errors
are left out because PyTorch asks CUDA for what it may not have, and the hazards of other libraries' kernels because
they are not ours. Racecheck fails at PyTorch's attention with an internal error, also where it is told to leave it
alone, so it gets our kernels apart from the blocks that launch them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Triton reads it when a kernel is defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
from few_rows import parts

import fourfold.kernels
from fourfold.kernels import (
    angles_triton,
    blockwise_triton,
    cross_entropy_triton,
    decode_attention_triton,
    decode_linear_triton,
    decode_norm_triton,
    encoding_triton,
    expansion_triton,
    grad_a_triton,
    group_expansion_triton,
    low_rank_beside_triton,
    low_rank_pair_triton,
    norm_triton,
    optimizer_triton,
    rotary_triton,
    small_batch_hopper_triton,
    small_batch_tiles,
    small_batch_triton,
    swiglu_low_rank_triton,
    swiglu_triton,
)
from fourfold.kernels.decode_tiles import Tile
from fourfold.kernels.low_rank import new_extended
from fourfold.kernels.optimizer_state import Entry, Hyperparameters, lay_out
from fourfold.kernels.swiglu import ACTIVATIONS
from fourfold.optimizers.maps import state_maps
from fourfold.quantization.formats import FORMATS
from fourfold.quantization.scales import NestedScales
from fourfold.quantization.tensor import QuantizedTensor, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """An allocation of its own, whose rows follow each other without a gap."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def quantized(
    shape: tuple[int, ...], format: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> tuple[QuantizedTensor, Tensor, blockwise_triton.NestedParts | None]:
    """A weight, its scales as a kernel reads them, and what quantized scales are decoded with."""
    weight = quantize(torch.randn(shape), format, block_size, double_quant).to(DEVICE)
    scales = weight.scales
    if isinstance(scales, NestedScales):
        parts = (scales.code_map, scales.nested_absmax, scales.offset, scales.nested_block_size)
        return weight, scales.codes, blockwise_triton.NestedParts(*parts)
    return weight, scales.dequantize(), None


def dequantize() -> None:
    """Rows of whole words and of odd lengths, the last tile short; codes that begin between two words."""
    for format, shape, double_quant in (
        ("nf4", (33, 257), True),
        ("fp4", (41, 200), False),
        ("int8", (33, 257), False),
        ("int8", (41, 100), True),
    ):
        weight, scales, nested = quantized(shape, format, double_quant=double_quant)
        arguments = (weight.codebook, scales, weight.block_size, list(shape), torch.float16, nested)
        blockwise_triton.dequantize(weight.codes, *arguments)
        shifted = torch.cat([weight.codes[:1], weight.codes])[1:]
        blockwise_triton.dequantize(shifted, *arguments)
    # Whole tiles alone.
    for double_quant in (True, False):
        weight, scales, nested = quantized((6, 1024), double_quant=double_quant)
        blockwise_triton.dequantize(weight.codes, weight.codebook, scales, 64, [6, 1024], torch.float16, nested)


def encode() -> None:
    for format, size, block_size in (("nf4", 4097, 64), ("fp4", 1, 64), ("int8", 9001, 4096)):
        number_format, flat = FORMATS[format], random(size)
        order = number_format.sorted_values(DEVICE)[1]
        encoding_triton.quantize(flat, number_format.thresholds(DEVICE), order, block_size)


def expand() -> None:
    """Several linears in one matrix: rows of several tiles, of whole words, and odd ones; ranks that fill nothing."""
    for columns, format, double_quant, linears in (
        (4104, "nf4", True, [(3, 5)]),
        (520, "nf4", True, [(24, 16), (9, 7)]),
        (101, "int8", False, [(7, 3), (9, None)]),
    ):
        total_rows, used_ranks = sum(rows for rows, _ in linears), sum(rank or 0 for _, rank in linears)
        padded_ranks = -(-used_ranks // 16) * 16
        out = torch.empty(total_rows + padded_ranks, columns + padded_ranks, dtype=torch.float16, device=DEVICE)
        row = rank_row = 0
        for rows, rank in linears:
            weight, scales, nested = quantized((rows, columns), format, double_quant=double_quant)
            a, b = (None, None) if rank is None else (random(rank, columns), random(rows, rank))
            place = (rows, columns, row, total_rows, used_ranks, rank_row, a, b, 0.5)
            expansion_triton.expand_(out, weight.codes, weight.codebook, scales, weight.block_size, nested, *place)
            row, rank_row = row + rows, rank_row + (rank or 0)


def expand_groups() -> None:
    """Three linears, two and one, in a launch each; rows that end within a run of words; ranks that fill nothing."""
    for columns, double_quant, linears in (
        (1024, True, [(6, 5), (2, None), (4, 7)]),
        (1536, False, [(4, 3), (8, 16)]),
        (2048, True, [(3, None)]),
    ):
        padded_ranks = -(-sum(rank or 0 for _, rank in linears) // 16) * 16
        out = new_extended(random(1), sum(rows for rows, _ in linears) + padded_ranks, columns, padded_ranks)
        members = [quantized((rows, columns), double_quant=double_quant) for rows, _ in linears]
        weight, _, nested = members[0]
        own = [[None if part is None else part[index] for _, _, part in members] for index in (1, 2)]
        sizes = (weight.block_size, 1 if nested is None else nested.block_size, [rows for rows, _ in linears], columns)
        assert group_expansion_triton.takes(
            out, [one.codes for one, _, _ in members], weight.codebook, 64, None if nested is None else 256, *sizes[2:]
        )
        group_expansion_triton.expand_group_(
            *(out, [one.codes for one, _, _ in members], weight.codebook, [scales for _, scales, _ in members]),
            *(None if nested is None else nested.code_map, *own, *sizes),
            [None if rank is None else random(rank, columns) for _, rank in linears],
            [None if rank is None else random(rows, rank) for rows, rank in linears],
            [0.5] * len(linears),
        )


def few_rows() -> None:
    """Every tile, none of them full; columns shared among warps, and in some among programs; scales, too, or not."""
    for tile, inputs, rows, columns, block_size in (
        (0, 1, 75, 64, 64),
        (1, 7, 21, 8192, 64),
        (2, 13, 41, 320, 64),
        (3, 11, 37, 4160, 128),
        (4, 31, 131, 192, 64),
        (5, 17, 133, 2112, 64),
        (6, 33, 41, 1088, 128),
        (6, 63, 37, 2048, 128),
    ):
        weight, _, _ = quantized((rows, columns), block_size=block_size, double_quant=inputs % 4 == 3)
        x, bias = random(inputs, columns), random(rows)
        small_batch_triton.matmul(x, *parts(weight), bias, small_batch_tiles.TILES[tile])


def few_rows_on_hopper() -> None:
    """Every tile, not full; the last tile of W short; columns shared among programs, and not."""
    for inputs, rows, columns, double_quant in ((13, 41, 256, True), (31, 131, 768, False), (63, 37, 2048, True)):
        weight, _, _ = quantized((rows, columns), double_quant=double_quant)
        small_batch_hopper_triton.matmul(random(inputs, columns), *parts(weight), random(rows))


def decode_linears() -> None:
    """Members that end within a tile, warps without columns; scales and low-rank columns, too, or not; gated."""
    for inputs, rows, columns, double_quant, gated, tiles in (
        (1, (37, 12, 21), 192, True, False, 0),
        (13, (41,), 2112, False, False, 0),
        (5, (21, 21), 320, True, True, 0),
        # Columns that tell blocks apart: all spans held, some of them without columns; one asked for ahead, gated; with
        # scales that are kept and such that are not; tiles of rows in turn.
        (2, (40, 12, 20), 384, True, False, 0),
        (1, (36,), 5888, True, False, 0),
        (1, (36,), 4224, True, False, 0),
        (1, (20, 20), 4224, False, True, 0),
        (2, (72, 28, 12), 1536, True, False, 3),
        (1, (72, 72), 1024, True, True, 2),
    ):
        weights = [quantized((count, columns), double_quant=double_quant)[0] for count in rows]
        given = [parts(weight) for weight in weights]
        codes, scales, absmax, offsets = ([each[index] for each in given] for index in (0, 2, 4, 5))
        nested = (absmax, offsets, 256) if double_quant else ([], [], 1)
        total = sum(rows)
        residual = None if gated else random(inputs, total)
        low, up = random(inputs, 16 * len(rows)), random(total, 16)
        decode_linear_triton.decode_linear(
            *(random(inputs, columns), codes, weights[0].codebook, scales, given[0][3], *nested, rows),
            *(random(total), residual, low, up, "silu" if gated else "", 1.0, 1.0, torch.float16),
            tile=Tile(8, 16, 1, 4, tiles=tiles) if tiles else None,
        )


def decode_attention() -> None:
    """The first and the last place of a slot, and between; parts without keys; windows, norms and rotation, or not."""
    for rows, heads, kv_heads, head_dim, window, plain in ((3, 4, 2, 32, None, False), (2, 3, 1, 16, 70, True)):
        keys, values = random(3, kv_heads, 130, head_dim), random(3, kv_heads, 130, head_dim)
        angles = (None, None) if plain else (random(rows, head_dim), random(rows, head_dim))
        norms = (None, None) if plain else (random(head_dim), random(head_dim))
        slots, positions = [2, 0, 1][:rows], [129, 0, 70][:rows]
        places = (torch.tensor(slots, device=DEVICE), torch.tensor(positions, device=DEVICE))
        decode_attention_triton.decode_attention_(
            *(random(rows, (heads + 2 * kv_heads) * head_dim), *angles, keys, values, *places),
            *(head_dim**-0.5, window, *norms, 1e-6, plain, 64),
        )


def decode_norms() -> None:
    for rows, width, rank in ((3, 72, 0), (2, 4099, 5)):
        x, lora_a = random(rows, width), random(rank, width) if rank else None
        decode_norm_triton.decode_norm(x, random(width), 1e-6, lora_a)
        decode_norm_triton.low_products(x, random(3, width), 2.0, torch.float16)


def norm() -> None:
    for rows, width, rank in ((7, 72, 16), (3, 4099, 0)):
        x, grad, weight = random(rows, width), random(rows, width), random(width)
        rstd = norm_triton.rms_norm(x, weight, 1e-6, rank)[1]
        residual_grad = random(rows, width) if rank else None
        norm_triton.rms_norm(x, weight, 1e-6, 0, random(rows, width), torch.empty_like(x) if rank else None)
        norm_triton.rms_norm_backward(grad, x, weight, rstd, residual_grad, torch.empty_like(x))


def low_rank() -> None:
    """One layer and three; columns that fill no tile; shares without rows, and the last tile of rows short."""
    tile = low_rank_pair_triton.SMALL
    for rows, width, rank, begins in ((33, 300, 5, ()), (77, 1280, 3, (512, 768))):
        ranks = rank * (len(begins) + 1)
        extended = random(rows, width + ranks)
        low_rank_pair_triton.low_rank_pair_(
            extended, width, random(width, ranks).t(), random(rows, ranks), begins, [0.3] * (len(begins) + 1), tile
        )
        x, grad_low, rstd = random(rows, width), random(rows, ranks), random(rows, dtype=torch.float32)
        sums = grad_a_triton.grad_a(grad_low, x, tile=grad_a_triton.SMALL)
        grad_a_triton.grad_a(grad_low, x, rstd, random(width), sums, grad_a_triton.SMALL)


def low_rank_beside() -> None:
    """Rows and columns that fill no tile."""
    for rows, width, rank, tile in (
        (33, 300, 5, low_rank_beside_triton.SHORT),
        (77, 520, 48, low_rank_beside_triton.TALL),
    ):
        x, projection, extended = random(rows, width), random(rank, width), random(rows, width + rank)
        for in_place in (False, True):
            low_rank_beside_triton.low_rank_beside(x, projection, extended, tile, in_place=in_place)
            x = extended[:, :width]


def rotary() -> None:
    """Rotated wholly, in part and not at all; with norms of the heads and without; over the input and beside it."""
    for heads, head_dim, rotary_dim, has_norms in (
        ((3, 1), 24, 24, False),
        ((3, 1), 24, 24, True),
        ((6, 2), 96, 48, True),
        ((5, 1), 40, 0, False),
    ):
        positions, rows, width = 11, 33, (heads[0] + 2 * heads[1]) * head_dim
        qkv, bias = random(rows, width), random(width)
        cos, sin = (random(positions, rotary_dim), random(positions, rotary_dim)) if rotary_dim else (None, None)
        norms = (random(head_dim), random(head_dim)) if has_norms else (None, None)
        rotary_triton.rotary(qkv, cos, sin, *heads, bias, *norms, 1e-6)
        parts = [random(rows, count * head_dim) for count in (heads[0], heads[1], heads[1])]
        rotary_triton.rotary_backward(*parts, qkv if has_norms else None, cos, sin, *heads, bias, *norms, 1e-6, 16)
        if not has_norms:
            rotary_triton.rotary_(qkv, cos, sin, *heads, bias)
            rotary_triton.rotary_(qkv, cos, sin, *heads)
    for shape, half in (((2, 37), 20), ((1, 16), 64)):
        positions = torch.arange(shape[0] * shape[1], device=DEVICE).view(shape)
        angles_triton.rotary_angles(positions, random(half, dtype=torch.float32), 1.0, torch.float16)


def swiglu() -> None:
    for (rows, width, rank), activation in zip(((5, 33, 16), (7, 1025, 0)), ACTIVATIONS, strict=True):
        projection = random(rank, width) if rank else None
        swiglu_triton.swiglu(random(rows, 2 * width), projection, activation)
        both = random(rank, 2 * width) if rank else None
        swiglu_triton.swiglu_backward_(random(rows, 2 * width + rank), random(rows, width), both, activation)


def swiglu_sums() -> None:
    """Every tile, none of them full; columns in two shares, rows in two and four; each of the sums missing once."""
    for rows, width, rank in ((5, 33, 3), (3, 7171, 48)):
        swiglu_low_rank_triton.swiglu_product(random(rows, 2 * width), random(rank, width))
    tiles = (swiglu_low_rank_triton.SHORT, swiglu_low_rank_triton.LONG, swiglu_low_rank_triton.MANY_RANKS)
    for tile, rows, ranks in zip(tiles, (5, 261, 519), ((3, 0, 16), (0, 5, 17), (33, 16, 0)), strict=True):
        gate, up, down = ranks
        low, grad_low = (random(rows, rank) if rank else None for rank in (gate + up, down))
        width = 33
        sums = torch.zeros(sum(ranks) * width, device=DEVICE)
        arguments = (random(rows, 2 * width), random(rows, width), low, gate, grad_low, sums)
        for add in (False, True):
            swiglu_low_rank_triton.swiglu_backward_sums_(*arguments, add, tile=tile)


def cross_entropy() -> None:
    for vocab, gradient in ((9001, True), (8008, False)):
        targets = torch.tensor([0, -100, vocab - 1], device=DEVICE)
        cross_entropy_triton.cross_entropy_triton(random(3, vocab), targets, gradient)


def optimizer() -> None:
    """Whole chunks, a short last block, less than a block, and one without a gradient; the last set is aligned."""
    odd = [(16, 256), (3, 1111), (5,), (2101,)]
    for shapes, bits, dtype in ((odd, 8, torch.float32), (odd, 32, torch.float16), ([(16, 256)], 8, torch.float32)):
        entries = [Entry(random(*shape, dtype=dtype), 0, bits if shape != (5,) else 32) for shape in shapes]
        groups, loss = [Hyperparameters(1e-2, 0.9, 0.999, 1e-8, 0.1)], torch.ones((), device=DEVICE)
        for rule, paged in (("adamw", False), ("adamw", True), ("lion", False)):
            state = lay_out([entry._replace(paged=paged) for entry in entries], state_maps(DEVICE), rule, page_bytes=1)
            grads = [None if param.shape == (2101,) else torch.randn_like(param) for param in state.params]
            for _ in range(2):
                optimizer_triton.optimizer_step_triton(state, grads, groups, 1.0, loss)


def block(model_type: str, recompute: str) -> None:
    """Forward and backward pass of fused blocks as training calls them: on a CPU, by the references."""
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from transformers.models.auto import CONFIG_MAPPING

    from fourfold.models.preparing import prepare
    from fourfold.quantization.hf_config import FourfoldConfig
    from fourfold.quantization.hf_quantizer import quantize_model

    config = CONFIG_MAPPING[model_type](
        hidden_size=72,
        intermediate_size=108,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=24,
        vocab_size=97,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).to(DEVICE)
    lora = LoraConfig(r=5, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = prepare(
        quantize_model(model, FourfoldConfig()), lora, fused=True, recompute=recompute, cuda_graphs=False
    ).train()
    tokens = torch.randint(3, 97, (3, 11), device=DEVICE)
    # Flash attention, which is the reproducible one: cuDNN builds its kernels first, and they are not ours.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        adapted(input_ids=tokens, use_cache=False).logits.float().square().mean().backward()
    finally:
        torch.use_deterministic_algorithms(False)


FAMILIES: dict[str, Callable[[], None]] = {
    "dequantize": dequantize,
    "quantize": encode,
    "expand": expand,
    "expand groups": expand_groups,
    "few rows": few_rows,
    "few rows on Hopper": few_rows_on_hopper,
    "a decode step's linear layers": decode_linears,
    "a decode step's attention": decode_attention,
    "a decode step's norms": decode_norms,
    "norm": norm,
    "low rank": low_rank,
    "low rank beside": low_rank_beside,
    "rotary": rotary,
    "swiglu": swiglu,
    "swiglu's sums": swiglu_sums,
    "cross entropy": cross_entropy,
    "optimizers": optimizer,
}
BLOCKS: dict[str, Callable[[], None]] = {
    "Llama's block": lambda: block("llama", "selective"),
    "Qwen3's block": lambda: block("qwen3", "full"),
}


def kernels() -> dict[str, Any]:
    """Everything that is launched: of what `triton.jit` made in `X_triton.py`, all with a name that ends in _kernel."""
    found = {}
    for path in sorted(Path(fourfold.kernels.__path__[0]).glob("*_triton.py")):
        module = import_module(f"fourfold.kernels.{path.stem}")
        for name, made in vars(module).items():
            is_kernel = isinstance(made, triton.KernelInterface) and name.endswith("_kernel")
            if is_kernel and made.fn.__module__ == module.__name__:
                found[f"{path.stem}.{name}"] = made
    return found


def run(families: dict[str, Callable[[], None]]) -> None:
    """Launches the families, one after the other, and exits naming the kernels that none of them has launched."""
    launches = Counter[str]()

    def count(name: str) -> Callable[..., None]:
        return lambda *_, **__: launches.update([name])

    for name, kernel in kernels().items():
        kernel.add_pre_run_hook(count(name))
    torch.manual_seed(0)
    for family, launch in families.items():
        before = launches.total()
        print(f"{family}:", end=" ", flush=True)
        launch()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        print(f"{launches.total() - before} launches", flush=True)
    forgotten = [name for name in kernels() if not launches[name]]
    if forgotten:
        sys.exit(f"never launched: {', '.join(forgotten)}")
    print(f"all {len(launches)} kernels launched")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--filters", action="store_true", help="print the options that leave other kernels alone")
    parser.add_argument("--apart", action="store_true", help="launch all kernels, but no block that is made of them")
    arguments = parser.parse_args()
    if arguments.filters:
        print(*(f"--kernel-name kernel_substring={name.rpartition('.')[2]}" for name in kernels()))
    else:
        run(FAMILIES if arguments.apart else {**FAMILIES, **BLOCKS})


if __name__ == "__main__":
    main()
