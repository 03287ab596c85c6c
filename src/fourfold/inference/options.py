"""How much an engine does at a time."""

from __future__ import annotations

from dataclasses import dataclass

from fourfold.errors import InferenceError
from fourfold.inference.cache import FIRST_BUCKET

__all__ = ["EngineOptions"]


@dataclass(frozen=True)
class EngineOptions:
    """How much an engine does at a time.

    Args:
        max_sequences: Sequences that run at a time: slots of the cache. None for as many as fit, up to 64.
        max_length: Tokens of prompt and answer together, at most the model's context. None for as many as it has, or
            as fit.
        prefill_chunk: Tokens of prompts that a step reads while sequences run, so that these do not stall for long.
        prefill_alone: Tokens that it reads at once while none does, if that is more.
        first_bucket: Tokens a slot has room for at first; it doubles as needed.
        reuse_prefixes: Whether a prompt may go on from what an ended sequence left in its slot.
        memory_bytes: What cache and passes may take beside the model. None for what the device has left.
        run_ahead: Whether a pass begins before the tokens of the one before have been read, so that a GPU does not wait
            for the host. What only a token can tell, such as a stop, is known a pass later, which was for nothing. None
            for doing so on a GPU.

    Raises:
        InferenceError: A value that is not allowed.
    """

    max_sequences: int | None = 8
    max_length: int | None = 2048
    prefill_chunk: int = 512
    prefill_alone: int = 2048
    first_bucket: int = FIRST_BUCKET
    reuse_prefixes: bool = True
    memory_bytes: int | None = None
    run_ahead: bool | None = None

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_length", "prefill_chunk", "prefill_alone", "first_bucket", "memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InferenceError(name, found=value, allowed="at least 1")
