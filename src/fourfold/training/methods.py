"""The options of the methods that learn from preferences, under TRL's names."""

from __future__ import annotations

from dataclasses import dataclass, field

from fourfold.errors import ConfigError
from fourfold.training.preference_losses import DPO_LOSSES, KTO_LOSSES

__all__ = ["FIGURES", "METHODS", "PREFERENCE_METHODS", "MethodOptions"]

# method -> its losses by TRL's `loss_type`, the first its default; none to choose from where it has one only
PREFERENCE_METHODS: dict[str, tuple[str, ...]] = {
    "dpo": tuple(DPO_LOSSES),
    "kto": tuple(KTO_LOSSES),
    "orpo": (),
    "reward": (),
}
_SIDES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
_OF_PAIRS = (*_SIDES, "rewards/accuracies", "rewards/margins")
# method -> the figures of its evaluations, after eval_ or eval_NAME_
FIGURES: dict[str, tuple[str, ...]] = {
    "sft": ("loss", "mean_token_accuracy"),
    "pretrain": ("loss", "mean_token_accuracy"),
    "dpo": ("loss", "mean_token_accuracy", *_OF_PAIRS),
    "orpo": ("loss", "mean_token_accuracy", *_OF_PAIRS, "nll_loss", "log_odds_ratio"),
    "kto": ("loss", "mean_token_accuracy", *_SIDES, "kl"),
    "reward": ("loss", "accuracy", "margin", "mean_reward"),
}
METHODS = ("sft", "pretrain", *PREFERENCE_METHODS)


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What is learned, and how; the defaults are TRL's.

    Attributes:
        method: A name in `METHODS`.
        beta: How near the model stays to its reference (dpo, kto), or the weight of the odds (orpo).
        loss_type: Losses that are summed up, for dpo one or more, for kto one; none: the method's first.
        loss_weights: Weight of each; none: 1.
        label_smoothing: Share of pairs that are the wrong way round: dpo's robust, exo_pair and aot losses.
        precompute_ref_log_probs: dpo: whether the reference is asked once, before training.
        desirable_weight, undesirable_weight: kto: weights of good and of bad answers.
        center_rewards_coefficient: reward: weight of the squared sum of a pair's scores; None: 0.

    Raises:
        ConfigError: An unknown method or loss, or not as many weights as losses.
    """

    method: str = "sft"
    beta: float = 0.1
    loss_type: tuple[str, ...] = ()
    loss_weights: tuple[float, ...] = field(default=())
    label_smoothing: float = 0.0
    precompute_ref_log_probs: bool = False
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    center_rewards_coefficient: float | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError("method is not known", found=repr(self.method), allowed=METHODS)
        losses = PREFERENCE_METHODS.get(self.method, ())
        if unknown := [name for name in self.loss_type if name not in losses]:
            allowed = losses or "none: the method has one loss only"
            raise ConfigError(
                f"loss_type is no loss of method {self.method}", found=", ".join(unknown), allowed=allowed
            )
        if self.method == "kto" and len(self.loss_type) > 1:
            raise ConfigError("kto takes one loss", found=", ".join(self.loss_type), allowed=losses)
        if self.loss_weights and len(self.loss_weights) != len(self.losses):
            raise ConfigError(
                "loss_weights has not as many numbers as there are losses",
                found=len(self.loss_weights),
                allowed=f"{len(self.losses)}",
            )

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that are summed up."""
        return self.loss_type or PREFERENCE_METHODS.get(self.method, ())[:1]

    @property
    def weights(self) -> tuple[float, ...]:
        """The weight of each."""
        return self.loss_weights or (1.0,) * len(self.losses)
