"""What `opened` finds in a page: nothing in a good one, and each fault in a page that is bad in just that way."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser.opened import VIEWS, opened

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

DOT = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"

GOOD = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>good</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>:root {{ color-scheme: light dark }} .scroll {{ overflow-x: auto }}</style></head><body>
<section id="results"><h1>Results</h1><p>Two numbers.</p>
<div class="scroll"><table><tr><th>score</th><td><div style="width: 600px">1</div></td></tr></table></div>
<figure><img alt="dot" src="{DOT}"><figcaption>A dot</figcaption></figure>
<details><summary>more</summary><p>less</p></details></section></body></html>"""

PHONE = [view for view in VIEWS if view.startswith("phone")]
DARK = [view for view in VIEWS if view.endswith("dark")]

BAD = {
    "no section": ('id="results"', "", VIEWS, "no section #results"),
    "hidden section": ('id="results"', 'id="results" hidden', VIEWS, "section #results is not visible"),
    "external image": ("<p>", '<img src="http://192.0.2.1/a.png"><p>', VIEWS, "requests http://192.0.2.1/a.png"),
    "external style": (
        "<p>",
        '<link rel=stylesheet href="https://a.test/a.css"><p>',
        VIEWS,
        "requests https://a.test/a.css",
    ),
    "external import": ("<style>", "<style>@import 'https://a.test/';", VIEWS, "requests https://a.test/"),
    "file beside": ("<p>", '<img src="beside.png"><p>', VIEWS, "/beside.png"),
    "web socket": ("<p>", "<script>new WebSocket('ws://a.test/')</script><p>", VIEWS, "requests ws://a.test/"),
    "console error": ("<p>", "<script>console.error('lost')</script><p>", VIEWS, "console: lost"),
    "script error": ("<p>", "<script>nothing()</script><p>", VIEWS, "script error: nothing is not defined"),
    "wide table": ('class="scroll"', "", PHONE, "px wide and overflows"),
    "cut table": ('class="scroll"', 'style="overflow: hidden"', PHONE, "px, and nothing scrolls"),
    "no viewport": ('name="viewport"', "", PHONE, "laid out 980 px wide on a screen of 390"),
    "empty table": ("<p>", "<table></table><p>", VIEWS, "table 1 is not visible"),
    "hidden figure": ("<figure>", '<figure style="display: none">', VIEWS, "figure 1 is not visible"),
    "broken image": (DOT, "data:image/png;base64,AAAA", VIEWS, "img 1 has no picture"),
    "white on white": ("<p>", '<p style="background: #fff">', DARK, "contrast 1.00 of <p> “Two numbers.”"),
    "grey heading": ("<h1>", '<h1 style="color: #808080">', VIEWS[::2], "contrast 3.95 of <h1> “Results”"),
    "faded cell": ("<td>", '<td style="opacity: .4">', VIEWS, "of <div> “1”"),
    "hidden in details": ("<p>less", '<p style="color: Canvas">less', VIEWS, "contrast 1.00 of <p> “less”"),
}


def test_a_good_page_has_no_fault(browser: Browser, tmp_path: Path, shots: Path) -> None:
    page = tmp_path / "good.html"
    page.write_text(GOOD)
    found = opened(browser, page, shots, ("results",))
    assert found.faults == []
    assert (found.tables, found.figures, found.texts) == (1, 2, 7)
    assert [shot.name for shot in found.shots] == [f"good-{view.replace(' ', '-')}.png" for view in VIEWS]
    assert all(shot.stat().st_size > 0 for shot in found.shots)


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_page_is_found(fault: str, browser: Browser, tmp_path: Path) -> None:
    old, new, views, line = BAD[fault]
    page = tmp_path / "bad.html"
    assert old in GOOD
    page.write_text(GOOD.replace(old, new, 1))
    found = opened(browser, page, tmp_path, ("results",))
    assert [one.split(":")[0] for one in found.faults if one.endswith(line)] == views, found.faults
