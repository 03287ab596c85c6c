"""A model as lm-evaluation-harness takes one: its own interface, `lm_eval.api.model.TemplateLM`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fourfold.errors import ConfigError
from fourfold.evaluation.likelihood import continuation_likelihoods, longest_input
from fourfold.inference import GenerationOptions, generate_replies

__all__ = ["HarnessModel"]

_MAX_NEW_TOKENS = 256


class HarnessModel(TemplateLM):
    """A causal LM of Transformers, or a PEFT model around one, with its tokenizer, for the harness.

    What is asked is the harness's; the numbers come from `continuation_likelihoods` and `generate_replies`.

    Args:
        model: The model, on any device.
        tokenizer: Its tokenizer.
        batch_size: Requests at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int = 8) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = longest_input(model)

    @property
    def eot_token_id(self) -> int:
        end: int = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        begin: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's cache of rendered questions."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; without a word on special tokens, those that the text does not begin with itself."""
        if add_special_tokens is None:
            begin = self.tokenizer.bos_token
            add_special_tokens = not (begin and string.startswith(begin))
        ids: list[int] = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns as a text, up to where the answer begins, or to where a turn that was begun goes on."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(before or [self.prefix_token_id], scored) for _, before, scored in requests]
        found = continuation_likelihoods(self.model, pairs, self.batch_size)
        return [(likelihood.log_prob, likelihood.is_greedy) for likelihood in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows as long as the model's positions that score each token once."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = [
                make_disjoint_window(window)
                for window in get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            scored = self._loglikelihood_tokens([(None, before, after) for before, after in windows])
            totals.append(sum(log_prob for log_prob, _ in scored))
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers that end before a stop string, after so many tokens, or where the model ends them."""
        answers: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in groups.values():
            options = self._options(requests[indices[0]].args[1])
            room = self.max_length - options.max_new_tokens
            if room < 1:
                raise ConfigError(
                    "max_gen_toks of a task leaves no room for the question",
                    found=options.max_new_tokens,
                    allowed=f"below the model's {self.max_length} positions",
                )
            prompts = [self.tok_encode(requests[index].args[0])[-room:] for index in indices]
            replies = generate_replies(self.model, self.tokenizer, prompts, options)
            answers |= zip(indices, replies, strict=True)
        return [answers[index] for index in range(len(requests))]

    def _options(self, asked: Mapping[str, Any]) -> GenerationOptions:
        """The task's `generation_kwargs`."""
        until = asked.get("until") or ()
        samples = asked.get("do_sample", False) and asked.get("temperature", 1.0) > 0
        return GenerationOptions(
            max_new_tokens=int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or _MAX_NEW_TOKENS),
            temperature=float(asked.get("temperature", 1.0)) if samples else 0.0,
            top_p=float(asked.get("top_p", 1.0)) if samples else 1.0,
            batch_size=self.batch_size,
            stop=(until,) if isinstance(until, str) else tuple(until),
        )
