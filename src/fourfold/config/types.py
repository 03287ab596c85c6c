"""Types of the configuration's values: texts and numbers that are of one form."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = ["Amount", "ChatTemplate", "Count", "CountOrZero", "CudaDevice", "PiSSAIterations"]

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
