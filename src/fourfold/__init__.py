"""Fourfold: fine-tune large language models in a quarter of the memory, and ship what was trained."""
