"""Concurrent streams over `fourfold serve`: whether each is answered, and what the server adds to the engine's time.

    python benchmarks/serving.py MODEL --streams 8

runs the engine alone with so many requests at a time, in this process, then the server over the same engine, and its
clients in a process of their own: so the model, its cache and the kernels are the same. Both take the same prompts, and
tokens without end until `--tokens`. Rounds of the two take turns. The time per token is that of a step of all streams,
from the first token of the last stream on to the last token of the first; the server's is taken where tokens arrive, at
the clients. Beside it stands what the event loop's thread, which is all that the server is beside the engine, computed
for each token: other work on the machine changes that little. `--shape 8b` takes random weights in the shape of
Llama-3-8B, quantized to NF4; MODEL is the tokenizer then. The numbers go into `benchmarks/results/serving.json`, or
where `--json` says.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import multiprocessing
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2

from fourfold.environment import gather
from fourfold.hosted import find_hosted
from fourfold.hosting import load_hosted
from fourfold.inference import EngineOptions, Request
from fourfold.serving import Served, ServerOptions, open_socket
from fourfold.serving.server import make_server

RESULTS = Path(__file__).parent / "results" / "serving.json"
QUESTION = "Tell me about the sea, about ships, and about the people who sail them."


@dataclass
class Stream:
    """When the pieces of one stream came, in seconds, and how much each held: tokens, or characters as their measure.

    `failure`: Of one that did not end as it should.
    """

    times: list[float]
    sizes: list[int]
    num_tokens: int
    failure: str | None = None


def time_per_token(streams: list[Stream]) -> float:
    """Seconds of a step, while all of them run."""
    begin = max(stream.times[0] for stream in streams)
    end = min(stream.times[-1] for stream in streams)
    rates = []
    for stream in streams:
        inside = [number for number, moment in enumerate(stream.times) if begin <= moment <= end]
        share = sum(stream.sizes[number] for number in inside[1:]) / max(sum(stream.sizes), 1)
        seconds = stream.times[inside[-1]] - stream.times[inside[0]]
        rates.append(seconds / max(share * stream.num_tokens, 1))
    return statistics.fmean(rates)


def run_engine(served: Served, num_streams: int, num_tokens: int) -> list[Stream]:
    """The engine alone."""
    engine = served.engine
    messages = [[{"role": "user", "content": f"{index}. {QUESTION}"}] for index in range(num_streams)]
    render = engine.tokenizer.apply_chat_template
    prompts = [render(each, add_generation_prompt=True, return_dict=True)["input_ids"] for each in messages]
    running = {
        engine.submit(Request(tuple(prompt), max_new_tokens=num_tokens, ignore_eos=True)): Stream([], [], 0)
        for prompt in prompts
    }
    while engine.has_work:
        for chunk in engine.step():
            stream = running[chunk.sequence]
            stream.times.append(time.monotonic())
            stream.sizes.append(len(chunk.token_ids))
            stream.num_tokens += len(chunk.token_ids)
    return list(running.values())


async def read_stream(client: httpx2.AsyncClient, url: str, model: str, index: int, num_tokens: int) -> Stream:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"{index}. {QUESTION}"}],
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stream = Stream([], [], 0)
    try:
        async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    stream.failure = event["error"]["message"]
                elif event["choices"] and (text := event["choices"][0]["delta"].get("content")):
                    stream.times.append(time.monotonic())
                    stream.sizes.append(len(text))
                elif event["usage"]:
                    stream.num_tokens = event["usage"]["completion_tokens"]
        if stream.num_tokens != num_tokens:
            stream.failure = stream.failure or f"{stream.num_tokens} tokens of {num_tokens}"
    except httpx2.HTTPError as error:
        stream.failure = f"{type(error).__name__}: {error}"
    return stream


async def read_streams(url: str, model: str, num_streams: int, num_tokens: int) -> list[Stream]:
    limits = httpx2.Limits(max_connections=num_streams)
    async with httpx2.AsyncClient(timeout=600, limits=limits, trust_env=False) as client:
        return await asyncio.gather(
            *(read_stream(client, url, model, index, num_tokens) for index in range(num_streams))
        )


def clients(connection: Any, url: str, model: str, num_streams: int, num_tokens: int) -> None:
    """A process of its own: answers each "go" with the streams of a round."""
    while connection.recv() == "go":
        connection.send(asyncio.run(read_streams(url, model, num_streams, num_tokens)))


def load(words: argparse.Namespace) -> tuple[Served, str]:
    options = EngineOptions(max_sequences=words.streams, max_length=words.max_length, reuse_prefixes=False)
    if words.shape is None:
        hosted = find_hosted(words.model, name="model", load_in_4bit=words.load_in_4bit)
        return load_hosted(hosted, options), Path(words.model).name
    from fourfold.inference import Engine
    from fourfold.models.loading import default_device, default_dtype, load_tokenizer
    from fourfold.quantization.hf_config import FourfoldConfig
    from fourfold.training.bench import random_model

    model = random_model(words.shape, FourfoldConfig(), default_dtype(default_device()), default_device())
    return Served(
        Engine(model, load_tokenizer(words.model), options), {"model": None}
    ), f"random weights, {words.shape}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder or name; with --shape, where the tokenizer is")
    parser.add_argument("--shape", help="a shape of `fourfold bench`, in NF4")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--json", type=Path, default=RESULTS)
    words = parser.parse_args()
    sys.setswitchinterval(0.0005)  # as `fourfold.serving.serve` has it
    served, name = load(words)
    options = ServerOptions(port=0, max_waiting=words.streams)
    rounds: dict[str, list[float]] = {"engine": [], "server": []}
    firsts, failures, computed = [], [], []
    with open_socket(options) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        run_engine(served, words.streams, words.tokens)  # grows the cache, compiles
        ready = threading.Event()
        server = make_server(served, options, ready.set)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        ready.wait()
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(
            target=clients, args=(theirs, url, "model", words.streams, words.tokens)
        )
        process.start()
        clock = time.pthread_getcpuclockid(thread.ident or 0)
        for number in range(words.rounds + 1):
            # Between requests the server's thread waits, so that the engine is this one's for a while.
            alone = run_engine(served, words.streams, words.tokens)
            began, computed_before = time.monotonic(), time.clock_gettime(clock)
            ours.send("go")
            streams = ours.recv()
            loop_seconds = time.clock_gettime(clock) - computed_before
            failures += [stream.failure for stream in streams if stream.failure]
            if number == 0 or failures:
                continue  # connections and code are warm from here on
            rounds["engine"].append(time_per_token(alone))
            rounds["server"].append(time_per_token(streams))
            computed.append(loop_seconds / (words.streams * words.tokens))
            firsts += [stream.times[0] - began for stream in streams]
            print(f"engine {rounds['engine'][-1] * 1e3:.2f} ms, server {rounds['server'][-1] * 1e3:.2f} ms a step")
        ours.send("end")
        process.join()
        server.should_exit = True
        thread.join()
    machine = gather()
    medians = {name: statistics.median(values) if values else None for name, values in rounds.items()}
    record = {
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/serving.py MODEL --streams {words.streams} --tokens {words.tokens}"
        + (f" --shape {words.shape}" if words.shape else ""),
        "model": name,
        "processor": machine.cpu,
        "gpus": [gpu.name for gpu in machine.gpus],
        "versions": machine.versions
        | {package: version(package) for package in ("fastapi", "starlette", "uvicorn", "httpx2")},
        "streams": words.streams,
        "tokens": words.tokens,
        "failures": failures,
        "ms_per_step": {name: [round(value * 1e3, 3) for value in values] for name, values in rounds.items()},
        "overhead": None if not rounds["server"] else round(medians["server"] / medians["engine"] - 1, 4),
        "event_loop_us_per_token": [round(value * 1e6, 1) for value in computed],
        "event_loop_share": None
        if not computed
        else round(statistics.median(computed) * words.streams / medians["engine"], 4),
        "tokens_per_second": None if not rounds["server"] else round(words.streams / medians["server"], 1),
        "median_time_to_first_token": None if not firsts else round(statistics.median(firsts), 3),
    }
    words.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
