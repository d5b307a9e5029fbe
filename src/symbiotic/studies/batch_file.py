"""Files of prompts or questions: `.txt`, one text a line, or `.jsonl`, one mapping a line. Imports nothing heavy."""

from __future__ import annotations

import codecs
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from symbiotic.schema import ConfigError, RunError, parse

T = TypeVar("T")
SUFFIXES = (".txt", ".jsonl")


def check_file(key: str, path: str) -> None:
    """Raises ConfigError: no such file, or not one of `SUFFIXES`."""
    if not Path(path).is_file():
        raise ConfigError(f"{key}={path}: no such file")
    if Path(path).suffix not in SUFFIXES:
        raise ConfigError(f"{key}={path}: must be a file {' or '.join(SUFFIXES)}")


def check_text(key: str, text: str) -> None:
    """Raises ConfigError: no word in it, or half of a character."""
    if not text.strip():
        raise ConfigError(f"{key}=: must hold at least one word")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{key}={text!r}: not valid Unicode") from error


def read_rows(path: str, cls: type[T], text: str, check: Callable[[T], None]) -> tuple[list[T], list[str]]:
    """The usable lines, and what is wrong with each other one. Empty lines are skipped.

    Args:
        cls: dataclass of a line. text: its field that a line of a `.txt` file is.
        check: raises ConfigError for values that cannot be.

    Raises:
        RunError: not readable, or without a usable line.
    """
    rows: list[T] = []
    problems: list[str] = []
    try:
        content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise RunError(f"{path}: cannot be read ({error.strerror})") from error
    for number, raw in enumerate(content.split(b"\n"), 1):  # not splitlines: U+2028 may stand inside a text
        if not raw.strip():
            continue
        try:
            line = raw.decode()
            value = {text: line.strip()} if Path(path).suffix == ".txt" else json.loads(line)
            row = parse(cls, value, "")
            check(row)
            rows.append(row)
        except (ValueError, OSError, RecursionError) as error:  # ConfigError is a ValueError
            why = f"not JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error).removeprefix("=")
            why = "not UTF-8" if isinstance(error, UnicodeDecodeError) else why
            problems.append(f"{path}: line {number}: {' '.join(why.split())}")
    if not rows:
        raise RunError(f"{path}: no line that can be used{f'; {problems[0]}' if problems else ''}")
    return rows, problems


def report_left_out(problems: Sequence[str], made: str) -> None:
    """Name what could not be used, when all else is done.

    Raises:
        RunError: there was something.
    """
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    if problems:
        raise RunError(f"{len(problems)} {'line was' if len(problems) == 1 else 'lines were'} left out; {made}")
