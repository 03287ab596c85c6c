"""Operators: X.py holds the schema and the PyTorch reference; a GPU kernel stands beside it as X_triton.py."""
