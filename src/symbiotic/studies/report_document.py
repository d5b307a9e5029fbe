"""A report as data: sections of text, tables, figures and galleries. The templates render it as HTML and as Markdown.

All text in here is plain: what escapes it is the renderer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from symbiotic.studies.report_style import Picture


@dataclass(frozen=True)
class Cell:
    """text: what is read first. note: a smaller second line. strong: what the table is looked at for."""

    text: str
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Column:
    """of: what it belongs to, shown above it; neighbours of one `of` share that heading."""

    title: str
    note: str = ""


@dataclass(frozen=True)
class Row:
    """kind: `arm`, `anchor` or `control`. picture: in front of the name, as the arm is drawn in the figures."""

    name: str
    cells: Sequence[Cell]
    kind: str = "arm"
    note: str = ""
    picture: Picture | None = None


@dataclass(frozen=True)
class Table:
    """columns: the first one is that of the rows' names. small: of text rather than numbers, so that lines may wrap."""

    caption: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    words: bool = False
    block: str = field(default="table", init=False)


@dataclass(frozen=True)
class Figure:
    """pictures: side by side where there is room. file: the name of the PNG that holds all of them, with the legend."""

    file: str
    caption: str
    pictures: Sequence[Picture]
    legend: bool = True
    block: str = field(default="figure", init=False)


@dataclass(frozen=True)
class Gallery:
    """Generated images beside their captions. images: arm -> one PNG a caption."""

    caption: str
    captions: Sequence[str]
    images: Mapping[str, Sequence[bytes]]
    file: str = "samples"
    block: str = field(default="gallery", init=False)


@dataclass(frozen=True)
class Text:
    """paragraphs. loud: to be seen before the rest of its section."""

    paragraphs: Sequence[str]
    loud: bool = False
    block: str = field(default="text", init=False)


@dataclass(frozen=True)
class Items:
    items: Sequence[str]
    block: str = field(default="items", init=False)


@dataclass(frozen=True)
class Terms:
    """Name -> what it is."""

    terms: Mapping[str, str]
    block: str = field(default="terms", init=False)


@dataclass(frozen=True)
class Code:
    code: str
    block: str = field(default="code", init=False)


@dataclass(frozen=True)
class Said:
    """A verdict: `supported`, `not supported` or `undecided`; the claim, and what the verdict rests on."""

    status: str
    claim: str
    line: str


@dataclass(frozen=True)
class Verdicts:
    verdicts: Sequence[Said]
    block: str = field(default="verdicts", init=False)


@dataclass(frozen=True)
class Folded:
    """Blocks behind a line that is clicked: what few readers need."""

    title: str
    blocks: Sequence[Block]
    block: str = field(default="folded", init=False)


Block = Table | Figure | Gallery | Text | Items | Terms | Code | Verdicts | Folded


@dataclass(frozen=True)
class Section:
    """id: the anchor of the table of contents; stable, others link to it."""

    id: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Document:
    """facts: small print under the title. legend: arm -> how the figures draw it."""

    title: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    legend: Mapping[str, Picture]

    def blocks(self) -> list[Block]:
        """All of them, also those that are folded away, in order."""
        found: list[Block] = []
        queue = [block for section in self.sections for block in section.blocks]
        while queue:
            block = queue.pop(0)
            found.append(block)
            queue[:0] = block.blocks if isinstance(block, Folded) else []
        return found
