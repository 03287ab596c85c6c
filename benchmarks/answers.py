"""How fast the engine answers: tokens a second by the number of sequences, and the time to the first token.

    python benchmarks/answers.py --shape 8b --batches 1 8 32 --json benchmarks/results/answers.json   # a GPU
    python benchmarks/answers.py --model MODEL_OR_RUN --batches 1 8 16 --generate

Each row answers random prompts of `--prompt-tokens` tokens, greedily over `--new-tokens` tokens, as many sequences at
a time as the row says, after a round that is not measured. `--generate` sets Transformers' own generate over the same
prompts beside it. With `--clock process` seconds are those of this process alone, on a machine that others use, too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from fourfold import FourfoldConfig, pipeline, prepare
from fourfold.inference import Engine, EngineOptions, Request, SamplingOptions
from fourfold.models.underlying import underlying
from fourfold.training.bench import random_model
from fourfold.training.run_folder import installed_versions


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a model or a run, or a hub's name")
    parser.add_argument("--shape", help="random weights of this shape instead: 8b, 1b, tiny")
    parser.add_argument("--quant-type", default="nf4", help="of --shape's weights; none for 16 bits")
    parser.add_argument("--lora-r", type=int, help="of an adapter on all linear layers of --shape, which answers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--first-token-of", type=int, default=1000, help="tokens of the prompt that is timed alone")
    parser.add_argument("--generate", action="store_true", help="Transformers' generate beside it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--clock", choices=("wall", "process"), default="wall")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    if args.model:
        session = pipeline.chat(args.model)
        return session.model, session.tokenizer
    config = None if args.quant_type == "none" else FourfoldConfig(bnb_4bit_quant_type=args.quant_type)
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = random_model(args.shape, config, dtype, device)
    tokenizer = _numbers(model.config.vocab_size)
    if args.lora_r:
        lora = LoraConfig(r=args.lora_r, target_modules="all-linear", init_lora_weights=False)
        return prepare(model, lora), tokenizer
    return model, tokenizer


def _numbers(vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for a model that has none: each token is a number."""
    from tokenizers import Tokenizer, models

    vocab = {f"{number} ": number for number in range(vocab_size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="0 ")))


def measured(args: argparse.Namespace, model: Any, tokenizer: Any, batch: int) -> dict[str, Any]:
    clock: Callable[[], float] = time.process_time if args.clock == "process" else time.perf_counter
    options = EngineOptions(max_sequences=batch, max_length=args.prompt_tokens + args.new_tokens + 1)
    engine = Engine(model, tokenizer, options)
    sampling = SamplingOptions(temperature=args.temperature, top_p=args.top_p)
    row: dict[str, Any] = {"sequences": batch}
    for round_number in range(2):
        prompts = random_prompts(model, batch, args.prompt_tokens, seed=round_number)
        sequences = [
            engine.submit(
                Request(tuple(prompt), sampling, args.new_tokens, ignore_eos=True, adapter=args.lora_r and "default")
            )
            for prompt in prompts
        ]
        start = clock()
        while not all(sequence.token_ids for sequence in sequences):
            engine.step()
        read, before = clock(), sum(len(sequence.token_ids) for sequence in sequences)
        while engine.has_work:
            engine.step()
        end = clock()
        row["prefill_seconds"] = read - start
        row["decode_tokens_per_second"] = (batch * args.new_tokens - before) / (end - read)
        row["tokens_per_second"] = batch * args.new_tokens / (end - start)
    if args.generate:
        input_ids = torch.tensor(prompts, device=model.device)
        arguments = {"attention_mask": torch.ones_like(input_ids), "do_sample": False}
        for _ in range(2):
            start = clock()
            tokens = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
            with torch.no_grad():
                model.generate(input_ids=input_ids, **arguments, **tokens)
            _synchronize(model)
            row["generate_tokens_per_second"] = batch * args.new_tokens / (clock() - start)
    return row


def first_token(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, float]:
    """Seconds to the first token of a prompt alone, beside one plain pass over it."""
    length = args.first_token_of
    engine = Engine(model, tokenizer, EngineOptions(max_sequences=1, max_length=length + 2, reuse_prefixes=False))
    prompt = random_prompts(model, 1, length, seed=0)[0]
    seconds = []
    for _ in range(3):
        sequence = engine.submit(Request(tuple(prompt), max_new_tokens=1, adapter=args.lora_r and "default"))
        while engine.has_work:
            engine.step()
        seconds.append((sequence.first_token_at or 0) - sequence.submitted_at)
    input_ids = torch.tensor([prompt], device=model.device)
    plain = []
    for _ in range(3):
        start = time.perf_counter()
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
        _synchronize(model)
        plain.append(time.perf_counter() - start)
    return {"prompt_tokens": length, "first_token_seconds": min(seconds), "one_pass_seconds": min(plain)}


def random_prompts(model: Any, count: int, length: int, seed: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(seed)
    vocab_size = underlying(model).config.get_text_config(decoder=True).vocab_size
    prompts: list[list[int]] = torch.randint(vocab_size, (count, length), generator=draw).tolist()
    return prompts


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    args = arguments()
    if (args.model is None) == (args.shape is None):
        raise SystemExit("give --model or --shape")
    model, tokenizer = load(args)
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model or args.shape} on {device}, prompts of {args.prompt_tokens} tokens, {args.new_tokens} new ones")
    rows = []
    for batch in args.batches:
        row = measured(args, model, tokenizer, batch)
        rows.append(row)
        print("  ".join(f"{name} {value:,.2f}" for name, value in row.items()), flush=True)
    alone = first_token(args, model, tokenizer)
    print("  ".join(f"{name} {value:,.3f}" for name, value in alone.items()))
    if args.json:
        record = {"model": args.model or args.shape, "device": device, "versions": installed_versions()}
        chosen = {"prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "clock": args.clock}
        args.json.write_text(json.dumps(record | chosen | {"rows": rows, "first_token": alone}, indent=2) + "\n")


if __name__ == "__main__":
    main()
