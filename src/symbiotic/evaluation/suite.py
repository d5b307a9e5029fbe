"""Several benchmarks on one model: the scores, what they rest on, and what could not be measured."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from symbiotic.data.errors import DataError
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import Benchmark, MissingAsset, Record, Value, measuring
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.prompts import MAX_TOKENS
from symbiotic.redact import redacted_text
from symbiotic.schema import ConfigError, Objective

ERRORS = "errors"
"""Folder of the tracebacks, a file a benchmark."""
PACKAGE = Path(__file__).resolve().parents[1]


class Scores(dict[str, float]):
    """Score by name, and what must stand beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.values_of: dict[str, Value] = {}
        """Each score with its samples and, where it has one, its interval."""
        self.benchmark: dict[str, str] = {}
        """Which benchmark each score is of."""
        self.protocols: dict[str, Mapping[str, Any]] = {}
        """Benchmark -> what decided its values beside the model."""
        self.missing: dict[str, str] = {}
        """Benchmark -> the file that it lacks."""
        self.failed: dict[str, str] = {}
        """Benchmark -> why it could not be measured, though its files are there."""
        self.tracebacks: dict[str, str] = {}
        """Benchmark -> the whole error, of those in `failed` that nobody foresaw."""
        self.seconds: dict[str, float] = {}
        """Benchmark -> how long it took."""
        self.records: list[Record] = []
        """What was asked, answered and expected, sample by sample."""
        self.files: list[str] = []
        """Ledgers and folders of images that belong to it (see `Context`)."""
        self.problems: list[str] = []
        """What could not be used, one line each."""
        self.judges: dict[str, float] = {}
        """The embedded scorers' own accuracies on fresh renderings; empty where no image was judged."""

    @property
    def n(self) -> dict[str, int]:
        """Samples behind each score."""
        return {name: value.n for name, value in self.values_of.items()}

    @property
    def unmeasured(self) -> tuple[dict[str, str], ...]:
        """What is known of benchmarks without scores; all empty where each has its own."""
        return self.missing, self.failed, self.tracebacks

    def add(self, benchmark: str, name: str, value: Value) -> None:
        self[name], self.values_of[name], self.benchmark[name] = value.value, value, benchmark

    @contextmanager
    def noting(self, benchmark: str) -> Iterator[None]:
        """An error inside the block is that of one benchmark, which is then missing or failed; a key of the config that
        is wrong is everybody's."""
        try:
            yield
        except ConfigError:
            raise
        except MissingAsset as error:
            self.missing[benchmark] = str(error)
        except DataError as error:
            self.failed[benchmark] = str(error)
        except Exception as error:
            self.failed[benchmark] = f"{unforeseen(error)}; whole in {ERRORS}/{benchmark}.txt"
            self.tracebacks[benchmark] = traceback.format_exc()

    def write_tracebacks(self, folder: Path) -> None:
        for benchmark, text in self.tracebacks.items():
            path = folder / ERRORS / f"{benchmark}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(redacted_text(text), encoding="utf-8", errors="backslashreplace")


def unforeseen(error: Exception) -> str:
    """Type, message and place of an error, in one line; the place is the last one in this package."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(PACKAGE)] or frames
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message} ({Path(ours[-1].filename).name}:{ours[-1].lineno})"


class Suite:
    """Benchmarks in the order in which they run.

    Args:
        tokenizer, objective, size, batch_size, caption_tokens: see `Context`.
        judges: the embedded scorers' own accuracies, asked for when images were judged.
    """

    def __init__(
        self,
        benchmarks: Sequence[Benchmark],
        tokenizer: Tokenizer,
        objective: Objective,
        size: tuple[int, int] = (20, 20),
        batch_size: int = 96,
        judges: Callable[[], Mapping[str, float]] = dict,
        caption_tokens: int = MAX_TOKENS,
    ) -> None:
        self.benchmarks, self.tokenizer, self.objective = tuple(benchmarks), tokenizer, objective
        self.size, self.batch_size, self.judges = size, batch_size, judges
        self.caption_tokens = caption_tokens

    def measurable(self, model: nn.Module) -> list[Benchmark]:
        """Those that the model can take: one without latents draws no images."""
        return [b for b in self.benchmarks if not b.needs_latents or getattr(model, "latents", True)]

    def run(
        self,
        model: nn.Module,
        seed: int = 0,
        only: Collection[str] | None = None,
        *,
        share: float = 1.0,
        folder: Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Scores:
        """Measure the model; its train/eval modes and the global random state are as before afterwards. A benchmark
        that cannot be measured costs the others nothing: see `Scores.noting`.

        Args:
            seed: draws the noise that the images start from; the rest has no chance in it.
            only: names of benchmarks; by default all. Those about images are left out for a model without latents.
            share, folder: see `Context`; with a folder, what was measured before is not measured again.
            say: gets a line when a benchmark begins.
        """
        scores = Scores()
        with measuring(model):
            for benchmark in self.measurable(model):
                if only is not None and benchmark.name not in only:
                    continue
                say(benchmark.name)
                context = self.context(seed, share, folder)
                start = time.perf_counter()
                with scores.noting(benchmark.name):
                    benchmark.prepare(say)
                    self._measure(benchmark, model, context, scores)
                scores.problems += context.problems
                scores.seconds[benchmark.name] = time.perf_counter() - start
        scores.problems[:] = dict.fromkeys(scores.problems)
        scores.judges.update(self.judges() if "embedded_acc" in scores else {})
        return scores

    def context(self, seed: int, share: float, folder: Path | None) -> Context:
        context = Context(self.tokenizer, self.objective, self.size, seed, self.batch_size, share, folder)
        return replace(context, caption_tokens=self.caption_tokens)

    def _measure(self, benchmark: Benchmark, model: nn.Module, context: Context, scores: Scores) -> None:
        scores.protocols[benchmark.name] = benchmark.protocol()
        measured = list(benchmark.run(model, context))
        for name, value in measured:
            scores.add(benchmark.name, name, value)
        scores.records += context.records
        scores.files += dict.fromkeys(context.files)
