"""Attention as two plain functions, against PyTorch's own attention and autograd in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fourfold.models.attention import (
    ATTENTION,
    AttentionCase,
    Documents,
    attention_backward,
    attention_forward,
    choose_attention,
)
from fourfold.models.attention_math import causal_mask, document_ids

HEADS = [(4, 4), (6, 2), (4, 1)]  # MHA, GQA, MQA
BATCH, LENGTH, HEAD_DIM, SCALE = 2, 23, 16, 0.3
PACKED = [0, 5, 6, 23, 40, 46]  # documents of 5, 1 and 17 tokens, then of 17 and 6


def make_qkv(heads: int, kv_heads: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v as parts of one buffer, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    width = (heads + 2 * kv_heads) * HEAD_DIM
    buffer = torch.randn(BATCH, LENGTH, width, dtype=torch.float64, generator=generator).to(dtype)
    q, k, v = buffer.unflatten(-1, (-1, HEAD_DIM)).split([heads, kv_heads, kv_heads], dim=2)
    grad = torch.randn(BATCH, LENGTH, heads, HEAD_DIM, dtype=torch.float64, generator=generator).to(dtype)
    return q, k, v, grad


def by_autograd(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, seen: Tensor) -> list[Tensor]:
    """out, dq, dk and dv by softmax under a mask and autograd, in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    groups = q.shape[2] // k.shape[2]
    queries = leaves[0].transpose(1, 2)
    keys, values = (x.repeat_interleave(groups, dim=2).transpose(1, 2) for x in leaves[1:])
    scores = (queries @ keys.mT * SCALE).masked_fill(~seen, float("-inf"))
    out = (scores.softmax(-1) @ values).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def by_us(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, documents: Documents | None, window: int | None, backend: str | None
) -> list[Tensor]:
    out, state = attention_forward(q, k, v, scale=SCALE, documents=documents, window=window, backend=backend)
    state = state.with_tensors([x.clone() for x in state.tensors()])  # as an offloading policy does
    return [out, *attention_backward(grad, q, k, v, out, state, scale=SCALE, documents=documents, window=window)]


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def mask_by_hand(documents: list[int] | None, window: int | None) -> Tensor:
    """bool [batch, 1, seq, seq], from the definition, token by token."""
    seen = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    for row in range(BATCH):
        for query in range(LENGTH):
            for key in range(query + 1):
                near = window is None or query - key < window
                bounds = documents or []
                between = any(row * LENGTH + key < bound <= row * LENGTH + query for bound in bounds)
                seen[row, 0, query, key] = near and not between
    return seen


@pytest.mark.parametrize("backend", ["math", "cpu"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("window", [None, 2, 9])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_and_backward_agree_with_autograd_in_float64(
    backend: str, heads: int, kv_heads: int, window: int | None, packed: bool
) -> None:
    q, k, v, grad = make_qkv(heads, kv_heads)
    documents = Documents(torch.tensor(PACKED, dtype=torch.int32), 17) if packed else None
    seen = mask_by_hand(PACKED if packed else None, window)
    for actual, expected in zip(
        by_us(q, k, v, grad, documents, window, backend), by_autograd(q, k, v, grad, seen), strict=True
    ):
        assert actual.is_contiguous()
        assert actual.dtype == torch.float64
        assert error(actual, expected) < 1e-14


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_the_reference_rounds_16_bit_results_once(dtype: torch.dtype, bound: float) -> None:
    q, k, v, grad = make_qkv(6, 2, dtype)
    expected = by_autograd(q, k, v, grad, mask_by_hand(None, None))
    for actual, reference in zip(by_us(q, k, v, grad, None, None, "math"), expected, strict=True):
        assert actual.dtype == dtype
        assert error(actual, reference) < bound


def test_packed_documents_give_what_separate_calls_give() -> None:
    q, k, v, grad = make_qkv(6, 2)
    documents = Documents(torch.tensor(PACKED, dtype=torch.int32), 17)
    packed = [x.flatten(0, 1) for x in by_us(q, k, v, grad, documents, None, None)]
    for begin, end in itertools.pairwise(PACKED):
        alone = [x.flatten(0, 1)[None, begin:end] for x in (q, k, v, grad)]
        for actual, expected in zip(packed, by_us(*alone, None, None, None), strict=True):
            torch.testing.assert_close(actual[begin:end], expected[0], rtol=1e-12, atol=1e-12)


def test_the_choice_ignores_boundaries_and_windows_that_forbid_nothing() -> None:
    q, k, v, _ = make_qkv(4, 4)
    plain, _ = attention_forward(q, k, v, scale=SCALE)
    rows = Documents(torch.tensor([0, LENGTH, 2 * LENGTH], dtype=torch.int32), LENGTH)
    same, _ = attention_forward(q, k, v, scale=SCALE, documents=rows, window=LENGTH)
    assert torch.equal(plain, same)


def test_padding_may_repeat_the_last_boundary() -> None:
    cu_seqlens = torch.tensor([0, 2, 5, 5, 5], dtype=torch.int32)
    assert document_ids(cu_seqlens, 5).tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(causal_mask(1, 5, torch.device("cpu"), cu_seqlens, None)[0, 0, 0, 4], torch.arange(5) >= 2)


def case(**changes: object) -> AttentionCase:
    values: dict[str, object] = {
        "device_type": "cuda",
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "length": 2048,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "documents": False,
        "window": None,
        "deterministic": False,
    }
    return AttentionCase(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice as it falls on an NVIDIA GPU with cuDNN 9.15."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "cudnn"),
        ({"head_dim": 256}, "cudnn"),
        ({"head_dim": 256, "capability": (8, 0)}, "flash"),
        ({"documents": True}, "flash"),
        ({"window": 512}, "flash"),
        ({"length": 2000}, "flash"),
        ({"deterministic": True}, "flash"),
        ({"dtype": torch.float32}, "efficient"),
        ({"capability": (7, 5), "dtype": torch.float16}, "efficient"),
        ({"capability": (7, 5)}, "math"),
        ({"dtype": torch.float64}, "math"),
        ({"head_dim": 20}, "math"),
        ({"device_type": "cpu", "capability": (0, 0)}, "cpu"),
        ({"device_type": "xpu", "capability": (0, 0)}, "math"),
    ],
)
def test_the_first_kernel_that_does_not_refuse_is_chosen(changes: dict[str, object], expected: str) -> None:
    assert choose_attention.__wrapped__(case(**changes)).name == expected


def test_every_row_is_named_as_its_key() -> None:
    assert all(name == row.name for name, row in ATTENTION.items())
