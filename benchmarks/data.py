"""Speed of tokenizing and packing beside `datasets.map` alone, memory of streaming, waste of packing.

python benchmarks/data.py --tokenizer MODEL --gsm8k gsm8k-train.jsonl --json benchmarks/results/data.json
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
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


def speed(folder: Path, tokenizer: Any, kind: str, count: int, num_proc: int) -> dict[str, Any]:
    rows = load_rows(str(short_rows(folder / f"{kind}.jsonl", count, kind)))
    start = time.perf_counter()
    alone(rows, tokenizer, kind, num_proc)
    seconds_alone = time.perf_counter() - start
    options = DataOptions(max_length=2048, packing=True, num_proc=num_proc)
    start = time.perf_counter()
    prepared = prepare(rows, tokenizer, options, kind)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    prepare(load_rows(str(folder / f"{kind}.jsonl")), tokenizer, options, kind)
    again = time.perf_counter() - start
    return {
        "rows": count,
        "num_proc": num_proc,
        "seconds_of_map_alone": seconds_alone,
        "seconds_tokenized_and_packed": seconds,
        "share_of_its_speed": seconds_alone / seconds,
        "seconds_from_cache": again,
        "packing_waste": prepared.report.packing_waste,
    }


def stream_memory(folder: Path, tokenizer: Any, count: int) -> dict[str, Any]:
    """Resident memory while rows are streamed, at each tenth of them, from the second on against the last."""
    path = short_rows(folder / "streamed.jsonl", count, "prompt_completion")
    stream = RowStream([DataSource(str(path))], tokenizer, DataOptions(max_length=2048, packing=True))
    resident, tokens = [], 0
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
            record[kind] = speed(Path(folder), tokenizer, kind, args.rows, args.num_proc)
            print(kind, record[kind])
        record["stream"] = stream_memory(Path(folder), tokenizer, args.stream_rows)
        print("stream", record["stream"])
        if args.gsm8k:
            record["gsm8k"] = waste(args.gsm8k, tokenizer)
            print("gsm8k", record["gsm8k"])
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
