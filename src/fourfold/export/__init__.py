"""Merging adapters into the base, and the proof that what is merged is what was trained."""
