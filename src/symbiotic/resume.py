"""A run goes on as it began: what differs is refused by name, or let through by name and kept on record."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from symbiotic.config import VOLATILE, VOLATILE_SOURCE, VOLATILE_TRAINER
from symbiotic.files import digest, read_json, unreadable, write_json
from symbiotic.redact import redacted
from symbiotic.runs import VERSIONS
from symbiotic.schema import Config, ConfigError, RunError

SETTINGS = "settings.json"
"""Of a run folder: every setting that decides what the run computes, its code, versions and corpus; flat."""
CHANGES = "changes.json"
"""Of a run folder: what was changed after the run had begun: key, old, new, step, time."""

FREE = (
    *VOLATILE,
    "ablation",
    "data.num_workers",
    "data.source.folder",
    *(f"data.source.{key}" for key in VOLATILE_SOURCE),
    *(f"trainer.{key}" for key in VOLATILE_TRAINER),
)
"""Keys that may differ, with all below them: they change nothing that a run computes."""


def settings(config: Config, made: Mapping[str, str], corpus: str) -> dict[str, Any]:
    """What decides a run, flat. made: provenance of this process; corpus: fingerprint of the data."""
    plain = redacted(json.loads(json.dumps(asdict(config))))
    kept = {key: value for key, value in _leaves("", plain) if not any(_below(key, free) for free in FREE)}
    return kept | {key: made[key] for key in ("code", *VERSIONS)} | {"corpus": corpus}


def hold(
    folder: Path,
    now: Mapping[str, Any],
    allowed: Sequence[str],
    begun: bool,
    step: Callable[[], int],
    manifest: Callable[[], Mapping[str, Any]] = dict,
) -> None:
    """Keep the settings of a run that begins; hold those of one that goes on against them.

    allowed: keys, or what they lie under, that may differ: such a change is added to `changes.json`, with the
        step at which it comes (finding that reads the checkpoint, so it is asked for only then).
    manifest: that of the newest checkpoint, whose hashes stand in for `settings.json` where that is damaged.

    Raises:
        RunError: something else differs; each key is named with its old and new value.
        ConfigError: something is allowed that does not differ, and never did.
    """
    known = _kept(folder)
    if begun and known is None and not origin(now).items() <= manifest().items():
        why = f"its {SETTINGS} is damaged" if (folder / SETTINGS).exists() else f"begun by code that kept no {SETTINGS}"
        vain = "and no checkpoint says that it began with these settings, code and versions"
        raise RunError(f"{folder}: {why}, {vain}; start it as it began, or remove the folder to run it anew")
    apart = _apart(known, now) if begun and known is not None else {}
    before = [change["key"] for change in changes(folder)]
    idle = [name for name in allowed if not any(_below(key, name) for key in (*apart, *before))]
    if idle:
        raise ConfigError(f"allow_changes=[{','.join(idle)}]: has no effect: nothing of it differs in {folder}")
    refused = {key: pair for key, pair in apart.items() if not any(_below(key, name) for name in allowed)}
    if refused:
        way = f"go back, remove the folder to run it anew, or have it on record: allow_changes=[{','.join(refused)}]"
        raise RunError(f"{folder}: this run began otherwise: {_listed(refused)}; {way}")
    if apart:
        at = step()
        time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        made = [{"key": key, "old": old, "new": new, "step": at, "time": time} for key, (old, new) in apart.items()]
        write_json(folder / CHANGES, [*changes(folder), *made])
    write_json(folder / SETTINGS, dict(now))


def hold_finished(folder: Path, now: Mapping[str, Any]) -> None:
    """A run that is finished is shown again to who asks for it: its settings; code, versions and data may be others.

    Raises:
        RunError: a setting differs; each key is named with its old and new value.
    """
    free = ("code", "corpus", *VERSIONS)
    apart = {key: pair for key, pair in _apart(_kept(folder) or now, now).items() if key not in free}
    if apart:
        what = f"this run is finished, and was another: {_listed(apart)}"
        raise RunError(f"{folder}: {what}; take another run_dir, or none")


def changes(folder: Path) -> list[dict[str, Any]]:
    """What was changed of a run after it had begun, oldest first.

    Raises:
        RunError: the record is damaged.
    """
    if unreadable(folder / CHANGES):
        raise RunError(f"{folder / CHANGES}: damaged, so that nobody knows what was changed; put it right by hand")
    return list(read_json(folder / CHANGES) or [])


def identity(settings: Mapping[str, Any]) -> dict[str, str]:
    """What the manifest of a checkpoint says of the run: a hash of its settings, and the fingerprint of its data. What
    is null counts as not there."""
    apart = ("code", "corpus", *VERSIONS)
    decided = {key: value for key, value in settings.items() if key not in apart and value is not None}
    return {"settings": digest(decided), "data": str(settings["corpus"])}


def origin(settings: Mapping[str, Any]) -> dict[str, str]:
    """What the manifest of a checkpoint says of where it comes from: `identity`, code and versions."""
    return identity(settings) | {key: str(settings[key]) for key in ("code", *VERSIONS)}


def identities(folder: Path) -> set[str]:
    """Those of the settings that the run had since it began, the present ones included, from its record of changes."""
    now = dict(_kept(folder) or {})
    found = set(identity(now).values()) if now else set()
    for change in reversed(changes(folder)):
        now[change["key"]] = change["old"]
        found |= set(identity(now).values()) if now else set()
    return found


def _kept(folder: Path) -> dict[str, Any] | None:
    """The settings of a run folder; None where there are none that can be read."""
    known = read_json(folder / SETTINGS)
    return known if isinstance(known, dict) else None


def _apart(known: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> old and new value, of what differs."""
    keys = [*now, *(key for key in known if key not in now)]
    return {key: (known.get(key), now.get(key)) for key in keys if known.get(key) != now.get(key)}


def _listed(apart: Mapping[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{key} {old} -> {new}" for key, (old, new) in apart.items())


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield key, value
        return
    for name, child in value.items():
        yield from _leaves(f"{key}.{name}" if key else name, child)
