"""HTML pages from Jinja2 templates in one file each: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clae_dist.escape import shown


def render(package: str, template: str, **values: Any) -> str:
    """Render a template of `package`, which may extend the base page and import the macros of clae_dist/templates.

    Every value is escaped twice: control characters by escape.shown, markup by Jinja2. An undefined name is an error.
    """
    return _environment(package).get_template(template).render(values)


@cache
def _environment(package: str) -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader(package), PackageLoader("clae_dist")]),
        autoescape=True,
        finalize=_finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else shown(value)  # Markup: the result of a macro or block


def data_uri(image: bytes, kind: str) -> str:
    """An image as the source of an <img>; `kind` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
