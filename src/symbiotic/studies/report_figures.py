"""The figures of a report, panel by panel: what the arms scored, how they got there, and how their experts were used.

A line is the mean over the seeds of an arm, the band around it their range (with one seed there is none). An arm has
the same colour and marker everywhere; a control has those of its arm, dashed and hollow.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.evaluation.names import metric
from symbiotic.studies.curves import KIND_NAMES, Series
from symbiotic.studies.report_style import SIZE, Look, Picture, Theme, panel, plain
from symbiotic.studies.statistics import Seeds

FEW = 20
"""Up to so many points a line carries its marker at each of them."""


@dataclass(frozen=True)
class Drawn:
    """An arm as the figures need it.

    Args:
        scores, metrics: name -> one series a seed; of the benchmarks, and of what was logged.
        starts: anchor (`stage 0`, `iteration 0`) -> score -> seed -> value.
    """

    name: str
    look: Look
    scores: Mapping[str, Sequence[Series]]
    metrics: Mapping[str, Sequence[Series]]
    starts: Mapping[str, Mapping[str, Seeds]] = field(default_factory=dict)

    def last(self, score: str) -> list[float]:
        """The last value of every seed."""
        return [values[-1] for _, values in self.scores.get(score, ()) if values]


# --------------------------------------------------------------------------- lines over the steps


def score_panel(arms: Sequence[Drawn], score: str) -> Picture | None:
    """A score over the steps of joint training, with stage 0 as a line; None where no arm has it."""
    facts, drawn = metric(score), [arm for arm in arms if arm.scores.get(score)]
    if not drawn:
        return None
    low = min((value for arm in drawn for _, values in arm.scores[score] for value in values), default=0.0)
    falling = facts.better == "lower" and low > 0

    def draw(axis: Any, theme: Theme) -> None:
        before: dict[int, float] = {}
        for arm in drawn:
            before |= arm.starts.get("stage 0", {}).get(score, {})
        if before:
            level = statistics.fmean(before.values())
            axis.axhline(level, color=theme.dim, linestyle=":", linewidth=1.2, zorder=1)
            beside(axis, level, "stage 0", theme)
        for arm in drawn:
            lines(axis, arm, arm.scores[score], theme)
        if falling:
            logarithmic(axis, "y")
        axis.set_xlabel("step of joint training")

    ends = "; ".join(f"{arm.name} {statistics.fmean(arm.last(score)):.{facts.digits}f}" for arm in drawn)
    scale = ", logarithmic scale" if falling else ""
    title = f"{facts.title} {arrow(facts.better)}"
    return panel(draw, title, f"Lines over the steps{scale}; at the end, means over the seeds: {ends}.")


def metric_panel(arms: Sequence[Drawn], name: str, title: str, random: str | None = None) -> Picture | None:
    """A logged metric over the steps; random: the metric that says what uniform routing would give."""
    drawn = [arm for arm in arms if arm.metrics.get(name)]
    if not drawn:
        return None

    def draw(axis: Any, theme: Theme) -> None:
        levels: dict[float, tuple[Any, Any]] = {}
        for arm in drawn:
            if random and arm.metrics.get(random):
                steps, values = mean_and_range(arm.metrics[random])[:2]
                levels.setdefault(round(float(np.mean(values)), 2), (steps, values))
            lines(axis, arm, arm.metrics[name], theme)
        for steps, values in levels.values():
            axis.plot(steps, values, color=theme.dim, linestyle=":", linewidth=1.2, zorder=1)
        axis.set_xlabel("step of joint training")

    ends = "; ".join(f"{a.name} {statistics.fmean(v[-1] for _, v in a.metrics[name] if v):.3f}" for a in drawn)
    return panel(draw, title, f"Lines over the steps; at the end, means over the seeds: {ends}.")


def lines(axis: Any, arm: Drawn, series: Sequence[Series], theme: Theme) -> None:
    """Mean and range of an arm over the steps that all its seeds have."""
    steps, mean, low, high = mean_and_range(series)
    style = arm.look.style(theme) | {"markevery": max(1, len(steps) // 6)}
    if len(steps) > FEW:
        style["linewidth"] = 1.2
    axis.plot(steps, mean, **style, zorder=2 if arm.look.control else 3)
    if len(series) > 1:
        axis.fill_between(steps, low, high, color=style["color"], alpha=0.1, linewidth=0, zorder=1)


def mean_and_range(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all series have, and the mean, lowest and highest value there; NaN is left out."""
    found = [{s: v for s, v in zip(*one, strict=True) if not math.isnan(v)} for one in series]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    values = np.array([[one[step] for step in steps] for one in found])
    return np.array(steps), values.mean(0), values.min(0), values.max(0)


# --------------------------------------------------------------------------- what is kept, and at which price


