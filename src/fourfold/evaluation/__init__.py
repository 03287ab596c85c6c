"""How good a model is: perplexity on text, loss and exact match on held-out rows."""

from __future__ import annotations

from fourfold.evaluation.exact_match import COMPARISONS, ExactMatch, Sample, exact_match
from fourfold.evaluation.perplexity import Perplexity, perplexity
from fourfold.evaluation.validation import ValidationLoss, validation_loss

__all__ = [
    "COMPARISONS",
    "ExactMatch",
    "Perplexity",
    "Sample",
    "ValidationLoss",
    "exact_match",
    "perplexity",
    "validation_loss",
]
