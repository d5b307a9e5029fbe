"""Hydra's and OmegaConf's errors as one line: key, value, what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from symbiotic.schema import near_miss

COMPOSE_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)
"""What resolving a wrong config may raise."""

_KEY = re.compile(r"(?:Could not override|Could not append to config\. An item is already at"
                  r"|Could not delete from config\.?) '(?P<key>[^']+)'")  # fmt: skip

Known = Callable[[Sequence[str]], Mapping[str, Any]]
"""Overrides -> a config that does compose, as a plain container, to find near misses in."""


def explain(error: BaseException, overrides: Sequence[str], known: Known, conf: Path) -> str:
    """One line for an error that composing raised.

    known: called only for an unknown key. conf: the folder of the groups.
    """
    text = str(error)
    if isinstance(error, MissingConfigException):
        return _missing_option(error, conf)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: cannot be read as key=value"
    if isinstance(error, yaml.YAMLError):
        return f"YAML: {' '.join(text.split())}"
    if found := _KEY.search(text):
        return _unknown_key(_full_key(error, found["key"]), text, overrides, known(overrides))
    if found := re.search(r"Multiple values for (\S+)\. ", text):
        return f"{_written(found[1], overrides)}: {found[1]} is chosen already; leave the + away"
    if "Config group override must be a string" in text:
        written = next((o for o in overrides if (conf / o.split("=")[0]).is_dir() and o.endswith("=null")), "")
        return f"{written}: must be an option of the group; {near_miss('null', _options(conf / written.split('=')[0]))}"
    if "requires --multirun" in text or "Ambiguous value" in text:
        found = re.search(r"'(.+?)'(?= requires|\n|$)", text)
        return f"{found[1] if found else ''}: several values need -m; write key=[a,b] for a list"
    return _omegaconf(error)


def _options(group: Path) -> list[str]:
    return [path.stem for path in group.glob("*.yaml")]


def _missing_option(error: MissingConfigException, conf: Path) -> str:
    found = re.search(r"Could not (?:load|find) '(.+)/(.+?)'", str(error))
    if not found:
        return _first_line(error)
    group, name = found.groups()
    options = error.options if error.options is not None else _options(conf / group)
    return f"{group}={name}: no such option; {near_miss(name, options)}"


def _full_key(error: BaseException, key: str) -> str:
    """Of a mapping that was set as a whole (`system.routers={a: b}`), the key inside it that does not exist."""
    full = str(getattr(error.__cause__, "full_key", None) or key)
    return full if full.startswith(key) else key


def _written(key: str, overrides: Sequence[str]) -> str:
    """The override that sets the key (or a mapping around it), as it was typed."""
    names = {o.lstrip("+~").split("=")[0].split("@")[0]: o for o in overrides}
    around = sorted((name for name in names if f"{key}.".startswith(f"{name}.")), key=len)
    return names[around[-1]] if around else key


def _unknown_key(key: str, text: str, overrides: Sequence[str], known: Mapping[str, Any]) -> str:
    written = _written(key, overrides)
    if "delete" in text:
        return f"~{key}: nothing to delete; {nearest(key, known)}"
    if "already at" in text:
        return f"{written}: {key} is there already; leave the + away"
    return f"{written}: no such key; {nearest(key, known)}"


def nearest(key: str, node: Any) -> str:
    """Near miss for the first part of a dotted key that the container lacks."""
    parts = key.split(".")
    for i, part in enumerate(parts):
        above = ".".join(parts[:i])
        if not isinstance(node, Mapping):
            return f"{above} is {'null' if node is None else node} and has no keys"
        if not node:
            return f"{above} is empty; write ++{key}=… to add to it"
        if part not in node:
            known = [".".join((*parts[:i], str(name))) for name in node]
            return near_miss(".".join(parts[: i + 1]), known)
        node = node[part]
    return "it is null" if node is None else "it cannot be set so"


def _omegaconf(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    full_key = getattr(cause, "full_key", None)
    prefix = f"{full_key}: " if full_key else ""
    return prefix + (_first_line(cause) or _first_line(error) or type(error).__name__)


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