ANCHORS = {"stage 0": "|", "iteration 0": "x"}


def forgetting_panel(arms: Sequence[Drawn], score: str) -> Picture | None:
    """One line an arm: where it started (stage 0, iteration 0), where it ended, each seed, and its control."""
    drawn = [arm for arm in arms if arm.last(score)]
    if not drawn:
        return None
    facts = metric(score)

    def draw(axis: Any, theme: Theme) -> None:
        for height, arm in enumerate(drawn):
            ends, style = arm.last(score), arm.look.style(theme) | {"linestyle": "none"}
            mean = statistics.fmean(ends)
            starts = {name: arm.starts.get(name, {}).get(score) for name in ANCHORS}
            for name, values in starts.items():
                if values:
                    axis.plot(statistics.fmean(values.values()), height, ANCHORS[name], color=theme.ink, markersize=7)
            if starts["stage 0"]:
                axis.plot(
                    [statistics.fmean(starts["stage 0"].values()), mean], [height] * 2, color=theme.line, zorder=1
                )
            axis.plot(ends, [height] * len(ends), **style | {"markersize": 3, "alpha": 0.5})
            axis.plot(mean, height, **style | {"markersize": 7})
        if facts.chance is not None and min(v for arm in drawn for v in arm.last(score)) < facts.chance + 0.2:
            axis.axvline(facts.chance, color=theme.dim, linestyle=":", linewidth=1)
        axis.set_yticks(range(len(drawn)), [plain(short(arm.name)) for arm in drawn])
        axis.set_ylim(len(drawn) - 0.4, -0.6)
        axis.grid(visible=False, axis="y")

    described = "; ".join(f"{arm.name} {statistics.fmean(arm.last(score)):.{facts.digits}f}" for arm in drawn)
    height = 0.9 + 0.27 * len(drawn)
    title = f"{facts.title} {arrow(facts.better)}"
    return panel(draw, title, f"A line for each arm from stage 0 to the end; {described}.", (SIZE[0], height))


def frontier_panel(arms: Sequence[Drawn], kept: str, error: str) -> Picture | None:
    """What is kept of understanding against an error of generation, over the steps; the large marker is the end."""
    drawn = [arm for arm in arms if arm.scores.get(kept) and arm.scores.get(error)]
    if not drawn:
        return None
    x, y = metric(error), metric(kept)

    def draw(axis: Any, theme: Theme) -> None:
        for arm in drawn:
            style = arm.look.style(theme)
            xs, ys = paired(arm.scores[error], arm.scores[kept])
            axis.plot(xs, ys, **style | {"linewidth": 0.9, "markersize": 3, "alpha": 0.7})
            axis.plot(xs[-1], ys[-1], **style | {"markersize": 8})
            for one in zip(arm.last(error), arm.last(kept), strict=False):
                axis.plot(*one, **style | {"markersize": 3, "linestyle": "none", "alpha": 0.5})
        logarithmic(axis, "x")
        axis.set_xlabel(f"{x.title} {arrow(x.better)} (logarithmic)")
        axis.set_ylabel(f"{y.title} {arrow(y.better)}")

    means = [(arm.name, statistics.fmean(arm.last(kept)), statistics.fmean(arm.last(error))) for arm in drawn]
    ends = "; ".join(f"{name} {high:.{y.digits}f} at {low:.{x.digits}f}" for name, high, low in means)
    return panel(draw, f"against {x.title}", f"{y.title}: a path for each arm; its end: {ends}.", (SIZE[0], 3.4))


