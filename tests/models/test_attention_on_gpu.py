"""Every GPU kernel of the table against the reference in float64, on parts of one q, k, v buffer."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairwise
from torch import Tensor

from fourfold.models.attention import (
    ATTENTION,
    AttentionState,
    Documents,
    attention_backward,
    attention_forward,
)
from fourfold.models.attention_interface import attention

pytestmark = pytest.mark.gpu

BOUNDS = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 2e-5}
BATCH, LENGTH, SCALE = 2, 192, 0.11
PACKED = [0, 1, 130, 192, 255, 384]


def poison() -> None:
    """Leaves NaN in the memory that the next tensors are made of, so that what is not written shows."""
    blocks = [torch.full((1 << 20,), float("nan"), device="cuda") for _ in range(8)]
    blocks += [torch.full((1 << 16,), float("nan"), device="cuda") for _ in range(8)]
    del blocks


def make_qkv(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, length: int = LENGTH
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    buffer = torch.randn(BATCH, length, (heads + 2 * kv_heads) * head_dim, device="cuda", dtype=dtype)
    q, k, v = buffer.unflatten(-1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=2)
    return q, k, v, torch.randn(BATCH, length, heads, head_dim, device="cuda", dtype=dtype)


def both_ways(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, documents: Documents | None, window: int | None, backend: str | None
) -> tuple[list[Tensor], AttentionState]:
    poison()
    out, state = attention_forward(q, k, v, scale=SCALE, documents=documents, window=window, backend=backend)
    state = state.with_tensors([x.cpu().cuda() for x in state.tensors()])
    return [out, *attention_backward(grad, q, k, v, out, state, scale=SCALE, documents=documents, window=window)], state


def check(
    backend: str | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    documents: Documents | None = None,
    window: int | None = None,
) -> None:
    wide = [x.double() for x in (q, k, v, grad)]
    expected, _ = both_ways(*wide, documents, window, "math")
    actual, state = both_ways(q, k, v, grad, documents, window, backend)
    assert state.backend == (backend or state.backend)
    for name, one, other in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert one.shape == other.shape, name
        assert one.dtype == q.dtype, name
        assert one.is_contiguous(), name
        # A token that sees itself alone gives q and k no gradient at all; dv is then what their roundings are small to.
        size = other.norm() if other.any() else expected[3].norm()
        error = float((one.double() - other).norm() / size)
        assert error < BOUNDS[q.dtype], f"{name}: {error:.2e}"


def packed() -> Documents:
    return Documents(torch.tensor(PACKED, dtype=torch.int32, device="cuda"), 129)


@pytest.mark.parametrize(
    ("backend", "heads", "head_dim", "dtype"),
    pairwise(
        ["cudnn", "flash", "efficient"],
        [(4, 4), (8, 2), (4, 1)],
        [64, 80, 96, 128, 256],
        [torch.bfloat16, torch.float16],
    ),
)
def test_16_bit_kernels(backend: str, heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    if backend == "cudnn" and head_dim > 128 and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuDNN takes head_dim above 128 on compute capability 9.0 only")
    check(backend, *make_qkv(*heads, head_dim, dtype))


@pytest.mark.parametrize("length", [1, 2, 63, 65, 200])
@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient", None])
def test_odd_lengths(backend: str | None, length: int) -> None:
    if backend == "cudnn" and length == 1:
        pytest.skip("cuDNN takes no row of one token")
    check(backend, *make_qkv(4, 2, 64, torch.bfloat16, length))


# Flash attention takes 16-bit numbers only.
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("flash", torch.bfloat16),
        ("efficient", torch.bfloat16),
        ("efficient", torch.float32),
        (None, torch.bfloat16),
        (None, torch.float32),
    ],
)
@pytest.mark.parametrize(("is_packed", "window"), [(False, 1), (False, 50), (True, None), (True, 1), (True, 50)])
def test_documents_and_windows(backend: str | None, dtype: torch.dtype, is_packed: bool, window: int | None) -> None:
    if window == 1:  # each token sees itself alone: the gradients of q and k are rounding, and out is v
        q, k, v, _ = make_qkv(8, 2, 64, dtype)
        out, _ = attention_forward(
            q, k, v, scale=SCALE, documents=packed() if is_packed else None, window=1, backend=backend
        )
        torch.testing.assert_close(out, v.repeat_interleave(4, dim=2), rtol=1e-2, atol=1e-2)
        return
    check(backend, *make_qkv(8, 2, 64, dtype), packed() if is_packed else None, window)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_fp32(head_dim: int) -> None:
    check("efficient", *make_qkv(8, 2, head_dim, torch.float32))
    check(None, *make_qkv(8, 2, head_dim, torch.float32))


def test_boundaries_may_be_padded_and_the_longest_overstated() -> None:
    documents = Documents(torch.tensor([*PACKED, 384, 384], dtype=torch.int32, device="cuda"), LENGTH)
    q, k, v, grad = make_qkv(8, 2, 64, torch.bfloat16)
    check("flash", q, k, v, grad, documents)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
def test_the_forward_gives_the_same_bits_again(backend: str) -> None:
    q, k, v, grad = make_qkv(8, 2, 128, torch.bfloat16)
    one, other = (both_ways(q, k, v, grad, None, None, backend)[0][0] for _ in range(2))
    assert torch.equal(one, other)


def test_deterministic_algorithms_give_the_same_gradients_again() -> None:
    q, k, v, grad = make_qkv(8, 2, 128, torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        (one, state), (other, _) = (both_ways(q, k, v, grad, None, None, None) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert state.backend == "flash"
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_whole_16_bit_rows_take_cudnn_and_packed_ones_flash() -> None:
    q, k, v, grad = make_qkv(8, 2, 128, torch.bfloat16)
    _, whole = both_ways(q, k, v, grad, None, None, None)
    _, parts = both_ways(q, k, v, grad, packed(), None, None)
    assert (whole.backend, parts.backend) == ("cudnn", "flash")


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_no_copy_of_q_k_and_v_is_made(backend: str) -> None:
    q, k, v, _ = make_qkv(8, 2, 128, torch.bfloat16, 2048)
    attention_forward(q, k, v, scale=SCALE, backend=backend)  # workspaces and plans
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, state = attention_forward(q, k, v, scale=SCALE, backend=backend)
    kept = out.nbytes + state.lse.nbytes
    assert torch.cuda.max_memory_allocated() - before < kept + k.numel() * k.element_size()


def test_neither_way_waits_for_the_gpu() -> None:
    q, k, v, grad = make_qkv(8, 2, 128, torch.bfloat16)
    documents = packed()
    for told in (None, documents):
        both_ways(q, k, v, grad, told, None, None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out, state = attention_forward(q, k, v, scale=SCALE, documents=told)
            attention_backward(grad, q, k, v, out, state, scale=SCALE, documents=told)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_autograd_function_gives_pytorchs_gradients() -> None:
    q, k, v, grad = make_qkv(8, 2, 64, torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(attention(*leaves, scale=SCALE), leaves, grad)
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in leaves), is_causal=True, scale=SCALE, enable_gqa=True
    )
    theirs = torch.autograd.grad(out.transpose(1, 2), leaves, grad)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_every_gpu_kernel_of_the_table_is_tested_here() -> None:
    assert set(ATTENTION) - {"cpu", "math"} == {"cudnn", "flash", "efficient"}
