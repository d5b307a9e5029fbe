"""Runs as their folders keep them, and which keys of their configs decide what they computed."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from symbiotic.callbacks.events import EVENTS, read_events
from symbiotic.callbacks.in_loop_evaluation import SCORES, read_scores
from symbiotic.config import VOLATILE, VOLATILE_TRAINER, logs_steer
from symbiotic.runs import read_json
from symbiotic.schema import Config, ConfigError, RunError, parse
from symbiotic.studies.curves import Series, read_series

IGNORED = (*VOLATILE, "seed", "ablation")
"""Top-level keys that name a run, or say where it runs and what it shows."""

INSTRUMENTS = (
    *("step_log", "routing_monitor", "self_checks", "gradient_conflict", "routing_heatmap", "evaluation"),
    *("shared_only_probe", "sample_grid", "progress", "ema"),
)
"""Callbacks that look on."""


@dataclass
class Run:
    folder: Path
    summary: dict[str, Any]
    config: dict[str, Any]
    scores: dict[int, dict[str, float | None]]

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    @cached_property
    def metrics(self) -> dict[str, Series]:
        path = self.folder / "metrics.csv"
        return read_series(path) if path.is_file() else {}


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
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
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


def acts(key: str, values: Mapping[str, Any]) -> bool:
    """Whether a callback's key may change the training: instruments do not, nor does an alarm that only warns."""
    if key.startswith("callbacks.collapse_alarm"):
        return values.get("callbacks.collapse_alarm.action", "warn") != "warn"
    return not key.startswith(tuple(f"callbacks.{name}" for name in INSTRUMENTS))


def plain(config: Config | Mapping[str, Any]) -> dict[str, Any]:
    """With every key that this code knows, lists for tuples: as `config.yaml` would be read again."""
    try:
        typed = config if isinstance(config, Config) else parse(Config, config)
    except ConfigError:  # of other code
        return json.loads(json.dumps(config))
    return json.loads(json.dumps(asdict(typed)))


def config_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Full key -> value of everything that may decide a result; of a `plain` config."""
    kept = {key: value for key, value in config.items() if key not in IGNORED}
    if logs_steer(config):
        kept["log_every"] = config["log_every"]
    values = flat(kept)
    aside = {"data.num_workers", "data.source.folder", *(f"trainer.{name}" for name in VOLATILE_TRAINER)}
    order = {"system.pools (order)": list(config["system"]["pools"])}
    return {key: value for key, value in (values | order).items() if key not in aside and acts(key, values)}


def training_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those that decide the training: all but the evaluation's."""
    return {key: value for key, value in config_keys(config).items() if not key.startswith("evaluation.")}


MISSING = "(no such key)"


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys whose values differ."""
    keys = [*one, *(key for key in other if key not in one)]
    return [key for key in keys if one.get(key, MISSING) != other.get(key, MISSING)]
