"""Secrets stay out of what a run writes: configs, records, logs, tracebacks. Standard library only."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import IO, Any

REDACTED = "<redacted>"
NAME = re.compile(
    r"(?:^|[_\-.])(?:api_?key|access_?key|private_?key|secret|token(?!_(?:kind|type|id|row|count|size))|password|passwd|"
    r"passphrase|credentials?|auth|authorization|cookie)(?:$|[_\-.])",
    re.IGNORECASE,
)
"""Of keys and environment variables whose values are secret: `api_key`, `HF_TOKEN`, but not `row_tokens` or
`token_kind`."""

_SIGNED = "token|sig|signature|key|keyid|accessid|key-pair-id|policy|credential|secret|password|jwt|auth"
_GIVEN = "x-api-key|api[_-]?key|access[_-]?token|client[_-]?secret|password|passwd"
_SHAPES = (
    *(r"hf_[A-Za-z0-9]{20,}", r"gh[pousr]_[A-Za-z0-9]{20,}", r"github_pat_\w{20,}", r"sk-[\w-]{20,}"),
    *("AKIA[0-9A-Z]{16}", r"xox[abprs]-[\w-]{10,}", r"eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"),
)
IN_TEXT = (
    # who asks, before the host of an address: user:password@, token@
    (re.compile(r"(?<=://)[^/\s'\"]+(?=@)"), REDACTED),
    # of a signed address
    (re.compile(rf"(?<=[?&#;])([^=&#;\s]*(?:{_SIGNED}))=[^&#;\s'\"]+", re.IGNORECASE), rf"\1={REDACTED}"),
    # headers, to the end of the line or of the text in quotes
    (
        re.compile(r"\b((?:proxy-)?authorization|(?:set-)?cookie)(['\"]?\s*[:=]\s*['\"]?)[^\n'\"]+", re.IGNORECASE),
        rf"\1\2{REDACTED}",
    ),
    (
        re.compile(rf"\b({_GIVEN})(['\"]?\s*[:=]\s*['\"]?)(?!null\b)[^\s'\",;&]{{6,}}", re.IGNORECASE),
        rf"\1\2{REDACTED}",
    ),
    (re.compile(r"\b(Bearer|Basic)\s+(?=\S*[\d=])[\w\-.~+/=]{8,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    # what looks like nothing else
    (re.compile(rf"\b(?:{'|'.join(_SHAPES)})"), REDACTED),
)
SHORT, LONG = 6, 8
"""Characters: a secret shorter than the first may be anything and is left; one shorter than the second is looked for
as a word of its own."""
NUMBER = 12
"""Digits from which on a whole number can be a secret; shorter ones, and all with a point, are steps, seeds, losses."""

_known: set[str] = set()  # secrets that stood below a key that said so, in this process


def redacted(value: Any, key: str = "") -> Any:
    """A plain container without what is secret in it: all text below a key that says so, and of other texts what
    `redacted_text` finds. Whole numbers below such a key are a password that was not quoted, from 6 digits on."""
    if isinstance(value, Mapping):
        secret = key if NAME.search(key) else ""
        return {name: redacted(child, str(name) if NAME.search(str(name)) else secret) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(child, key) for child in value]
    below = bool(NAME.search(key))
    if below and type(value) is int and abs(value) >= 10 ** (SHORT - 1):
        return REDACTED
    if not isinstance(value, str):
        return value
    if value and below:
        if len(value) >= LONG:  # a shorter one may be a word of other texts
            _known.add(value)
        return REDACTED
    return redacted_text(value)


def redacted_texts(value: Any) -> Any:
    """A plain container whose texts are without what `redacted_text` finds, whatever keys they stand below."""
    if isinstance(value, Mapping):
        return {name: redacted_texts(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_texts(child) for child in value]
    return redacted_text(value) if isinstance(value, str) else value


def redacted_text(text: str) -> str:
    """Without passwords and signatures in addresses, values of headers, tokens of known shapes, the values of this
    process's environment variables whose names say so, and those that a config had below such a key."""
    for secret in sorted(filter(_telling, (*_known, *_environment())), key=len, reverse=True):
        if secret in text:
            ends = (r"(?<!\w)", r"(?!\w)") if len(secret) < LONG else ("", "")
            text = re.sub(f"{ends[0]}{re.escape(secret)}{ends[1]}", REDACTED, text)
    for pattern, instead in IN_TEXT:
        text = pattern.sub(instead, text)
    return text


def _environment() -> Iterable[str]:
    return (value for name, value in os.environ.items() if NAME.search(name))


def _telling(secret: str) -> bool:
    """Whether a text that has it has it for no other reason."""
    if len(secret) < SHORT or secret == REDACTED:
        return False
    if secret.isdecimal():
        return len(secret) >= NUMBER
    return not re.fullmatch(r"[\d.,+\-eE_]*", secret)


class RedactedFile:
    """A text file that gets whole lines, without secrets; what is no line yet is written by `close`."""

    def __init__(self, file: IO[str]) -> None:
        self._file, self._rest = file, ""

    def write(self, text: str) -> int:
        *lines, self._rest = f"{self._rest}{text}".split("\n")
        self._file.writelines(f"{redacted_text(line)}\n" for line in lines)
        return len(text)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.write(redacted_text(self._rest))
        self._rest = ""
        self._file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
