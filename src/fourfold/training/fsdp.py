"""Checkpoints of a run whose parameters are sharded: whole weights and optimizer state, whatever the processes are.

The main process gathers parameter by parameter, so that never more than one is whole on a GPU. State of 8 bits has a
scale for each block of 256 elements of what a process holds. Where parts end with a block, as they do wherever rows of
a matrix are a multiple of 256 elements or many, whole state is their blocks one after the other; elsewhere it is
decoded, joined and encoded anew.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel

from fourfold.errors import CheckpointError
from fourfold.kernels.optimizer import decode_moment, encode_moment
from fourfold.kernels.optimizer_state import BLOCK_SIZE
from fourfold.kernels.shards import is_sharded, local_part
from fourfold.models.sharding import gathered_head, give_back
from fourfold.optimizers.maps import state_maps
from fourfold.training.whole_state import WholeState

__all__ = ["ShardedState", "gather_rows", "own_rows"]


class Rows(NamedTuple):
    """How the rows of a parameter are parted: as `torch.chunk` does, which is FSDP2's way.

    Attributes:
        counts: Rows of each process.
        rank: This one.
        width: Elements of a row.
    """

    counts: list[int]
    rank: int
    width: int

    @classmethod
    def of(cls, parameter: Tensor) -> Rows:
        """Of a parameter that is sharded over the default group."""
        world, rows = distributed.get_world_size(), parameter.shape[0]
        each = -(-rows // world)
        counts = [max(0, min(each, rows - each * index)) for index in range(world)]
        return cls(counts, distributed.get_rank(), parameter.numel() // max(rows, 1))

    @property
    def end_with_blocks(self) -> bool:
        """Whether each part but the last consists of whole blocks."""
        last = max((index for index, count in enumerate(self.counts) if count), default=0)
        return all(count * self.width % BLOCK_SIZE == 0 for count in self.counts[:last])

    def blocks(self) -> list[int]:
        return [-(-count * self.width // BLOCK_SIZE) for count in self.counts]


def gather_rows(part: Tensor, counts: list[int]) -> Tensor:
    """All processes' parts, one after the other along the first dimension; this one's is `part`."""
    padded = part.new_zeros(max(counts), *part.shape[1:])
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([each[:count] for each, count in zip(parts, counts, strict=True)])


def own_rows(whole: Tensor, counts: list[int], rank: int) -> Tensor:
    """This process's part of what `gather_rows` gives."""
    start = sum(counts[:rank])
    return whole[start : start + counts[rank]]


class ShardedState(WholeState):
    """Of FSDP2. All processes call each method; what is returned is on the CPU of the main process, and empty
    elsewhere."""

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        give_back(model)
        if isinstance(model, PeftModel):
            trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
            return _on_main((name, _whole(value)) for name, value in trained)
        # A tensor that has two names is gathered once, and stays one.
        named = model.state_dict()
        first = {local_part(value).data_ptr(): name for name, value in reversed(named.items())}
        whole = _on_main((name, _whole(named[name])) for name in dict.fromkeys(first.values()))
        return {name: whole[first[local_part(value).data_ptr()]] for name, value in named.items()} if whole else whole

    def weigh(self, model: nn.Module, weight: float) -> None:
        give_back(model)
        super().weigh(model, weight)

    @contextlib.contextmanager
    def head(self, base: PreTrainedModel) -> Iterator[nn.Module]:
        with gathered_head(base):
            yield base.get_output_embeddings()

    def load_weights(self, model: nn.Module, folder: Path) -> bool:
        """Give an adapted model the adapter of a checkpoint.

        Raises:
            CheckpointError: It is another adapter, or all weights are trained.
        """
        give_back(model)
        targets: Mapping[str, Tensor]
        if isinstance(model, PeftModel):
            own = {name: value for name, value in model.named_parameters() if value.requires_grad}
            targets = get_peft_model_state_dict(model, state_dict=own, save_embedding_layers=False)
            saved = load_file(folder / "adapter_model.safetensors")
        else:
            targets = dict(model.named_parameters())
            saved = {}
            for file in sorted(folder.glob("model*.safetensors")):
                saved |= load_file(file)
        for name, target in targets.items():
            source = saved.get(name)
            if source is None or source.shape != target.shape:
                raise CheckpointError(
                    f"{folder} holds another model than the one that is trained",
                    found=f"{name}: {None if source is None else list(source.shape)}",
                    allowed=f"{list(target.shape)}",
                )
            with torch.no_grad():
                rows = Rows.of(target) if is_sharded(target) else None
                part = source if rows is None else own_rows(source, rows.counts, rows.rank)
                local_part(target).copy_(part)
        return True

    def optimizer(self, optimizer: Any, model: nn.Module) -> dict[str, Any]:
        saved: dict[str, Any] = optimizer.state_dict()
        inner = getattr(optimizer, "optimizer", optimizer)
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        if inner.state:
            whole = ((number, _whole_state(own, inner.state.get(own, {}))) for number, own in enumerate(parameters))
            saved["state"] = _on_main(whole)
        return saved

    def load_optimizer(self, optimizer: Any, model: nn.Module, state: dict[str, Any]) -> None:
        inner = getattr(optimizer, "optimizer", optimizer)
        parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
        own = {
            number: _own_state(parameters[number], values)
            for number, values in state["state"].items()
            if local_part(parameters[number]).numel()
        }
        optimizer.load_state_dict({**state, "state": own})


