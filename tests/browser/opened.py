"""A page opened in a real browser, at two widths, light and dark: what is wrong with it, and how it looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
"""Width and height of the window, in CSS pixels."""

SCHEMES = ("light", "dark")

VIEWS = [f"{size} {scheme}" for size in SIZES for scheme in SCHEMES]

CHECKS = Path(__file__).with_name("checks.js").read_text()


@dataclass
class Opened:
    """What the views of one page have in common."""

    faults: list[str] = field(default_factory=list)
    """One line each: the view, and what is wrong there."""

    tables: int = 0
    figures: int = 0
    texts: int = 0
    shots: list[Path] = field(default_factory=list)


def opened(browser: Browser, path: Path, shots: Path, sections: tuple[str, ...] = ()) -> Opened:
    """Open the file `path` in every view, with a screenshot of each in the folder `shots`.

    `sections`: ids that the page must show. Nothing but the file itself is let through: a request for anything else
    is a fault, for a page is one file.
    """
    found = Opened()
    for name, (width, height) in SIZES.items():
        for scheme in SCHEMES:
            shot = shots / f"{path.stem}-{name}-{scheme}.png"
            context = browser.new_context(
                viewport={"width": width, "height": height},
                screen={"width": width, "height": height},
                is_mobile=name == "phone",
                has_touch=name == "phone",
                color_scheme=scheme,
            )
            try:
                counts = view(context.new_page(), path.resolve().as_uri(), sections, shot)
            finally:
                context.close()
            found.faults += [f"{name} {scheme}: {fault}" for fault in counts.pop("faults")]
            found.tables, found.figures, found.texts = counts["tables"], counts["figures"], counts["texts"]
            found.shots.append(shot)
    return found


def view(page: Page, url: str, sections: tuple[str, ...], shot: Path) -> dict[str, Any]:
    """The counts and faults of one view."""
    heard: list[str] = []
    page.on(
        "request", lambda request: heard.append(f"requests {request.url}") if is_foreign(request.url, url) else None
    )
    page.on("websocket", lambda socket: heard.append(f"requests {socket.url}"))
    page.on("console", lambda message: heard.append(f"console: {message.text}") if message.type == "error" else None)
    page.on("pageerror", lambda error: heard.append(f"script error: {error}"))
    page.route(lambda address: is_foreign(address, url), lambda route: route.abort())
    page.goto(url, wait_until="load")
    counts = page.evaluate(CHECKS, list(sections))
    page.screenshot(path=shot, full_page=True)
    return {**counts, "faults": heard + counts["faults"]}


def is_foreign(address: str, url: str) -> bool:
    return address.split("#")[0] != url and not address.startswith("data:")
