"""The fused decoder block as a module: what takes a Transformers decoder layer's place."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fourfold.models.attention import Documents
from fourfold.models.attention_interface import ATTENTION_NAME, documents_from_mask, window_from_mask
from fourfold.models.block_function import fused_block
from fourfold.models.block_state import Block, GradientRoom
from fourfold.models.families import FAMILIES
from fourfold.models.fused_norm import FusedNorm
from fourfold.models.fused_rotary import FusedRotary
from fourfold.models.graphs import BlockGraphs
from fourfold.models.linear_group import LinearGroup, Unsupported, refuse_hooks, view_linear
from fourfold.models.recomputation import POLICIES, HostOffload, policies_of
from fourfold.quantization.linear import QuantizedWeight

__all__ = [
    "ACTIVATIONS",
    "FusedDecoderLayer",
    "drop_graphs",
    "fuse_blocks",
    "fused_layer_class",
    "keep_order",
    "set_recomputation",
    "sliding_window",
]

logger = logging.getLogger(__name__)

_CACHE = "a key-value cache is in use"
# Transformers' name of an activation -> the kernels'
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


class FusedDecoderLayer:
    """Mixin over a Transformers decoder layer: the same modules and parameter names, one function for all of them.

    Whatever the function does not do (a key-value cache, a mask that is not causal, dropout, DoRA, hooks on modules
    inside) the layer it stands before does, and the reason is told once.

    Attributes:
        recompute: Name of a policy of `POLICIES`; None follows `gradient_checkpointing`: "full" where it is on, "none"
            where it is off.
    """

    # Those of the decoder layer beside which this class stands.
    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any
    training: bool
    _forward_hooks: Any
    _gradient_checkpointing_func: Any

    recompute: str | None
    _index: int
    _offload: HostOffload
    _room: GradientRoom
    _graphs: BlockGraphs | None
    _checkpoints: bool
    _told: set[str]
    _in_order: bool = False

    # Transformers wraps a decoder layer's forward pass in checkpointing where this is true. The fused block does that
    # by itself, so the switch is kept, and read as off.
    @property
    def gradient_checkpointing(self) -> bool:
        return False

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self._checkpoints = on

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        try:
            if args:
                raise Unsupported("it was called with positional arguments")
            block = self._block(hidden_states, **kwargs)
        except Unsupported as reason:
            self._say(str(reason))
            return self._generic(hidden_states, *args, **kwargs)
        batch, seq, hidden = hidden_states.shape
        x = hidden_states.reshape(batch * seq, hidden)
        with torch.autocast(hidden_states.device.type, enabled=False):
            out = None
            if self._graphs is not None and self.training and block.needs_gradients(x) and not self._forward_hooks:
                out = self._graphs.run(self._index, x, block)
            if out is None:
                out = fused_block(x, block, self._in_order)
        return out.view(batch, seq, hidden)

    def _generic(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward = super().forward  # type: ignore[misc]  # the decoder layer's
        checkpoints = self._checkpoints or self.recompute not in (None, "none")
        if checkpoints and self.training and torch.is_grad_enabled() and not _has_cache(kwargs):
            checkpoint = getattr(self, "_gradient_checkpointing_func", _checkpoint)
            recomputed: Tensor = checkpoint(partial(forward, **kwargs), hidden_states, *args)
            return recomputed
        output: Tensor = forward(hidden_states, *args, **kwargs)
        return output

    def _say(self, reason: str) -> None:
        if reason not in self._told:
            self._told.add(reason)  # one set for all layers of a model
            # Generating is no training: nobody wonders that it goes another way.
            level = logging.DEBUG if reason == _CACHE else logging.INFO
            logger.log(level, "Decoder layers take the generic path, which is slower: %s", reason)

    def _block(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **kwargs: Any,
    ) -> Block:
        """Everything `fused_block` takes.

        Raises:
            Unsupported: The layer, or this call of it, asks for more than the block does.
        """
        attention = self.self_attn
        if attention.config._attn_implementation not in (ATTENTION_NAME, "sdpa"):
            raise Unsupported(f"attn_implementation is {attention.config._attn_implementation}")
        if _has_cache(kwargs):
            raise Unsupported(_CACHE)
        if kwargs.get("output_attentions") or kwargs.get("adapter_names") is not None:
            raise Unsupported("attention weights or adapters of each row are asked for")
        documents = documents_from_mask(attention_mask)
        if documents is None and cu_seq_lens_q is not None and max_length_q is not None:
            documents = Documents(cu_seq_lens_q, int(max_length_q))
        if attention_mask is not None and documents is None and window_from_mask(attention_mask) is None:
            raise Unsupported("the attention mask is not plainly causal")
        batch, seq, _ = hidden_states.shape
        if documents is not None and documents.are_rows(batch):
            documents = None
        if self.training and attention.attention_dropout > 0:
            raise Unsupported("attention_dropout is above 0")
        activation = ACTIVATIONS.get(attention.config.hidden_act)
        if activation is None:
            raise Unsupported(f"hidden_act is {attention.config.hidden_act}")
        self._check_dtype(hidden_states)
        for module in (attention, self.mlp, self.input_layernorm, self.post_attention_layernorm):
            refuse_hooks(module)
        view = partial(view_linear, training=self.training)
        qkv = LinearGroup(*(view(getattr(attention, name), bias=True) for name in ("q_proj", "k_proj", "v_proj")))
        head_dim = attention.head_dim
        num_heads, num_kv_heads = (linear.base.out_features // head_dim for linear in qkv.linears[:2])
        window = _window(attention, seq)
        cos, sin = _rotation(attention, position_embeddings, hidden_states)
        policy = POLICIES[self.recompute or ("full" if self._checkpoints and self.training else "none")]
        norm1, norm2 = self.input_layernorm, self.post_attention_layernorm
        q_norm = getattr(attention, "q_norm", None)
        k_norm = getattr(attention, "k_norm", None)
        return Block(
            qkv=qkv,
            out=LinearGroup(view(attention.o_proj)),
            gate_up=LinearGroup(view(self.mlp.gate_proj), view(self.mlp.up_proj)),
            down=LinearGroup(view(self.mlp.down_proj)),
            norm1=norm1.weight.detach(),
            norm2=norm2.weight.detach(),
            norm_eps=norm1.variance_epsilon,
            q_norm=None if q_norm is None else q_norm.weight.detach(),
            k_norm=None if k_norm is None else k_norm.weight.detach(),
            head_eps=0.0 if q_norm is None else q_norm.variance_epsilon,
            cos=cos,
            sin=sin,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=attention.scaling,
            activation=activation,
            window=window,
            documents=documents,
            batch=batch,
            seq=seq,
            policy=policy,
            rotation=None if cos is None or position_embeddings is None else position_embeddings[0],
            save=self._offload.save,
            room=self._room,
        )

    def _check_dtype(self, hidden_states: Tensor) -> None:
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            compute = torch.get_autocast_dtype(device_type)
            if compute != hidden_states.dtype:
                raise Unsupported(f"the hidden states are {hidden_states.dtype}, the products {compute}")
        norms = [self.input_layernorm, self.post_attention_layernorm]
        norms += [norm for name in ("q_norm", "k_norm") if (norm := getattr(self.self_attn, name, None)) is not None]
        for norm in norms:
            if norm.weight.dtype != hidden_states.dtype:
                raise Unsupported(f"a norm's weight is {norm.weight.dtype}, the hidden states {hidden_states.dtype}")
            if norm.weight.requires_grad:
                raise Unsupported("a norm's weight is trained")


def _has_cache(arguments: Mapping[str, Any]) -> bool:
    """Whether a layer is called with a key-value cache, by whatever name: Transformers 5.24 changed it."""
    return any(isinstance(value, Cache) for value in arguments.values())


def _checkpoint(function: Any, *args: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def sliding_window(attention: Any) -> int | None:
    """Tokens that a token sees at most; None for all before it."""
    # Mistral has it in its configuration, the same for all layers.
    window: int | None = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return window


def _window(attention: Any, seq: int) -> int | None:
    """`sliding_window`; None where the row is no longer than that."""
    window = sliding_window(attention)
    return window if window is not None and window < seq else None


def _rotation(
    attention: Any, position_embeddings: tuple[Tensor, Tensor] | None, hidden_states: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin, [positions, rotary_dim], the positions one row's or every row's."""
    if not getattr(attention, "use_rope", True):
        return None, None
    if position_embeddings is None:
        raise Unsupported("the model gives no position embeddings")
    cos, sin = position_embeddings
    if cos.dim() != 3 or cos.shape[0] not in (1, len(hidden_states)):
        raise Unsupported(f"position embeddings of shape {tuple(cos.shape)}")
    return cos.reshape(-1, cos.shape[-1]), sin.reshape(-1, sin.shape[-1])


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _fused_class(mixin: type, layer_class: type[nn.Module]) -> type[nn.Module]:
    """`layer_class` with `mixin` before it: Transformers still knows it for what it is."""
    if layer_class not in _CLASSES:
        _CLASSES[layer_class] = type(f"Fused{layer_class.__name__}", (mixin, layer_class), {})
    return _CLASSES[layer_class]


