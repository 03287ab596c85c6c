"""Replies of a model to conversations: in batches, or piece by piece for a chat."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from fourfold.errors import ConfigError, DataError
from fourfold.inference.sampling import SamplingOptions
from fourfold.inference.text import StopStrings

__all__ = [
    "GenerationOptions",
    "Message",
    "eval_mode",
    "generate_replies",
    "not_in_engine",
    "prompt_ids",
    "require_template",
    "stop_token_ids",
    "stream_reply",
]

Message = dict[str, str]
"""One turn of a conversation: `{"role": ..., "content": ...}`."""

Progress = Callable[[int, int], None]
"""Called with how many are done and how many there are."""


@dataclass(frozen=True)
class GenerationOptions:
    """How a reply is generated.

    Attributes:
        max_new_tokens: Tokens a reply may have.
        temperature: 0 takes the likeliest token each time (greedy).
        top_p: Share of probability that is sampled from; only with a temperature.
        batch_size: Conversations at a time.
        seed: Seed of the sampling; the caller's random state is left as it was.
        top_k: Only the k likeliest tokens, 0 for all; only with a temperature. None for what the model's generation
            config says.
        min_p: Only tokens that are at least this share as likely as the likeliest; only with a temperature.
        repetition_penalty: What the logits of tokens that were there are divided by. None for what the model's
            generation config says.
        stop: Texts that end a reply and are not part of it.

    Raises:
        ConfigError: A value that is not allowed.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    batch_size: int = 16
    seed: int = 0
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError("key max_new_tokens", found=self.max_new_tokens, allowed="at least 1")
        if self.batch_size < 1:
            raise ConfigError("key batch_size", found=self.batch_size, allowed="at least 1")
        if "" in self.stop:
            raise ConfigError("key stop", found='""', allowed="texts of at least one character")
        self.sampling(GenerationConfig())

    def sampling(self, config: GenerationConfig) -> SamplingOptions:
        """How tokens are chosen, by these options and, where they leave it open, the model's generation config."""
        penalty = self.repetition_penalty or getattr(config, "repetition_penalty", None)
        top_k = getattr(config, "top_k", None) if self.top_k is None else self.top_k
        return SamplingOptions(
            temperature=self.temperature,
            top_k=top_k or 0,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=1.0 if penalty is None else penalty,
            seed=self.seed,
        )


def generate_replies(
    model: Any,
    tokenizer: Any,
    conversations: Sequence[list[Message] | str],
    options: GenerationOptions,
    on_progress: Progress | None = None,
) -> list[str]:
    """The assistant's next turn in each conversation, or what follows a text, in the order given.

    Conversations of like length share a batch, padded on the left under an attention mask. Neither the
    tokenizer nor the model's mode is changed. Of the model's generation config, all but length, sampling and
    stop tokens holds.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one, on any device.
        tokenizer: Its tokenizer, for conversations with a chat template.
        conversations: Turns up to the one to be generated; or a text, which is continued as it is.
        options: How to generate.
        on_progress: Called after each batch with the conversations done and their number.

    Raises:
        DataError: The tokenizer has no chat template.
    """
    if any(not isinstance(conversation, str) for conversation in conversations):
        require_template(tokenizer)
    config = _generation_config(model, tokenizer, options)
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    # Longest first: what does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    replies = [""] * len(prompts)
    with eval_mode(model), _contiguous_head_input(model), _seeded(options.seed), torch.no_grad():
        for start in range(0, len(order), options.batch_size):
            chosen = order[start : start + options.batch_size]
            input_ids, attention_mask = _left_padded([prompts[index] for index in chosen], config.pad_token_id)
            generated = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=config,
                **_stopping(tokenizer, options),
            )
            texts = tokenizer.batch_decode(generated[:, input_ids.shape[1] :], skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                replies[index] = StopStrings(options.stop).whole(text)
            if on_progress is not None:
                on_progress(start + len(chosen), len(order))
    return replies


def stream_reply(model: Any, tokenizer: Any, messages: list[Message], options: GenerationOptions) -> Iterator[str]:
    """The assistant's next turn, piece by piece; joined, the pieces are what `generate_replies` returns.

    Closing the iterator (or leaving the loop over it) stops the generation after the token at hand.

    Raises:
        DataError: The tokenizer has no chat template.
    """
    require_template(tokenizer)
    config = _generation_config(model, tokenizer, options)
    input_ids = torch.tensor([prompt_ids(tokenizer, messages)], device=model.device)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stop = _Stop()
    failures: list[BaseException] = []

    def generate() -> None:
        try:
            with torch.no_grad():
                model.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=config,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stop]),
                )
        except BaseException as failure:
            # Raised again below, in the thread that reads: here nobody would see it.
            failures.append(failure)
            streamer.end()

    with eval_mode(model), _contiguous_head_input(model), _seeded(options.seed):
        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        try:
            texts = StopStrings(options.stop)
            for piece in streamer:
                text, is_stopped = texts.add(piece)
                if text:
                    yield text
                if is_stopped:
                    break
            if rest := texts.end():
                yield rest
        finally:
            stop.requested.set()
            thread.join()
    if failures:
        raise failures[0]


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a reply: the generation config's, the tokenizer's, the chat template's end of turn."""
    configured = model.generation_config.eos_token_id
    stops = set(configured if isinstance(configured, list) else [configured])
    stops.add(tokenizer.eos_token_id)
    stops.add(_turn_end_id(tokenizer) if tokenizer.chat_template else None)
    return sorted(stops - {None})


