"""Rules for what is evaluated: sizes of the benchmarks, and the keys of `src/eval.py`.

Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from symbiotic.checks.rules import at_least, known, positive, require, share
from symbiotic.schema import ConfigError, EvalConfig, Evaluation

EMBEDDED = ("knowledge", "reading", "flow_error", "image_ce", "generation")
"""Names of the embedded benchmarks, which run before the configured ones; of `ERRORS`, that of the run's objective."""

ERRORS = {"flow": "flow_error", "autoregressive": "image_ce"}
"""Objective -> the benchmark of its error on reference images."""

IN_LOOP = ("every", "quick")
"""Keys of `evaluation` that only training reads."""

_OF_RUNS = ("factors", "report", "evaluate")


def check_benchmarks(evaluation: Evaluation) -> None:
    """Raises ConfigError."""
    at_least(evaluation, "evaluation.", 0, "every")
    at_least(evaluation, "evaluation.", 1, "questions readings images batch_size caption_tokens")
    positive(evaluation, "evaluation.", "quick")
    share(evaluation, "evaluation.", "quick")


def check_evaluation(config: EvalConfig, explicit: Mapping[str, str]) -> None:
    """
    Args:
        explicit: full key -> how the user set it.

    Raises:
        ConfigError: the first rule that is broken, or a key that was set and would change nothing.
    """
    if (config.run is None) == (config.runs is None):
        raise ConfigError("run=FOLDER evaluates one run, runs=FOLDER all below it; give one of the two")
    check_benchmarks(config.evaluation)
    for name in IN_LOOP:
        _unused(f"evaluation.{name}", explicit, "only in-loop evaluations read it")
    study = {"study": f"study={config.study}"} if config.study != "none" else {}
    for name in ("study", *_OF_RUNS) if config.runs is None else ():
        _unused(name, {**explicit, **study}, "it is about the report, which runs=FOLDER writes")
    _weights(config)
    at_least(config, "", 1, "threads")
    require(config.threads <= 1024, "threads", config.threads, "must be at most 1024")
    require(config.seed is None or 0 <= config.seed < 2**32, "seed", config.seed, "must be in [0, 2**32), or null")
    device = re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", config.device)
    require(bool(device), "device", config.device, "must be cpu, cuda, mps or xpu, or one of several, as in cuda:1")
    there = (name for name, node in config.evaluation.benchmarks.items() if node is not None)
    known("only", config.only, (*EMBEDDED, *there), "benchmark")
    for name, low in (("steps", 1), ("guidance", 0), ("temperature", 0), ("top_k", 0)):
        value = getattr(config.sampler, name)
        require(value is None or low <= value < float("inf"), f"sampler.{name}", value, f"must be at least {low}")
    shift = config.sampler.time_shift
    require(shift is None or 0 < shift < float("inf"), "sampler.time_shift", shift, "must be positive")
    top_p = config.sampler.top_p
    require(top_p is None or 0 < top_p <= 1, "sampler.top_p", top_p, "must lie in (0, 1]")


def _unused(key: str, explicit: Mapping[str, str], why: str) -> None:
    if key in explicit:
        raise ConfigError(f"{explicit[key]}: has no effect here: {why}")


def _weights(config: EvalConfig) -> None:
    chosen = {"checkpoint": config.checkpoint, "step": config.step, "ema": config.ema or None}
    given = [f"{name}={value}" for name, value in chosen.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{' '.join(given)}: each says which weights; give one of them")
    require(config.step is None or config.step >= 0, "step", config.step, "must be at least 0")
    if config.runs is not None and given:
        right = "runs=FOLDER reports what each run ended with; run=FOLDER measures other weights of one run"
        raise ConfigError(f"{given[0]}: has no effect here: {right}")