def _swap(parent: nn.Module, name: str, mixin: type) -> nn.Module:
    """Put the same module, with `mixin` before its class, in its place."""
    module = parent.get_submodule(name)
    fused_class = _fused_class(mixin, type(module))
    fused = fused_class.__new__(fused_class)
    fused.__dict__.update(module.__dict__)
    setattr(parent, name, fused)
    return fused


def fuse_blocks(model: nn.Module, recompute: str | Sequence[str] | None = None, cuda_graphs: bool | None = None) -> int:
    """Put a fused block in the place of every decoder layer that has one, on this one model object.

    Modules, parameters and their names stay as they are.

    Args:
        recompute: A policy of `POLICIES` for all layers, or one for each; None follows the model's
            `gradient_checkpointing_enable()`.
        cuda_graphs: Whether batches that keep their shape are run by CUDA graphs (see `graphs`); None: those of at most
            `AUTO_TOKENS` tokens. Never where the base streams.

    Returns:
        How many layers were replaced, or were before.

    Raises:
        ConfigError: An unknown policy, or not as many as there are layers.
    """
    layer_class = fused_layer_class(getattr(getattr(model, "config", None), "model_type", None))
    if layer_class is None:
        return 0
    found = [
        (parent, name, layer)
        for parent in list(model.modules())
        if isinstance(parent, nn.ModuleList)
        for name, layer in parent.named_children()
        if isinstance(layer, layer_class)
    ]
    offload, room, told = HostOffload(), GradientRoom(), set[str]()
    graphs = None
    streams = any(isinstance(module, QuantizedWeight) and module.streamed is not None for module in model.modules())
    # Weights that stream move from one pass to the next, and a graph reads where it was captured.
    if cuda_graphs is not False and not streams:
        graphs = BlockGraphs() if cuda_graphs is None else BlockGraphs(max_tokens=sys.maxsize)
    for index, (parent, name, layer) in enumerate(found):
        fused = layer
        if not isinstance(layer, FusedDecoderLayer):
            fused = _swap(parent, name, FusedDecoderLayer)
            checkpoints = fused.__dict__.pop("gradient_checkpointing", False)
            fused.__dict__.update(recompute=None, _offload=offload, _room=room, _checkpoints=checkpoints, _told=told)
        fused.__dict__.update(_index=index, _graphs=graphs)
    for decoder in [module for module in model.modules() if _holds_fused_layers(module)]:
        if type(decoder.norm) is type(found[0][2].input_layernorm):
            _swap(decoder, "norm", FusedNorm)
        if not isinstance(decoder.rotary_emb, FusedRotary):
            _swap(decoder, "rotary_emb", FusedRotary)
    if found and recompute is not None:
        set_recomputation(model, recompute)
    return len(found)


