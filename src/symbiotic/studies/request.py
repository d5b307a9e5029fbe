"""Command lines of `key=value` for the scripts that look at one run: from text to a typed request.

Imports nothing heavy, so that a wrong request costs no time and one line.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from symbiotic.launch import FAILED, INTERRUPTED, WRONG_CONFIG, one_line
from symbiotic.schema import ConfigError, near_miss, parse

T = TypeVar("T")
Readers = Mapping[str, Callable[[str], Any]]


def whole(text: str) -> Any:
    """An integer, where it is one; what cannot be read stays text, for `parse` to refuse."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else text


def number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def flag(text: str) -> Any:
    return {"true": True, "false": False}.get(text.lower(), text)


def parse_request(cls: type[T], arguments: Sequence[str], readers: Readers) -> T:
    """The request, a dataclass, of a command line of `key=value`.

    Args:
        readers: key -> how its text is read, where its value is no text.

    Raises:
        ConfigError: something that is no key=value, an unknown key, one that is missing, or a value that cannot be.
    """
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument}: cannot be read as key=value; see --help")
        if key not in known:
            raise ConfigError(f"{argument}: no such key; {near_miss(key, known)}")
        if key in values:
            raise ConfigError(f"{argument}: {key} is given twice")
        values[key] = readers.get(key, str)(text)
    return parse(cls, values)


def run_folder(run: str | Path) -> Path:
    """Raises ConfigError where it is no folder of a run."""
    if not Path(run).is_dir():
        raise ConfigError(f"run={run}: no such folder; must be the folder of a run, which src/train.py prints")
    if not (Path(run) / "config.yaml").is_file():
        raise ConfigError(f"run={run}: no config.yaml in it; must be the folder of one run")
    return Path(run)


def check_device(device: str) -> None:
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", device):
        raise ConfigError(f"device={device}: must be cpu, cuda, mps or xpu, or one of several, as in cuda:1")


def check_weights_choice(checkpoint: str | None, step: int | None, ema: bool = False) -> None:
    if step is not None and step < 0:
        raise ConfigError(f"step={step}: must be at least 0")
    if checkpoint is not None and step is not None:
        raise ConfigError(f"step={step}: the weights are chosen already, by checkpoint={checkpoint}")
    if ema and (checkpoint is not None or step is not None):
        other = f"step={step}" if checkpoint is None else f"checkpoint={checkpoint}"
        raise ConfigError(f"ema=true: the weights are chosen already, by {other}")


def command(usage: str, act: Callable[[Sequence[str]], object], arguments: Sequence[str] | None = None) -> int:
    """Run a script; returns its exit status. An expected failure is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help", "help") for argument in arguments):
        print(usage, end="")
        return 0
    try:
        act(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return WRONG_CONFIG if isinstance(error, ConfigError) else FAILED
    return 0
