"""The fused step: tokens to logits over a cache of slots, for model families with a fused block.

    step = FusedStep(model)
    logits = step.prefill(slot, input_ids, cache, adapter)               # [vocab]
    logits = step.decode(tokens, slots, positions, cache, adapter)      # [n, vocab]

A decode pass reads nothing back and allocates by its inputs' shapes alone, so that it can be captured in a CUDA graph.
Several adapters of one model are served side by side, by name, whichever is active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold.kernels.angles import rotary_angles
from fourfold.kernels.norm import rms_norm
from fourfold.models.block import ACTIVATIONS, fused_layer_class, sliding_window
from fourfold.models.decode_layer import Angles, DecodeLayer, DecodeLinears
from fourfold.models.linear_group import LinearGroup, Unsupported, refuse_hooks, view_linear
from fourfold.models.underlying import underlying
from fourfold.models.weight_room import WeightRoom
from fourfold.quantization.embedding import QuantizedEmbedding
from fourfold.quantization.linear import QuantizedLinear, QuantizedWeight

__all__ = ["FusedStep", "HeldCache"]


class HeldCache(Protocol):
    """Keys and values of slots: of each layer [slots, kv_heads, length, head_dim] in the model's dtype."""

    @property
    def keys(self) -> Sequence[Any]: ...

    @property
    def values(self) -> Sequence[Any]: ...


