"""The page to chat on: one HTML file with its styles and script, which asks this server alone."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

__all__ = ["PAGE_HEADERS", "page"]

_HERE = Path(__file__).parent


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def page() -> str:
    """The page. Nothing of the model or its answers stands in it; the script asks for those."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("page.html.jinja").render(style=Markup(_read("page.css")), script=Markup(_script()))


def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _script() -> str:
    return _read("page.js")


# Whatever a model answers: no script runs but ours, and nothing is asked for but this server's endpoints.
PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hash(_script())}; style-src {_hash(_read('page.css'))}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
