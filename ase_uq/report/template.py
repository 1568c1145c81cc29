"""Templates of pages: HTML files that need no network, in the style of `page.css`."""

import base64
import hashlib
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from ase_uq.errors import MissingDependency
from ase_uq.report.viewer import packed
from ase_uq.report.words import counted, number

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
except ImportError as error:
    raise MissingDependency(
        'the page of a report needs jinja2, which is not installed. Run: pip install "ase-uq[report]"'
    ) from error


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """The text of a page.

    Args:
        template: File name of its template in this folder.
        values: What the template shows; the style of all pages is added as `style`.
    """
    environment = Environment(
        loader=PackageLoader("ase_uq.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "counted": counted,
        "number": number,
        "packed": packed,
        "percent": "{:.1%}".format,
        "sha256": _sha256,
        "thousands": "{:,}".format,
    }
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}
    return environment.get_template(template).render(values, style=_text("page.css"))


def page_script() -> str:
    """The script that turns structures."""
    return _text("page.js")


def _text(name: str) -> str:
    return files("ase_uq.report").joinpath(name).read_text("utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
