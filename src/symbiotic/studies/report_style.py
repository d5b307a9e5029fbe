"""How the figures of a report look: the two colour schemes, one look per arm over all figures, pixels to PNG."""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

DPI = 200
SIZE = (4.4, 2.9)
"""Inches of a panel: two stand side by side on a desktop, one fills a phone, and 8.5 points stay readable on both."""

NAMES = ("blue", "orange", "green", "pink", "grey", "gold", "light blue", "violet")
"""Apart by more than 10 (CIE76) in each scheme for readers with deuteranopia or protanopia too, and 3:1 to the page."""
MARKERS = {"o": "circles", "s": "squares", "^": "triangles", "D": "diamonds", "P": "plus signs", "X": "crosses"}


@dataclass(frozen=True)
class Theme:
    page: str
    ink: str
    dim: str
    line: str
    colours: Sequence[str]


LIGHT = Theme(
    "#ffffff", "#1b1f24", "#5b6470", "#d8dee4",
    ("#0B5CAD", "#C2410C", "#0A7F5A", "#C03A8E", "#4A4A4A", "#B08900", "#3A96D0", "#4B2A9B"),
)  # fmt: skip
DARK = Theme(
    "#14171b", "#eceff3", "#9aa4b0", "#323941",
    ("#4F9BEA", "#FF7A3D", "#2DB985", "#F48ACB", "#C4C4C4", "#F2D060", "#A5DEFF", "#9A7DFF"),
)  # fmt: skip


@dataclass(frozen=True)
class Look:
    """Of an arm, in every figure. A control has the colour and marker of its arm, dashed and hollow."""

    number: int
    control: bool = False

    @property
    def marker(self) -> str:
        """Another one in the second round of colours."""
        return list(MARKERS)[(self.number + self.number // len(NAMES)) % len(MARKERS)]

    @property
    def words(self) -> str:
        line, marks = ("dashed", "hollow ") if self.control else ("solid", "")
        return f"{NAMES[self.number % len(NAMES)]} {line} line, {marks}{MARKERS[self.marker]}"

    def style(self, theme: Theme) -> dict[str, Any]:
        """Arguments of a line with markers."""
        colour = theme.colours[self.number % len(theme.colours)]
        return {
            "color": colour,
            "linestyle": "--" if self.control else "-",
            "marker": self.marker,
            "markerfacecolor": theme.page if self.control else colour,
            "markeredgecolor": colour,
        }


@dataclass(frozen=True)
class Picture:
    """A panel in both schemes, each drawn when it is first looked at. alt: what it shows, in words."""

    alt: str
    draw: Callable[[Theme], np.ndarray]

    @functools.cached_property
    def light(self) -> np.ndarray:
        return self.draw(LIGHT)

    @functools.cached_property
    def files(self) -> tuple[bytes, bytes]:
        """In light and in dark, as PNG."""
        return png(self.light), png(self.draw(DARK))

    @property
    def width(self) -> int:
        """In CSS pixels, of which the pixels are two."""
        return self.light.shape[1] // 2

    @property
    def height(self) -> int:
        return self.light.shape[0] // 2


Draw = Callable[[Any, Theme], None]
"""Draws on an axis of matplotlib."""


@contextmanager
def canvas(theme: Theme, size: tuple[float, float]) -> Iterator[tuple[Any, Any]]:
    """A figure and a function that returns its pixels, with every text and line in the colours of the theme."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {
        "font.size": 8.5, "axes.titlesize": 9.5, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
        "grid.color": theme.line, "grid.linewidth": 0.6, "axes.edgecolor": theme.dim, "axes.linewidth": 0.7,
        "xtick.color": theme.dim, "ytick.color": theme.dim, "xtick.labelcolor": theme.ink, "text.color": theme.ink,
        "ytick.labelcolor": theme.ink, "axes.labelcolor": theme.ink, "axes.titlecolor": theme.ink,
        "axes.facecolor": theme.page, "figure.facecolor": theme.page, "hatch.color": theme.dim, "hatch.linewidth": 0.5,
        "lines.linewidth": 1.5, "lines.markersize": 4.5, "lines.markeredgewidth": 1.1, "legend.frameon": False,
    }  # fmt: skip
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        agg = FigureCanvasAgg(figure)

        def pixels() -> np.ndarray:
            agg.draw()
            return np.asarray(agg.buffer_rgba())[..., :3].copy()

        yield figure, pixels


def panel(draw: Draw, title: str, alt: str, size: tuple[float, float] = SIZE) -> Picture:
    """One axis with a title."""

    def drawn(theme: Theme) -> np.ndarray:
        with canvas(theme, size) as (figure, taken):
            axis = figure.subplots()
            draw(axis, theme)
            axis.set_title(title)
            return taken()

    return Picture(f"{title}. {alt}", drawn)


def swatch(look: Look, name: str) -> Picture:
    """A bit of the arm's line, for legends and tables."""

    def draw(theme: Theme) -> np.ndarray:
        with canvas(theme, (0.34, 0.14)) as (figure, taken):
            figure.set_layout_engine("none")
            axis = figure.add_axes((0, 0, 1, 1))
            axis.plot([0, 1, 2], [0, 0, 0], markevery=[1], **look.style(theme))
            axis.set_axis_off()
            return taken()

    return Picture(f"{name}: {look.words}", draw)


def montage(pictures: Sequence[np.ndarray], looks: Mapping[str, Look], columns: int = 2) -> np.ndarray:
    """Panels in rows, on white, with the legend of the arms below; each row as high as its highest panel."""
    columns = min(columns, len(pictures))
    width = max(picture.shape[1] for picture in pictures)
    rows = [pictures[start : start + columns] for start in range(0, len(pictures), columns)]
    made = []
    for row in rows:
        strip = np.full((max(p.shape[0] for p in row), columns * width, 3), 255, np.uint8)
        for i, picture in enumerate(row):
            strip[: picture.shape[0], i * width : i * width + picture.shape[1]] = picture
        made.append(strip)
    return np.concatenate([*made, *([legend(looks, columns * width)] if looks else [])])


def legend(looks: Mapping[str, Look], width: int) -> np.ndarray:
    """The arms, in as many columns as fit into `width` pixels."""
    from matplotlib.lines import Line2D

    inches = width / DPI
    columns = max(1, int(inches // (0.55 + 0.07 * max(map(len, looks)))))
    height = 0.18 * -(-len(looks) // columns) + 0.15
    with canvas(LIGHT, (inches, height)) as (figure, taken):
        figure.set_layout_engine("none")
        lines = [Line2D([], [], **look.style(LIGHT)) for look in looks.values()]
        figure.legend(lines, [plain(name) for name in looks], loc="center", ncols=columns)
        return taken()[:, :width]


def plain(text: str) -> str:
    """Text that matplotlib does not read as mathematics."""
    return text.replace("$", r"\$")


def png(pixels: np.ndarray) -> bytes:
    """Always the same bytes for the same pixels; in the 256 colours that hold most of them."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()
