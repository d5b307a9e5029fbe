"""What the instruments saw over a run, as one figure drawn from its metrics.csv."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from symbiotic.callbacks.csv_log import read_rows
from symbiotic.callbacks.events import Event, read_events
from symbiotic.callbacks.in_loop_evaluation import SCORES, read_scores
from symbiotic.files import commit

Series = tuple[list[int], list[float]]
"""Steps and values of a metric."""

EVENT_LINES: dict[str, dict[str, Any]] = {
    "phase": {"color": "grey", "linewidth": 0.8, "linestyle": "--"},
    "alarm": {"color": "red", "linewidth": 0.6, "linestyle": ":"},
    "intervention": {"color": "red", "linewidth": 0.8},
}
KIND_COLOURS = {"words": "C0", "prompts": "C1", "read patches": "C2", "latents": "C3"}
KIND_NAMES = {"text": "words", "prompt": "prompts", "vit": "read patches", "vae": "latents"}


def draw_instruments(folder: Path, path: Path) -> Path | None:
    """Losses, capacity by kind with its random baseline, drift, leak, conflicts and balance of one run, as a PNG.

    Panels without a logged metric are left out; None when nothing was logged. Events stand as lines in every panel:
    grey where a phase ended by a metric, red dashes for alarms, red for interventions.
    """
    from matplotlib.figure import Figure

    series = read_series(folder / "metrics.csv") | read_score_series(folder / SCORES)
    panels = [(title, chosen) for title, pick in PANELS.items() if (chosen := pick(series))]
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    height = 2.1 * rows + 0.6
    figure = Figure(figsize=(11, height))
    axes = figure.subplots(rows, 2, squeeze=False).reshape(-1)
    # Fixed, as finding the room that texts need takes matplotlib as long as drawing them.
    figure.subplots_adjust(0.075, 0.3 / height, 0.99, 1 - 0.65 / height, wspace=0.13, hspace=0.38)
    events = [event for event in read_events(folder) if event["kind"] in EVENT_LINES]
    last = max(step for _, chosen in panels for steps, _ in chosen.values() for step in steps)
    for axis, (title, chosen) in zip(axes, panels, strict=False):
        _panel(axis, title, chosen, events)
        axis.set_xlim(-0.02 * last, 1.02 * last)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.suptitle(folder.name)
    return commit(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def read_series(path: Path) -> dict[str, Series]:
    """Metric -> steps and values of a metrics.csv; empty cells are left out."""
    series: dict[str, Series] = {}
    for row in read_rows(path):
        for name, value in row.items():
            if name != "step" and value != "":
                steps, values = series.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(value))
    return series


def read_score_series(path: Path) -> dict[str, Series]:
    """`eval/SCORE` -> steps and values of a scores.jsonl, which has the first and the last step too."""
    series: dict[str, Series] = {}
    for step, scores in sorted(read_scores(path).items()):
        for name, value in scores.items():
            if value is not None:
                steps, values = series.setdefault(f"eval/{name}", ([], []))
                steps.append(step)
                values.append(value)
    return series


def _panel(axis: Any, title: str, chosen: Mapping[str, Series], events: Sequence[Event]) -> None:
    for label, (steps, values) in chosen.items():
        if label.endswith("by chance"):
            axis.plot(steps, values, color=axis.lines[-1].get_color(), linestyle=":", linewidth=1)
        else:
            style = "steps-post" if title.startswith("shield") else "default"
            marker = "." if len(steps) < 20 else None
            colour = KIND_COLOURS.get(label)
            axis.plot(steps, values, label=label, marker=marker, markersize=4, drawstyle=style, color=colour)
    for event in events:
        axis.axvline(event["step"], **EVENT_LINES[event["kind"]])
    if title == "losses" and min(v for _, values in chosen.values() for v in values) > 0:
        axis.set_yscale("log")
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="best")


def _losses(series: Mapping[str, Series]) -> dict[str, Series]:
    return {name: series[f"train/{name}"] for name in ("ce", "flow", "image_ce") if f"train/{name}" in series}


def _capacity(series: Mapping[str, Series]) -> dict[str, Series]:
    out: dict[str, Series] = {}
    for kind, label in KIND_NAMES.items():
        name = f"routing/capacity@1/{kind}"
        if name in series:
            out[label] = series[name]
            if f"{name}/random" in series:
                out[f"{label} by chance"] = series[f"{name}/random"]
    return out


def _by_pattern(pattern: str) -> Any:
    """Metrics whose name matches; the label is the first group, a kind of token by its name."""

    def pick(series: Mapping[str, Series]) -> dict[str, Series]:
        found = {match[1]: value for name, value in series.items() if (match := re.fullmatch(pattern, name))}
        return {KIND_NAMES.get(label, label): value for label, value in found.items()}

    return pick


PANELS = {
    "losses": _losses,
    "capacity rate at factor 1 by kind (dotted: random routing)": _capacity,
    "expert utilisation by kind": _by_pattern(r"routing/utilisation/(text|prompt|vit|vae)"),
    "drift of the router's probabilities on the probe": _by_pattern(r"routing/drift/(\w+)"),
    "leak of the generation gradient into shielded parameters": _by_pattern(r"leak/(\w+)"),
    "cosine of the tasks' gradients by role": _by_pattern(r"conflict/(\w+)/cosine"),
    "norm of generation / understanding gradient by role": _by_pattern(r"conflict/(\w+)/ratio"),
    "shield level": _by_pattern(r"phase/(shield)"),
    "on the shared experts alone": _by_pattern(r"shared_only/(\w+)"),
    "benchmarks": _by_pattern(r"eval/(knowledge\w+|reading|embedded_acc)"),
}
"""Title -> what it shows of the logged metrics."""
