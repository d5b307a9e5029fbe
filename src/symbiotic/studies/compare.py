"""Finished runs side by side: `python -m symbiotic.studies.compare RUNS [--steps 300 450] [--csv results.csv]`, and
what they logged: `--metrics leak/all routing/layer*/capacity@1/vae --between 400 450`.

Runs whose configs differ in the seed only are one arm; an arm is named by what sets it apart from the others. A score
is the mean over the arm's seeds and their sample standard deviation (none with one seed). An arm in which a collapse
alarm changed the training is marked.
Refuses to mix runs of different code or data: their numbers do not compare.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from symbiotic.schema import RunError
from symbiotic.studies import console
from symbiotic.studies.curves import read_series
from symbiotic.studies.runs_of import Run, differing, flat, plain, read_runs, stopped, training_keys

NAMES = {
    "system.name": "",
    "rates.lr": "lr ",
    "rates.by_role": "",
    "mix.drop": "without ",
    "objective.balance_weight": "balance ",
    "callbacks.collapse_alarm.action": "alarm: ",
}
"""Keys that name an arm, and what stands before their value."""

ROUTING = ("capacity@1.25/und", "capacity@1.25/vae", "utilisation/und", "utilisation/vae")


@dataclass
class Arm:
    """Runs that differ in the seed only."""

    name: str
    runs: list[Run] = field(default_factory=list)

    def values(self, step: int, score: str) -> list[float]:
        found = (run.scores.get(step, {}).get(score) for run in self.runs)
        return [float(value) for value in found if value is not None]

    def logged(self, metric: str, first: int, last: int) -> list[float]:
        """Per run, the mean of what was logged after step `first` up to `last`; without NaN."""
        found = (read_series(run.folder / "metrics.csv").get(metric, ([], [])) for run in self.runs)
        inside = ([v for s, v in zip(*series, strict=True) if first < s <= last and v == v] for series in found)
        return [statistics.fmean(values) for values in inside if values]

    def routing(self, metric: str) -> list[float]:
        found = (run.summary["routing"].get(f"routing/{metric}") for run in self.runs)
        return [float(value) for value in found if value is not None]


def check_alike(runs: Sequence[Run]) -> None:
    """Raises RunError: they were made by different code or from different data."""
    for what, value in (("code", lambda r: r.summary["provenance"]["code"]), ("data", lambda r: r.summary["data"])):
        odd = next((run for run in runs if value(run) != value(runs[0])), None)
        if odd is not None:
            raise RunError(f"{odd.folder}: other {what} ({value(odd)}) than {runs[0].folder} ({value(runs[0])})")


def arms(runs: Sequence[Run]) -> list[Arm]:
    """In the order of their names; seeds in order. A collapse alarm that changed the training stands in the name."""
    found = [Arm(name, members) for name, members in named_arms(runs).items()]
    for arm in found:
        if any(run.summary.get("events", {}).get("intervention") for run in arm.runs):
            arm.name += " (its alarm intervened)"
    return sorted(found, key=lambda arm: arm.name)


def named_arms(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Name -> runs that differ in the seed only, in the order of their names; seeds in order."""
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault(repr(sorted(training_keys(plain(run.config)).items())), []).append(run)
    configs = [flat(members[0].config, whole=NAMES) for members in groups.values()]
    varying = [key for key in NAMES if len({repr(config.get(key)) for config in configs}) > 1]
    found: dict[str, list[Run]] = {}
    for config, members in zip(configs, groups.values(), strict=True):
        ablations = [f"ablation {name}" for name in members[0].config.get("ablation") or ()]
        words = [*(text for key in varying if (text := label(key, config.get(key)))), *ablations]
        name = ", ".join(words) or members[0].config["system"]["name"]
        if name in found:  # they differ in a key that names no arm
            apart = differing(*(training_keys(plain(one[0].config)) for one in (members, found[name])))
            own = training_keys(plain(members[0].config))
            name = ", ".join([name, *(f"{key}={own.get(key)}" for key in apart)])
        found[name] = members
    return dict(sorted(found.items()))


