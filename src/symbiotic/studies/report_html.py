"""A report's document as one HTML file and as Markdown: templates of jinja2, and what escapes for them.

The page has no script and loads nothing: its images are inside, each in a light and a dark variant.
"""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from symbiotic.schema import RunError
from symbiotic.studies.report_document import Document

TEMPLATES = Path(__file__).resolve().parent / "templates"

MARKS = {"supported": "✓", "not supported": "✗", "undecided": "?"}


def html(document: Document) -> str:
    """The whole page; everything in the document is escaped."""
    style = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    return str(_environment(escape=True).get_template("report.html.j2").render(document=document, style=style))


def markdown(document: Document) -> str:
    """GitHub's Markdown; the figures are linked as `figures/NAME.png`."""
    text = _environment(escape=False).get_template("report.md.j2").render(document=document)
    return re.sub(r"\n{3,}", "\n\n", str(text)).strip() + "\n"


def _environment(escape: bool) -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError:
        raise RunError("the report needs jinja2, which is not installed; pip install 'symbiotic[eval]'") from None
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=escape, undefined=StrictUndefined)
    environment.filters |= {"data_uri": data_uri, "md": plain_markdown, "mark": lambda status: MARKS.get(status, "–")}
    return environment


def data_uri(image: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def plain_markdown(text: str) -> str:
    """Text that Markdown shows as it is, in a cell of a table too: nothing in it is markup, a line break is a space."""
    line = " ".join(str(text).split())
    line = re.sub(r"([\\`*|\[\]$~]|(?<!\w)_|_(?!\w))", r"\\\1", line)
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"^([#+-])(?=\s|$)", r"\\\1", line)
