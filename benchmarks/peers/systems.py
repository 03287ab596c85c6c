"""The systems that end_to_end.py compares: how each loads a model in 4 bits, adapts it and gives a loss.

Each is used as its own documentation says: Unsloth by FastLanguageModel, PEFT with bitsandbytes by
`prepare_model_for_kbit_training` under autocast (as TRL does), Liger by its patch of Transformers' Llama, fourfold by
its public functions. Their libraries are imported inside, so that a process holds one system and its patches alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Job:
    """One system in one setting.

    Args:
        model: Folder of a 16-bit checkpoint.
        recompute: Whether activations are computed again in the backward pass.
        policy: fourfold's recomputation policy, of `fourfold.models.recomputation.POLICIES`; None where the blocks
            are not fused: then gradient checkpointing, if `recompute` is set.
        dtype: What is computed in.
    """

    system: str
    model: str
    batch: int
    seq: int
    recompute: bool
    policy: str | None
    device: str
    dtype: str = "bfloat16"
    rank: int = 16
    learning_rate: float = 1e-4
    steps: int = 6
    warm_up: int = 3

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class Training:
    """A system that is ready to train.

    Args:
        loss: From token ids [batch, seq], all of them labelled, to the mean cross entropy of the next token.
    """

    model: nn.Module
    loss: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer


def fourfold(job: Job, *, fused: bool | None = None) -> Callable[[], Training]:
    import fourfold
    from fourfold.data.packing import supervised_positions
    from fourfold.models.attention import Documents
    from fourfold.models.attention_interface import ATTENTION_NAME, document_mask
    from fourfold.training.loss import supervised_cross_entropy

    model = fourfold.load_model(
        job.model, quantization=fourfold.FourfoldConfig(), dtype=job.torch_dtype, device=job.device
    )

    def adapt() -> Training:
        from peft import LoraConfig

        if job.recompute and job.policy is None:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        config = LoraConfig(r=job.rank, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
        prepared = fourfold.prepare(model, config, fused=fused, recompute=job.policy)
        base = prepared.get_base_model()
        # Found once, as the collator does it beside the training: every token has a label.
        positions = supervised_positions(torch.zeros(job.batch, job.seq, dtype=torch.int64)).to(job.device)

        # As the trainer does: rows named as documents, for which no dense mask is made and nothing synchronises.
        mask = None
        if base.config._attn_implementation == ATTENTION_NAME:
            boundaries = torch.arange(0, job.batch * job.seq + 1, job.seq, dtype=torch.int32, device=job.device)
            mask = document_mask(Documents(boundaries, job.seq))

        def loss(ids: Tensor) -> Tensor:
            hidden_states = base.base_model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            supervised = supervised_cross_entropy(hidden_states, ids, base.get_output_embeddings(), positions)
            return supervised.loss_sum / (ids.shape[0] * (ids.shape[1] - 1))

        return Training(prepared, loss, _our_optimizer(prepared, job))

    return adapt


def _our_optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    from fourfold.optimizers import AdamW

    # On the CPU the peers have 32-bit state, for want of an 8-bit one.
    state_bits = 8 if job.device == "cuda" else 32
    return AdamW(trainable(model), lr=job.learning_rate, weight_decay=0.01, state_bits=state_bits)


def fourfold_generic(job: Job) -> Callable[[], Training]:
    return fourfold(job, fused=False)


def unsloth(job: Job) -> Callable[[], Training]:
    from unsloth import FastLanguageModel

    model, _ = FastLanguageModel.from_pretrained(
        job.model, max_seq_length=max(job.seq, 2048), dtype=job.torch_dtype, load_in_4bit=True
    )

    def adapt() -> Training:
        FastLanguageModel.for_training(model)
        adapted = FastLanguageModel.get_peft_model(
            model,
            r=job.rank,
            target_modules=LINEARS,
            lora_alpha=16,
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth" if job.recompute else False,
            random_state=0,
        )
        return Training(adapted, lambda ids: adapted(input_ids=ids, labels=ids).loss, _peers_optimizer(adapted, job))

    return adapt


def peft_bnb(job: Job) -> Callable[[], Training]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=job.torch_dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        job.model,
        quantization_config=quantization,
        dtype=job.torch_dtype,
        device_map={"": job.device},
        attn_implementation="sdpa",
    )

    def adapt() -> Training:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

        prepared = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=job.recompute,
            gradient_checkpointing_kwargs={"use_reentrant": False} if job.recompute else None,
        )
        prepared.config.use_cache = False
        config = LoraConfig(r=job.rank, lora_alpha=16, target_modules=LINEARS, bias="none", task_type="CAUSAL_LM")
        adapted = get_peft_model(prepared, config)

        def loss(ids: Tensor) -> Tensor:
            with torch.autocast(job.device, job.torch_dtype, enabled=job.dtype != "float32"):
                return adapted(input_ids=ids, labels=ids, use_cache=False).loss

        return Training(adapted, loss, _peers_optimizer(adapted, job))

    return adapt


def peft_bnb_liger(job: Job) -> Callable[[], Training]:
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    apply_liger_kernel_to_llama(fused_linear_cross_entropy=True)
    return peft_bnb(job)


def _peers_optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    if job.device == "cuda":
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW8bit(trainable(model), lr=job.learning_rate, weight_decay=0.01)
    return torch.optim.AdamW(trainable(model), lr=job.learning_rate, weight_decay=0.01)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# name -> loads the model, and returns what adapts it
SYSTEMS: dict[str, Callable[[Job], Callable[[], Training]]] = {
    "fourfold": fourfold,
    "fourfold-generic": fourfold_generic,
    "unsloth": unsloth,
    "peft-bnb": peft_bnb,
    "peft-bnb-liger": peft_bnb_liger,
}
