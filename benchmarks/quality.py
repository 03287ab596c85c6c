"""What fine-tuning in 4 bits keeps: the quickstart's run beside the same run over the 16-bit base.

    python benchmarks/quality.py --wikitext wikitext2-test.txt [--folder runs/quality] [--learning_rate 1e-3 ...]

Trains the quickstart's task twice, over the NF4 base and over the 16-bit one; runs that lie in the folder already are
taken as they are. Then `fourfold evaluate --compare` sets side by side: 4-bit base, 16-bit base, both adapters, and the
4-bit one merged. All keys of the configuration can be given. The record goes into `benchmarks/results/quality.json`.

The claims checked: QLoRA answers at least 95% as many held-out rows rightly as LoRA over 16 bits does; and its
perplexity on WikiText-2 is less than 3% above that of the base it was trained on.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from fourfold import evaluating, pipeline
from fourfold.cli.evaluating import print_comparison
from fourfold.cli.terminal import quiet_libraries
from fourfold.config import load_config
from fourfold.environment import gather
from fourfold.evaluation.picture import draw_comparison
from fourfold.evaluation.side_by_side import Comparison

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quality.json"
SCORE_KEPT, PERPLEXITY_LOST = 0.95, 0.03
MODELS = ("base4", "base16", "qlora", "qlora@merged", "lora")


def compared(args: argparse.Namespace, more: list[str]) -> Comparison:
    """Train what is not there, and measure all."""
    sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
    from model import bring_model
    from task import write_task

    wikitext = args.wikitext.resolve()
    # Runs are named by their folders, which stand in the record.
    args.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(args.folder)
    train, held_out = write_task(Path("data"))
    keys = {"model_name_or_path": bring_model(), "train_dataset": train, "eval_dataset": held_out}
    words = [*(f"--{key}={value}" for key, value in keys.items()), *more]
    for name, flag in (("qlora", "--load_in_4bit"), ("lora", "--no-load_in_4bit")):
        if not (Path(name) / "adapter").is_dir():
            config = load_config(
                ROOT / "examples/quickstart/config.yaml",
                [*words, flag, f"--output_dir={name}", "--eval_generate_rows=0", "--overwrite_output_dir"],
            )
            pipeline.train(config, "plain")
    measures = {
        "eval_generate_rows": args.rows,
        "perplexity_text": wikitext,
        "perplexity_max_tokens": args.tokens,
        "perplexity_max_length": 512,
        "perplexity_stride": 256,
    }
    config = load_config("qlora", [f"--{key}={value}" for key, value in measures.items()])
    return evaluating.compare(config, MODELS)


def without_places(comparison: Comparison) -> dict[str, Any]:
    """The comparison as data, without the folders of this machine."""
    plain = comparison.to_dict()
    for model in plain["models"].values():
        del model["what"]
    return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--rows", type=int, default=120, help="held-out rows to answer")
    parser.add_argument("--tokens", type=int, default=16384, help="of WikiText-2, from its beginning")
    args, more = parser.parse_known_args()
    quiet_libraries(verbose=False)
    comparison = compared(args, more)
    print_comparison(comparison, None, as_json=False)
    draw_comparison(Path("quality.png"), comparison)
    scores = {name: cell.value for name, cell in comparison.cells["exact_match"].items()}
    lost = comparison.cells["perplexity"]["qlora"].difference
    assert lost is not None
    assert lost.relative is not None
    kept = scores["qlora"] / scores["lora"] if scores["lora"] else float("nan")
    environment = gather()
    record = {
        "command": shlex.join(
            ["python", "benchmarks/quality.py", f"--rows={args.rows}", f"--tokens={args.tokens}", *more]
        ),
        "date": datetime.date.today().isoformat(),
        "processor": environment.cpu,
        "versions": environment.versions,
        "score_kept": kept,
        "perplexity_lost": lost.relative,
        "comparison": without_places(comparison),
    }
    others = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    records = [other for other in others if other["command"] != record["command"]] + [record]
    RESULTS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    print(f"QLoRA keeps {kept:.1%} of LoRA's score (bound {SCORE_KEPT:.0%})")
    print(f"and its perplexity is {lost.relative:+.1%} of its base's (bound {PERPLEXITY_LOST:+.0%})")
    sys.exit(not (kept >= SCORE_KEPT and lost.relative < PERPLEXITY_LOST))


if __name__ == "__main__":
    main()
