"""``attn_implementation="fourfold"`` for any model of Transformers, by its public extension points.

Transformers asks two functions: one makes a mask for the whole model, one attends in each layer. Ours make no dense
mask where the kernels mask by themselves, and otherwise do what ``"sdpa"`` does, so that the numbers are always sdpa's
(but for the outputs of padding on the right, which are of no use).

Where more than causality is wanted of the kernels, the mask itself says so: an int32 tensor of four dimensions and no
memory, whose shape carries the numbers (`document_mask`, `window_mask`). Transformers hands 4-D masks on unread, so it
reaches every layer of every model, and again where activations are recomputed; any other attention fails on it.

Packed rows reach the layers in one of three ways, from the fastest to the slowest:

1. ``attention_mask=document_mask(documents)``.
2. ``cu_seq_lens_q`` and ``max_length_q`` among the model's arguments, as for Transformers' flash attention. Where
   position_ids start again, a dense mask is still made, and not used.
3. position_ids alone: a dense mask is made and used, for the function that makes masks is not told what they mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fourfold.errors import TrainingError
from fourfold.models.attention import AttentionState, Documents, attention_backward, attention_forward
from fourfold.models.attention_math import causal_mask

__all__ = [
    "ATTENTION_NAME",
    "attention",
    "document_mask",
    "documents_from_mask",
    "documents_from_position_ids",
    "register_attention",
    "window_from_mask",
    "window_mask",
]

ATTENTION_NAME = "fourfold"


def register_attention() -> str:
    """Make ``attn_implementation="fourfold"`` known to Transformers; again is no harm. Returns the name."""
    AttentionInterface.register(ATTENTION_NAME, _attend)
    AttentionMaskInterface.register(ATTENTION_NAME, _make_mask)
    return ATTENTION_NAME


def document_mask(documents: Documents) -> Tensor:
    """The boundaries of packed documents as an ``attention_mask`` for a model that attends by ``"fourfold"``.

    Returns:
        int32 [1, 1, max_length, documents + 1], a view that repeats ``cu_seqlens``.
    """
    return documents.cu_seqlens.expand(1, 1, documents.max_length, -1)


def documents_from_mask(attention_mask: Tensor | None) -> Documents | None:
    """What `document_mask` was made from; None for any other mask."""
    if not _speaks(attention_mask) or attention_mask.shape[3] == 0:
        return None
    return Documents(attention_mask[0, 0, 0], attention_mask.shape[2])


def window_mask(window: int, device: torch.device | str | None = None) -> Tensor:
    """A sliding window as an ``attention_mask``: an empty int32 tensor [1, 1, window, 0]."""
    return torch.empty(1, 1, window, 0, dtype=torch.int32, device=device)


def window_from_mask(attention_mask: Tensor | None) -> int | None:
    """What `window_mask` was made from; None for any other mask."""
    if not _speaks(attention_mask) or attention_mask.shape[3] != 0:
        return None
    return attention_mask.shape[2]


def _speaks(attention_mask: Tensor | None) -> TypeGuard[Tensor]:
    return attention_mask is not None and attention_mask.dtype == torch.int32 and attention_mask.dim() == 4


def documents_from_position_ids(position_ids: Tensor) -> Documents:
    """The documents of packed rows whose positions start again with each document.

    Args:
        position_ids: int [batch, seq]. On a GPU this waits for it once; a collator calls it on the CPU, for nothing.

    Returns:
        A document for each run of positions that grow by one; a run ends with its row.
    """
    starts = torch.ones_like(position_ids, dtype=torch.bool)
    starts[:, 1:] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    first = starts.flatten().nonzero().flatten()
    cu_seqlens = torch.cat([first, first.new_tensor([position_ids.numel()])]).to(torch.int32)
    return Documents(cu_seqlens, int(cu_seqlens.diff().max()))


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, documents: Documents | None = None, window: int | None = None
) -> Tensor:
    """`attention_forward` with autograd: q, k, v [batch, seq, heads or kv_heads, head_dim] to out as q, contiguous."""
    out: Tensor = _Attention.apply(q, k, v, scale, documents, window)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents | None, window: int | None
    ) -> Tensor:
        out, state = attention_forward(q, k, v, scale=scale, documents=documents, window=window)
        ctx.save_for_backward(q, k, v, out, state.lse)
        ctx.backend, ctx.philox = state.backend, state.philox
        ctx.arguments = {"scale": scale, "documents": documents, "window": window}
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        state = AttentionState(ctx.backend, lse, ctx.philox)
        return *attention_backward(grad_out, q, k, v, out, state, **ctx.arguments), None, None, None


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: query [batch, heads, q_len, head_dim] to [batch, q_len, heads, head_dim]."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    documents = _declared_documents(attention_mask, kwargs, query.device)
    window = window_from_mask(attention_mask) if documents is None else _named_window(module, kwargs)
    told = documents is not None or window is not None
    length, kv_length = query.shape[2], key.shape[2]
    if told and (length != kv_length or not causal):
        raise TrainingError(
            "packed documents and sliding windows without a dense mask need causal attention of rows over themselves",
            found=f"{length} queries over {kv_length} keys, causal={causal}",
            hint="call the model with use_cache=False",
        )
    whole = told or (attention_mask is None and causal and length == kv_length > 1)
    if whole and dropout == 0.0 and value.shape[-1] == query.shape[-1] and not _has_extras(kwargs):
        q, k, v = (x.transpose(1, 2) for x in _autocast(query, key, value))
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return attention(q, k, v, scale=scale, documents=documents, window=window), None
    if told:
        cu_seqlens = None if documents is None else documents.cu_seqlens
        attention_mask = causal_mask(query.shape[0], length, query.device, cu_seqlens, window)[:, 0]
    out: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
    )
    return out


def _declared_documents(
    attention_mask: Tensor | None, kwargs: dict[str, Any], device: torch.device
) -> Documents | None:
    documents = documents_from_mask(attention_mask)
    if documents is not None or kwargs.get("cu_seq_lens_q") is None or kwargs.get("max_length_q") is None:
        return documents
    cu_seqlens = kwargs["cu_seq_lens_q"].to(device=device, dtype=torch.int32)
    return Documents(cu_seqlens, int(kwargs["max_length_q"]))


def _named_window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The window that the layer names, for with documents declared the mask does not say it."""
    configured = getattr(getattr(module, "config", None), "sliding_window", None)
    if configured is not None and "sliding_window" not in kwargs:
        raise TrainingError(
            f"packed documents were declared to {type(module).__name__}, which does not name its sliding window",
            found=f"sliding_window={configured} in the model's configuration only",
            hint="leave the boundaries to position_ids",
        )
    window: int | None = kwargs.get("sliding_window")
    return window


