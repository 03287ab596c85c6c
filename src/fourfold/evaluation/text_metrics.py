"""How near an answer's text is to the reference: ROUGE, BLEU and chrF, by the libraries that define them.

A new measure is one function and one row of `TEXT_METRICS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fourfold.errors import ConfigError, DataError
from fourfold.evaluation.figures import Figure, Floats, mean_of

__all__ = ["TEXT_METRICS", "TextMetric", "require_text_metrics", "text_figures"]

_ROUGES = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class TextMetric:
    """A measure of texts.

    Args:
        description: What it is.
        package: The module that computes it.
        measure: From references and answers, in one order, to its figures.
    """

    description: str
    package: str
    measure: Callable[[Sequence[str], Sequence[str]], list[Figure]]


def require_text_metrics(names: Iterable[str]) -> None:
    """Raise ConfigError for a measure that there is not, or whose package is not installed."""
    for name in names:
        if name not in TEXT_METRICS:
            raise ConfigError("unknown measure of texts", found=name, allowed=TEXT_METRICS)
        package = TEXT_METRICS[name].package
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{name} is computed by {package}, which is not installed", hint='pip install "fourfold[metrics]"'
            )


def text_figures(names: Iterable[str], references: Sequence[str], answers: Sequence[str]) -> list[Figure]:
    """The figures of measures in `TEXT_METRICS`.

    Raises:
        ConfigError: See `require_text_metrics`.
        DataError: References that a measure cannot read.
    """
    names = list(names)
    require_text_metrics(names)
    return [figure for name in names for figure in TEXT_METRICS[name].measure(references, answers)]


def _rouge(references: Sequence[str], answers: Sequence[str]) -> list[Figure]:
    """F1 of words, of pairs of words and of the longest common subsequence (Lin 2004): the mean of rows, 0 to 1."""
    from rouge_score import rouge_scorer, tokenizers

    tokenizer = tokenizers.DefaultTokenizer(use_stemmer=False)
    for number, reference in enumerate(references, start=1):
        if not tokenizer.tokenize(reference):
            raise DataError(
                f"row {number}: the reference has no word that ROUGE counts",
                found=repr(reference[:120]),
                allowed="words of a to z and digits, which is all that rouge-score reads",
                hint="chrf measures texts in every script",
            )
    scorer = rouge_scorer.RougeScorer(list(_ROUGES), tokenizer=tokenizer)
    scores = [scorer.score(reference, answer) for reference, answer in zip(references, answers, strict=True)]
    return [mean_of(name, [row[name].fmeasure for row in scores]) for name in _ROUGES]


def _bleu(references: Sequence[str], answers: Sequence[str]) -> list[Figure]:
    """BLEU of the whole corpus (Papineni et al. 2002) as sacreBLEU has it by default, 0 to 100."""
    from sacrebleu.metrics import BLEU

    rows = [BLEU().corpus_score([answer], [[reference]]) for reference, answer in zip(references, answers, strict=True)]
    parts = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows], dtype=np.float64)

    def score(sums: Any) -> float:
        *counts, sys_len, ref_len = [int(part) for part in sums]
        smoothed = BLEU.compute_bleu(counts[:4], counts[4:], sys_len, ref_len, smooth_method="exp")
        return float(smoothed.score)

    def combine(sums: Floats) -> Floats:
        return np.apply_along_axis(score, -1, sums)

    return [Figure("bleu", float(BLEU().corpus_score(list(answers), [list(references)]).score), parts, combine)]


def _chrf(references: Sequence[str], answers: Sequence[str]) -> list[Figure]:
    """chrF2 of the whole corpus (Popović 2015) as sacreBLEU has it by default, 0 to 100."""
    from sacrebleu.metrics import CHRF
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    # sacreBLEU does not give what rows add to a corpus's score. These are its own counts of n-grams, so that the figure
    # can be had of drawn rows; the figure itself is sacreBLEU's.
    parts = []
    for reference, answer in zip(references, answers, strict=True):
        wanted, given = (extract_all_char_ngrams(text, CHRF.CHAR_ORDER, False) for text in (reference, answer))
        parts.append([[a.total(), r.total(), (a & r).total()] for a, r in zip(given, wanted, strict=True)])
    value = CHRF().corpus_score(list(answers), [list(references)]).score
    flat = np.array(parts, dtype=np.float64).reshape(len(parts), -1)
    return [Figure("chrf", float(value), flat, _chrf_of_counts)]


def _chrf_of_counts(sums: Floats) -> Floats:
    """chrF2 of counts [..., orders * (of the answer, of the reference, of both)], orders that are empty left out."""
    given, wanted, both = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    counts = (given > 0) & (wanted > 0)
    orders = np.maximum(counts.sum(-1), 1)
    precision = np.divide(both, given, out=np.zeros_like(both), where=counts).sum(-1) / orders
    recall = np.divide(both, wanted, out=np.zeros_like(both), where=counts).sum(-1) / orders
    below = 4 * precision + recall
    result: Floats = 100 * 5 * precision * recall / np.where(below > 0, below, 1)
    return result


TEXT_METRICS: dict[str, TextMetric] = {
    "rouge": TextMetric("words in common", "rouge_score", _rouge),
    "bleu": TextMetric("runs of words in common", "sacrebleu", _bleu),
    "chrf": TextMetric("runs of characters in common", "sacrebleu", _chrf),
}
