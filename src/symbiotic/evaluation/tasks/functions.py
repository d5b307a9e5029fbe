"""Functions of the task files beside it; lm-eval finds them by the file's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from symbiotic.evaluation.ocrbench import correct


def documents(documents: Callable[[], Sequence[Any]], **_: Any) -> dict[str, Sequence[Any]]:
    """The documents that a benchmark put into the task manager's metadata (a function: metadata is copied deeply)."""
    return {"test": documents()}


def ocrbench_correct(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, bool]:
    return {"correct": correct(results[0], document["answers"], document["dataset_name"])}
