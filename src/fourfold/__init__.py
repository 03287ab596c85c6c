"""Fourfold: fine-tune large language models in a quarter of the memory, and ship what was trained."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fourfold.errors import FourfoldError
    from fourfold.memory.planner import Plan
    from fourfold.models.loading import load_model
    from fourfold.models.preparing import load_adapter, prepare
    from fourfold.pipeline import Run, train
    from fourfold.planning import plan
    from fourfold.quantization.hf_config import FourfoldConfig
    from fourfold.quantization.hf_quantizer import quantize_model
    from fourfold.quantization.linear import QuantizedLinear
    from fourfold.quantization.tensor import QuantizedTensor, quantize

__version__ = "0.1.0"

# Where each public name lives; it is imported when it is first asked for, so that `import fourfold` costs nothing.
_HOMES = {
    "FourfoldConfig": "fourfold.quantization.hf_quantizer",
    "FourfoldError": "fourfold.errors",
    "Plan": "fourfold.memory.planner",
    "QuantizedLinear": "fourfold.quantization.linear",
    "QuantizedTensor": "fourfold.quantization.tensor",
    "Run": "fourfold.pipeline",
    "load_adapter": "fourfold.models.preparing",
    "load_model": "fourfold.models.loading",
    "plan": "fourfold.planning",
    "prepare": "fourfold.models.preparing",
    "quantize": "fourfold.quantization.tensor",
    "quantize_model": "fourfold.quantization.hf_quantizer",
    "train": "fourfold.pipeline",
}

__all__ = [
    "FourfoldConfig",
    "FourfoldError",
    "Plan",
    "QuantizedLinear",
    "QuantizedTensor",
    "Run",
    "load_adapter",
    "load_model",
    "plan",
    "prepare",
    "quantize",
    "quantize_model",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fourfold' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
