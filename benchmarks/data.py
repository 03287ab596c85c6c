"""Speed of tokenizing and packing beside `datasets.map` alone, memory of streaming, waste of packing.

python benchmarks/data.py --tokenizer MODEL --gsm8k gsm8k-train.jsonl --json benchmarks/results/data.json
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import psutil
import transformers
from transformers import AutoTokenizer

from fourfold.data import DataOptions, load_rows, prepare
from fourfold.data.sources import DataSource
from fourfold.data.stream import RowStream


def short_rows(path: Path, count: int, kind: str) -> Path:
    """Rows of some 30 tokens, all different."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            said = f"Order {number}: {number % 97} boxes of {number % 13} pieces were sent on day {number % 365}."
            row: dict[str, Any] = {"text": said} if kind == "text" else {"prompt": said, "completion": f"{number % 97}"}
            file.write(json.dumps(row) + "\n")
    return path


def alone(rows: datasets.Dataset, tokenizer: Any, kind: str, num_proc: int) -> None:
    """What `datasets.map` takes to tokenize: the text, or the conversation as the template renders it."""

    def tokenize(batch: dict[str, list[str]]) -> Any:
        if kind == "text":
            return tokenizer(batch["text"])
        turns = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(batch["prompt"], batch["completion"], strict=True)
        ]
        return tokenizer.apply_chat_template(turns, return_dict=True)

    rows.map(tokenize, batched=True, num_proc=num_proc, remove_columns=rows.column_names)


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Seconds by the clock, seconds of all cores for this process and those it waited for, and what came of it."""

    def cores() -> float:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    start, begin = time.perf_counter(), cores()
    result = work()
    return time.perf_counter() - start, cores() - begin, result


def speed(folder: Path, tokenizer: Any, kind: str, count: int, num_proc: int, rounds: int) -> dict[str, Any]:
    """Both from the same loaded rows, in turn, and nothing of either from the cache; medians."""
    rows = load_rows(str(short_rows(folder / f"{kind}.jsonl", count, kind)))
    options = DataOptions(max_length=2048, packing=True, num_proc=num_proc)
    seconds: dict[str, list[tuple[float, float]]] = {"alone": [], "ours": []}
    prepared = None
    for _ in range(rounds):
        for name in seconds:
            rows.cleanup_cache_files()
            shutil.rmtree(Path(datasets.config.HF_DATASETS_CACHE) / "fourfold", ignore_errors=True)
            gc.collect()
            if name == "alone":
                wall, cores, _ = timed(lambda: alone(rows, tokenizer, kind, num_proc))
            else:
                wall, cores, prepared = timed(lambda: prepare(rows, tokenizer, options, kind))
            seconds[name].append((wall, cores))
            print(kind, name, f"{wall:.1f} s, {cores:.1f} s of all cores", flush=True)
    assert prepared is not None
    again, _, _ = timed(lambda: prepare(load_rows(str(folder / f"{kind}.jsonl")), tokenizer, options, kind))
    (alone_wall, alone_cores), (ours_wall, ours_cores) = (
        [statistics.median(one) for one in zip(*each, strict=True)] for each in seconds.values()
    )
    return {
        "rows": count,
        "num_proc": num_proc,
        "rounds": rounds,
        "seconds_of_map_alone": alone_wall,
        "seconds_tokenized_and_packed": ours_wall,
        "share_of_its_speed": alone_wall / ours_wall,
        "core_seconds_of_map_alone": alone_cores,
        "core_seconds_tokenized_and_packed": ours_cores,
        "share_by_core_seconds": alone_cores / ours_cores,
        "seconds_from_cache": again,
        "packing_waste": prepared.report.packing_waste,
    }


def stream_memory(name: str, count: int) -> dict[str, Any]:
    """Resident memory while rows are streamed, at each tenth of them from the second on."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    resident, tokens = [], 0
    with tempfile.TemporaryDirectory() as folder:
        path = short_rows(Path(folder) / "streamed.jsonl", count, "prompt_completion")
        stream = RowStream([DataSource(str(path))], tokenizer, DataOptions(max_length=2048, packing=True))
        start = time.perf_counter()
        total = sum(1 for _ in stream)
        for number, row in enumerate(stream):
            tokens += len(row["input_ids"])
            if (number + 1) % max(1, total // 10) == 0:
                gc.collect()
                resident.append(psutil.Process().memory_info().rss)
        seconds = (time.perf_counter() - start) / 2
    return {"rows": count, "resident_bytes": resident, "tokens_per_second": tokens / seconds}


def waste(path: str, tokenizer: Any) -> dict[str, Any]:
    options = DataOptions(max_length=2048, packing=True, columns={"prompt": "question", "completion": "answer"})
    report = prepare(load_rows(path), tokenizer, options, "gsm8k").report
    return {"rows": report.rows_kept, "tokens": report.num_tokens, "packing_waste": report.packing_waste}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a model, or its name on the hub")
    parser.add_argument("--gsm8k", help="gsm8k-train.jsonl")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--stream-rows", type=int, default=200_000)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    record: dict[str, Any] = {
        "command": f"python benchmarks/data.py --rows {args.rows} --stream-rows {args.stream_rows}",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {
            "python": platform.python_version(),
            "datasets": datasets.__version__,
            "transformers": transformers.__version__,
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder) / "cache"
        for kind in ("text", "prompt_completion"):
            record[kind] = speed(Path(folder), tokenizer, kind, args.rows, args.num_proc, args.rounds)
            print(kind, record[kind])
        # Each in a process of its own, so that none has what another left.
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            counts = (args.stream_rows // 10, args.stream_rows)
            record["stream"] = [pool.apply(stream_memory, (args.tokenizer, count)) for count in counts]
        for one in record["stream"]:
            print("stream", one)
        if args.gsm8k:
            record["gsm8k"] = waste(args.gsm8k, tokenizer)
            print("gsm8k", record["gsm8k"])
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
