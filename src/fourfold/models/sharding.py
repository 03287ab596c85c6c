"""FSDP2 over a model with a frozen, quantized base: each process holds its share of every layer.

torch's public `fully_shard` does it, layer by layer, on the model as it was adapted. accelerate's own preparation does
not fit a base like this one: it makes the output head a unit with hooks, around which the loss, which reads the head's
weight, would compute a shard; it first copies the whole state dict, scales included; and it leaves scales, which are no
parameters, on the device that the model was loaded to.

- Of a decoder layer, codes (shown as bf16) and adapters (fp32) are one group: FSDP2 gathers mixed dtypes as bytes. The
  fused block reads its weights anew in each pass; what it holds between the passes are the gathered parameters' own
  tensors, whose memory FSDP2 empties and fills.
- Scales stand behind their codes in one parameter (`QuantizedWeight.join_scales`). What is one in ten thousand, nested
  scales and frozen vectors, such as norms, stays whole.
- The input embedding is a group, which is needed in the forward pass alone.
- A frozen output head is a group of its own, too: whole from its forward pass on until the loss, which reads its weight
  within `gathered_head`, has been taken. As a part of the root it would be so from the start, beside the embedding.
- The root group holds what remains: a head that learns, or whose weight is the embedding's. FSDP2 leaves it gathered
  after the forward pass, for the loss.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fourfold.errors import ConfigError
from fourfold.kernels.shards import is_sharded, local_part
from fourfold.models.block import FusedDecoderLayer, drop_graphs
from fourfold.models.hooks import hooks_of
from fourfold.models.underlying import decoder_layers, underlying
from fourfold.quantization.experts import quantized_parameters
from fourfold.quantization.linear import QuantizedWeight

__all__ = ["gathered_head", "give_back", "held_bytes", "plain_class", "shard_model"]

logger = logging.getLogger(__name__)

# Before torch 2.13, FSDP2 makes parameters of its parts that want a gradient at first, which bytes cannot. They are
# copied and gathered, and never computed with.
_SHOWN_AS = torch.bfloat16


def shard_model(model: nn.Module, device: torch.device, fill: Callable[[nn.Module], None] | None = None) -> None:
    """Give each process of the default group its share of a model, in place.

    At no moment is more than one layer whole on the device, beside what is this process's.

    Args:
        model: A causal LM of Transformers, adapters on it or not, on `device` or on the CPU. The same everywhere.
        device: Where this process computes.
        fill: Called with each part of the model, in the order of the forward pass, before it is sharded: to give it
            weights that were not there before, on `device`. The output head comes last, then the rest, as the whole
            model.

    Raises:
        ConfigError: Quantized experts, a base that streams, weights trained in fp16, or no decoder layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    base = underlying(model)
    if _root(base) is not None:
        return
    _require_shardable(base)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    # Gradients are summed in fp32, whatever their parameters are.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)

    def shard(part: nn.Module, gives_back: bool | None = True) -> None:
        if fill is not None:
            fill(part)
        whole = _bring(part, device)
        fully_shard(part, mesh=mesh, reshard_after_forward=gives_back, mp_policy=policy, ignored_params=whole)

    drop_graphs(base)
    embedding = base.get_input_embeddings()
    head = base.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    if not is_tied and not any(True for _ in embedding.children()):
        shard(embedding)
        if not _learns(embedding):
            # Else it would be gathered ahead for a pass that has no use for it.
            embedding.set_unshard_in_backward(False)
    layers = decoder_layers(base)
    if layers is None:
        raise ConfigError("no decoder layers to shard were found", found=type(base).__name__)
    for layer in layers:
        if isinstance(layer, FusedDecoderLayer):
            layer._graphs = None  # the weights' memory comes and goes
        shard(layer)
    if head is not None and not is_tied and not any(True for _ in head.children()) and not _learns(head):
        kind = plain_class(head)
        shard(head, False)  # its forward pass comes just before the loss
        if kind is not None:
            head._plain = (kind, hooks_of(head))
    shard(base, None)  # FSDP2 leaves it gathered, as the root
    if "hf_device_map" in vars(base):
        vars(base)["hf_device_map"] = {"": device}
    logger.info("The model is sharded over %d processes; CUDA graphs are off, since weights move", mesh.size())


def _require_shardable(base: nn.Module) -> None:
    for path, module in base.named_modules():
        if quantized_parameters(module):
            raise ConfigError(
                "quantized experts that are held as one parameter cannot be sharded",
                found=path,
                allowed="models whose layers hold linear layers, or distributed: ddp",
            )
        if isinstance(module, QuantizedWeight) and module.streamed is not None:
            raise ConfigError("a base that streams cannot be sharded", hint="leave stream_base out")


def _bring(module: nn.Module, device: torch.device) -> set[nn.Parameter]:
    """Bring to the device what `fully_shard` does not, and give the parameters that are not to be sharded."""
    whole = set[nn.Parameter]()
    for part in module.modules():
        if isinstance(part, QuantizedWeight):
            part.join_scales(device, _SHOWN_AS)
        for parameter in part.parameters(recurse=False):
            # Needed by passes in which nothing else of their group is.
            if parameter.dim() < 2 and not parameter.requires_grad and not is_sharded(parameter):
                parameter.data = parameter.data.to(device)
                whole.add(parameter)
    return whole


def give_back(model: nn.Module) -> None:
    """Of a sharded model, what a pass without a backward pass has left gathered, as an evaluation's: parameters are
    parts again."""
    root = _root(underlying(model))
    if root is None:
        return
    root.reshard()
    if _is_group(head := root.get_output_embeddings()):
        head.reshard()


@contextlib.contextmanager
def gathered_head(base: nn.Module) -> Iterator[None]:
    """Within, the output head of a sharded model is whole, for whoever reads its weight; of another it always is.

    A frozen head is given back afterwards: nothing of it is wanted in the backward pass of
    `fourfold.training.loss`. One that learns stays, for its gradient.
    """
    root = _root(base)
    if root is None:
        yield
        return
    head = root.get_output_embeddings()
    group = head if _is_group(head) else root
    group.unshard()
    try:
        yield
    finally:
        if not (_learns(head) and torch.is_grad_enabled()):
            group.reshard()


def plain_class(module: nn.Module) -> type | None:
    """Of a module that does no more than its class, that class; None where hooks or a `forward` of its own may.

    What FSDP2 has put around a head does not count while it is whole: to call the head would have it gathered anew.
    """
    own = getattr(module, "_plain", None)
    if own is not None and not any(map(is_sharded, module.parameters())):
        kind, hooks = own
    else:
        kind, hooks = type(module), frozenset()
    # accelerate's hooks stand in the instance's `forward`.
    return None if hooks_of(module) - hooks or "forward" in vars(module) else kind


def _root(base: Any) -> Any:
    """The model as FSDP2's; None where it is not sharded."""
    return base if _is_group(base) else None


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_group(module: Any) -> bool:
    """Whether FSDP2 gathers it by itself."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's weights that this process holds where it computes: parameters or its parts of them, and
    scales."""
    parameters = {parameter: local_part(parameter) for parameter in model.parameters()}
    scales = {module: module.scales for module in model.modules() if isinstance(module, QuantizedWeight)}
    held = sum(each.num_bytes for each in scales.values() if each is not None)
    return held + sum(part.nbytes for whole, part in parameters.items() if part.device == whole.device)