def _holds_fused_layers(module: nn.Module) -> bool:
    """Whether it is the decoder itself, with a norm behind its layers."""
    layers = getattr(module, "layers", None)
    has_norm = isinstance(getattr(module, "norm", None), nn.Module)
    return has_norm and isinstance(layers, nn.ModuleList) and any(isinstance(one, FusedDecoderLayer) for one in layers)


def set_recomputation(model: nn.Module, recompute: str | Sequence[str]) -> None:
    """Choose what each fused block of a model keeps for the backward pass; CUDA graphs of another choice go.

    Args:
        recompute: A policy of `POLICIES` for all blocks, or one for each, the first layer's first.

    Raises:
        ConfigError: An unknown policy, or not as many as there are blocks.
    """
    blocks = [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]
    names = policies_of(recompute, len(blocks))
    if [block.recompute for block in blocks] != names:
        drop_graphs(model)
    for block, name in zip(blocks, names, strict=True):
        block.recompute = name


def keep_order(model: nn.Module) -> None:
    """Have the gradients of adapters arrive in one order always, fused or not; for whoever sums over processes what
    arrives, as it arrives. CUDA graphs of the blocks go.
    """
    drop_graphs(model)
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            module._in_order, module._graphs = True, None


def drop_graphs(model: nn.Module) -> None:
    """Free the CUDA graphs of a model's fused blocks, and what passes between blocks; they are made anew."""
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            if module._graphs is not None:
                module._graphs.clear()
            module._room.clear()


def fused_layer_class(model_type: str | None) -> type[nn.Module] | None:
    """Transformers' decoder layer of a family with a fused block; None for another family."""
    family = FAMILIES.get(model_type or "")
    if family is None or family.fused_layer is None:
        return None
    module, _, name = family.fused_layer.rpartition(".")
    layer_class: type[nn.Module] = getattr(importlib.import_module(module), name)
    return layer_class
