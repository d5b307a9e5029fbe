"""The tables of a report: scores, what was forgotten, routing, budgets, provenance, what is missing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from symbiotic.evaluation.names import METRICS, Metric, is_variant, metric
from symbiotic.layout import pool_sizes, visible_pools
from symbiotic.schema import Model, System, parse
from symbiotic.studies.curves import KIND_NAMES
from symbiotic.studies.report_data import ArmData, Pair, is_part
from symbiotic.studies.report_document import Cell, Column, Row, Table
from symbiotic.studies.report_figures import arrow
from symbiotic.studies.report_style import Picture
from symbiotic.studies.runs_of import Run
from symbiotic.studies.statistics import Comparison, Seeds

SIDES = ("understanding", "generation")
NONE = "–"
SPREAD = "Mean ± sample standard deviation over seeds"

# --------------------------------------------------------------------------- numbers


def number(value: float, digits: int, signed: bool = False) -> str:
    """`0.950`, `−0.012`, `+0.012`, and `0.000` for what rounds to it; with a minus that is one."""
    value = round(value, digits) or 0.0
    return f"{value:{'+' if signed and value else ''}.{digits}f}".replace("-", "−")


def mean_sd(values: Sequence[float], digits: int) -> str:
    """`0.930 ± 0.030`; one value has no deviation, and no value is –."""
    if not values:
        return NONE
    mean = number(statistics.fmean(values), digits)
    return mean if len(values) == 1 else f"{mean} ± {number(statistics.stdev(values), digits)}"


def interval(low_high: tuple[float, float] | None, digits: int) -> str:
    """`[−0.035, +0.015]`; nothing where there is none."""
    return "" if low_high is None else f"[{number(low_high[0], digits, True)}, {number(low_high[1], digits, True)}]"


def difference(found: Comparison | None, digits: int) -> str:
    """`−0.010 [−0.035, +0.015]`; nothing where there is none."""
    if found is None:
        return ""
    return f"{number(found.mean, digits, True)} {interval(found.t, digits)}".strip()


def counted(n: int, one: str, many: str = "") -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def scores_of(arms: Sequence[ArmData], side: str, parts: bool = False) -> list[str]:
    """Names of the scores that any arm has, official ones first, then in the order in which they are defined; those of
    averaged weights and of shares of the samples stand in the curves.

    parts: instead, those of parts of a benchmark (`mmlu/anatomy`).
    """
    found = dict.fromkeys(name for arm in arms for name in arm.scores if not is_variant(name))
    wanted = [n for n in found if metric(n).side == side and is_part(n) == parts]
    return sorted(wanted, key=place)


def place(name: str) -> tuple[bool, int, str]:
    """Sorts official scores to the front, then by their definition."""
    order = list(METRICS)
    return not metric(name).official, order.index(name) if name in METRICS else len(order), name


# --------------------------------------------------------------------------- the main table


def score_column(name: str, samples: Iterable[int]) -> Column:
    """`knowledge, not replayed ↑`, and below it n and chance."""
    facts, counts = metric(name), sorted(set(samples))
    notes = [f"n {counts[0]}" if len(counts) == 1 else f"n {counts[0]} to {counts[-1]}"] if counts else []
    notes += [f"chance {facts.chance:g}"] if facts.chance is not None else []
    return Column(f"{title(name, facts)} {arrow(facts.better)}", ", ".join(notes))


def title(name: str, facts: Metric) -> str:
    return facts.title if not is_part(name) else f"{facts.title}: {name.split('/', 1)[1]}"


def anchor_rows(arms: Sequence[ArmData], scores: Sequence[str], step: int | None) -> list[Row]:
    """Stage 0, and iteration 0 (behind the split), once for all arms that have the same values there."""
    rows = []
    for name in ("stage 0", "iteration 0"):
        groups: list[tuple[list[str], dict[str, Seeds]]] = []
        for arm in arms:
            values = {score: arm.anchor(name, score, step) for score in scores}
            if any(values.values()):
                group = next((group for group in groups if agree(group[1], values)), None)
                if group is None:
                    groups.append(([arm.name], values))
                else:
                    group[0].append(arm.name)
                    for score in scores:
                        group[1][score] = {**group[1][score], **values[score]}
        for names, merged in groups:
            cells = [Cell(mean_sd(list(merged[score].values()), metric(score).digits)) for score in scores]
            rows.append(Row(name, cells, "anchor", "" if len(groups) == 1 else f"of {'; '.join(names)}"))
    return rows


def agree(one: Mapping[str, Seeds], other: Mapping[str, Seeds]) -> bool:
    """Whether two anchors are the same model: equal for every seed that both have (rounding of sums aside)."""
    pairs = [(v, other[score][seed]) for score in one for seed, v in one[score].items() if seed in other[score]]
    return bool(pairs) and all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) for a, b in pairs)


def arm_row(arm: ArmData, cells: Sequence[Cell], pictures: Mapping[str, Picture]) -> Row:
    """Its name with what must be said about it."""
    notes = [f"{len(arm.runs)} seed{'s' if len(arm.runs) > 1 else ''}"]
    notes += [f"control of {'; '.join(arm.of)}"] if arm.of else []
    if arm.intervened:
        notes.append(f"⚠ its alarm intervened (seed {', '.join(map(str, arm.intervened))})")
    return Row(arm.name, cells, "control" if arm.of else "arm", "; ".join(notes), pictures.get(arm.name))


def main_table(
    arms: Sequence[ArmData],
    side: str,
    reference: str,
    differences: Mapping[Pair, Comparison],
    pictures: Mapping[str, Picture],
    step: int | None = None,
) -> Table | None:
    """Arms by scores of one side, anchors first: mean ± deviation, below it the difference to the reference arm.

    differences: (arm, score) -> against the reference.
    """
    scores = scores_of(arms, side)
    if not scores:
        return None
    rows = anchor_rows(arms, scores, step)
    for arm in arms:
        compared = {score: differences.get((arm.name, score)) for score in scores}
        cells = [score_cell(arm, score, step, compared[score], arm.name == reference) for score in scores]
        rows.append(arm_row(arm, cells, pictures))
    columns = [score_column(score, {n for arm in arms for n in arm.samples(score, step)}) for score in scores]
    text = "One seed, so neither deviation nor interval; below a score, the difference to the reference arm."
    if paired(arms):
        text = f"{SPREAD}; below it, the difference to {reference}, paired by seed, with its 95 % t interval"
        text += "; bold where that excludes 0."
    if any(arm.resampled(score, step) for arm in arms for score in scores):
        text += " Resampled: 95 % interval of the mean by the images drawn, which leaves out how seeds differ."
    return Table(f"{side.capitalize()}. {text}", [Column("arm"), *columns], rows)


def score_cell(arm: ArmData, score: str, step: int | None, found: Comparison | None, reference: bool) -> Cell:
    """found: the difference to the reference arm."""
    digits, values = metric(score).digits, list(arm.values(score, step).values())
    notes = ["reference" if reference and values else difference(found, digits), lost(arm, score, step)]
    own = arm.resampled(score, step)
    notes += [f"resampled {number(own[0], digits)} to {number(own[1], digits)}"] if own else []
    return Cell(mean_sd(values, digits), "; ".join(filter(None, notes)), found is not None and found.sure)


def lost(arm: ArmData, score: str, step: int | None) -> str:
    """`n 2 of 3 seeds` where seeds have no number."""
    n, of = len(arm.values(score, step)), len(arm.runs)
    return f"n {n} of {of} seeds" if n < of and score in arm.scores else ""


def paired(arms: Sequence[ArmData]) -> bool:
    """Whether any arm has more than one seed, without which there is no interval and no verdict."""
    return any(len(arm.runs) > 1 for arm in arms)


def difference_table(
    arms: Sequence[ArmData], scores: Sequence[str], reference: str, differences: Mapping[Pair, Comparison]
) -> Table:
    """Every difference to the reference with both intervals and the test question by question."""
    rows = []
    for score in scores:
        digits = metric(score).digits
        for arm in arms:
            found = differences.get((arm.name, score))
            if found is not None and arm.name != reference:
                p = NONE if found.p is None else f"{found.p:.3f}" if found.p >= 0.001 else "< 0.001"
                texts = [number(found.mean, digits, True), str(found.n)]
                texts += [interval(found.t, digits) or NONE, interval(found.bootstrap, digits) or NONE, p]
                name = f"{title(score, metric(score))} {arrow(metric(score).better)}: {arm.name}"
                rows.append(Row(name, [*map(Cell, texts)]))
    titles = ["score: arm", f"difference to {reference}", "pairs", "95 % t interval", "95 % bootstrap", "p by question"]
    return Table("Differences to the reference arm, paired by seed.", [*map(Column, titles)], rows)


def parts_table(arms: Sequence[ArmData], side: str, step: int | None) -> Table | None:
    """Scores by arms, of the parts of benchmarks: subjects, groups, categories."""
    scores = scores_of(arms, side, parts=True)
    rows = []
    for score in scores:
        facts, counts = metric(score), {n for arm in arms for n in arm.samples(score, step)}
        cells = [
            Cell(mean_sd(list(arm.values(score, step).values()), facts.digits), lost(arm, score, step)) for arm in arms
        ]
        rows.append(Row(f"{title(score, facts)} {arrow(facts.better)}", cells, note=score_column(score, counts).note))
    caption = "Parts of benchmarks: subjects, groups, categories." + (f" {SPREAD}." if paired(arms) else "")
    return Table(caption, [Column("part"), *(Column(arm.name) for arm in arms)], rows) if rows else None


# --------------------------------------------------------------------------- forgetting


def change_table(
    caption: str,
    arms: Sequence[ArmData],
    scores: Sequence[str],
    changes: Mapping[Pair, Comparison],
    pictures: Mapping[str, Picture],
    words: tuple[str, str] = ("", ""),
) -> Table | None:
    """Arms by scores: a change with its interval; words: what a change for the worse and for the better is called
    where its interval excludes 0."""
    rows = []
    for arm in arms:
        found = [changes.get((arm.name, score)) for score in scores]
        if any(found):
            cells = [
                Cell(NONE) if c is None else Cell(number(c.mean, metric(s).digits, True), said(c, s, words), c.sure)
                for s, c in zip(scores, found, strict=True)
            ]
            rows.append(arm_row(arm, cells, pictures))
    columns = [Column(f"{title(score, metric(score))} {arrow(metric(score).better)}") for score in scores]
    return Table(caption, [Column("arm"), *columns], rows) if rows else None


def said(change: Comparison, score: str, words: tuple[str, str]) -> str:
    """The interval, and the word where it excludes 0."""
    better = (change.mean > 0) == (metric(score).better == "higher")
    word = words[better] if change.sure else ""
    return ": ".join(part for part in (word, interval(change.t, metric(score).digits)) if part)


# --------------------------------------------------------------------------- routing


def routing_table(arms: Sequence[ArmData], pictures: Mapping[str, Picture]) -> Table | None:
    """Capacity and utilisation by kind of token at the last log; below, what uniform random routing gives."""
    names = [f"routing/{m}/{kind}" for m in ("capacity@1", "capacity@1.25", "utilisation") for kind in KIND_NAMES]
    rows = []
    for arm in arms:
        values = {
            name: [v for run in arm.runs if (v := run.summary["routing"].get(name)) is not None] for name in names
        }
        random = {
            name: [v for run in arm.runs if (v := run.summary["routing"].get(f"{name}/random"))] for name in names
        }
        if any(values.values()):
            cells = [
                Cell(mean_sd(values[n], 3), f"random {number(statistics.fmean(random[n]), 3)}" if random[n] else "")
                for n in names
            ]
            rows.append(arm_row(arm, cells, pictures))
    columns = [Column(f"{n.split('/')[1]} ↑", KIND_NAMES[n.split("/")[2]]) for n in names]
    caption = "Routing at the last log, mean over the layers; below a capacity rate, that of uniform random routing."
    return Table(caption, [Column("arm"), *columns], rows) if rows else None


# --------------------------------------------------------------------------- what is missing


def unmeasured_table(arms: Sequence[ArmData]) -> Table | None:
    """Benchmarks without a value: which file is needed and where it is looked for, or why they failed."""
    lines: dict[tuple[str, str, str], int] = {}
    for arm in arms:
        for run in arm.runs:
            for state, key in (("not measured", "missing"), ("failed", "failed")):
                for name, line in run.results.get(key, {}).items():
                    lines[name, state, line] = lines.get((name, state, line), 0) + 1
    rows = [Row(name, [Cell(state), Cell(line), Cell(str(runs))]) for (name, state, line), runs in lines.items()]
    columns = [
        Column("benchmark"),
        Column("state"),
        Column("what is needed, and where it is looked for"),
        Column("runs"),
    ]
    return Table("Official benchmarks without a value here.", columns, rows, words=True) if rows else None


def problems(arms: Sequence[ArmData]) -> dict[str, int]:
    """Items that could not be used -> in how many runs."""
    found: dict[str, int] = {}
    for arm in arms:
        for run in arm.runs:
            for line in run.results.get("problems", ()):
                found[line] = found.get(line, 0) + 1
    return found


def judges_table(arms: Sequence[ArmData]) -> Table | None:
    """The embedded judges' own figures, without which their scores cannot be read."""
    names = dict.fromkeys(name for arm in arms for run in arm.runs for name in judges(run) if name != "seconds")
    rows = [
        Row(
            name.replace("_", " "),
            [Cell(spread([judges(run)[name] for arm in arms for run in arm.runs if name in judges(run)]))],
        )
        for name in names
    ]
    caption = "The judges of the embedded image scores, on fresh renderings of known content."
    return Table(caption, [Column("judge"), Column("accuracy or cosine")], rows) if rows else None


def judges(run: Run) -> Mapping[str, float]:
    return run.results.get("judges") or run.summary.get("judges") or {}


def spread(values: Sequence[float]) -> str:
    """One number where all are equal, else the range."""
    low, high = (number(value, 3) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


# --------------------------------------------------------------------------- heat maps


def heatmap(run: Run) -> tuple[Path, dict[str, list[bool]], dict[str, int]] | None:
    """The last counts of a run, which experts each kind may use, and the pools; None where nothing was counted."""
    files = sorted((run.folder / "routing").glob("step=*.npz"))
    if not files:
        return None
    model, system = parse(Model, run.config["model"]), parse(System, run.config["system"])
    pools, seen = pool_sizes(model, system), visible_pools(system)
    visible = {kind: [pool in seen[kind] for pool, size in pools.items() for _ in range(size)] for kind in seen}
    return files[-1], visible, pools
