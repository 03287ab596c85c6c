"""Parameters with a learning rate of their own: LoRA+, and groups by name.

The Trainer parts parameters into those with weight decay and those without (biases, norms). Each of its two parts is
parted further here:

1. what `lr_groups` names has that group's rate, of several the first;
2. with LoRA+ (https://arxiv.org/abs/2402.12354), B of an adapter, and vectors, have `loraplus_lr_ratio` times the
   learning rate, and adapters on embeddings `loraplus_lr_embedding`, as PEFT's `create_loraplus_optimizer` has it;
3. all others the learning rate itself.

All groups are one optimizer's: gradients are clipped by their norm over all of them, and the schedule scales each rate.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.trainer_pt_utils import get_parameter_names

from fourfold.errors import CheckpointError, ConfigError

__all__ = ["GroupOptions", "LrGroup", "names_by_group", "parameter_groups", "rates_of_groups", "require_groups"]

# As Trainer.get_decay_parameter_names has them; a test compares.
_WITHOUT_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
_NUM_NAMED = 5


@dataclass(frozen=True)
class LrGroup:
    """A learning rate for parameters whose name has one of `modules` as a part, or matches it as a glob."""

    modules: tuple[str, ...]
    lr: float
    name: str

    def has(self, parameter: str) -> bool:
        return any(part in parameter or fnmatch.fnmatchcase(parameter, part) for part in self.modules)


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Which parameters have a learning rate of their own.

    Attributes:
        loraplus_lr_ratio: Rate of B over that of A; None: no LoRA+.
        loraplus_lr_embedding: Rate of adapters on embeddings, with LoRA+.
        lr_groups: Groups by name, before LoRA+.

    Raises:
        ConfigError: A rate that is not above 0.
    """

    loraplus_lr_ratio: float | None = None
    loraplus_lr_embedding: float = 1e-6
    lr_groups: tuple[LrGroup, ...] = ()

    def __post_init__(self) -> None:
        rates = {"loraplus_lr_ratio": self.loraplus_lr_ratio, "loraplus_lr_embedding": self.loraplus_lr_embedding}
        for key, rate in (*rates.items(), *(("lr_groups", group.lr) for group in self.lr_groups)):
            if rate is not None and rate <= 0:
                raise ConfigError(f"{key} is out of range", found=rate, allowed="a number above 0")

    @property
    def is_asked_for(self) -> bool:
        """Whether there are groups but those of the Trainer."""
        return self.loraplus_lr_ratio is not None or bool(self.lr_groups)


def parameter_groups(
    model: nn.Module, options: GroupOptions, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups for an optimizer, each with params, lr, weight_decay and its name; the first has the learning rate itself.

    Raises:
        ConfigError: A group of `lr_groups` that names no parameter which is trained and is in no group before it.
    """
    rates = {"base": learning_rate}
    if options.loraplus_lr_ratio is not None:
        rates["lora_B"] = learning_rate * options.loraplus_lr_ratio
        rates["lora_embedding"] = options.loraplus_lr_embedding
    rates |= {group.name: group.lr for group in options.lr_groups}
    decaying = set(get_parameter_names(model, [nn.LayerNorm], _WITHOUT_DECAY))
    members: dict[tuple[str, bool], list[nn.Parameter]] = {("base", True): []}
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    for name, parameter in trained:
        members.setdefault((_group_of(name, parameter, options), name in decaying), []).append(parameter)
    for group in options.lr_groups:
        if not members.keys() & {(group.name, True), (group.name, False)}:
            names = [name for name, _ in trained]
            shown = ", ".join(names[:_NUM_NAMED]) + (", ..." if len(names) > _NUM_NAMED else "")
            raise ConfigError(
                f"lr_groups: group {group.name} names nothing that is trained",
                found=", ".join(group.modules),
                allowed=f"parts of names, or globs, of {shown}",
                hint="a parameter belongs to the first group that names it",
            )
    keys = sorted(members, key=lambda key: (list(rates).index(key[0]), not key[1]))
    return [
        {
            "params": members[name, decays],
            "lr": rates[name],
            "weight_decay": weight_decay if decays else 0.0,
            "name": name,
        }
        for name, decays in keys
    ]


def _group_of(name: str, parameter: nn.Parameter, options: GroupOptions) -> str:
    named = next((group.name for group in options.lr_groups if group.has(name)), None)
    if named is not None or options.loraplus_lr_ratio is None:
        return named or "base"
    if "lora_embedding_" in name:
        return "lora_embedding"
    return "lora_B" if "lora_B" in name or parameter.ndim == 1 else "base"


def names_by_group(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    """Names of the parameters of each group of an optimizer, which are in the order of its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def rates_of_groups(optimizer: Optimizer, learning_rate: float) -> dict[str, float]:
    """For a log: the rate of each group that has one of its own, as learning_rate/NAME.

    Args:
        optimizer: With groups of `parameter_groups`, and a schedule.
        learning_rate: That of the first group at the step that is logged; the optimizer has the next one's.
    """
    first = optimizer.param_groups[0]
    return {
        f"learning_rate/{group['name']}": learning_rate * group["initial_lr"] / first["initial_lr"]
        for group in optimizer.param_groups
        if group.get("name", "base") != "base" and first.get("initial_lr")
    }


def require_groups(saved: list[list[str]] | None, now: list[list[str]] | None, checkpoint: object) -> None:
    """Raises CheckpointError where a checkpoint's optimizer had other groups: its state would be that of others.

    Args:
        saved: As `names_by_group` gave them; None: the checkpoint does not say.
        now: The optimizer's, likewise.
        checkpoint: Its folder, for the message.
    """
    if saved is None or now is None or saved == now:
        return
    pairs = zip(_flat(saved), _flat(now), strict=False)
    first = next(((before, after) for before, after in pairs if before != after), None)
    raise CheckpointError(
        f"{checkpoint} was written with other groups of parameters",
        found=f"{first[0][1]} in group {first[0][0] + 1}" if first else f"{len(saved)} groups",
        allowed=f"{first[1][1]} in group {first[1][0] + 1}" if first else f"{len(now)} groups",
        hint="resume with the loraplus_lr_ratio and lr_groups that the run began with",
    )


def _flat(groups: list[list[str]]) -> Iterator[tuple[int, str]]:
    yield from ((number, name) for number, names in enumerate(groups) for name in names)
