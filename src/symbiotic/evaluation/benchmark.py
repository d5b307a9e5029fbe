"""The contract of every benchmark, and how a model is held while it is measured.

A benchmark yields `(name, Value)`; a value never comes without the number of samples that it rests on. What was
asked, answered and expected, sample by sample, goes to `Context.records`; what could not be used goes to
`Context.problems`, one line each, and is never counted as wrong.
"""

from __future__ import annotations

import abc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from symbiotic.data.errors import DataError

Record = dict[str, Any]
T = TypeVar("T")


class Value(NamedTuple):
    """A score and the number of samples behind it. NaN where there is none."""

    value: float
    n: int


@dataclass
class Context:
    """What a benchmark needs beside the model, and where it leaves its traces."""

    seed: int = 0
    batch_size: int = 96
    records: list[Record] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Benchmark(abc.ABC):
    """One benchmark. `needs_latents`: it is left out for a model that cannot generate images."""

    name: ClassVar[str]
    needs_latents: ClassVar[bool] = False

    @abc.abstractmethod
    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        """Measure the model, which is in evaluation mode and without gradients (see `measuring`)."""


def mean(values: Sequence[float]) -> Value:
    """Mean and count; NaN of nothing."""
    return Value(float(np.mean(values)) if len(values) else float("nan"), len(values))


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def kept(items: Sequence[T], prepare: Callable[[T], Any], context: Context) -> tuple[list[T], list[Any]]:
    """The items that can be prepared, and what they became; the others are named in `context.problems`."""
    usable, prepared = [], []
    for item in items:
        try:
            prepared.append(prepare(item))
        except DataError as error:
            context.problems.append(str(error))
        else:
            usable.append(item)
    return usable, prepared


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextmanager
def measuring(model: nn.Module) -> Iterator[nn.Module]:
    """The model in evaluation mode and without gradients; afterwards every module's mode and the global random
    state are what they were, also after an error."""
    modes = {module: module.training for module in model.modules()}
    device = device_of(model)
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield model
    finally:
        for module, training in modes.items():
            module.training = training


def write_jsonl(path: str | Path, records: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object a line; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path