def paired(first: Sequence[Series], second: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Means over the seeds of two scores at the steps that both have, without the start: there is nothing drawn yet."""
    one, two = mean_and_range(first), mean_and_range(second)
    steps = [step for step in one[0] if step in two[0]]
    steps = steps[1:] or steps
    return tuple(s[1][np.isin(s[0], steps)] for s in (one, two))  # type: ignore[return-value]


# --------------------------------------------------------------------------- which experts


def heatmap_panel(name: str, path: Path, visible: Mapping[str, Sequence[bool]], pools: Mapping[str, int]) -> Picture:
    """Layer x expert for each kind of token that there was, below each other, on the scale of all heat maps.

    path: counts [L, M, E] and tokens [M] as the heat map of a run leaves them. visible: kind -> which experts it may
    use. pools: name -> number of experts, in the order of the columns.
    """
    with np.load(path) as file:
        counts, tokens, kinds = file["counts"], file["tokens"], [str(kind) for kind in file["kinds"]]
        first, last = (int(step) for step in file["steps"])
    shown = [m for m in range(len(kinds)) if tokens[m] > 0]
    layers, experts = counts.shape[0], counts.shape[2]
    relative = {kinds[m]: relative_load(counts[:, m], np.asarray(visible[kinds[m]])) for m in shown}

    def draw(axis: Any, theme: Theme) -> None:
        image = np.full((len(shown) * (layers + 1) - 1, experts), np.nan)
        for i, kind in enumerate(relative):
            image[i * (layers + 1) : i * (layers + 1) + layers] = relative[kind]
        picture = heat(axis, image, theme)
        middles = [i * (layers + 1) + (layers - 1) / 2 for i in range(len(shown))]
        axis.set_yticks(middles, [KIND_NAMES.get(kind, kind).replace(" ", "\n") for kind in relative])
        for end in np.cumsum(list(pools.values()))[:-1]:
            axis.axvline(end - 0.5, color=theme.ink, linewidth=1.2)
        axis.set_xlabel(f"expert ({', '.join(f'{pool} {size}' for pool, size in pools.items())})")
        bar = axis.figure.colorbar(picture, ax=axis, extend="max", pad=0.02, ticks=[0, 0.5, 1, 2, 4])
        bar.ax.set_yticklabels(["0", "0.5", "1", "2", "4"])
        bar.set_label("load / even share")

    ends = {KIND_NAMES.get(kind, kind): (np.nanmin(load), np.nanmax(load)) for kind, load in relative.items()}
    said = "; ".join(f"{kind}: from {low:.1f} to {high:.1f} times an even share" for kind, (low, high) in ends.items())
    size = SIZE[0], 0.9 + 0.09 * (len(shown) * (layers + 1) - 1) + 0.2
    return panel(draw, name, f"Layers by experts for each kind of token, steps {first} to {last}; {said}.", size)


def relative_load(counts: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Counts [L, E] -> load [L, E] as a multiple of an even share over the visible experts; NaN where not visible."""
    total = counts.sum(-1, keepdims=True)
    load = counts / np.where(total > 0, total, 1) * max(1, visible.sum())
    return np.where(visible[None], load, np.nan)


def heat(axis: Any, image: np.ndarray, theme: Theme) -> Any:
    """The picture, one row a layer; experts out of sight and gaps between kinds stay in the colour of the page."""
    from matplotlib.colors import TwoSlopeNorm

    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=4.0)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.set_facecolor(theme.page)
    axis.tick_params(length=0)
    return axis.imshow(image, norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")


# --------------------------------------------------------------------------- generated images


def gallery_pixels(captions: Sequence[str], images: Mapping[str, Sequence[np.ndarray]]) -> np.ndarray:
    """A row an arm, a column a caption: the gallery as one picture, for where there is no table of images."""
    import textwrap

    from symbiotic.studies.report_style import LIGHT, canvas

    columns, rows = len(captions), len(images)
    with canvas(LIGHT, (1.6 + 0.9 * columns, 0.6 + 0.9 * rows)) as (figure, taken):
        axes = figure.subplots(rows, columns, squeeze=False)
        for row, (arm, pictures) in zip(axes, images.items(), strict=True):
            for axis, picture in zip(row, pictures, strict=False):
                axis.imshow(picture, interpolation="nearest")
            row[0].set_ylabel(plain(short(arm)), rotation=0, ha="right", va="center")
        for axis, caption in zip(axes[0], captions, strict=True):
            axis.set_title(plain(textwrap.fill(caption, 16)), fontsize=7, fontweight="normal", loc="center")
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[], frame_on=False)
            axis.grid(visible=False)
        return taken()


def grid_panel(name: str, path: Path) -> Picture:
    """A sample grid that the training drew, captions included."""
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))

    def draw(axis: Any, theme: Theme) -> None:
        axis.imshow(pixels, interpolation="lanczos")
        axis.set_axis_off()

    size = SIZE[0], 0.3 + SIZE[0] * pixels.shape[0] / pixels.shape[1]
    return panel(draw, name, "Generated images, each above its caption.", size)


# --------------------------------------------------------------------------- words


def arrow(better: str) -> str:
    return "↑" if better == "higher" else "↓"


def logarithmic(axis: Any, which: str) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade, or at its powers where there are many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis, f"set_{which}scale")("log")
    low, high = getattr(axis, f"get_{which}lim")()
    one = getattr(axis, f"{which}axis")
    one.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    one.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    one.set_minor_formatter(NullFormatter())


def beside(axis: Any, height: float, text: str, theme: Theme) -> None:
    """A word above a horizontal line, at its right end."""
    place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axis.annotate(text, (1, height), (-2, 2), ha="right", va="bottom", fontsize=7.5, color=theme.dim, **place)


def short(name: str, length: int = 32) -> str:
    """With its middle left out, as names that are alike differ at their ends."""
    half = length // 2
    return name if len(name) <= length else f"{name[: half - 1]}…{name[-half:]}"
