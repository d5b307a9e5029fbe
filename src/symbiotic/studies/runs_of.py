"""Runs as their folders keep them, and which keys of their configs decide what they computed."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from symbiotic.callbacks.events import EVENTS, read_events
from symbiotic.callbacks.in_loop_evaluation import SCORES, read_scores
from symbiotic.checks.evaluation import EMBEDDED
from symbiotic.config import VOLATILE, VOLATILE_TRAINER, read_yaml
from symbiotic.evaluation.context import whole_lines
from symbiotic.evaluation.names import metric
from symbiotic.runs import read_json
from symbiotic.schema import Config, ConfigError, RunError, parse
from symbiotic.studies import speed
from symbiotic.studies.curves import Series, read_series

IGNORED = (*VOLATILE, "seed", "ablation")
"""Top-level keys that name a run, or say where it runs and what it shows."""

INSTRUMENTS = (
    *("step_log", "routing_monitor", "self_checks", "gradient_conflict", "routing_heatmap", "evaluation"),
    *("shared_only_probe", "sample_grid", "progress", "ema"),
)
"""Callbacks that look on."""


LOGGED = ("routing/", "leak/", "conflict/")
"""Names of what was logged, not measured by a benchmark."""

ANCHORS = "anchors.json"
"""In an evaluation: the scores of the run's parent and of its start that the training did not measure alike."""

STARTS = ("stage 0", "iteration 0")

Measured = Mapping[str, Any]
"""`value` and `n` of a score; of an evaluation with `benchmark`, `low` and `high`."""


class AuditError(RunError):
    """Runs that cannot stand in one report. The message names them and says what would help."""


