from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fourfold.errors import ConfigError
from fourfold.export.gguf_tokenizer import PRE_TOKENIZERS, pre_tokenizer_named, require_exportable

TEXT = "Paid 1,249.50 euros, didn't WE'VE?\n\n  naïve Привет 我们 12345\t\r\n x  "


def tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_name_is_found_again_from_its_own_pre_tokenizer(name) -> None:
    _, ignore_merges = PRE_TOKENIZERS[name]
    backend = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], ignore_merges=bool(ignore_merges)))
    backend.pre_tokenizer = pre_tokenizer_named(name)
    assert require_exportable(tokenizer(backend), 8) == name


@pytest.mark.parametrize("name", ["llama-bpe", "qwen2", "tekken", "gpt-4o"])
def test_the_splits_are_those_that_transformers_reads_from_gguf_files(name) -> None:
    reading = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(reading.Regex(reading.GGUF_PRE_TOKENIZER_SPLITS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert pre_tokenizer_named(name).pre_tokenize_str(TEXT) == theirs.pre_tokenize_str(TEXT)


def test_other_tokenizers_are_refused_with_what_they_are() -> None:
    unigram = Tokenizer(models.Unigram([("a", 0.0)], 0))
    with pytest.raises(ConfigError, match=r"Unigram(.|\n)*byte-level BPE"):
        require_exportable(tokenizer(unigram), 8)
    fallback = Tokenizer(models.BPE(vocab={"a": 0}, merges=[], byte_fallback=True))
    with pytest.raises(ConfigError, match="BPE with byte fallback"):
        require_exportable(tokenizer(fallback), 8)
    lowered = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    lowered.normalizer = normalizers.Lowercase()
    with pytest.raises(ConfigError, match="normalizer Lowercase"):
        require_exportable(tokenizer(lowered), 8)
    words = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ConfigError, match=r"no name for this tokenizer's pre-tokenizer(.|\n)*Whitespace"):
        require_exportable(tokenizer(words), 8)


def test_more_tokens_than_rows_are_refused(tiny_tokenizer) -> None:
    with pytest.raises(ConfigError, match="3 rows"):
        require_exportable(tiny_tokenizer, 3)
