"""What a study's factors do, and how fast its arms get there: sections of the report of a study that asks for them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from symbiotic.evaluation.names import metric
from symbiotic.studies import report_tables as tables
from symbiotic.studies.attribution import Effect, effects
from symbiotic.studies.curves import KIND_NAMES
from symbiotic.studies.report_data import ArmData, StudyData
from symbiotic.studies.report_document import Block, Cell, Column, Figure, Row, Section, Table, Text
from symbiotic.studies.report_figures import SIZE, arrow, panel
from symbiotic.studies.report_style import Picture, Theme
from symbiotic.studies.verdicts import small

SCORES = (
    *("knowledge_unreplayed", "reading", "embedded_acc", "flow_error", "image_ce"),
    "routing/capacity@1.25/vae",
)
"""Whose effects are shown, behind the official ones; and steps to the study's targets."""

KEPT = ("mmlu", "knowledge_unreplayed", "reading")


def sections(study: StudyData, arms: Sequence[Any], pictures: Mapping[str, Picture]) -> list[Section]:
    found = []
    if study.design:
        found.append(Section("factors", "What each factor does", factor_blocks(study)))
    if study.speeds:
        found.append(Section("speed", "Retention against speed", speed_blocks(study, pictures)))
    return found


# --------------------------------------------------------------------------- factors


def factor_blocks(study: StudyData) -> list[Block]:
    """One table: effects by scores."""
    scores = told_scores(study)
    found = {score: effects(study.levels, study.design, values(study, score)) for score in scores}
    rows: dict[tuple[str, int], dict[str, Effect]] = {}
    for score, told in found.items():
        for one in told:
            rows.setdefault((one.name, one.groups), {})[score] = one
    table = Table(
        f"Differences of arms that are equal in all other factors, averaged over such pairs within each seed{SEEDS}.",
        [Column("effect"), Column("arms"), *(column(score) for score in scores)],
        [effect_row(name, groups, one, scores) for (name, groups), one in rows.items()],
    )
    base = "; ".join(f"{factor}: {levels[0]}" for factor, levels in study.design.items())
    note = (
        f"Against {base}. A line with × is an interaction: how much more the first change does where the second is "
        "made too. Effects that no such arms can tell are left out. Bold: the interval excludes 0. Holm: p, adjusted "
        "for all effects on the same score."
    )
    return [table, Text([note])]


def column(score: str) -> Column:
    """`routing/capacity@1.25/vae`: capacity@1.25 of latents."""
    if not score.startswith("routing/"):
        return tables.score_column(score, ())
    _, measure, kind = score.split("/")
    return Column(f"{measure} {arrow('higher')}", KIND_NAMES.get(kind, kind))


SEEDS = "; below it, the 95 % t interval over seeds"


def told_scores(study: StudyData) -> list[str]:
    official = [name for side in tables.SIDES for name in tables.scores_of(study.arms, side) if metric(name).official]
    names = [*official, *SCORES, *study.speeds]
    return [name for name in names if any(arm.values(name, study.step) for arm in study.arms)]


def values(study: StudyData, score: str) -> dict[str, Mapping[int, float]]:
    found = {arm.name: arm.values(score, study.step) for arm in study.arms if arm.name in study.levels}
    return {arm: seeds for arm, seeds in found.items() if seeds}


def effect_row(name: str, groups: int, found: Mapping[str, Effect], scores: Sequence[str]) -> Row:
    what = "quadruple" if "×" in name else "pair"
    return Row(name, [Cell(tables.counted(groups, what)), *(effect_cell(found.get(score), score) for score in scores)])


def effect_cell(found: Effect | None, score: str) -> Cell:
    if found is None or found.comparison is None:
        return Cell(tables.NONE)
    digits, made = metric(score).digits, found.comparison
    interval = tables.interval(made.t, digits)
    note = f"{interval}, Holm {small(found.holm)}" if interval else tables.counted(made.n, "seed")
    return Cell(tables.number(made.mean, digits, True), note, made.sure)


# --------------------------------------------------------------------------- speed


def speed_blocks(study: StudyData, pictures: Mapping[str, Picture]) -> list[Block]:
    blocks: list[Block] = []
    for name in study.speeds:
        arms = [arm for arm in study.arms if arm.generates]
        kept = next((score for score in KEPT if any(arm.values(score, study.step) for arm in arms)), None)
        drawn = speed_panel(arms, name, kept, study.step) if kept is not None else None
        if drawn is not None:
            text = "Up and to the left is better. Large marker: the mean, small ones: the seeds that got there."
            file = "speed-" + name.split("/", 1)[1].replace("@", "-")
            blocks.append(
                Figure(file, f"What is kept at the end, and how soon the target was reached. {text}", [drawn])
            )
        blocks.append(speed_table(arms, name, pictures))
    return blocks


def speed_table(arms: Sequence[ArmData], name: str, pictures: Mapping[str, Picture]) -> Table:
    """Steps of the seeds that reached the target, and how many did."""
    rows = []
    for arm in arms:
        found = list(arm.values(name).values())
        cells = [Cell(tables.mean_sd(found, 0)), Cell(f"{len(found)} of {tables.counted(len(arm.runs), 'seed')}")]
        rows.append(tables.arm_row(arm, cells, pictures))
    caption = (
        f"{metric(name).title.capitalize()}, between evaluations on a line (of logarithms, for what falls). A seed "
        "that never got there has no number: the mean of the others is then too good."
    )
    return Table(caption, [Column("arm"), Column("steps"), Column("got there")], rows)


def speed_panel(arms: Sequence[ArmData], name: str, kept: str, step: int | None) -> Picture | None:
    """Steps to the target, and the score that is kept at the end, by arm; None where no arm got there."""
    points = {}
    for arm in arms:
        steps, scores = arm.values(name), arm.values(kept, step)
        pairs = [(steps[seed], scores[seed]) for seed in steps if seed in scores]
        if pairs:
            points[arm.name] = (arm, pairs)
    if not points:
        return None
    facts = metric(kept)

    def draw(axis: Any, theme: Theme) -> None:
        for arm, pairs in points.values():
            style = arm.look.style(theme)
            x, y = (statistics.fmean(values) for values in zip(*pairs, strict=True))
            axis.plot(x, y, **style | {"markersize": 8, "linestyle": "none"})
            for pair in pairs:
                axis.plot(*pair, **style | {"markersize": 3, "linestyle": "none", "alpha": 0.5})
        axis.set_xlabel(f"{metric(name).title} {arrow('lower')}")
        axis.set_ylabel(f"{facts.title} {arrow(facts.better)}")

    means = []
    for named, (_, pairs) in points.items():
        x, y = (statistics.fmean(values) for values in zip(*pairs, strict=True))
        means.append(f"{named} {x:.0f} steps, {y:.{facts.digits}f}")
    text = f"{facts.title} at the end against {metric(name).title}, a marker for each arm: {'; '.join(means)}."
    return panel(draw, facts.title, text, (SIZE[0], 3.4))