def label(key: str, value: Any) -> str:
    if value in ({}, [], None):
        return ""
    if isinstance(value, Mapping):
        rates = {role: rate for role, rate in value.items() if rate is not None}
        return " ".join(f"{role} {rate:g}" for role, rate in rates.items())
    text = "+".join(map(str, value)) if isinstance(value, list) else f"{value:g}" if isinstance(value, float) else value
    return f"{NAMES[key]}{text}"


def cell(values: Sequence[float]) -> str:
    """`.93 ± .03`; one seed has no deviation."""
    if not values:
        return console.NONE
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def table(found: Sequence[Arm], scores: Sequence[str], steps: Sequence[int]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the scores at each step, then the routing of the last log."""
    columns = ["arm", "seeds", *(f"{score} @{step}" for score in scores for step in steps), *ROUTING]
    rows = []
    for arm in found:
        cells = [cell(arm.values(step, score)) for score in scores for step in steps]
        rows.append([arm.name, str(len(arm.runs)), *cells, *(cell(arm.routing(metric)) for metric in ROUTING)])
    return columns, rows


def metric_table(
    found: Sequence[Arm], patterns: Sequence[str], between: tuple[int, int]
) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of logged metrics, means over the steps of `between`; a pattern may hold `*`."""
    known = dict.fromkeys(n for arm in found for run in arm.runs for n in read_series(run.folder / "metrics.csv"))
    names = [name for pattern in patterns for name in known if fnmatchcase(name, pattern)]
    if not names:
        raise RunError(f"--metrics {' '.join(patterns)}: nothing of that name was logged")
    rows = [[arm.name, str(len(arm.runs)), *(cell(arm.logged(name, *between)) for name in names)] for arm in found]
    return ["arm", "seeds", *names], rows


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_csv(path: Path, found: Sequence[Arm]) -> None:
    """One row a run, step and score: the raw numbers behind the table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "seed", "step", "score", "value", "code", "commit", "data"])
        for arm in found:
            for run in arm.runs:
                made = [run.summary["provenance"]["code"], run.summary["provenance"]["commit"], run.summary["data"]]
                listed = [("stage 0", run.summary["anchors"]["stage 0"]), *((str(s), v) for s, v in run.scores.items())]
                for step, scores in [*listed, ("last log", run.summary["routing"])]:
                    for score, value in scores.items():
                        number = "" if value is None else f"{value:.6g}"
                        writer.writerow([arm.name, run.config["seed"], step, score, number, *made])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m symbiotic.studies.compare", description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[300, 450])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--metrics", nargs="+", help="names of docs/metrics.md, * for any part: print these instead")
    parser.add_argument("--between", type=int, nargs=2, default=[400, 450], help="steps that --metrics averages over")
    chosen = parser.parse_args(arguments)
    for folder, why in stopped(chosen.runs).items():
        print(f"left out: {folder}: {why}", file=sys.stderr)
    try:
        runs = read_runs(chosen.runs)
        check_alike(runs)
        found = arms(runs)
        if chosen.metrics:
            print(markdown(*metric_table(found, chosen.metrics, tuple(chosen.between))))
            return 0
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    errors = [e for e in ("flow_error", "image_ce") if any(arm.values(s, e) for arm in found for s in chosen.steps)]
    for scores in (["knowledge_unreplayed", "knowledge_replayed", "reading"], ["embedded_acc", *errors]):
        print(markdown(*table(found, scores, chosen.steps)), end="\n\n")
    anchors = {run.config["seed"]: run.summary["anchors"]["stage 0"] for arm in found for run in arm.runs}
    print("stage 0:", {seed: {k: round(v, 3) for k, v in scores.items()} for seed, scores in sorted(anchors.items())})
    if chosen.csv:
        write_csv(chosen.csv, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
