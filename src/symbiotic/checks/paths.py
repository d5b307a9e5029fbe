"""Is what a run reads there? Asked before it is launched, and not of every config: one may be composed elsewhere.

Neither torch nor numpy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from symbiotic.checks.rules import require
from symbiotic.data.tar import find_files, find_shards, suffixes_of
from symbiotic.schema import Config


def check_paths(config: Config) -> None:
    """Raises ConfigError: a file or folder of the data that is not there, or is no plain file."""
    if config.dry_run:  # reads nothing
        return
    source, key = config.data.source, "data.source."
    tokenizer = source.get("tokenizer")
    if isinstance(tokenizer, str):
        require(Path(tokenizer).exists(), f"{key}tokenizer", tokenizer, "no such file")
    if "shards" in source:
        find_shards(_listed(source["shards"]), f"{key}shards")
    named = source.get("sources")
    for name, origin in (named if isinstance(named, Mapping) else {}).items():
        if isinstance(origin, Mapping):
            _check_origin(origin, f"{key}sources.{name}")
    if config.model.vision is not None:
        right = (
            "no such file or folder; must hold the weights of a SigLIP or CLIP, with open_clip_config.json beside them"
        )
        require(Path(config.model.vision.path).exists(), "model.vision.path", config.model.vision.path, right)
    for folder in config.data.encoded:
        require(Path(folder).is_dir(), "data.encoded", folder, "no such folder; src/encode_shards.py writes one")


def _check_origin(origin: Mapping[str, Any], key: str) -> None:
    suffixes = suffixes_of(str(origin.get("format", "own")))
    for name, endings in (("files", suffixes), ("images", (".tar",))):
        local = [part for part in _listed(origin.get(name, ())) if "://" not in part]
        folders = name == "images" and len(local) == 1 and Path(local[0]).is_dir()
        if local and not folders:
            find_files(local, f"{key}.{name}", endings)


def _listed(value: Any) -> Sequence[str]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    return [str(part) for part in value] if several else [str(value)]
