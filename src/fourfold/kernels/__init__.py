"""Operators: X.py holds the schema and the PyTorch reference; a GPU kernel stands beside it as X_triton.py.

A native kernel for the CPU is X_cpu.c, with the X_cpu.py that loads it; importing this room registers it.
"""

from __future__ import annotations

from fourfold.kernels import blockwise, blockwise_cpu, encoding, expansion, small_batch

__all__ = ["blockwise", "blockwise_cpu", "encoding", "expansion", "small_batch"]
