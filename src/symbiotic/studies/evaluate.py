"""One evaluation of a run: `<run>/evaluation/<weights>-<hash>/`, found again by everything that decides its scores.

    results.json        scores, protocols, what is missing; written last, always the same bytes
    parts/NAME.json     what one finished benchmark gave; results.json is put together from them
    NAME.jsonl          records, one a line
    errors/NAME.txt     the traceback of a benchmark that failed as nobody foresaw
    images/SET/*.png    generated images; grid.png shows the first of each set
    seconds.json        how long each benchmark took, where it was measured

An evaluation that was killed goes on: finished benchmarks are not run again, of the others only what has no record yet.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from symbiotic.config import VOLATILE
from symbiotic.evaluation.benchmark import device_of
from symbiotic.evaluation.grid import draw_grid, save_png
from symbiotic.evaluation.images import image_facts, load_image
from symbiotic.evaluation.suite import ERRORS, Scores, Suite
from symbiotic.runs import (
    VERSIONS,
    commit,
    digest,
    locked,
    provenance,
    read_json,
    source_hash,
    state_hash,
    write_json,
)
from symbiotic.schema import EvalConfig, Evaluation, RunError
from symbiotic.studies.benchmarks import benchmark_names, make_suite, read_protocols
from symbiotic.trained import EMA, PARENT_FILE, Trained, open_run

RESULTS, SECONDS, PARTS, LOCK = "results.json", "seconds.json", "parts", ".lock"

CODE = ("models", "objectives", "generation", "data", "evaluation")
"""Sources that decide what a score is: scores of other code are measured again."""

PACKAGES = ("torch", "numpy", "pillow")
"""What all benchmarks rest on; the libraries of one are part of its protocol."""
SIZES = ("questions", "readings", "images", "scorers")
"""Keys of `evaluation` that decide the embedded scores."""

GRID = 8
"""Images of each set in the grid."""

Say = Callable[[str], None]


def evaluate_run(config: EvalConfig, run: Path, say: Say = print) -> Path:
    """Measure what has not been measured yet; returns the folder of the evaluation.

    Args:
        config: its `run` and `runs` are not read. say: gets a line when a benchmark begins.

    Raises:
        ConfigError, RunError: what is missing or wrong, in one line. (A benchmark without its files, or with files that
            cannot be used, is a line in the results.)
    """
    start = time.perf_counter()
    session = open_session(config, run, say)
    session.seconds["start-up"] = time.perf_counter() - start
    with locked(session.folder / LOCK):
        sweep(session.folder)
        asked = benchmark_names(config.evaluation, config.only)
        for name in session.protocols:
            if name in asked and read_json(session.part(name)) is None:
                session.adopt(name)
                session.measure(name, say)
        session.write()
    return session.folder


def evaluation_folder(config: EvalConfig, run: Path) -> Path:
    """Where `evaluate_run` puts the results for this config, whether they are there or not; raises as it does."""
    return open_session(config, run).folder


def read_results(folder: Path) -> dict[str, Any]:
    """`results.json` of an evaluation.

    Raises:
        RunError: there is none; the evaluation never ended.
    """
    found = read_json(folder / RESULTS)
    if not isinstance(found, dict):
        raise RunError(f"{folder / RESULTS}: no such results; src/eval.py writes them when an evaluation has ended")
    return found


def sweep(folder: Path) -> None:
    """Remove what writes left behind that were killed: all hidden files but the lock, which the caller holds."""
    for path in folder.rglob(".*"):
        if path.is_file() and path.name != LOCK:
            path.unlink()


# --------------------------------------------------------------------------- what is measured, on what


@dataclass
class Session:
    """An opened run and its benchmarks.

    found: their protocols, and which cannot be measured, as far as it is known. as_trained: whether the embedded scores
    compare with those of the training.
    """

    trained: Trained
    suite: Suite
    seed: int
    weights_hash: str
    found: Scores
    as_trained: bool
    seconds: dict[str, float] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)
    """Of benchmarks that were tried and have no part."""

    @property
    def protocols(self) -> dict[str, Mapping[str, Any]]:
        return self.found.protocols

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the scores."""
        images = self.suite.tokenizer.images
        return {
            **({"image_tokenizer": images.fingerprint} if images is not None else {}),
            "weights_hash": self.weights_hash,
            "seed": self.seed,
            "sampler": asdict(self.suite.objective.sampler),
            "size": list(self.suite.size),
            "caption_tokens": self.suite.caption_tokens,
            "device": device_of(self.trained.model).type,
            "data": self.trained.corpus.name,
            "protocol": self.protocols,
            "evaluation_code": source_hash(*CODE),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        }

    @functools.cached_property
    def folder(self) -> Path:
        return self.trained.folder / "evaluation" / f"{weights_name(self.trained)}-{digest(self.identity)[:8]}"

    def part(self, name: str) -> Path:
        return self.folder / PARTS / f"{name}.json"

    def adopt(self, name: str) -> None:
        """Take over the records and images of an earlier evaluation that differs in other benchmarks only, for one
        because their assets were not there: they need not be made again."""
        mine = {key: value for key, value in self.identity.items() if key != "protocol"}
        for other in sorted(self.folder.parent.glob(f"*/{RESULTS}")):
            found, part = read_json(other) or {}, read_json(other.parent / PARTS / f"{name}.json")
            same = all(found.get(key) == value for key, value in mine.items())
            if part and same and found["protocol"].get(name) == json.loads(json.dumps(self.protocols[name])):
                for file in part["files"]:
                    copy_missing(other.parent / file, self.folder / file)
                return

    def measure(self, name: str, say: Say) -> None:
        """Run one benchmark; what it gave becomes its part. One that fails has a line in `failed`."""
        scores = self.suite.run(
            self.trained.model, self.seed, only=[name], folder=self.folder, say=lambda n: say(f"   {n} …")
        )
        self.seconds |= scores.seconds
        for mine, new in zip(self.found.unmeasured, scores.unmeasured, strict=True):
            mine.update(new)
        if any(scores.unmeasured):
            self.problems[name] = scores.problems
        else:
            write_json(self.part(name), part(scores))

    def write(self) -> None:
        """`results.json` from the parts, last; nothing is written that is there already."""
        read = {name: read_json(self.part(name)) for name in self.protocols}
        parts = {name: found for name, found in read.items() if found is not None}
        grid = self.folder / "grid.png"
        if not grid.is_file():
            draw_images(self.folder / "images", grid)
        for name in parts:
            (self.folder / ERRORS / f"{name}.txt").unlink(missing_ok=True)
        self.found.write_tracebacks(self.folder)
        if set(self.seconds) - {"start-up"}:
            write_json(self.folder / SECONDS, (read_json(self.folder / SECONDS) or {}) | rounded(self.seconds))
        known = read_json(self.folder / RESULTS) or {}
        results = json.loads(json.dumps(self.results(parts)))
        if known:  # the commit at which it was measured
            results["provenance"]["evaluation"] = known["provenance"]["evaluation"]
        if known != results:
            write_json(self.folder / RESULTS, results)

    def results(self, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        trained = self.trained
        summary = read_json(trained.folder / "summary.json") or {}
        problems = {name: found["problems"] for name, found in parts.items()} | self.problems
        facts = {key: value for key, value in self.identity.items() if key != "protocol"}
        return {
            "run": trained.folder.name,
            "weights": weights_name(trained),
            "step": trained.step,
            "ema": trained.weights.name == EMA,
            "as_trained": self.as_trained,
            **facts,
            "protocol": {name: self.protocols[name] for name in parts},
            "scores": {name: score for found in parts.values() for name, score in found["scores"].items()},
            "judges": next((found["judges"] for found in parts.values() if found["judges"]), {}),
            "missing": {name: line for name, line in self.found.missing.items() if name not in parts},
            "failed": {name: line for name, line in self.found.failed.items() if name not in parts},
            "problems": list(dict.fromkeys(line for lines in problems.values() for line in lines)),
            "left_out": {name: len(lines) for name, lines in problems.items() if lines},
            "provenance": {
                "config": config_hash(trained),
                "parent": summary.get("parent"),
                "training": summary.get("provenance"),
                "evaluation": provenance(),
            },
        }


def open_session(config: EvalConfig, run: Path, say: Say = print) -> Session:
    """Raises as `evaluate_run`."""
    trained = open_run(
        run, checkpoint=config.checkpoint, step=config.step, ema=config.ema, data=config.data, device=config.device
    )
    suite = make_suite(config, trained)
    asked = benchmark_names(config.evaluation, config.only)
    found = read_protocols(suite, trained.model, asked, say)
    seed = trained.config.seed if config.seed is None else config.seed
    alike = as_trained(config.evaluation, suite, seed, trained)
    return Session(trained, suite, seed, state_hash(trained.model.state_dict()), found, alike)


def as_trained(evaluation: Evaluation, suite: Suite, seed: int, trained: Trained) -> bool:
    """Whether the embedded benchmarks are measured as the run's own training measured them: sizes, judges, seed,
    sampler, code and versions."""
    began, now = (read_json(trained.folder / "summary.json") or {}).get("provenance") or {}, provenance()
    return (
        all(getattr(evaluation, name) == getattr(trained.config.evaluation, name) for name in SIZES)
        and suite.objective.sampler == trained.config.objective.sampler
        and seed == trained.config.seed
        and all(began.get(name) == now[name] for name in ("code", *VERSIONS))
    )


# --------------------------------------------------------------------------- plain values


def weights_name(trained: Trained) -> str:
    """`step=000450`, `ema`, `parent`, or the stem of another file."""
    if trained.weights.name == EMA:
        return "ema"
    if trained.weights.name == PARENT_FILE or trained.step is None:
        return re.sub(r"[^\w.=-]+", "_", trained.weights.stem)
    return f"step={trained.step:06d}"


def part(scores: Scores) -> dict[str, Any]:
    """What one benchmark gave; a number that is none is null."""
    values = {name: value._asdict() | {"benchmark": scores.benchmark[name]} for name, value in scores.values_of.items()}
    plain = {name: {k: None if v != v else v for k, v in score.items()} for name, score in values.items()}
    return {"scores": plain, "judges": scores.judges, "problems": scores.problems, "files": scores.files}


def config_hash(trained: Trained) -> str:
    """Of what decides the training: no paths, no intervals of logs."""
    kept = {key: value for key, value in asdict(trained.config).items() if key not in VOLATILE}
    source = {key: value for key, value in trained.config.data.source.items() if key != "folder"}
    return digest(kept | {"data": {**kept["data"], "source": source}})


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in seconds.items() if math.isfinite(value)}


def copy_missing(source: Path, target: Path) -> None:
    """A file, or the files of a folder; what the target has stays."""
    files = source.iterdir() if source.is_dir() else [source]
    for file in files:
        to = target / file.name if source.is_dir() else target
        if file.is_file() and not to.exists():
            commit(to, functools.partial(shutil.copyfile, file))


def draw_images(folder: Path, path: Path) -> None:
    """The first images of every set, above their captions; nothing where there are none."""
    sets = sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []
    shown = [image for one in sets for image in sorted(one.glob("*.png"))[:GRID]]
    if shown:
        captions = [image_facts(image).get("prompt", "") for image in shown]
        save_png(draw_grid([load_image(image) for image in shown], captions), path)
