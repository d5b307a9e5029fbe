"""What stands in a report, in reading order: the summary first, then the evidence, then where it comes from."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import get_args

from symbiotic.data.errors import DataError
from symbiotic.evaluation.images import image_facts
from symbiotic.evaluation.names import metric
from symbiotic.studies import report_factors as factors
from symbiotic.studies import report_figures as figures
from symbiotic.studies import report_origin as origin
from symbiotic.studies import report_tables as tables
from symbiotic.studies.curves import KIND_NAMES
from symbiotic.studies.report_data import ArmData, StudyData, is_part
from symbiotic.studies.report_document import (
    Block,
    Document,
    Figure,
    Folded,
    Gallery,
    Items,
    Said,
    Section,
    Text,
    Verdicts,
)
from symbiotic.studies.report_style import Picture, swatch
from symbiotic.studies.report_tables import SIDES, counted, number
from symbiotic.studies.runs_of import Run
from symbiotic.studies.verdicts import Status

HEADLINES = ("knowledge_unreplayed", "reading", "embedded_acc")
"""Scores of the summary, behind the official ones."""

FEW = 4
"""Problems that the summary names."""

SHOWN = 8
"""Generated images of each arm."""


def document(study: StudyData, audit: Sequence[Block], command: str, date: str) -> Document:
    """The whole report. audit: the blocks of that section. command: what made the report."""
    pictures = {arm.name: swatch(arm.look, arm.name) for arm in study.arms}
    drawn = [draw(arm, study.step) for arm in study.arms]
    sections = [
        Section("summary", "Summary", [Text([summary(study)], loud=True), *absent(study)]),
        Section("verdicts", "Verdicts", verdicts(study)),
        Section("results", "Results", results(study, pictures)),
        Section("forgetting", "Forgetting and interference", forgetting(study, drawn, pictures)),
        *factors.sections(study, drawn, pictures),
        Section("curves", "Learning curves", curves(drawn)),
        Section("routing", "Routing", routing(study, drawn, pictures)),
        Section("samples", "Generated images", samples(study)),
        Section("audit", "Audit", audit),
        Section("provenance", "Provenance", origin.provenance(study, command)),
        Section("glossary", "What the scores are", origin.glossary(study)),
    ]
    facts = {"study": study.name, "arms": str(len(study.arms)), "runs": str(len(study.runs))}
    facts |= {"seeds": ", ".join(map(str, study.seeds)), "reference arm": study.reference, "date": date}
    return Document(study.question, facts, sections, {arm.shown: pictures[arm.name] for arm in study.arms})


def draw(arm: ArmData, step: int | None) -> figures.Drawn:
    """The arm as the figures need it."""
    logged = dict.fromkeys(name for run in arm.runs for name in run.metrics)
    metrics = {name: [run.metrics[name] for run in arm.runs if name in run.metrics] for name in logged}
    starts = {a: {name: arm.anchor(a, name, step) for name in arm.scores} for a in figures.ANCHORS}
    return figures.Drawn(arm.shown, arm.look, arm.scores, metrics, starts)


# --------------------------------------------------------------------------- the first two minutes


def summary(study: StudyData) -> str:
    """What was compared, how the hypotheses fared, where the headline scores end, what is missing."""
    seeds = f"seed{'s' * (len(study.seeds) > 1)} {', '.join(map(str, study.seeds))}"
    compared = f"{counted(len(study.arms), 'arm')}, {counted(len(study.runs), 'run')} ({seeds}), compared"
    when = "at the end of joint training" if study.step is None else f"at step {study.step}"
    said = [f"{compared} {when}; differences are to {study.reference}, paired by seed."]
    if not tables.paired(study.arms):
        said.append("There is one seed: no deviation, no interval, and no verdict.")
    elif study.verdicts:
        states = [found.status for found in study.verdicts]
        tally = ", ".join(f"{states.count(status)} {status}" for status in get_args(Status))
        said.append(f"Of {counted(len(states), 'hypothesis', 'hypotheses')}: {tally}.")
    said += [line for score in headlines(study) if (line := spread(study, score))]
    lacking = dict.fromkeys(
        name for run in study.runs for key in ("missing", "failed") for name in run.results.get(key, ())
    )
    if lacking:
        said.append(f"Not measured: {', '.join(lacking)} (see the results).")
    marked = [arm.name for arm in study.arms if arm.intervened]
    if marked:
        said.append(f"In {', '.join(marked)} the collapse alarm changed the training.")
    return " ".join(said)


def absent(study: StudyData) -> list[Block]:
    """The first lines of what the audit misses."""
    more = len(study.problems) - FEW
    lines = [*study.problems[:FEW], *([f"and {more} more: see the audit"] if more > 0 else [])]
    return [Items(lines)] if lines else []


def headlines(study: StudyData) -> list[str]:
    found = [name for side in SIDES for name in tables.scores_of(study.arms, side)]
    return [name for name in found if metric(name).official][:3] + [name for name in HEADLINES if name in found]


def spread(study: StudyData, score: str) -> str:
    """`Reading ends between 0.895 (standard 2e-3) and 0.942 (…), from 0.952 at stage 0.`"""
    facts = metric(score)
    ends = {arm.name: statistics.fmean(v.values()) for arm in study.arms if (v := arm.values(score, study.step))}
    if not ends:
        return ""
    low, high = min(ends, key=lambda n: ends[n]), max(ends, key=lambda n: ends[n])
    words = facts.title[:1].upper() + facts.title[1:]
    before = {seed: v for arm in study.arms for seed, v in arm.anchor("stage 0", score, study.step).items()}
    start = f", from {number(statistics.fmean(before.values()), facts.digits)} at stage 0" if before else ""
    if len(ends) == 1:
        return f"{words} ends at {number(ends[low], facts.digits)} ({low}){start}."
    least, most = (number(ends[name], facts.digits) for name in (low, high))
    if least == most:
        return f"{words} ends at {least} in all arms{start}."
    return f"{words} ends between {least} ({low}) and {most} ({high}){start}."


def verdicts(study: StudyData) -> list[Block]:
    if not study.verdicts:
        return [Text(["The study states no hypothesis."])]
    if not tables.paired(study.arms):
        why = "One seed: there is no interval, so no verdict. What was measured for each hypothesis:"
        return [Text([why]), Items([found.line for found in study.verdicts])]
    note = (
        "Supported: the whole 95 % t interval over seeds lies beyond the margin. Not supported: all of it lies on the "
        "other side. Undecided: anything else. p is against the margin; Holm's is adjusted for all hypotheses."
    )
    said = [Said(v.status, v.hypothesis.claim, v.line.removeprefix(f"{v.hypothesis.claim}: ")) for v in study.verdicts]
    return [Verdicts(said), Text([note])]


# --------------------------------------------------------------------------- results


def results(study: StudyData, pictures: Mapping[str, Picture]) -> list[Block]:
    arms, found = study.arms, study.differences
    made = [tables.main_table(arms, side, study.reference, found, pictures, study.step) for side in SIDES]
    blocks: list[Block] = [table for table in made if table is not None]
    if any(not arm.generates for arm in arms):
        blocks.append(Text(["– : not trained to generate images, so image scores say nothing."]))
    unmeasured = tables.unmeasured_table(arms)
    blocks += [unmeasured] if unmeasured else []
    blocks.append(Text([origin.NOT_OFFICIAL]))
    scores = [name for side in SIDES for name in tables.scores_of(arms, side)]
    if tables.paired(study.arms) and found:
        table = tables.difference_table(arms, scores, study.reference, found)
        blocks.append(Folded("All differences, with both intervals", [table]))
    for side in SIDES:
        parts = tables.parts_table(arms, side, study.step)
        blocks += [Folded(f"Parts of the {side} benchmarks", [parts])] if parts else []
    judges = tables.judges_table(arms)
    blocks += [judges] if judges else []
    bad = tables.problems(arms)
    if bad:
        lines = [f"{line} ({counted(runs, 'run')})" for line, runs in bad.items()]
        blocks.append(Folded(f"{counted(len(bad), 'item')} left out, the rest evaluated", [Items(lines)]))
    return blocks


def forgetting(study: StudyData, drawn: Sequence[figures.Drawn], pictures: Mapping[str, Picture]) -> list[Block]:
    scores = tables.scores_of(study.arms, "understanding")
    blocks: list[Block] = []
    panels = [p for score in scores if (p := figures.forgetting_panel(drawn, score))]
    if panels:
        text = "| stage 0, × iteration 0 (after the split), large marker: mean at the end, small ones: seeds."
        blocks.append(Figure("forgetting", f"What joint training leaves of the understanding side. {text}", panels))
    losses = tables.change_table(
        f"Forgetting: the end against stage 0{', with the 95 % t interval over seeds' * tables.paired(study.arms)}.",
        study.arms, scores, study.forgetting, pictures, ("forgotten", "gained"),
    )  # fmt: skip
    costs = tables.change_table(
        "Interference: the arm against its control, the same training without generation. Synergy is a difference for "
        "the better whose interval excludes 0.",
        study.arms, scores, study.interference, pictures, ("interference", "synergy"),
    )  # fmt: skip
    blocks += [table for table in (losses, costs) if table]
    if costs is None:
        blocks.append(Text(["No arm has an understanding-only control here, so interference cannot be told."]))
    errors = [
        name for name in ("flow_error", "image_ce", "embedded_fd", "fid") if any(arm.scores.get(name) for arm in drawn)
    ]
    kept = [name for name in ("mmlu", "knowledge_unreplayed", "reading") if any(arm.scores.get(name) for arm in drawn)]
    made = [p for error in errors[-2:] for score in kept[:1] if (p := figures.frontier_panel(drawn, score, error))]
    if made:
        text = "Up and to the left is better. Paths over the evaluations; large marker: the end, small ones: the seeds."
        blocks.append(Figure("frontier", f"Retention against generation error. {text}", made))
    return blocks


def curves(drawn: Sequence[figures.Drawn]) -> list[Block]:
    names = dict.fromkeys(name for arm in drawn for name in arm.scores if not is_part(name))
    order = [name for side in SIDES for name in sorted(names, key=tables.place) if metric(name).side == side]
    panels = [p for name in order if (p := figures.score_panel(drawn, name))]
    if not panels:
        return [Text(["No score was measured while the runs trained."])]
    text = "Mean over seeds, band: their range. Dotted: stage 0. Step 0 is iteration 0, after the split."
    return [Figure("curves", f"Scores over joint training. {text}", panels)]


# --------------------------------------------------------------------------- instruments


def routing(study: StudyData, drawn: Sequence[figures.Drawn], pictures: Mapping[str, Picture]) -> list[Block]:
    table = tables.routing_table(study.arms, pictures)
    blocks: list[Block] = [table] if table else [Text(["No routing was logged."])]
    panels = []
    for kind, name in KIND_NAMES.items():
        capacity = f"routing/capacity@1/{kind}"
        panels += [
            figures.metric_panel(drawn, capacity, f"capacity rate, {name} ↑", f"{capacity}/random"),
            figures.metric_panel(drawn, f"routing/utilisation/{kind}", f"utilisation, {name} ↑"),
        ]
    blocks += shown(
        "routing",
        "Capacity rate at factor 1 and expert utilisation by kind of token. Dotted: uniform random routing over as "
        "many experts (several lines where arms show their tokens different numbers of experts).",
        panels,
    )
    heat = [figures.heatmap_panel(f"{arm.shown}, seed {run.seed}", *found) for arm in study.arms
            for run in arm.runs[:1] if (found := tables.heatmap(run))]  # fmt: skip
    text = "Red: more than an even share; blue: less; blank: experts that the kind may not use. Rows are layers."
    blocks += shown(
        "experts", f"Which experts each kind of token used, layer by layer, at the end. {text}", heat, False
    )
    roles = sorted({name.split("/")[1] for arm in drawn for name in arm.metrics if name.startswith("conflict/")})
    leak = [figures.metric_panel(drawn, "leak/all", "leak ↓")]
    text = "The generation gradient that reaches shielded weights, relative to the same without shield, on the probe."
    blocks += shown("leak", text, leak)
    cosines = [figures.metric_panel(drawn, f"conflict/{role}/cosine", role) for role in roles]
    conflict = shown("conflict", "Cosine of the two tasks' gradients by role of the weights, on the probe.", cosines)
    return [*blocks, *([Folded("Conflict of the two tasks' gradients", conflict)] if conflict else [])]


def shown(file: str, caption: str, panels: Sequence[Picture | None], legend: bool = True) -> list[Block]:
    """A figure of the panels that there are."""
    found = [panel for panel in panels if panel is not None]
    return [Figure(file, caption, found, legend)] if found else []


def samples(study: StudyData) -> list[Block]:
    """The same captions in every arm, first seed; the grids of the training where nothing was evaluated."""
    made = {arm.shown: prompted(arm.runs[0]) for arm in study.arms if arm.generates}
    made = {name: found for name, found in made.items() if found}
    if made:
        captions = list(next(iter(made.values())))
        images = {name: list(found.values()) for name, found in made.items() if list(found) == captions}
        text = "A row an arm, first seed, the same captions and noise for all; images as generated, enlarged."
        return [Gallery(f"Generated images. {text}", captions, images)]
    grids = {
        arm.shown: sorted((arm.runs[0].folder / "samples").glob("step=*.png")) for arm in study.arms if arm.generates
    }
    panels = [figures.grid_panel(name, found[-1]) for name, found in grids.items() if found]
    text = "Each image stands above its caption; the grids that the training drew last."
    return shown("samples", f"Generated images, first seed. {text}", panels, False) or [Text(["There are no images."])]


def prompted(run: Run) -> dict[str, bytes]:
    """Caption -> PNG, of the first images of the first set that the evaluation generated."""
    folders = sorted((run.evaluation / "images").glob("*/")) if run.evaluation is not None else []
    found: dict[str, bytes] = {}
    for path in sorted(folders[0].glob("*.png"))[:SHOWN] if folders else ():
        try:
            found[image_facts(path).get("prompt", "")] = path.read_bytes()
        except DataError:
            continue
    return found