@dataclass
class Run:
    """A finished run. results, evaluation: what `studies/evaluate.py` wrote of the weights that it ended with, and the
    folder; {} where it did not."""

    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    scores: dict[int, dict[str, float | None]]
    results: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Path | None = None
    withheld: Collection[str] = ()
    """Scores that other runs of the report were evaluated by and this one was not: what its training measured, maybe
    on other samples, does not stand beside theirs."""

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @property
    def last(self) -> int:
        return int(self.summary["steps"])

    @cached_property
    def metrics(self) -> dict[str, Series]:
        """What was logged while it trained."""
        path = self.folder / "metrics.csv"
        return read_series(path) if path.is_file() else {}

    @cached_property
    def parameters(self) -> dict[str, int] | None:
        """What its receipt counts; None without one."""
        found = self.summary.get("parameters") or (read_json(self.folder / "receipt.json") or {}).get("parameters")
        return {name: int(value) for name, value in found.items()} if isinstance(found, dict) else None

    @cached_property
    def measured_anchors(self) -> dict[str, dict[str, Measured]]:
        """`stage 0` and `iteration 0` -> what `studies/anchors.py` measured of them."""
        found = (read_json(self.evaluation / ANCHORS) if self.evaluation is not None else None) or {}
        return {name: scores for name, scores in found.items() if isinstance(scores, dict)}

    def anchor(self, anchor: str, name: str, step: int | None = None) -> Measured:
        """`value` and `n` of a score at `stage 0` or `iteration 0`, measured like its value at a step (None: the last);
        {} where it was not."""
        evaluated = self.evaluated(name, step)
        if evaluated and not anchored_by_training(self.results, evaluated["benchmark"]):
            return self.measured_anchors.get(anchor, {}).get(name, {})
        value = self.summary.get("anchors", {}).get(anchor, {}).get(name)
        return {} if _number(value) is None else {"value": value, "n": self.summary["n"].get(name)}

    def anchors(self, step: int | None = None) -> dict[str, dict[str, Measured]]:
        """`stage 0` and `iteration 0` -> every score that they have."""
        known = [self.summary.get("anchors", {}), self.measured_anchors]
        names = {anchor: [*dict.fromkeys(name for one in known for name in one.get(anchor, {}))] for anchor in STARTS}
        every = {anchor: {name: self.anchor(anchor, name, step) for name in found} for anchor, found in names.items()}
        return {anchor: {name: m for name, m in found.items() if m} for anchor, found in every.items()}

    def score(self, name: str, step: int | None = None) -> float | None:
        """At a step (None: the last): as evaluated, else as measured in training; `routing/...`, `leak/...` and
        `conflict/...` as logged; `steps_to/SCORE@TARGET` by the whole course of the score."""
        step = self.last if step is None else step
        if (aim := speed.parsed(name)) is not None:
            course = [(at, value) for at in self.steps if (value := self.score(aim[0], at)) is not None]
            return speed.reached(name, ([at for at, _ in course], [value for _, value in course]))
        if name.startswith(LOGGED):
            pooled = self.summary.get("routing", {}) if step == self.last else {}
            logged = dict(zip(*self.metrics.get(name, ([], [])), strict=True))
            return _number(pooled.get(name, logged.get(step)))
        evaluated = self.evaluated(name, step)
        if evaluated:
            return _number(evaluated["value"])
        if name in self.withheld and step == self.last:
            return None
        found = self.scores.get(step, {})
        return _number(found.get(name, self.summary["scores"].get(name) if step == self.last else None))

    @property
    def steps(self) -> list[int]:
        """At which anything was measured."""
        return sorted({*self.scores, self.last})

    def names(self, step: int | None = None) -> list[str]:
        """Of the scores that were measured at a step (None: the last), also those that gave no number."""
        step = self.last if step is None else step
        trained = [*self.scores.get(step, {}), *(self.summary["scores"] if step == self.last else ())]
        return [*dict.fromkeys([*trained, *(self.results.get("scores", {}) if step == self.last else ())])]

    def samples(self, name: str, step: int | None = None) -> int | None:
        """Behind a score at a step (None: the last), where that is known."""
        n = self.evaluated(name, step).get("n", self.summary.get("n", {}).get(name))
        return None if n is None else int(n)

    def evaluated(self, name: str, step: int | None = None) -> Measured:
        """What the evaluation says of a score at a step (None: the last); {} where it did not measure it."""
        there = self.results if step in (None, self.last) else {}
        return there.get("scores", {}).get(name, {})

    def answers(self, name: str, step: int | None = None) -> dict[str, float]:
        """Question -> whether it was answered right, from the records behind a share of right answers; {} without."""
        step = self.last if step is None else step
        if not metric(name).share:
            return {}
        base, _, subject = name.partition("/")
        wanted, held_out = RECORDS.get(base, base), name.endswith("_held_out")
        if self.evaluation is not None and self.evaluated(name, step):
            path = self.evaluation / f"{wanted}.jsonl"
        else:
            path = self.folder / "predictions" / f"step={step:06d}.jsonl"
        records = whole_lines(path) if path.is_file() else ()
        mine = (r for r in records if r.get("benchmark") == wanted and (r.get("held_out") or not held_out))
        return {str(r["id"]): float(r["correct"]) for r in mine if subject in ("", r.get("subject"))}


def anchored_by_training(results: Mapping[str, Any], benchmark: str) -> bool:
    """Whether the anchors that the training measured stand beside the values of an evaluation."""
    return benchmark in EMBEDDED and bool(results.get("as_trained"))


RECORDS = {
    **{"embedded_acc": "generation", "embedded_acc_held_out": "generation"},
    **{"mmlu_share": "mmlu", "ocrbench_share": "ocrbench"},
}
"""Score -> the benchmark that its records name, where that is not the score's own name."""


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


def read_runs(root: Path) -> list[Run]:
    """Every finished run below `root`, in the order of their paths.

    Raises:
        RunError: there is none.
    """
    runs = [read_run(folder) for folder in finished_folders(root)]
    if not runs:
        raise RunError(f"{root}: no finished run (a folder with summary.json) in here")
    return runs


