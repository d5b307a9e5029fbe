"""Which benchmarks a run is measured on: the embedded ones of its corpus, and those of the config behind them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from symbiotic.checks.evaluation import EMBEDDED, ERRORS
from symbiotic.config import instantiate
from symbiotic.evaluation.benchmark import Benchmark, MissingAsset, Value
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.embedded import corpus_suite
from symbiotic.evaluation.suite import Scores, Suite
from symbiotic.schema import ConfigError, EvalConfig, Evaluation
from symbiotic.trained import TOKENIZER, Trained, resampled


def make_suite(config: EvalConfig, trained: Trained) -> Suite:
    """The embedded benchmarks, and the configured ones behind them; with the run's objective and words.

    Raises:
        ConfigError: a key of the sampler that the run's objective does not have.
    """
    objective = resampled(trained.config.objective, asdict(config.sampler), "sampler.")
    evaluation, more = config.evaluation, list(make_benchmarks(config.evaluation).values())
    if (trained.corpus / TOKENIZER).is_file():
        images = trained.tokenizer.images
        suite = corpus_suite(trained.corpus, evaluation, objective, more, images, trained.size)
        suite.tokenizer.autoencoder, suite.tokenizer.vision = trained.tokenizer.autoencoder, trained.tokenizer.vision
    else:
        others = {error for name, error in ERRORS.items() if name != objective.name}
        absent = [Absent(name, trained.corpus) for name in EMBEDDED if name not in others]
        suite = Suite([*absent, *more], trained.tokenizer, objective, batch_size=evaluation.batch_size)
        suite.caption_tokens = evaluation.caption_tokens
    suite.size = trained.size
    return suite


class Absent(Benchmark):
    """An embedded benchmark whose corpus is gone."""

    def __init__(self, name: str, corpus: Path) -> None:
        self.name, self.corpus = name, corpus  # type: ignore[misc]

    def protocol(self) -> Mapping[str, Any]:
        where = "data=FOLDER says where the corpora lie; the run's own command writes it again"
        raise MissingAsset(f"{self.corpus}: no such corpus; {where}")

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        yield from ()


def make_benchmarks(evaluation: Evaluation) -> dict[str, Benchmark]:
    """The config's benchmarks by key, in the order in which they run.

    Raises:
        ConfigError: a node that cannot be built, or two of the same benchmark, whose records would mix.
    """
    made: dict[str, Benchmark] = {}
    for key, node in evaluation.benchmarks.items():
        if node is None:
            continue
        benchmark = instantiate(node, f"evaluation.benchmarks.{key}")
        twin = next((k for k, b in made.items() if b.name == benchmark.name), None)
        if twin is not None or benchmark.name in EMBEDDED:
            other = f"evaluation.benchmarks.{twin}" if twin else "the embedded one"
            raise ConfigError(f"evaluation.benchmarks.{key}: measures {benchmark.name} as {other} does; leave one out")
        made[key] = benchmark
    return made


def benchmark_names(evaluation: Evaluation, only: Sequence[str]) -> set[str]:
    """Names of the benchmarks at these keys of the config, of the embedded ones, or of these names; of all where
    nothing is given."""
    keys = {name: name for name in EMBEDDED} | {key: b.name for key, b in make_benchmarks(evaluation).items()}
    names = {name: name for name in keys.values()} | keys  # `hps_v2` is the key of `hps_v2.1`
    return {names[word] for word in only if word in names} if only else set(keys.values())


def read_protocols(
    suite: Suite, model: nn.Module, asked: Collection[str] = (), say: Callable[[str], None] = print
) -> Scores:
    """The protocols of all benchmarks, and which have none; nothing is measured. asked: those that are to be."""
    found = Scores()
    for benchmark in suite.measurable(model):
        with found.noting(benchmark.name):
            if benchmark.name in asked:
                benchmark.prepare(say)
            found.protocols[benchmark.name] = benchmark.protocol()
    return found
