"""What the official scores of a run are held against: its parent and its own start, measured by the same benchmarks.

The embedded scores have these anchors since training. Here they are measured after the run itself, into `anchors.json`
beside its results; runs of one parent share the parent's evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from symbiotic.checks.evaluation import EMBEDDED
from symbiotic.runs import read_json, write_json
from symbiotic.schema import EvalConfig
from symbiotic.studies.evaluate import evaluate_run, read_results
from symbiotic.studies.runs_of import ANCHORS
from symbiotic.trained import read_config


def measure_anchors(config: EvalConfig, run: Path, evaluation: Path, say: Callable[[str], None] = print) -> Path | None:
    """Write `anchors.json` into a run's evaluation; None where no official benchmark was measured.

    Raises:
        RunError: the weights that joint training started from are gone.
    """
    wanted = [name for name in read_results(evaluation)["protocol"] if name not in EMBEDDED]
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
        say(f"   stage 0 has no official scores: the cached parent of {run} is gone")
    else:
        measured["stage 0"] = evaluate_run(of, parent, say)
    scores = {anchor: official(read_results(folder)) for anchor, folder in measured.items()}
    return write_json(path, {"benchmarks": wanted, **scores})


def official(results: Mapping[str, Any]) -> dict[str, Any]:
    return {name: score for name, score in results["scores"].items() if score["benchmark"] not in EMBEDDED}


def parent_folder(run: Path) -> Path | None:
    """The cached parent that a run started from; None where it is not there, or was a checkpoint."""
    name = str((read_json(run / "summary.json") or {}).get("parent", ""))
    folder = Path(read_config(run).paths.cache) / "stage0" / name.removeprefix("stage 0 ")
    return folder if name.startswith("stage 0 ") and (folder / "config.yaml").is_file() else None