def _on_main(named: Any) -> dict[Any, Any]:
    """Of pairs that all processes must make, what the main process keeps, on its CPU."""
    is_main = distributed.get_rank() == 0
    kept = {}
    for name, value in named:
        if is_main:
            kept[name] = (
                {key: each.cpu() for key, each in value.items()} if isinstance(value, dict) else value.detach().cpu()
            )
    return kept


def _whole(value: Tensor) -> Tensor:
    if not is_sharded(value):
        return value
    rows = Rows.of(value)
    return gather_rows(local_part(value), rows.counts)


def _whole_state(parameter: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State of all of a parameter, of the parts that each process has; the same names on all of them."""
    if not is_sharded(parameter):
        return dict(state)
    rows, part = Rows.of(parameter), local_part(parameter)
    names: list[Any] = [None] * len(rows.counts)
    # Whoever has no row has no state, and yet takes part.
    distributed.all_gather_object(names, {name: value.dtype for name, value in state.items()})
    dtypes: dict[str, torch.dtype] = max(names, key=len)
    whole: dict[str, Tensor] = {}
    for name, dtype in dtypes.items():
        if name == "step":
            whole[name] = state.get(name, torch.zeros((), device=part.device)).clone()
        elif name.startswith("absmax"):
            own = state.get(name, part.new_empty(0, dtype=dtype))
            whole[name] = gather_rows(own.to(part.device), rows.blocks())
        else:
            own = state.get(name, part.new_empty(part.shape, dtype=dtype))
            whole[name] = gather_rows(own.to(part.device), rows.counts)
    if rows.end_with_blocks:
        return whole
    return _converted(whole, rows, of_parts=True)


def _own_state(parameter: Tensor, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's part of the state that `_whole_state` gives."""
    if not is_sharded(parameter):
        return dict(whole)
    rows = Rows.of(parameter)
    if not rows.end_with_blocks:
        whole = _converted(whole, rows, of_parts=False)
    return {
        name: value
        if name == "step"
        else own_rows(value, rows.blocks() if name.startswith("absmax") else rows.counts, rows.rank)
        for name, value in whole.items()
    }


def _converted(state: Mapping[str, Tensor], rows: Rows, *, of_parts: bool) -> dict[str, Tensor]:
    """State of 8 bits whose blocks are those of the parts, or of the whole: as the other has them.

    Args:
        of_parts: Whether the blocks given are those of the parts, one part's after the other's.
    """
    converted = dict(state)
    for number in (1, 2):
        codes, absmax = state.get(f"state{number}"), state.get(f"absmax{number}")
        if codes is None or absmax is None:
            continue
        points = state_maps(codes.device)[number - 1]
        counts, blocks = (rows.counts, rows.blocks()) if of_parts else ([len(codes)], [len(absmax)])
        parts = zip(codes.split(counts), absmax.split(blocks), strict=True)
        values = torch.cat([decode_moment(*each, points) for each in parts])
        encoded = [encode_moment(part, points) for part in ([values] if of_parts else values.split(rows.counts))]
        converted[f"state{number}"] = torch.cat([each for each, _ in encoded])
        converted[f"absmax{number}"] = torch.cat([each for _, each in encoded])
    return converted
