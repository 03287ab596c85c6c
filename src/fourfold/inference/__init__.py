"""Replies of a model: an engine of many sequences at a time, batches for evaluation, pieces for a chat."""

from __future__ import annotations

from fourfold.inference.cache import CacheShape, LayerShape, SlotCache
from fourfold.inference.choosing import step_for
from fourfold.inference.engine import Engine
from fourfold.inference.footprint import ServingFootprint, serving_footprint
from fourfold.inference.generate import (
    GenerationOptions,
    Message,
    eval_mode,
    generate_replies,
    not_in_engine,
    prompt_ids,
    require_template,
    stop_token_ids,
    stream_reply,
)
from fourfold.inference.generic_step import GenericStep
from fourfold.inference.logprobs import TokenLogprob
from fourfold.inference.options import EngineOptions
from fourfold.inference.requests import Chunk, Constraint, FinishReason, Request, Sequence
from fourfold.inference.sampling import SamplingOptions
from fourfold.inference.steps import Step

__all__ = [
    "CacheShape",
    "Chunk",
    "Constraint",
    "Engine",
    "EngineOptions",
    "FinishReason",
    "GenerationOptions",
    "GenericStep",
    "LayerShape",
    "Message",
    "Request",
    "SamplingOptions",
    "Sequence",
    "ServingFootprint",
    "SlotCache",
    "Step",
    "TokenLogprob",
    "eval_mode",
    "generate_replies",
    "not_in_engine",
    "prompt_ids",
    "require_template",
    "serving_footprint",
    "step_for",
    "stop_token_ids",
    "stream_reply",
]
