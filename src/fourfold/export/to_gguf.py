"""A merged model as one GGUF file with its tokenizer and chat template, and Ollama's Modelfile beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fourfold.errors import ConfigError, VerificationError
from fourfold.export import llama_cpp
from fourfold.export.agreement import Bounds, agreement, agreement_of_likeliest, require_same_texts
from fourfold.export.gguf_model import write_gguf
from fourfold.export.gguf_tokenizer import STOPS, pre_tokenizer_named
from fourfold.export.modelfile import modelfile
from fourfold.export.trained import Reading, Trained
from fourfold.export.verification import reference_logits
from fourfold.models.underlying import underlying

__all__ = ["BOUNDS", "MODEL_FILE", "read", "write"]

MODEL_FILE = "model.gguf"
# llama.cpp is asked position by position, at few of them where Transformers has read the file at all.
MAX_POSITIONS = 64
# What Transformers cannot read of the families that are written.
_UNREAD = ("smollm3",)

_SIXTEEN_BITS = Bounds(kl=1e-3, top1=0.995)
# Those of the rounded weights lie above what was measured of Q8_0 and Q4_0 (docs/numbers.md); the others lie between.
BOUNDS: dict[str, Bounds] = {
    "F16": _SIXTEEN_BITS,
    "BF16": _SIXTEEN_BITS,
    "F32": _SIXTEEN_BITS,
    "Q8_0": Bounds(kl=0.01, top1=0.93),
    "Q5_1": Bounds(kl=0.5, top1=0.7),
    "Q5_0": Bounds(kl=0.5, top1=0.7),
    "Q4_1": Bounds(kl=1.5, top1=0.5),
    "Q4_0": Bounds(kl=1.5, top1=0.5),
}


def write(trained: Trained, folder: Path, quantization: str | None) -> list[str]:
    """Write the file and the Modelfile."""
    write_gguf(
        trained.model, trained.tokenizer, folder / MODEL_FILE, quantization or "F16", trained.stops, trained.name
    )
    text = modelfile(trained.tokenizer, trained.stops, MODEL_FILE)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return [
        f"llama.cpp: llama-server -m {folder / MODEL_FILE} --jinja",
        f"Ollama:    ollama create {trained.name} -f {folder / 'Modelfile'}",
    ]


def read(trained: Trained, folder: Path, reference: Sequence[Tensor]) -> dict[str, Reading]:
    """Transformers, where it knows the family, and llama.cpp, where its bindings are installed.

    Raises:
        ConfigError: Neither of them is there to read it.
        VerificationError: Another tokenizer, chat template or stop token, or a file that is refused.
    """
    path = folder / MODEL_FILE
    readings = {}
    if underlying(trained.model).config.model_type not in _UNREAD:
        readings["transformers"] = _by_transformers(trained, path, reference)
    if llama_cpp.is_installed():
        readings["llama.cpp"] = _by_llama_cpp(trained, path, reference, is_sample=bool(readings))
    if not readings:
        raise ConfigError(
            "nothing here reads this family's GGUF files, so that the export cannot be verified",
            found=underlying(trained.model).config.model_type,
            hint="pip install xllamacpp, which carries llama.cpp",
        )
    return readings


def _by_transformers(trained: Trained, path: Path, reference: Sequence[Tensor]) -> Reading:
    place: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    fields = gguf.GGUFReader(path).fields
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # Not every name of llama.cpp's pre-tokenizers is known to Transformers, which then takes GPT-2's.
    pre = pre_tokenizer_named(fields["tokenizer.ggml.pre"].contents())
    tokenizer.backend_tokenizer.pre_tokenizer = pre
    texts = require_same_texts(
        trained.tokenizer, trained.prompts, lambda text: list(tokenizer(text)["input_ids"]), "Transformers"
    )
    _require_same(tokenizer.chat_template, trained.tokenizer.chat_template, "chat template")
    keys = [f"tokenizer.ggml.{name}_token_id" for name in STOPS]
    stops = {int(fields[key].contents()) for key in keys if key in fields}
    # Of more than three, those that the file has no room for stand in the Modelfile.
    _require_same(len(stops - set(trained.stops)), 0, "choice of stop tokens")
    _require_same(len(stops), min(len(STOPS), len(trained.stops)), "number of stop tokens")
    config = AutoConfig.from_pretrained(**place)
    checks = {"tokenizer": texts, "chat_template": "same", "stop_tokens": sorted(stops), "rope": "read from the file"}
    rope = underlying(trained.model).config.rope_parameters
    if rope["rope_type"] != "default":
        # Transformers does not read scaled positions from a GGUF file; what the file says of them llama.cpp reads.
        config.rope_parameters = copy.deepcopy(rope)
        checks["rope"] = "the trained model's: not read from the file"
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**place, config=config, dtype=torch.float32, **options)
    found = agreement(reference, reference_logits(model.to(trained.model.device), trained.prompts))
    return Reading(found, transformers.__version__, checks)


def _by_llama_cpp(trained: Trained, path: Path, reference: Sequence[Tensor], is_sample: bool) -> Reading:
    longest = max(map(len, trained.prompts))
    share = max(1, MAX_POSITIONS // len(trained.prompts)) if is_sample else longest
    with llama_cpp.opened(path, longest) as served:
        texts = require_same_texts(trained.tokenizer, trained.prompts, served.tokenize, "llama.cpp")
        _require_same(
            served.chat_template(), trained.tokenizer.chat_template or served.chat_template(), "chat template"
        )
        # The last positions of each text: those that see the most.
        likeliest = [served.likeliest(prompt, share) for prompt in trained.prompts]
    found = agreement_of_likeliest([logits[-share:] for logits in reference], likeliest)
    checks = {
        "tokenizer": texts,
        "chat_template": "same",
        "mean_kl": f"over {llama_cpp.NUM_LIKELIEST} tokens, all others as one: a lower bound",
    }
    return Reading(found, llama_cpp.version(), checks, is_sample)


def _require_same(found: object, wanted: object, what: str) -> None:
    if found != wanted:
        raise VerificationError(
            f"the exported {what} is not the model's; nothing was written", found=found, allowed=str(wanted)
        )
