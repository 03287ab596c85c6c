"""The trainer: TRL's, with an exact and cheap loss, whole checkpoints and an orderly way out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    PrinterCallback,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from fourfold.data import model_inputs
from fourfold.errors import ConfigError, TrainingError
from fourfold.memory.meter import memory_used
from fourfold.models.block import drop_graphs
from fourfold.models.underlying import underlying
from fourfold.training.batches import (
    ROW_NUMBERS,
    without_repeated,
)
from fourfold.training.best import KeepsBest, evaluation_is_due, name_best
from fourfold.training.checkpoint import (
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    load_optimizer_state,
    load_rng_state,
    prune_checkpoints,
    save_optimizer_state,
    save_rng_state,
    shared_checkpoint,
    write_manifest,
)
from fourfold.training.distributed import DISTRIBUTED, DistributedRow
from fourfold.training.early_stopping import keep_callback_states
from fourfold.training.evaluation_sets import by_name
from fourfold.training.guard import StepGuard, own_optimizer
from fourfold.training.hidden_states import last_hidden_states, takes_logits_to_keep
from fourfold.training.interrupt import (
    EvaluationInterrupted,
    InterruptCallback,
    TrainingInterrupted,
    catch_interrupts,
)
from fourfold.training.loss import SupervisedLoss, logits_agree, supervised_cross_entropy
from fourfold.training.out_of_memory import (
    OutOfMemory,
    is_out_of_memory,
    let_go,
    part_key,
    parts_in_use,
    standing_parts,
    with_rest,
)
from fourfold.training.parameter_groups import rates_of_groups, require_groups
from fourfold.training.progress import ProgressCallback
from fourfold.training.requantizing import save_changed_base
from fourfold.training.running import load_running, save_running
from fourfold.training.tally import Tally

__all__ = ["FourfoldTrainer"]

logger = logging.getLogger(__name__)


class FourfoldTrainer(KeepsBest):
    """TRL's SFTTrainer for an adapter or a whole model, and rows that are tokenized and masked already.

    - The loss of an optimizer step is the sum over all supervised tokens of all its microbatches and
      processes divided by their number; so is the evaluation loss. Only supervised positions go through
      the LM head.
    - Checkpoints are those of `fourfold.training.checkpoint`.
    - SIGINT and SIGTERM finish the step, save and raise `TrainingInterrupted`.
    - A loss or gradient that is not finite raises TrainingError and never reaches the weights.
    """

    def __init__(self, *args: Any, row: DistributedRow = DISTRIBUTED["ddp"], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.row, self._whole = row, row.state()
        by_deepspeed = row.zero_stage is not None
        if self.is_deepspeed_enabled is not by_deepspeed or self.is_fsdp_enabled:
            raise ConfigError(
                "accelerate is configured to share the model by itself",
                found="DeepSpeed or FSDP",
                allowed=f"key distributed: {', '.join(DISTRIBUTED)}",
                hint="start with `accelerate launch --multi_gpu`, or with torchrun",
            )
        if row.shard is not None and not by_deepspeed:
            # accelerate wraps in DDP what has not been prepared by anyone.
            self.model._is_accelerate_prepared = True
        if self.accelerator.ddp_handler is not None:
            # Gradients lie in what is reduced, and are not copied there.
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        # compute_loss divides by the tokens of the whole step, so the Trainer has to count them and must
        # not divide by the number of microbatches.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)  # disable_tqdm chose it; progress is told by our own callback
        self._guard = StepGuard(self.accelerator.scaler, self._total_norm)
        self._interrupt = InterruptCallback(self.args.device)
        self.add_callback(self._guard)
        self.add_callback(self._interrupt)
        self._tallies = {"train": Tally(), "eval": Tally()}
        self._tokens_seen = 0
        self._standing: dict[str, int] = {}
        self._head_is_plain: bool | None = None
        self._resuming = False
        self._restored: tuple[dict[str, Any], dict[str, Any]] | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the step's loss, a scalar in fp32.

        TRL's own loss serves the models whose logits are more than the LM head's output (a soft cap, a
        scale), mixtures of experts with a balancing loss, and callers that want the logits.
        """
        if not self.model.training:
            inputs = without_repeated(inputs, self.accelerator, self.args.per_device_eval_batch_size)
        if return_outputs or self.aux_loss_enabled or not takes_logits_to_keep(underlying(self.model)):
            loss = None
        else:
            loss = self._supervised_loss(model, inputs)
        if loss is None:
            forward_inputs = model_inputs(self.model, inputs) | {"labels": inputs["labels"]}
            return super().compute_loss(model, forward_inputs, return_outputs, num_items_in_batch)
        mask = inputs.get("attention_mask")
        num_tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        self._tallies["train" if self.model.training else "eval"].add(loss, num_tokens)
        # At least 1, so that a batch without a supervised token is a finite zero.
        num_items = torch.as_tensor(loss.num_tokens if num_items_in_batch is None else num_items_in_batch)
        mean = loss.loss_sum / num_items.clamp(min=1).to(loss.loss_sum.device)
        if num_items_in_batch is not None:
            # The count is that of all processes, and DDP averages the gradients over them.
            mean = mean * self.accelerator.num_processes
        return mean

    def _supervised_loss(self, model: nn.Module, inputs: dict[str, Any]) -> SupervisedLoss | None:
        """The loss from the last hidden states; None where the LM head's output is not the logits."""
        hidden_states = self.hidden_states(model, inputs)
        if hidden_states is None:
            return None
        positions = inputs.get("supervised_positions")
        with self.accelerator.autocast(), self._whole.head(underlying(self.model)) as lm_head:
            return supervised_cross_entropy(hidden_states, inputs["labels"], lm_head, positions)

    def hidden_states(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor | None:
        """What the LM head takes, [batch, seq, hidden]; None where its output is not the logits."""
        base = underlying(self.model)
        hidden_states, logits = last_hidden_states(model, base, inputs)
        if self._head_is_plain is None:
            with self.accelerator.autocast(), self._whole.head(base) as lm_head:
                head = lm_head(hidden_states[:, -1:].detach()).detach()
            self._head_is_plain = logits_agree(logits.detach(), head)
            if not self._head_is_plain:
                logger.info("%s scales or caps its logits; its own forward pass gives them", type(base).__name__)
        return hidden_states if self._head_is_plain else None

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._resuming:
            # Should the Trainer restore by hooks of other names one day, it must not go unnoticed.
            raise TrainingError(
                "The optimizer was not restored from the checkpoint",
                hint="this version of Transformers is not supported; use the one the run began with",
            )
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        self._guard.add_loss(loss)
        return loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._guard.begin([batch.pop(ROW_NUMBERS, []) for batch in batches])
        return batches, num_items

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        # The Trainer makes two groups, with and without weight decay, and adapters are all in one. DeepSpeed drops an
        # empty group, so nobody has one: a checkpoint's groups are the same however the run is shared.
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _total_norm(self, model: nn.Module) -> torch.Tensor:
        """Norm of the step's gradients, where the optimizer is not ours."""
        if self.row.zero_stage is not None:
            # DeepSpeed has made the step by now, or left it out: then this is infinite.
            norm = self.deepspeed.get_global_grad_norm()
            return torch.as_tensor(norm, dtype=torch.float32, device=self.args.device)
        return nn.utils.get_total_norm([value.grad for value in model.parameters() if value.grad is not None])

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | None:
        # Ours clips within its step.
        return None if own_optimizer(self.optimizer) else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        # The tensor that the coming step will write to: read only where it is logged, after that.
        own = own_optimizer(self.optimizer)
        return super()._get_grad_norm(model, grad_norm=grad_norm) if own is None else own.grad_norm

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The Trainer's loop, with the loss averaged over tokens; the Trainer's own averages over batches."""
        self._tallies["eval"] = Tally()
        # A data loader draws a number, which the steps after it would miss: the run is the same without evaluations.
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, **kwargs)
        loss_sum, num_supervised, num_correct, _ = self._take("eval")
        if num_supervised:
            prefix = kwargs.get("metric_key_prefix", "eval")
            output.metrics[f"{prefix}_loss"] = loss_sum / num_supervised
            output.metrics[f"{prefix}_mean_token_accuracy"] = num_correct / num_supervised
        return output

    def _take(self, mode: str) -> list[float]:
        """Sums over all processes since the last call: loss, supervised, correct and all tokens."""
        tally, self._tallies[mode] = self._tallies[mode], Tally()
        values = (tally.loss_sum, tally.num_supervised, tally.num_correct, tally.num_tokens)
        # fp64 counts tokens exactly where fp32 stops at 16 million; MPS has none.
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        sums = torch.stack([torch.as_tensor(value).to(self.args.device, dtype) for value in values])
        totals: list[float] = self.accelerator.reduce(sums, reduction="sum").tolist()
        return totals

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a training log: mean_token_accuracy, num_tokens, tokens_per_second and memory in bytes, by part."""
        if "loss" in logs:
            _, num_supervised, num_correct, num_tokens = self._take("train")
            self._tokens_seen += int(num_tokens)
            if num_supervised:
                logs["mean_token_accuracy"] = num_correct / num_supervised
                logs["num_tokens"] = self._tokens_seen
                logs["tokens_per_second"] = num_tokens / self._guard.seconds
            self._guard.seconds = 0.0
            logs |= self._guard.scaling() | rates_of_groups(self.optimizer, logs.get("learning_rate", 0.0))
            memory = memory_used(self.args.device)
            logs |= {"memory_current_bytes": memory.current_bytes, "memory_peak_bytes": memory.peak_bytes}
            if self.args.device.type == "cuda":
                # Elsewhere the process is measured, whose memory is no sum of these.
                if not self._standing:
                    # A log follows a step: the optimizer has its state.
                    self._standing = standing_parts(self.model, self.optimizer)
                logs |= {part_key(part): size for part, size in with_rest(self._standing, memory.peak_bytes).items()}
        super().log(logs, start_time)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has a card of its own, and the Trainer's would be written over it."""

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: "auto" for the newest whole checkpoint of the run folder, or a path.

        Raises:
            CheckpointError: The checkpoint is missing, not whole, a pickle, or of another model.
            TrainingInterrupted: SIGINT or SIGTERM came; a checkpoint was saved.
            OutOfMemory: A step did not fit; a checkpoint of those before was saved.
            TrainingError: The loss is not finite, or the disk is full.
        """
        resume = find_checkpoint(Path(self.args.output_dir), resume_from_checkpoint)
        sets = by_name(self.eval_dataset)
        self.args.eval_on_start = resume is not None and evaluation_is_due(resume, self.args, sets)
        self._interrupt.reset()
        self._resuming = resume is not None
        output: TrainOutput | None = None
        with catch_interrupts(self._interrupt):
            try:
                output = super().train(resume_from_checkpoint=str(resume) if resume else None, **kwargs)
            except EvaluationInterrupted:
                self._save_checkpoint(self.model, None)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                raise self._out_of_memory(error) from None
            finally:
                for callback in self.callback_handler.callbacks:
                    if isinstance(callback, ProgressCallback):
                        callback.close()
                # NEFTune's: after an error the Trainer leaves it, and the next one's would add to its noise.
                if (noise := getattr(self, "neftune_hook_handle", None)) is not None:
                    noise.remove()
        step, signal_number = self.state.global_step, self._interrupt.signal_number
        if signal_number is not None and (output is None or step < self.state.max_steps):
            raise TrainingInterrupted(signal_number, step, checkpoint_path(Path(self.args.output_dir), step))
        return output

    def _out_of_memory(self, error: RuntimeError) -> OutOfMemory:
        """Gives up the step that did not fit, and saves those before."""
        reason = str(error).splitlines()[0]
        parts = parts_in_use(self.model, self.optimizer, memory_used(self.args.device).peak_bytes)
        let_go(error)
        self.give_up_step()
        self.model.zero_grad(set_to_none=True)
        drop_graphs(self.model)
        step = self.state.global_step
        folder = checkpoint_path(Path(self.args.output_dir), step) if step else None
        if self.accelerator.num_processes > 1:
            # The others wait in a collective, and what all share cannot be saved by one.
            folder = next(reversed(list_checkpoints(Path(self.args.output_dir))), None)
        elif folder is not None and not folder.is_dir():
            self._save_checkpoint(self.model, None)
        return OutOfMemory(step, folder, parts, reason)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        self._guard.check()
        folder = checkpoint_path(Path(self.args.output_dir), self.state.global_step)
        self.store_flos()
        weights, optimizer = self._whole.weights(self.model), self._whole.optimizer(self.optimizer, self.model)
        with shared_checkpoint(folder, self.accelerator, is_main=self.args.should_save) as partial:
            save_rng_state(partial, self.args.process_index)
            save_running(partial, self.args.process_index, self.running_sums())
            if self.args.should_save:
                save_changed_base(self.callback_handler.callbacks, partial)
                self.model.save_pretrained(partial, **({} if weights is None else {"state_dict": weights}))
                self.processing_class.save_pretrained(partial)
                states = (optimizer, self.lr_scheduler.state_dict(), self._whole.shapes(self.model))
                groups = self._whole.groups(self.optimizer, self.model)
                save_optimizer_state(partial, *states, self.accelerator.scaler, groups)
                name_best(self.state, folder.parent, saving=folder)
                keep_callback_states(self.state, [*self.callback_handler.callbacks, self.control])
                self.state.save_to_json(str(partial / "trainer_state.json"))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_manifest(partial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save and self.args.save_total_limit is not None:
            prune_checkpoints(folder.parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """What is trained, whole, on the main process; None: the model holds it whole. All processes call this."""
        return self._whole.weights(self.model)

    def weigh_adapter(self, weight: float) -> None:
        """Multiply the adapter, when training has ended: the optimizer knows nothing of it. All processes call this."""
        self._whole.weigh(self.model, weight)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if self.row.zero_stage is None or resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        # The Trainer would look for DeepSpeed's own checkpoint, which is a pickle. Weights go into the model before
        # DeepSpeed parts it, optimizer state into its parts afterwards.
        self._load_from_checkpoint(resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Read before the adapter, so that a checkpoint of another model is told by the names that differ.
        path = Path(resume_from_checkpoint)
        self._restored = load_optimizer_state(path, self._whole.shapes(self.model), self.accelerator.scaler)
        self.load_weights(path)

    def load_weights(self, checkpoint: Path) -> None:
        if not self._whole.load_weights(self.model, checkpoint):
            super().load_weights(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._restored is None:
            return
        optimizer_state, scheduler_state = self._restored
        require_groups(optimizer_state.pop("names"), self._whole.groups(self.optimizer, self.model), checkpoint)
        self._whole.load_optimizer(self.optimizer, self.model, optimizer_state)
        self.lr_scheduler.load_state_dict(scheduler_state)
        self._restored = None
        self._resuming = False
        self._tokens_seen = max((int(entry.get("num_tokens", 0)) for entry in self.state.log_history), default=0)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        path, own = Path(checkpoint), (self.args.process_index, self.args.world_size)
        self.run_on(load_running(path, *own, self.args.device))
        index = self.args.process_index
        if index and not (path / f"rng_state_{index}.safetensors").is_file():
            set_seed(self.args.seed + index)  # the run had fewer processes
        else:
            load_rng_state(path, index)
