"""Where tokenized rows are kept, by their content.

`datasets` itself caches by the path and time of a file and by the pickled tokenizer, whose bytes change when it is
used. The key here is of what decides the result alone: the rows, the tokenizer's own file, its chat template, and the
options.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import tokenizers
import transformers

__all__ = ["cache_file", "content_key"]

LAYOUT = 2
"""Goes up when the same input comes to be encoded otherwise."""

_ROWS_AT_A_TIME = 10_000


def content_key(rows: datasets.Dataset, tokenizer: Any | None, options: dict[str, Any]) -> str:
    """The key, 32 hexadecimal digits, of what tokenizing these rows gives.

    Args:
        rows: Their values and names of columns count, not the file that they came from.
        tokenizer: A fast tokenizer; None where none is needed.
        options: Whatever else the result depends on, as JSON can write it.
    """
    digest = hashlib.blake2b(digest_size=16)
    versions = [LAYOUT, datasets.__version__, transformers.__version__, tokenizers.__version__]
    digest.update(json.dumps([versions, options, _about(tokenizer)], sort_keys=True).encode())
    if tokenizer is not None:
        # The file but for its beginning: what the last call asked for as truncation and padding.
        digest.update(tokenizer.backend_tokenizer.to_str().partition('"added_tokens"')[2].encode())
    digest.update(str(rows.features).encode())
    for table in rows.with_format("arrow").iter(_ROWS_AT_A_TIME):
        batch = table.combine_chunks().replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as writer:
            writer.write_table(batch)
        digest.update(sink.getvalue())
    return digest.hexdigest()


def _about(tokenizer: Any | None) -> Any:
    if tokenizer is None:
        return None
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    return [type(tokenizer).__name__, special, tokenizer.chat_template]


def cache_file(key: str) -> str | None:
    """The file of a key, in the cache folder of `datasets`; None where that is switched off."""
    if not datasets.is_caching_enabled():
        return None
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "fourfold"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{key}.arrow")