def _has_extras(kwargs: dict[str, Any]) -> bool:
    """Whether the layer asks for what changes the scores and only sdpa's function knows, or refuses."""
    return any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))


def _autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In autocast's dtype, which it casts to for PyTorch's own attention and cannot for ours."""
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def _make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Transformers' mask function: None or `window_mask` where kernels mask, else sdpa's [batch, 1, q_len, kv_len]."""
    from_start = q_length == kv_length > 1 and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    if from_start and allow_is_causal_skip and _pads_only_right(attention_mask, kv_length):
        if local_size is None:
            return None
        # Chunked attention has a local_size too, and only the configuration tells which of the two this is.
        sliding, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
        if local_size == sliding and local_size != chunk:
            return window_mask(local_size, kwargs.get("device"))
    arguments = {} if mask_function is None else {"mask_function": mask_function}
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        config=config,
        **arguments,
        **kwargs,
    )
    return mask


def _pads_only_right(attention_mask: Tensor | None, length: int) -> bool:
    """Whether padding, if any, stands behind all tokens, where causal attention does not look. Waits for the GPU once,
    as sdpa's own mask function does."""
    if attention_mask is None:
        return True
    if attention_mask.shape[-1] != length:
        return False
    kept = attention_mask.bool()
    return bool((kept[:, :-1] >= kept[:, 1:]).all())
