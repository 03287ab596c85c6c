"""Perplexity, loss and exact match on held-out rows."""
