"""Trainers that learn from preferences: DPO and ORPO from pairs of answers, KTO from answers marked good or bad.

They are the trainer of supervised fine-tuning with another loss, so that blocks, optimizers, checkpoints, interrupts
and logs are the same. TRL's own trainers for these methods tokenize the rows themselves, keep a second adapter for the
reference, and put a head of their own on the model; the numbers here are theirs, which tests compare.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from fourfold.data import IGNORE_INDEX, model_inputs
from fourfold.data.preference import (
    ALL_LABELS,
    ALL_POSITIONS,
    KL_PREFIX,
    REFERENCE,
    REFERENCE_COLUMNS,
    AnswerCollator,
    PairCollator,
)
from fourfold.errors import ConfigError
from fourfold.models.underlying import underlying
from fourfold.training.batches import ROW_NUMBERS, Collator
from fourfold.training.building import trainer_arguments
from fourfold.training.checkpoint import find_checkpoint
from fourfold.training.evaluation_sets import EvalDataset, as_the_trainer_takes_them, by_name, prefix_of
from fourfold.training.hidden_states import takes_logits_to_keep
from fourfold.training.means import Means
from fourfold.training.methods import MethodOptions
from fourfold.training.options import TrainingOptions
from fourfold.training.preference_losses import DPO_LOSSES, KTO_LOSSES, Pairs, odds_ratio_loss
from fourfold.training.reference import read_reference, write_reference
from fourfold.training.token_losses import TokenLosses, losses_of_logits, token_losses
from fourfold.training.trainer import FourfoldTrainer

__all__ = ["DPOTrainer", "KTOTrainer", "ORPOTrainer", "PreferenceTrainer", "RewardTrainer", "build_preference_trainer"]


class PreferenceTrainer(FourfoldTrainer):
    """What the methods share: the mean over a step's examples, and means of what TRL logs.

    The loss of an optimizer step is the mean over all examples (pairs, or answers) of all its microbatches and
    processes. Logged beside it are TRL's figures: rewards/chosen, rewards/rejected, rewards/accuracies, ...

    Args:
        method: What is learned.
    """

    rows_per_example = 2

    def __init__(self, *args: Any, method: MethodOptions, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.method = method
        self._means = {"train": Means(), "eval": Means()}

    @abstractmethod
    def example_losses(self, model: nn.Module, batch: dict[str, Any], means: Means) -> Tensor:
        """The loss of each example of a batch, [examples]; adds to `means` what is logged."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's loss, a scalar in fp32; there are no outputs to return."""
        means = self._means["train" if self.model.training else "eval"]
        losses = self.example_losses(model, inputs, means)
        means.add("loss", losses)
        if num_items_in_batch is None:
            return losses.mean()
        # The number is that of all processes, and DDP averages the gradients over them.
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, _ = super().get_batch_samples(*args, **kwargs)
        rows = sum(len(batch["input_ids"]) for batch in batches)
        number = torch.tensor(rows // self.rows_per_example, device=self.args.device)
        return batches, self.accelerator.reduce(number, reduction="sum")

    def token_losses(
        self,
        model: nn.Module,
        batch: dict[str, Any],
        labels: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> TokenLosses:
        """The cross entropy of each supervised token of a batch.

        Args:
            model: What is called.
            batch: Of `fourfold.data.Collator`.
            labels, positions: Others than the batch's, int64 [batch, seq], and `supervised_positions` of them.
        """
        if labels is None:
            labels, positions = batch["labels"], batch.get("supervised_positions")
        base = underlying(self.model)
        hidden = self.hidden_states(model, batch) if takes_logits_to_keep(base) else None
        with self.accelerator.autocast():
            if hidden is None:
                logits = model(**model_inputs(base, batch), use_cache=False).logits
                return losses_of_logits(logits, labels, positions)
            with self._whole.head(base) as lm_head:
                return token_losses(hidden, labels, lm_head, positions)

    def count(self, losses: TokenLosses, batch: dict[str, Any]) -> None:
        """Add a batch to what the trainer logs of tokens."""
        mode = "train" if self.model.training else "eval"
        self._tallies[mode].add(losses.summed(), batch["attention_mask"].sum())

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within, without gradients, the model is the one that it is compared with: the base, its adapter off."""
        assert isinstance(self.model, PeftModel)
        with torch.no_grad(), self.model.disable_adapter():
            yield

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._means["eval"] = Means()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        figures = self._means["eval"].take(self.accelerator, self.args.device)
        output.metrics.update({f"{prefix}_{name}": value for name, value in figures.items()})
        return output

    def running_sums(self) -> dict[str, Tensor | float]:
        return super().running_sums() | self._means["train"].sums()

    def run_on(self, sums: dict[str, Any]) -> None:
        super().run_on(sums)
        self._means["train"] = Means.from_sums(sums)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            figures = self._means["train"].take(self.accelerator, self.args.device)
            figures.pop("loss", None)
            logs |= figures
        super().log(logs, start_time)


def _with_reference(rows: Dataset, values: Tensor) -> Dataset:
    """The rows with columns of `values`, [rows, 2]."""
    rows = rows.with_format(None)
    rows = rows.remove_columns([column for column in REFERENCE_COLUMNS if column in rows.column_names])
    for column, numbers in zip(REFERENCE_COLUMNS, values.T.tolist(), strict=True):
        rows = rows.add_column(column, numbers)
    return rows


def _halves(values: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected: a batch holds all chosen answers, then all rejected ones in the same order."""
    chosen, rejected = values.chunk(2)
    return chosen, rejected


def _add_rewards(means: Means, chosen: Tensor, rejected: Tensor) -> None:
    means.add("rewards/chosen", chosen)
    means.add("rewards/rejected", rejected)
    means.add("rewards/accuracies", (chosen > rejected).float())
    means.add("rewards/margins", chosen - rejected)


class DPOTrainer(PreferenceTrainer):
    """Direct Preference Optimization, https://arxiv.org/abs/2305.18290, by the losses of `DPO_LOSSES`.

    The reference is the base with its adapter off; or, precomputed, the model as it is when training begins, whose
    log-probabilities stand in the run folder and are read from there when a run goes on.
    """

    def example_losses(self, model: nn.Module, batch: dict[str, Any], means: Means) -> Tensor:
        ref = batch.pop(REFERENCE, None)
        if ref is None:
            # Before the policy's pass: what that keeps for its backward pass may lie where this one works.
            with self.reference():
                ref, _ = self.token_losses(model, batch).by_row()
        losses = self.token_losses(model, batch)
        self.count(losses, batch)
        log_probs, lengths = losses.by_row()
        pairs = Pairs(
            *_halves(log_probs),
            *_halves(ref.to(log_probs)),
            *_halves(lengths),
            beta=self.method.beta,
            smoothing=self.method.label_smoothing,
        )
        _add_rewards(means, self.method.beta * pairs.good, self.method.beta * pairs.bad)
        means.add("logps/chosen", pairs.chosen)
        means.add("logps/rejected", pairs.rejected)
        kinds = zip(self.method.losses, self.method.weights, strict=True)
        return torch.stack([weight * DPO_LOSSES[name](pairs) for name, weight in kinds]).sum(dim=0)

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> TrainOutput:
        if self.method.precompute_ref_log_probs:
            self._add_reference(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, **kwargs)

    def _add_reference(self, resume_from_checkpoint: str | Path | None) -> None:
        """Columns of the reference's log-probabilities, computed now, or read where a run goes on."""
        assert isinstance(self.train_dataset, Dataset)
        datasets = {"train": self.train_dataset}
        datasets |= {prefix_of(name): rows for name, rows in by_name(self.eval_dataset).items()}
        resume = find_checkpoint(Path(self.args.output_dir), resume_from_checkpoint)
        if resume is None:
            computed = {name: self._reference_of(dataset, name) for name, dataset in datasets.items()}
        else:
            computed = read_reference(resume.parent, {name: len(dataset) for name, dataset in datasets.items()})
        if self.args.should_save:
            write_reference(Path(self.args.output_dir), computed)
        self.use_reference(computed)

    def use_reference(self, computed: dict[str, Tensor]) -> None:
        """Take the reference's log-probabilities of "train" rows and of held-out ones by `prefix_of` their set, each
        [rows, 2] in fp32."""
        if "train" in computed:
            self.train_dataset: Any = _with_reference(self.train_dataset, computed["train"])
        held_out = by_name(self.eval_dataset)
        known = {name: prefix_of(name) for name in held_out if prefix_of(name) in computed}
        held_out |= {name: _with_reference(held_out[name], computed[prefix]) for name, prefix in known.items()}
        self.eval_dataset: EvalDataset = as_the_trainer_takes_them(held_out)

    def _reference_of(self, dataset: Dataset, name: str) -> Tensor:
        """[rows, 2]: log-probabilities of the chosen and the rejected answers by the model as it is."""
        size = self.args.per_device_train_batch_size if name == "train" else self.args.per_device_eval_batch_size
        was_training = self.model.training
        # In training mode there is nothing that varies either, and fused blocks take the kernels of training.
        self.model.train()
        found = []
        with torch.no_grad():
            for start in range(0, len(dataset), size):
                rows = [dataset[index] for index in range(start, min(start + size, len(dataset)))]
                batch = self._prepare_inputs(self.data_collator(rows))
                batch.pop(ROW_NUMBERS, None)
                log_probs, _ = self.token_losses(self.model, batch).by_row()
                found.append(torch.stack(_halves(log_probs), dim=1).float().cpu())
        self.model.train(was_training)
        return torch.cat(found)


class ORPOTrainer(PreferenceTrainer):
    """Odds Ratio Preference Optimization, https://arxiv.org/abs/2403.07691, which needs no reference.

    The loss of a microbatch is the cross entropy of its chosen rows, prompts included as in TRL, and `beta` times the
    odds ratio loss of the answers.
    """

    def example_losses(self, model: nn.Module, batch: dict[str, Any], means: Means) -> Tensor:
        # One pass gives both: all tokens of the chosen rows for the cross entropy, those with a label for the odds.
        wanted, positions = batch.pop(ALL_LABELS), batch.pop(ALL_POSITIONS)
        losses = self.token_losses(model, batch, wanted, positions)
        self.count(losses, batch)
        is_answer = batch["labels"].reshape(-1).index_select(0, positions + 1) != IGNORE_INDEX
        log_probs, lengths = losses.by_row(is_answer)
        chosen, rejected = _halves(log_probs / lengths.clamp(min=1))
        num_pairs = len(chosen)
        of_chosen = (losses.rows < num_pairs).to(losses.losses)
        cross_entropy = (losses.losses * of_chosen).sum() / of_chosen.sum().clamp(min=1)
        odds = odds_ratio_loss(chosen, rejected)
        beta = self.method.beta
        _add_rewards(means, beta * chosen, beta * rejected)
        means.add("logps/chosen", chosen)
        means.add("logps/rejected", rejected)
        means.add("nll_loss", cross_entropy.expand(num_pairs))
        means.add("log_odds_ratio", -odds)
        return cross_entropy + beta * odds


class KTOTrainer(PreferenceTrainer):
    """Kahneman-Tversky Optimization, https://arxiv.org/abs/2402.01306: answers that are good or bad, each by itself.

    The KL between policy and reference is estimated from the microbatch's prompts, each with the answer of the row
    before it; the reference is the base with its adapter off.
    """

    rows_per_example = 1

    def example_losses(self, model: nn.Module, batch: dict[str, Any], means: Means) -> Tensor:
        is_good = batch.pop("label").bool()
        names = [name for name in batch if name.startswith(KL_PREFIX)]
        mismatched = {name.removeprefix(KL_PREFIX): batch.pop(name) for name in names}
        kl = torch.zeros((), device=self.args.device)
        if self.method.losses == ("kto",):
            with torch.no_grad():
                policy, _ = self.token_losses(model, mismatched).by_row()
            with self.reference():
                ref, _ = self.token_losses(model, mismatched).by_row()
            kl = self.accelerator.reduce((policy - ref).mean(), reduction="mean").clamp(min=0)
        # Before the policy's pass: what that keeps for its backward pass may lie where this one works.
        with self.reference():
            ref, _ = self.token_losses(model, batch).by_row()
        losses = self.token_losses(model, batch)
        self.count(losses, batch)
        log_probs, _ = losses.by_row()
        ratios = log_probs - ref
        sign = torch.where(is_good, 1.0, -1.0).to(ratios)
        weight = torch.where(is_good, self.method.desirable_weight, self.method.undesirable_weight).to(ratios)
        rewards = self.method.beta * ratios.detach()
        for name, chosen in (("chosen", is_good), ("rejected", ~is_good)):
            means.add(f"rewards/{name}", rewards * chosen, chosen.sum())
            means.add(f"logps/{name}", log_probs * chosen, chosen.sum())
        means.add("kl", kl.expand(len(ratios)))
        return weight * KTO_LOSSES[self.method.losses[0]](ratios, sign, kl, self.method.beta)


class RewardTrainer(PreferenceTrainer):
    """A model that scores answers, from which of two is the better: -log s(score+ - score-), Bradley and Terry.

    The model is a sequence classifier of one label, whose score is read at the last token. Logged are TRL's accuracy,
    margin and mean_reward.
    """

    def example_losses(self, model: nn.Module, batch: dict[str, Any], means: Means) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        chosen, rejected = _halves(model(**inputs, use_cache=False).logits.squeeze(-1).float())
        margins = chosen - rejected
        means.add("accuracy", (margins > 0).float())
        means.add("margin", margins)
        means.add("mean_reward", (chosen + rejected) / 2)
        losses = -nn.functional.logsigmoid(margins)
        if self.method.center_rewards_coefficient is not None:
            # https://arxiv.org/abs/2312.09244, equation 2
            losses = losses + self.method.center_rewards_coefficient * (chosen + rejected) ** 2
        return losses


TRAINERS: dict[str, type[PreferenceTrainer]] = {
    "dpo": DPOTrainer,
    "orpo": ORPOTrainer,
    "kto": KTOTrainer,
    "reward": RewardTrainer,
}


def build_preference_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: EvalDataset,
    collator: Collator,
    options: TrainingOptions,
    method: MethodOptions,
    callbacks: Sequence[TrainerCallback] = (),
    *,
    max_length: int = 1024,
) -> PreferenceTrainer:
    """A trainer for rows of `fourfold.data.prepare_preferences`.

    Args:
        model, tokenizer, options, callbacks: As `build_trainer`.
        train_dataset, eval_dataset: Pairs, or marked answers, tokenized; several held-out sets by name.
        collator: From rows of `input_ids` and `labels` to tensors, as `fourfold.data.Collator`.
        method: What is learned.
        max_length: Tokens to which KTO's mismatched rows are cut.

    Raises:
        ConfigError: As `build_trainer`; or a reference that the model has not: without an adapter there is none.
    """
    needs_base = method.method == "kto" or (method.method == "dpo" and not method.precompute_ref_log_probs)
    if needs_base and not isinstance(model, PeftModel):
        raise ConfigError(
            f"method {method.method} refers to the base without its adapter, and there is no adapter",
            hint="add one, or for dpo give precompute_ref_log_probs: true",
        )
    if method.method == "reward":
        if getattr(model.config, "num_labels", None) != 1 or not hasattr(underlying(model), "score"):
            raise ConfigError(
                "the model gives no score",
                found=type(underlying(model)).__name__,
                allowed="a sequence classifier of one label, as load_model(..., num_labels=1) gives it",
            )
        # By which it tells where a row ends.
        underlying(model).config.pad_token_id = tokenizer.pad_token_id
    collators: dict[str, Collator] = {
        "kto": AnswerCollator(collator, max_length, with_kl=method.losses == ("kto",)),
        "orpo": PairCollator(collator, with_prompts=True),
    }
    chosen = collators.get(method.method, PairCollator(collator))
    arguments = trainer_arguments(model, tokenizer, train_dataset, eval_dataset, chosen, options, callbacks)
    return TRAINERS[method.method](**arguments, method=method)