class FusedStep:
    """What turns tokens into logits, by the kernels of `kernels/decode_*.py` where they serve.

    Adapters are LoRA's; their matrices are read, and copied in the dtype of the model, when a name is used for the
    first time: `refresh` has them read anew. So it does with the base, whose weights are read where they stood then.

    Attributes:
        vocab_size: Columns of the logits.
        layers: Of each layer, what it keeps of a token: key and value heads, their size, and the window or None.
        version: Grows by one whenever adapters are read anew: a CUDA graph holds for one version.

    Args:
        model: A causal LM of a family with a fused block (`models/families.py`), or PEFT's model around one.

    Raises:
        Unsupported: Why another step must take this model.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self.model = model
        base = underlying(model)
        layer_class = fused_layer_class(getattr(base.config, "model_type", None))
        decoder: Any = base.get_decoder() if hasattr(base, "get_decoder") else None
        if layer_class is None or decoder is None:
            raise Unsupported(f"{type(base).__name__} has no fused block")
        stack = getattr(decoder, "layers", None)
        if not isinstance(stack, nn.ModuleList) or not all(isinstance(layer, layer_class) for layer in stack):
            raise Unsupported(f"not all layers are {layer_class.__name__}")
        self._check_adapters()
        self._embedding: Any = base.get_input_embeddings()
        self._head: Any = base.get_output_embeddings()
        if not isinstance(self._embedding, nn.Embedding):
            raise Unsupported(f"the embedding is a {type(self._embedding).__name__}")
        if type(self._head) not in (nn.Linear, QuantizedLinear):
            raise Unsupported(f"the output head is a {type(self._head).__name__}")
        self._norm, self._rotary, self._stack = decoder.norm, decoder.rotary_emb, stack
        self.vocab_size: int = self._head.out_features
        self.dtype: torch.dtype = self._norm.weight.dtype
        self._check_whole_model(base)
        self.version = 0
        self._views: dict[str | None, list[DecodeLayer]] = {}
        self.layers = tuple((one.num_kv_heads, one.head_dim, one.window) for one in self._view(None))

    def _check_adapters(self) -> None:
        if not isinstance(self.model, PeftModel):
            return
        for name, config in self.model.peft_config.items():
            kind = str(getattr(config.peft_type, "value", config.peft_type))
            if kind != "LORA":
                raise Unsupported(f"adapter {name} is {kind}")
            if getattr(config, "target_parameters", None):
                raise Unsupported(f"adapter {name} is on parameters")

    def _check_whole_model(self, base: PreTrainedModel) -> None:
        for module in (self._embedding, self._head, self._norm, self._rotary, *self._stack):
            refuse_hooks(module)
        if any(isinstance(module, QuantizedWeight) and module.streamed is not None for module in base.modules()):
            raise Unsupported("the base streams")
        devices = {parameter.device for parameter in base.parameters()}
        if len(devices) > 1:
            raise Unsupported(f"the model is on {len(devices)} devices")
        rope_type = self._rotary.rope_type
        if not isinstance(rope_type, str) or "dynamic" in rope_type or rope_type == "longrope":
            raise Unsupported(f"the rotary embedding changes with the length ({rope_type})")
        held = self._embedding.weight.dtype
        if isinstance(self._embedding, QuantizedEmbedding):
            held = self._embedding.compute_dtype or self._embedding.quantized.dtype
        if held != self.dtype:
            raise Unsupported(f"the embedding is {held}, the norms {self.dtype}")
        if any(getattr(base.config, name, None) not in (None, 1.0) for name in ("logit_scale", "logits_scaling")):
            raise Unsupported("the model scales its logits")

    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters there are."""
        return tuple(self.model.peft_config) if isinstance(self.model, PeftModel) else ()

    def supports(self, adapter: str | None) -> str | None:
        """Why another step must take this adapter (None: the base); None if this one does."""
        try:
            self._view(adapter)
        except Unsupported as reason:
            return str(reason)
        return None

    def refresh(self) -> None:
        """Forget what was read of adapters: they have changed."""
        self._views.clear()
        self.version += 1

    @torch.no_grad()
    def prefill(self, slot: int, input_ids: Tensor, cache: HeldCache, adapter: str | None, start: int = 0) -> Tensor:
        """Write a part of a prompt into a slot.

        Args:
            slot: Which.
            input_ids: int64 [length], the sequence's tokens from `start` on; those before stand in the slot.
            cache: Has room for `start + length` tokens.
            adapter: Name of the adapter; None for the base.
            start: Tokens that stand in the slot.

        Returns:
            Logits [vocab] after the last token.

        Raises:
            Unsupported: See `supports`.
        """
        return self._read(input_ids, slot, slice(-1, None), cache, adapter, start)

    @torch.no_grad()
    def prefill_padded(
        self, input_ids: Tensor, slot: Tensor, last: Tensor, cache: HeldCache, adapter: str | None
    ) -> Tensor:
        """Write the beginning of a prompt into a slot, with tokens behind it that fill up a length.

        Reads nothing back and allocates by the shape of `input_ids` alone, so that it can be captured in a CUDA graph.
        What the tokens behind the prompt leave in the slot stands where the sequence's next tokens are written before
        they are read.

        Args:
            input_ids: int64 [length], the prompt, and any tokens behind it.
            slot: int64 [1], which.
            last: int64 [1], the index of the prompt's last token.
            cache: Has room for `length` tokens.
            adapter: Name of the adapter; None for the base.

        Returns:
            Logits [vocab] after the prompt's last token.

        Raises:
            Unsupported: See `supports`.
        """
        return self._read(input_ids, slot, last, cache, adapter)

    def prompt_bytes(self, length: int) -> int:
        """What a pass over so many tokens takes at most beside weights and cache, by any adapter that there is."""
        names = [name for name in (None, *self.adapters()) if self.supports(name) is None]
        layers = [layer for name in names for layer in self._view(name)]
        weights = max(layer.weight_elements for layer in layers)
        tokens = length * max(layer.token_elements for layer in layers)
        return (weights + tokens) * self.dtype.itemsize

    def _read(
        self,
        input_ids: Tensor,
        slot: int | Tensor,
        last: slice | Tensor,
        cache: HeldCache,
        adapter: str | None,
        start: int = 0,
    ) -> Tensor:
        layers = self._view(adapter)
        x: Tensor = self._embedding(input_ids)
        angles = self._angles(torch.arange(start, start + len(input_ids), device=input_ids.device))
        weights = WeightRoom(max(layer.weight_elements for layer in layers), self.dtype, x.device)
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            # Behind the last layer's attention only the last token counts.
            only = last if layer is layers[-1] else None
            x = layer.prefill(x, angles, keys, values, slot, weights, start, only)
        return self._logits(x)[0]

    @torch.no_grad()
    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: HeldCache, adapter: str | None) -> Tensor:
        """Write a token to each of some slots.

        Args:
            tokens: int64 [n].
            slots: int64 [n], all different.
            positions: int64 [n], the tokens that each slot holds: where its token is written.
            cache: Has room for them.
            adapter: Name of the adapter of all rows; None for the base.

        Returns:
            Logits [n, vocab].

        Raises:
            Unsupported: See `supports`.
        """
        x = self._embedding(tokens)
        angles = self._angles(positions)
        for layer, keys, values in zip(self._view(adapter), cache.keys, cache.values, strict=True):
            x = layer.decode(x, angles, keys, values, slots, positions)
        return self._logits(x)

    def _angles(self, positions: Tensor) -> Angles:
        rotary = self._rotary
        cos, sin = rotary_angles(positions[None], rotary.inv_freq, rotary.attention_scaling, self.dtype)
        return cos[0], sin[0]

    def _logits(self, x: Tensor) -> Tensor:
        normed, _ = rms_norm(x, self._norm.weight, self._norm.variance_epsilon)
        logits: Tensor = self._head(normed)
        return logits

    def _view(self, adapter: str | None) -> list[DecodeLayer]:
        """The layers with one adapter's matrices, or none's."""
        if adapter not in self._views:
            if adapter is not None and adapter not in self.adapters():
                raise Unsupported(f"there is no adapter {adapter}")
            names = () if adapter is None else (adapter,)
            self._views[adapter] = [self._layer(layer, names) for layer in self._stack]
        return self._views[adapter]

    def _layer(self, layer: Any, names: tuple[str, ...]) -> DecodeLayer:
        attention, mlp = layer.self_attn, layer.mlp
        activation = ACTIVATIONS.get(attention.config.hidden_act)
        if activation is None:
            raise Unsupported(f"hidden_act is {attention.config.hidden_act}")
        norm1, norm2 = layer.input_layernorm, layer.post_attention_layernorm
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        for module in (attention, mlp, norm1, norm2):
            refuse_hooks(module)
        for norm in (norm1, norm2, q_norm, k_norm):
            if norm is not None and norm.weight.dtype != self.dtype:
                raise Unsupported(f"a norm's weight is {norm.weight.dtype}, the last norm's {self.dtype}")

        def linears(*modules: nn.Module, bias: bool = False) -> DecodeLinears:
            views = (view_linear(module, training=False, bias=bias, names=names) for module in modules)
            return DecodeLinears(LinearGroup(*views), self.dtype)

        qkv = linears(attention.q_proj, attention.k_proj, attention.v_proj, bias=True)
        num_heads, num_kv_heads = (one.base.out_features // attention.head_dim for one in qkv.group.linears[:2])
        return DecodeLayer(
            qkv=qkv,
            out=linears(attention.o_proj),
            gate_up=linears(mlp.gate_proj, mlp.up_proj),
            down=linears(mlp.down_proj),
            norm1=norm1.weight.detach(),
            norm2=norm2.weight.detach(),
            norm_eps=norm1.variance_epsilon,
            q_norm=None if q_norm is None else q_norm.weight.detach(),
            k_norm=None if k_norm is None else k_norm.weight.detach(),
            head_eps=0.0 if q_norm is None else q_norm.variance_epsilon,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=attention.head_dim,
            scale=attention.scaling,
            window=sliding_window(attention),
            rotates=bool(getattr(attention, "use_rope", True)),
            activation=activation,
        )
