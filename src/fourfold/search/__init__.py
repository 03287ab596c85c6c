"""Hyperparameter search: the space, the study with its trials, its pictures and its page."""

from __future__ import annotations

from fourfold.search.space import Choices, Range, SearchSpace

__all__ = ["Choices", "Range", "SearchSpace"]
