"""The pages of a report: escaped, self-contained, accessible, whatever stands in the document."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from symbiotic.studies.report_document import (
    Block,
    Cell,
    Code,
    Column,
    Document,
    Figure,
    Folded,
    Gallery,
    Items,
    Row,
    Said,
    Section,
    Table,
    Terms,
    Text,
    Verdicts,
)
from symbiotic.studies.report_html import TEMPLATES, html, markdown, plain_markdown
from symbiotic.studies.report_style import DARK, LIGHT, Picture, Theme, png

HOSTILE = '<b>|x" onload=y & `z` *s* [l](http://h) $m$\n# t'
VOID = {"meta", "link", "img", "source", "br"}


class Page(HTMLParser):
    """What a static check needs of a page: tags in balance, attributes, texts outside of style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.faults: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.parents: list[tuple[str, ...]] = []
        self.text = ""
        self.style = ""
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self.parents.append(tuple(self.open))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.text += data

    def of(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag in tags]


def faults(text: str) -> list[str]:
    """What is wrong with a page that must be one file, valid and accessible; one line each."""
    page = Page(text)
    found = list(page.faults)
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    found += [f"id {name} stands {n} times" for name, n in ids.items() if n > 1]
    found += [f"link to {a['href']}" for a in page.of("a") if a["href"][:1] != "#" or a["href"][1:] not in ids]
    found += [f"<{tag}>" for tag, _ in page.tags if tag in ("script", "iframe", "object", "embed", "video", "form")]
    sources = [a[name] for a in page.of("img", "source", "link") for name in ("src", "srcset", "href") if name in a]
    found += [f"loads {source[:40]}" for source in sources if not source.startswith("data:")]
    found += [f"loads by style: {url}" for url in re.findall(r"url\(|@import", page.style)]
    found += [f"attribute {name}" for _, a in page.tags for name in a if name.startswith("on") or name == "style"]
    found += ["img without alt" for a in page.of("img") if not a.get("alt", "").strip()]
    found += [
        f"no {scheme}"
        for scheme in ("color-scheme: light dark", "prefers-color-scheme: dark")
        if scheme not in page.style
    ]
    tables = text.count("<table")
    for part, least in (("<caption>", tables), ("<thead>", tables), ('<th scope="col">', tables)):
        found += [f"{part} missing in a table"] if text.count(part) < least else []
    found += ["th without scope" for a in page.of("th") if a.get("scope") not in ("col", "row")]
    found += ["table that does not scroll" for (tag, _), parents in zip(page.tags, page.parents, strict=True)
              if tag == "table" and parents[-1] != "div"]  # fmt: skip
    return found + [f"{name} missing" for name in ("viewport",) if name not in {a.get("name") for a in page.of("meta")}]


def picture(value: int = 0) -> Picture:
    pixels = np.full((4, 6, 3), value, np.uint8)
    return Picture(HOSTILE, lambda theme: pixels if theme is LIGHT else 255 - pixels)


ROW = Row(HOSTILE, [Cell(HOSTILE, HOSTILE, True)], "anchor", HOSTILE, picture())
BLOCKS: list[Block] = [
    Text([HOSTILE, "two"], loud=True),
    Table(HOSTILE, [Column("arm"), Column(HOSTILE, HOSTILE)], [ROW]),
    Figure("figure", HOSTILE, [picture(), picture(9)]),
    Gallery(HOSTILE, [HOSTILE, "b"], {HOSTILE: [png(np.zeros((2, 2, 3), np.uint8))] * 2}, "gallery"),
    Items([HOSTILE]),
    Terms({HOSTILE: HOSTILE}),
    Code(HOSTILE),
    Verdicts([Said("not supported", HOSTILE, HOSTILE), Said("undecided", "b", "c")]),
    Folded(HOSTILE, [Table("inner", [Column("a")], [Row("b", [])])]),
]  # fmt: skip


@pytest.fixture
def document() -> Document:
    return Document(
        HOSTILE, {HOSTILE: HOSTILE}, [Section("one", HOSTILE, BLOCKS), Section("two", "b", [])], {HOSTILE: picture()}
    )


def test_the_page_of_any_text_is_whole_and_loads_nothing(document: Document) -> None:
    text = html(document)
    assert faults(text) == []
    page = Page(text)
    assert {tag for tag, _ in page.tags} & {"b"} == {"b"}  # ours, around strong cells and verdicts
    assert text.count("<b>") == 3
    assert HOSTILE.replace("\n", " ") in " ".join(page.text.split("\n"))
    assert [a["href"] for a in page.of("a")] == ["#one", "#two"]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("<body>", '<body><img alt="x" src="http://h/x.png">', "loads http://h/x.png"),
        ("<body>", '<body><img src="data:,">', "img without alt"),
        ("<body>", "<body><script>1</script>", "<script>"),
        ("<body>", '<body><p onclick="x"></p>', "attribute onclick"),
        ("</main>", "", "</body> closes nothing"),
        ('href="#one"', 'href="#three"', "link to #three"),
        ('id="two"', 'id="one"', "id one stands 2 times"),
        (' scope="row"', "", "th without scope"),
        ("<caption>", "<p>", "<caption> missing in a table"),
        ("prefers-color-scheme: dark", "print", "no prefers-color-scheme: dark"),
    ],
)
def test_the_check_finds(document: Document, old: str, new: str, fault: str) -> None:
    text = html(document)
    assert old in text
    assert fault in faults(text.replace(old, new))


def test_markdown_shows_any_text_as_it_is(document: Document) -> None:
    text = markdown(document)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3 + 3  # two tables of one row
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in rows] == [3, 3, 3, 2, 2, 2]
    outside = re.sub(r"```\n.*?\n```", "", text, flags=re.DOTALL)
    assert not re.search(r"<(?!br>|sub>|/sub>)", outside)
    assert not re.search(r"^# t", outside, flags=re.MULTILINE)
    assert "![" in text
    assert "](figures/figure.png)" in text
    assert "](figures/gallery.png)" in text


def test_escapes_of_markdown_by_hand() -> None:
    assert plain_markdown("a|b *c* `d` knowledge_unreplayed _e_") == r"a\|b \*c\* \`d\` knowledge_unreplayed \_e\_"
    assert plain_markdown("<b>\n&amp;") == "&lt;b&gt; &amp;amp;"
    assert plain_markdown("# head") == r"\# head"


def luminance(colour: str) -> float:
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_stand_out_from_the_page(theme: Theme) -> None:
    assert min(contrast(colour, theme.page) for colour in theme.colours) >= 3.0
    assert min(contrast(colour, theme.page) for colour in (theme.ink, theme.dim)) >= 4.5


def test_texts_of_the_page_have_contrast_in_both_schemes() -> None:
    light, dark = re.findall(r":root \{(.*?)\}", (TEMPLATES / "report.css").read_text(), flags=re.DOTALL)
    for scheme in (light, dark):
        colours = dict(re.findall(r"--(\w+): (#\w+)", scheme))
        full = {name: c if len(c) == 7 else "#" + "".join(2 * digit for digit in c[1:]) for name, c in colours.items()}
        texts = [c for name, c in full.items() if name not in ("page", "panel", "line")]
        assert len(texts) == 6
        assert min(contrast(text, full[ground]) for text in texts for ground in ("page", "panel")) >= 4.5
