"""The plan of joint training as a figure: rates, shield, balance weight and data mix over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symbiotic.files import commit
from symbiotic.layout import shield_kinds
from symbiotic.schema import Config
from symbiotic.studies.console import rate_groups
from symbiotic.training.phases import active_phases, balance_weight, bounds, mix_schedule, phase_at, role_rates


def draw_timeline(config: Config, roles: Sequence[str], path: Path) -> Path:
    """Write the phases as a PNG. A phase that may end earlier is drawn to its last step, with its condition.

    roles: those that the model's parameters really have.
    """
    from matplotlib.figure import Figure

    steps = list(range(config.phases.steps))
    panels = [_rates, _balance, *([_shield] if shield_kinds(config.system) else []), _mix]
    figure = Figure(figsize=(10, 1.2 + 1.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for panel, axis in zip(panels, axes, strict=True):
        panel(axis, config, roles, steps)
        axis.spines[["top", "right"]].set_visible(False)
    _phases(list(axes), config)
    axes[-1].set_xlim(0, config.phases.steps)
    figure.suptitle(f"{config.system.name}: phases of joint training")
    return commit(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def _rates(axis: Any, config: Config, roles: Sequence[str], steps: list[int]) -> None:
    frozen = [phase_at(config.phases, step).frozen for step in steps]
    for group in rate_groups(config, list(roles)):
        course = [role_rates(config.rates, config.phases, step, group)[group[0]] for step in steps]
        by_frozen: dict[tuple[bool, ...], list[str]] = {}
        for role in group:
            by_frozen.setdefault(tuple(role in names for names in frozen), []).append(role)
        for i, (held, members) in enumerate(by_frozen.items()):
            shown = [math.nan if off or not rate else rate for rate, off in zip(course, held, strict=True)]
            note = " (frozen where it has no line)" if any(held) else ""
            axis.plot(steps, shown, "--" if i else "-", label=", ".join(members) + note)  # they share their values
    axis.set_yscale("log")
    axis.set_ylabel("learning rate")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _shield(axis: Any, config: Config, roles: Sequence[str], steps: list[int]) -> None:
    levels = [phase_at(config.phases, step).shield for step in steps]
    axis.fill_between(steps, levels, step="post", alpha=0.4)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("shield level")


def _balance(axis: Any, config: Config, roles: Sequence[str], steps: list[int]) -> None:
    weights = [balance_weight(config.objective, phase_at(config.phases, step)) for step in steps]
    axis.plot(steps, weights, drawstyle="steps-post")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("balance\nweight")


def _mix(axis: Any, config: Config, roles: Sequence[str], steps: list[int]) -> None:
    schedule = mix_schedule(config.phases, config.mix)
    names = list(dict.fromkeys(name for _, weights in schedule for name in weights))
    shares = {name: [0.0] * len(steps) for name in names}
    for first, weights in schedule:
        total = sum(weights.values())
        for name in names:
            shares[name][first:] = [weights.get(name, 0.0) / total] * (len(steps) - first)
    left_out = {name: f"{name} (left out)" if name in config.mix.drop else name for name in names}
    axis.stackplot(steps, *shares.values(), labels=[left_out[name] for name in names], alpha=0.6, step="post")
    axis.set_ylim(0, 1)
    axis.set_ylabel("share of\nsamples")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _phases(axes: list[Any], config: Config) -> None:
    first, notes = 0, []
    for phase in active_phases(config.phases):
        for axis in axes:
            axis.axvline(first, color="grey", linewidth=0.8, linestyle=":")
        name = phase.name + ("*" if phase.when else "")
        axes[0].annotate(
            name, (first, 1.0), (3, 3), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8
        )
        if phase.when:
            notes.append(f"{name} may end earlier, and the next phase starts: {phase.when.metric} {bounds(phase.when)}")
        first = phase.until
    axes[-1].set_xlabel("\n".join(["optimiser step", *notes]))
