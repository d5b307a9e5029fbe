"""The contract of every benchmark, and how a model is held while it is measured.

A benchmark yields `(name, Value)`; a value never comes without the number of samples that it rests on. Everything it
needs beside the model and its own files stands in the `Context`, which also keeps what was asked, answered and
expected, sample by sample, so that an interrupted evaluation goes on.
"""

from __future__ import annotations

import abc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from symbiotic.data.errors import DataError

if TYPE_CHECKING:
    from symbiotic.evaluation.context import Context

Record = dict[str, Any]
T = TypeVar("T")


class Value(NamedTuple):
    """A score and the number of samples behind it; NaN where there is none. low, high: the 95 % resampling interval of
    a score that is no mean over samples (a Frechet distance), where the benchmark computed one."""

    value: float
    n: int
    low: float | None = None
    high: float | None = None


class MissingAsset(DataError):
    """A file that a benchmark needs and that is not there. The line says which file, where it is looked for (the key or
    the variable of the environment), and how a user gets it."""


class Benchmark(abc.ABC):
    """One benchmark. `needs_latents`: it is left out for a model that cannot generate images."""

    name: ClassVar[str]
    needs_latents: ClassVar[bool] = False

    def prepare(self, say: Callable[[str], None]) -> None:  # noqa: B027
        """Make what the protocol rests on, where that is not an asset; only of benchmarks that are to be measured. say:
        gets a line before what takes long."""

    def protocol(self) -> Mapping[str, Any]:
        """What decides the values beside the model and the `Context`: settings, and the files by a hash of what they
        hold. Plain values. Scores of different protocols are not compared.

        Raises:
            MissingAsset: a file that is not there; nothing has been measured then.
        """
        return {}

    @abc.abstractmethod
    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        """Measure the model, which is in evaluation mode and without gradients (see `measuring`).

        An item that cannot be used is one line in `context.problems` and never counted as wrong.

        Raises:
            DataError: the benchmark as a whole cannot be read.
        """


def mean(values: Sequence[float]) -> Value:
    """Mean and count; NaN of nothing."""
    return Value(float(np.mean(values)) if len(values) else float("nan"), len(values))


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Consecutive pieces of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


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
