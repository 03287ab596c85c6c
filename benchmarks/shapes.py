"""Checkpoint folders with random weights in the shape of known models, for measuring where no model can be fetched.

    python benchmarks/shapes.py 8b FOLDER [--tokenizer FOLDER]     (1b, tiny: see fourfold.training.bench.SHAPES)

The weights are bf16 (fp32 for tiny), drawn on the GPU where there is one. `--tokenizer` copies a tokenizer's files
beside them: Unsloth loads none without.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from fourfold.files import whole_folder
from fourfold.training.bench import SHAPES, shape_config


def make_checkpoint(shape: str, folder: Path, tokenizer: Path | None) -> None:
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        dtype = torch.float32 if shape == "tiny" else torch.bfloat16
        model = LlamaForCausalLM._from_config(shape_config(shape), dtype=dtype)
    with whole_folder(folder) as partial:
        model.save_pretrained(partial)
        for file in tokenizer.iterdir() if tokenizer else ():
            if file.is_file():
                shutil.copy(file, partial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    args = parser.parse_args()
    make_checkpoint(args.shape, args.folder, args.tokenizer)


if __name__ == "__main__":
    main()