def finished_folders(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.rglob("summary.json"))


def read_run(folder: Path) -> Run:
    """Raises RunError: no summary or no config that can be read."""
    summary = read_json(folder / "summary.json")
    try:
        config = read_yaml(folder / "config.yaml")
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        config = None
    for name, content in (("summary.json", summary), ("config.yaml", config)):
        if not isinstance(content, dict):
            raise RunError(f"{folder / name}: no such file, or not readable; the run's own command writes it again")
    return Run(folder, summary, config, read_scores(folder / SCORES))


def stopped(root: Path) -> dict[Path, str]:
    """Folder -> why, for every run below `root` that its alarm stopped: it has no scores, and must not go unnoticed."""
    folders = sorted(path.parent for path in root.rglob(EVENTS) if not (path.parent / "summary.json").exists())
    texts = {folder: [e["text"] for e in read_events(folder) if e.get("action") == "stop"] for folder in folders}
    return {folder: lines[-1] for folder, lines in texts.items() if lines}


# --------------------------------------------------------------------------- keys of a config


def flat(config: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists stay, and so do the mappings at the keys `whole`."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        kept = name in whole or not isinstance(value, Mapping)
        out |= {name: value} if kept else flat(value, f"{name}.", whole)
    return out


def plain(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """With every key that this code knows, lists for tuples: as `config.yaml` would be read again."""
    try:
        typed = config if isinstance(config, Config) else parse(Config, config)
    except ConfigError:  # of other code
        return json.loads(json.dumps(config))
    return json.loads(json.dumps(asdict(typed)))


def config_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Full key -> value of everything that may decide a result; of a `plain` config.

    Phases go by their names. `system.pools (order)`, `phases.log_every` (where a phase ends by a logged metric) and the
    alarm as one value stand for what no key alone says.
    """
    kept = {key: value for key, value in config.items() if key not in IGNORED}
    phases = kept["phases"]["list"]
    kept["phases"] = {**kept["phases"], "list": by_name(phases)}
    kept["callbacks"] = {key: value for key, value in kept["callbacks"].items() if key not in INSTRUMENTS}
    kept["callbacks"]["collapse_alarm"] = alarm(kept["callbacks"].get("collapse_alarm"), config["log_every"])
    values = flat(kept) | {"system.pools (order)": list(config["system"]["pools"])}
    if any(phase.get("when") for phase in phases):
        values["phases.log_every"] = config["log_every"]
    aside = {"data.num_workers", "data.source.folder", *(f"trainer.{name}" for name in VOLATILE_TRAINER)}
    return {key: value for key, value in values.items() if key not in aside}


def alarm(node: Mapping[str, Any] | None, log_every: int) -> str:
    """What a collapse alarm may do to the training; one that only warns is as none."""
    if node is None or node.get("action", "warn") == "warn":
        return "warn"
    settings = {key: value for key, value in node.items() if key not in ("action", "_target_")}
    return f"{node['action']}, every {log_every} steps, {json.dumps(settings, sort_keys=True)}"


def by_name(phases: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Name -> what the phase sets."""
    names = [phase["name"] for phase in phases]
    numbered = [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names)]
    settings = ({k: v for k, v in phase.items() if k != "name" and v not in (None, [], {})} for phase in phases)
    return dict(zip(numbered, settings, strict=True))


def training_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide the training: all but the evaluation's."""
    return {key: value for key, value in config_keys(config).items() if not key.startswith("evaluation.")}


MISSING = "(no such key)"
SHOWN = 4


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ."""
    keys = [*one, *(key for key in other if key not in one)]
    return [key for key in keys if one.get(key, MISSING) != other.get(key, MISSING)]


def text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)


def listed(words: Iterable[str]) -> str:
    """The first few, and how many more."""
    whole = list(words)
    more = f" and {len(whole) - SHOWN} more" if len(whole) > SHOWN else ""
    return ", ".join(whole[:SHOWN]) + more
