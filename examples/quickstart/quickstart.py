"""The quickstart: a real language model, stored in 4 bits, learns a task it could not do.

    python examples/quickstart/quickstart.py [--key value ...]      any key of config.yaml

1. A model of 135 million weights is brought (model.py) and stored in NF4.
2. It is asked to turn notes about payments into strict JSON (task.py), on rows that training never shows.
3. A LoRA adapter is trained on 600 other rows, and the same questions are asked again.
4. The adapter is merged into an ordinary 16-bit model, which is compared with the trained one.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from shutil import rmtree
from typing import Any

from model import bring_model
from task import SYSTEM_PROMPT, write_task

from fourfold import pipeline
from fourfold.cli.terminal import progress_style, quiet_libraries, reporting_errors
from fourfold.config import load_config
from fourfold.evaluation import Sample
from fourfold.memory.meter import memory_used

HERE = Path(__file__).parent
MIB = 2**20
NUM_SHOWN = 3


def headline(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 76 - len(text)), flush=True)


def show_samples(before: list[Sample], after: list[Sample]) -> None:
    """A few held-out notes with both answers; of those that training changed, the first."""
    changed = [pair for pair in zip(before, after, strict=True) if pair[1].correct and not pair[0].correct]
    for old, new in changed[:NUM_SHOWN]:
        print(f"\n  note    {old.prompt[-1]['content']}")
        print(f"  before  {' '.join(old.answer.split())[:150]}")
        print(f"  after   {new.answer}")


def main() -> None:
    started = time.monotonic()
    folder = Path("runs/quickstart-data")
    base, merged = folder / "base-nf4", folder / "merged"
    overrides = ["--overwrite_output_dir", *sys.argv[1:]]

    headline("1. the model, in 4 bits")
    original = bring_model()
    write_task(folder)
    for old in (base, merged):
        if old.exists():
            rmtree(old)
    config = load_config(str(HERE / "config.yaml"), [f"--model_name_or_path={original}", *overrides])
    size = pipeline.quantize_checkpoint(config, base)
    print("\n".join(size.lines()))

    headline("2. before training")
    config = load_config(str(HERE / "config.yaml"), [f"--model_name_or_path={base}", *overrides])
    if Path(config.output_dir).exists():
        rmtree(config.output_dir)
    before, samples_before = pipeline.evaluate_with_samples(config)
    print(f"exact match {before['exact_match']:.1%} of {before['exact_match_rows']} held-out rows")

    headline("3. training")
    run = pipeline.train(config, progress_style(False))

    headline("4. merging")
    report = pipeline.merge(str(run.output_dir), merged)
    print("\n".join(report.lines()))

    headline("the result")
    show_samples(samples_before, run.samples)
    summary: dict[str, Any] = {
        "exact_match_before": before["exact_match"],
        "exact_match_after": run.metrics["exact_match"],
        "base_bytes_16bit": size.num_bytes_16bit,
        "base_bytes_4bit": size.num_bytes,
        "peak_bytes": memory_used("cpu").peak_bytes,
        "seconds": time.monotonic() - started,
    }
    (run.output_dir / "quickstart.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"""
  exact match on held-out rows    {before["exact_match"]:.1%}  →  {run.metrics["exact_match"]:.1%}
  the base model's weights        {size.num_bytes_16bit / MIB:.0f} MiB in 16 bits  →  {size.num_bytes / MIB:.0f} MiB
  validation loss                 {before["eval_loss"]:.3f}  →  {run.metrics["eval_loss"]:.3f}
  time, peak memory               {summary["seconds"]:.0f} s, {summary["peak_bytes"] / 2**30:.1f} GiB
  loss picture                    {run.output_dir / "loss.png"}
  model card                      {run.output_dir / "README.md"}

Talk to it:

  {Path(sys.executable).parent / "fourfold"} chat {run.output_dir} \\
    --system "{SYSTEM_PROMPT}" \\
    --prompt "Paid €41.20 to the baker on 3 May 2023."
""")


if __name__ == "__main__":
    quiet_libraries(verbose=False)
    with reporting_errors(as_json=False):
        main()
