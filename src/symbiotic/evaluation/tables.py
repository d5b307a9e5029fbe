"""Rows of CSV, TSV and parquet files: all text as it stands in the file, and what cannot be read named, row by row."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.evaluation.assets import package


def text_rows(path: Path, columns: int | None = None, delimiter: str = ",") -> Iterator[tuple[int, list[str], str]]:
    """(record number from 1, fields, what is wrong with it) of a CSV or TSV file; "None" and "NA" are texts.

    After a broken record that swallowed several lines, such as one with a quote that never closes, reading goes on at
    the line behind its first.

    Args:
        columns: how many fields a record has; None: as many as the first.

    Raises:
        DataError: the file cannot be read.
    """
    csv.field_size_limit(sys.maxsize)  # an image in base64 is longer than the default
    with readable_errors("read", path):
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    lines = list(io.StringIO(text, newline=""))
    start = row = 0
    while start < len(lines):
        reader = csv.reader(lines[start:], strict=True, delimiter=delimiter)
        for fields, fault, used in _records(reader):
            columns = columns or len(fields)
            broken = bool(fault) or len(fields) != columns
            if fields or fault:
                row += 1
                yield row, fields, fault or _fault(fields, columns)
            end = start + reader.line_num
            if broken and used > 1:
                start = end - used + 1
                break
        else:
            start = len(lines)


def _fault(fields: Sequence[str], columns: int) -> str:
    if len(fields) != columns:
        return f"{len(fields)} fields; must be {columns}"
    return "not UTF-8" if any(halved(field) for field in fields) else ""


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: it is none, not UTF-8, or nested so deeply that no file of a benchmark is.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def halved(text: str) -> bool:
    """Whether a text holds half a character (a lone surrogate, as JSON may), which no tokenizer takes."""
    return any("\ud800" <= sign <= "\udfff" for sign in text)


def _records(reader: csv._reader) -> Iterator[tuple[list[str], str, int]]:  # type: ignore[name-defined]
    """(fields, fault, lines used) of each record; a faulty one is reported, not raised."""
    while True:
        before = reader.line_num
        try:
            yield next(reader), "", reader.line_num - before
        except StopIteration:
            return
        except csv.Error as error:
            yield [], str(error), reader.line_num - before


def parquet_rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[dict[str, Any] | str]:
    """The rows of a parquet file as plain values, or one line for each piece (row group) that cannot be read.

    Args:
        columns: what every row must have. optional: read where they are there.

    Raises:
        DataError: not a parquet file, or one of `columns` is missing; no package that reads it.
    """
    package("pyarrow", "eval")
    from pyarrow import ArrowException, parquet

    try:
        file = parquet.ParquetFile(path)
        there = file.schema_arrow.names
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file ({_first_line(error)})") from error
    with file:
        missing = [name for name in columns if name not in there]
        if missing:
            raise DataError(f"{path}: no column {', '.join(missing)}; it has {', '.join(there)}")
        wanted = [*columns, *(name for name in optional if name in there)]
        for group in range(file.num_row_groups):
            try:
                rows = file.read_row_group(group, wanted, use_threads=False).to_pylist()
            except (ArrowException, OSError, ValueError) as error:
                yield f"row group {group} cannot be read ({_first_line(error)})"
            else:
                yield from rows


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
