"""What the scores of an evaluation are held against: the run's parent and its own start, measured in the same way.

The training measured both by the embedded benchmarks; where an evaluation does as it did, these stand. All else is
measured after the run itself, into `anchors.json` beside its results; runs of one parent share the parent's evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from symbiotic.runs import read_json, write_json
from symbiotic.schema import EvalConfig
from symbiotic.studies.evaluate import evaluate_run, read_results
from symbiotic.studies.runs_of import ANCHORS, anchored_by_training
from symbiotic.trained import read_config


def measure_anchors(config: EvalConfig, run: Path, evaluation: Path, say: Callable[[str], None] = print) -> Path | None:
    """Write `anchors.json` into a run's evaluation; None where the training measured all of them.

    Raises:
        RunError: the weights that joint training started from are gone.
    """
    results = read_results(evaluation)
    wanted = [name for name in results["protocol"] if not anchored_by_training(results, name)]
    path = evaluation / ANCHORS
    known = read_json(path) or {}
    if not wanted:
        return None
    if known.get("benchmarks") == wanted:
        return path
    of = replace(config, checkpoint=None, step=None, ema=False, only=tuple(wanted))
    parent = parent_folder(run)
    measured = {"iteration 0": evaluate_run(replace(of, step=0), run, say)}
    if parent is None:
        say(f"   stage 0 has no scores of {', '.join(wanted)}: the cached parent of {run} is gone")
    else:
        measured["stage 0"] = evaluate_run(of, parent, say)
    scores = {anchor: scores_of(folder, wanted) for anchor, folder in measured.items()}
    return write_json(path, {"benchmarks": wanted, **scores})


def scores_of(evaluation: Path, benchmarks: Sequence[str]) -> dict[str, Any]:
    scores = read_results(evaluation)["scores"]
    return {name: score for name, score in scores.items() if score["benchmark"] in benchmarks}


def parent_folder(run: Path) -> Path | None:
    """The cached parent that a run started from; None where it is not there, or was a checkpoint."""
    name = str((read_json(run / "summary.json") or {}).get("parent", ""))
    folder = Path(read_config(run).paths.cache) / "stage0" / name.removeprefix("stage 0 ")
    return folder if name.startswith("stage 0 ") and (folder / "config.yaml").is_file() else None