def _turn_end_id(tokenizer: Any) -> int | None:
    """The added token that the template writes right after an answer, where it writes one."""
    answer = "sentinel answer"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    _, _, rest = text.rpartition(answer)
    ids = tokenizer(rest.lstrip(), add_special_tokens=False)["input_ids"]
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


@contextmanager
def eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _contiguous_head_input(model: Any) -> Iterator[None]:
    """The output head sees contiguous hidden states.

    `generate` hands it a strided slice of the prompt's last position. With a frozen weight PyTorch then takes a batched
    product, for which the CPU copies the head once for each row: 3.2 GB at 60 rows of a 576 x 49,152 head in bf16.
    """
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # manual_seed seeds every GPU, so each one's state is put back; a GPU not yet in use is left alone.
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _generation_config(model: Any, tokenizer: Any, options: GenerationOptions) -> GenerationConfig:
    stops = stop_token_ids(model, tokenizer)
    config = deepcopy(model.generation_config)
    sampling = options.temperature > 0
    chosen = options.sampling(config)
    config.update(
        max_new_tokens=options.max_new_tokens,
        max_length=None,
        do_sample=sampling,
        temperature=options.temperature if sampling else 1.0,
        top_p=options.top_p if sampling else 1.0,
        # What is None here is filled in from the model's own again.
        min_p=options.min_p if sampling else None,
        repetition_penalty=chosen.repetition_penalty,
        num_beams=1,
        use_cache=True,
        eos_token_id=stops,
        # Padding stands under the attention mask, so a stop token does where there is no pad token.
        pad_token_id=stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    if not sampling:
        config.top_k = 50  # the library's default, which it takes as not set
    elif options.top_k is not None:
        config.top_k = options.top_k
    return config


# What of a generation config the engine has a way of its own for, or no use.
_ENGINE_KNOWS = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams", "use_cache"),
    *("max_length", "max_new_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "cache_implementation"),
    *("transformers_version", "num_return_sequences", "output_scores", "return_dict_in_generate"),
    *("output_attentions", "output_hidden_states", "output_logits", "compile_config", "disable_compile"),
}


def not_in_engine(config: GenerationConfig) -> str | None:
    """What a model's generation config asks for beside sampling and stop tokens; None for nothing."""
    asked = config.to_diff_dict()
    return (
        ", ".join(f"{name}={value}" for name, value in asked.items() if name not in _ENGINE_KNOWS and name[0] != "_")
        or None
    )


def _stopping(tokenizer: Any, options: GenerationOptions) -> dict[str, Any]:
    """What `generate` needs to end rows whose text has a stop string."""
    return {"stop_strings": list(options.stop), "tokenizer": tokenizer} if options.stop else {}


def require_template(tokenizer: Any) -> None:
    """Raises DataError where a tokenizer cannot write conversations."""
    if not tokenizer.chat_template:
        raise DataError("the tokenizer has no chat template", hint="set the key chat_template")


def prompt_ids(tokenizer: Any, messages: list[Message] | str) -> list[int]:
    """Tokens of a conversation up to where the assistant's turn begins, or of a text."""
    if isinstance(messages, str):
        text_ids: list[int] = tokenizer(messages)["input_ids"]
        return text_ids
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def _left_padded(prompts: list[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`input_ids` and `attention_mask`, int64, [batch, longest]."""
    width = max(map(len, prompts))
    input_ids = torch.tensor([[pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts])
    attention_mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return input_ids, attention_mask


class _Stop(StoppingCriteria):
    def __init__(self) -> None:
        self.requested = threading.Event()

    def __call__(self, input_ids: torch.Tensor, _scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.requested.is_set(), device=input_ids.device)
