"""How good a model is: perplexity on text, loss and answers on held-out rows, multiple choice, and the harness."""

from __future__ import annotations

from fourfold.evaluation.exact_match import COMPARISONS, ExactMatch, Sample, exact_match
from fourfold.evaluation.multiple_choice import MultipleChoice, multiple_choice
from fourfold.evaluation.perplexity import Perplexity, perplexity
from fourfold.evaluation.tasks import TASKS, EvaluationOptions
from fourfold.evaluation.text_metrics import TEXT_METRICS
from fourfold.evaluation.validation import ValidationLoss, validation_loss

__all__ = [
    "COMPARISONS",
    "TASKS",
    "TEXT_METRICS",
    "EvaluationOptions",
    "ExactMatch",
    "MultipleChoice",
    "Perplexity",
    "Sample",
    "ValidationLoss",
    "exact_match",
    "multiple_choice",
    "perplexity",
    "validation_loss",
]
