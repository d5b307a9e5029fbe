"""What the scores of an evaluation are held against: the run's parent and its own start, measured in the same way.

The training measured both by the embedded benchmarks; where an evaluation does as it did, these stand. All else is
measured after the run itself, into `anchors.json` beside its results; runs of one parent share the parent's evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from symbiotic.runs import read_json, write_json
from symbiotic.schema import EvalConfig, RunError
from symbiotic.studies.evaluate import evaluate_run, read_results
from symbiotic.studies.runs_of import ANCHORS, anchored_by_training
from symbiotic.trained import read_config


def measure_anchors(config: EvalConfig, run: Path, evaluation: Path, say: Callable[[str], None] = print) -> Path | None:
    """Write `anchors.json` into a run's evaluation; None where the training measured all of them.

    What could not be measured is said, kept as `unmeasured`, and tried again the next time.
    """
    results = read_results(evaluation)
    wanted = [name for name in results["protocol"] if not anchored_by_training(results, name)]
    path = evaluation / ANCHORS
    known = read_json(path) or {}
    if not wanted:
        return None
    if known.get("benchmarks") == wanted and not known.get("unmeasured"):
        return path
    of = replace(config, checkpoint=None, step=None, ema=False, only=tuple(wanted))
    scores, unmeasured = dict[str, Any](), list[str]()
    for anchor, act in {"iteration 0": partial(start_of, of, run), "stage 0": partial(parent_of, of, run)}.items():
        try:
            folder = act(say)
        except RunError as error:
            unmeasured.append(f"{anchor}: {error}")
            continue
        scores[anchor] = scores_of(folder, wanted)
        unmeasured += [f"{anchor}: {line}" for line in lacking(folder, wanted)]
    for line in unmeasured:
        say(f"   anchor not measured: {line}")
    return write_json(path, {"benchmarks": wanted, "unmeasured": unmeasured, **scores})


def start_of(config: EvalConfig, run: Path, say: Callable[[str], None]) -> Path:
    """The evaluation of what joint training started from. Raises RunError: it is gone."""
    return evaluate_run(replace(config, step=0), run, say)


def parent_of(config: EvalConfig, run: Path, say: Callable[[str], None]) -> Path:
    """The evaluation of the run's parent. Raises RunError: it is gone."""
    parent = parent_folder(run)
    if parent is None:
        raise RunError(f"the cached parent of {run} is gone")
    return evaluate_run(config, parent, say)


def lacking(evaluation: Path, benchmarks: Sequence[str]) -> list[str]:
    """A line for each of these benchmarks that was tried and has no scores."""
    results = read_results(evaluation)
    lines = results["missing"] | results["failed"]
    return [f"{name}: {lines[name]}" for name in benchmarks if name in lines]


def scores_of(evaluation: Path, benchmarks: Sequence[str]) -> dict[str, Any]:
    scores = read_results(evaluation)["scores"]
    return {name: score for name, score in scores.items() if score["benchmark"] in benchmarks}


def parent_folder(run: Path) -> Path | None:
    """The cached parent that a run started from; None where it is not there, or was a checkpoint."""
    name = str((read_json(run / "summary.json") or {}).get("parent", ""))
    folder = Path(read_config(run).paths.cache) / "stage0" / name.removeprefix("stage 0 ")
    return folder if name.startswith("stage 0 ") and (folder / "config.yaml").is_file() else None
