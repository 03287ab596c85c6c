"""Types of the configuration's values: texts and numbers that are of one form; defaults that others decide."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

__all__ = [
    "Amount",
    "ChatTemplate",
    "Count",
    "CountOrZero",
    "CudaDevice",
    "PiSSAIterations",
    "as_list",
    "default_4bit",
    "default_epochs",
    "default_warmup",
]

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
PiSSAIterations = Annotated[str, Field(pattern=r"^pissa_niter_[1-9][0-9]*$", description="pissa_niter_N (N a number)")]
CudaDevice = Annotated[str, Field(pattern=r"^cuda(:[0-9]+)?$", description="cuda or cuda:N (N a number)")]
Amount = Annotated[
    str,
    Field(
        pattern=r"^[0-9]+(\.[0-9]+)? *([gG]|[gG][bB]|[gG][iI][bB])$",
        description="an amount of memory: 8GB, 7.5 GiB",
    ),
]
ChatTemplate = Annotated[
    str,
    Field(
        pattern=r"\{[{%]|\.(jinja|jinja2|j2)$",
        description="Jinja text, or the path of a .jinja file",
    ),
]


def as_list(value: object) -> object:
    """`report_to: none` and `report_to: wandb` are Hugging Face's own ways to write a list."""
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str) else value


def default_4bit(given: dict[str, Any]) -> bool:
    """Four bits, unless it is to be eight."""
    return not given.get("load_in_8bit", False)


def default_epochs(given: dict[str, Any]) -> float | None:
    """One epoch, unless the steps are counted."""
    return 1.0 if given.get("max_steps") is None else None


def default_warmup(given: dict[str, Any]) -> float | None:
    """3% of the steps, unless they are counted or the schedule knows no warm-up."""
    if given.get("warmup_steps") is not None:
        return None
    return 0.0 if given.get("lr_scheduler_type") == "constant" else 0.03
