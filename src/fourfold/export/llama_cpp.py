"""llama.cpp itself as a reader of GGUF files, where its bindings are installed (xllamacpp).

They carry llama.cpp's server, which listens on an address of this machine while it is open. Asked are its endpoints
`/completion`, `/tokenize` and `/props`: https://github.com/ggml-org/llama.cpp/tree/master/tools/server.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import VerificationError

__all__ = ["NUM_LIKELIEST", "LlamaCpp", "is_installed", "opened", "version"]

# How many tokens the server is asked for at each position; what the rest has together is one minus their sum.
NUM_LIKELIEST = 256


def is_installed() -> bool:
    return importlib.util.find_spec("xllamacpp") is not None


def version() -> str:
    return f"xllamacpp {importlib.metadata.version('xllamacpp')}"


@dataclass(frozen=True)
class LlamaCpp:
    """A GGUF file that llama.cpp serves.

    Args:
        address: URL of the server.
    """

    address: str

    def likeliest(self, token_ids: Sequence[int], num_positions: int) -> list[tuple[Tensor, Tensor]]:
        """At each of the last positions of a text the likeliest next tokens.

        Returns:
            Ids, int64, and log-probabilities, fp64, [NUM_LIKELIEST] each.
        """
        # The token that is written, which changes nothing of what is told: of one that ends the reply, or is part of a
        # character, nothing would be.
        written = self._ask("/tokenize", content="a", add_special=False)["tokens"][0]
        found = []
        for end in range(max(1, len(token_ids) - num_positions + 1), len(token_ids) + 1):
            answer = self._ask(
                "/completion",
                prompt=list(token_ids[:end]),
                n_predict=1,
                n_probs=NUM_LIKELIEST,
                cache_prompt=True,
                temperature=0,
                logit_bias=[[written, 1e4]],
            )
            (position,) = answer["completion_probabilities"]
            top = position["top_logprobs"]
            ids = torch.tensor([entry["id"] for entry in top])
            found.append((ids, torch.tensor([entry["logprob"] for entry in top], dtype=torch.float64)))
        return found

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, in which special ones are read as such."""
        tokens: list[int] = self._ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return tokens

    def chat_template(self) -> str:
        template: str = self._ask("/props")["chat_template"]
        return template

    def _ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)


@contextlib.contextmanager
def opened(path: Path, longest: int) -> Iterator[LlamaCpp]:
    """A file while llama.cpp serves it on the CPU, with keys and values in fp32.

    Args:
        path: The file.
        longest: Tokens of the longest text.

    Raises:
        VerificationError: llama.cpp refuses it.
    """
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path = str(path)
    options.n_ctx = max(64, longest + 8)
    options.n_parallel = 1
    options.n_gpu_layers = 0
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
    options.cache_ram_mib = 0
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.warmup = False
    options.verbosity = -1
    options.port = 0
    try:
        server = xllamacpp.Server(options)
    except RuntimeError as error:
        raise VerificationError(
            "llama.cpp cannot load the exported file", found=str(error), hint="this is a fault of the export"
        ) from error
    try:
        yield LlamaCpp(server.listening_address)
    finally:
        del server
