"""What must be the same in all runs of a report: code, data, versions, parents, sample counts, protocols."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from symbiotic.runs import VERSIONS, digest
from symbiotic.schema import Config, parse
from symbiotic.studies.runs_of import MISSING, SHOWN, AuditError, Run, differing, listed

IDENTITY = {
    "evaluation_code": "evaluation code",
    "versions": "versions in the evaluation",
    "sampler": "sampler",
    "size": "image size",
    "data": "corpus",
    "device": "kind of device",
    "caption_tokens": "longest caption",
}
"""Keys of results.json that decide its scores, and what they are called."""


def check_provenance(runs: Sequence[Run]) -> None:
    """Raises AuditError: results of different code, data, versions or parents, or scores over different samples."""
    refuse(runs, "code", lambda run: run.summary["provenance"]["code"])
    refuse(runs, "data", lambda run: run.summary["data"])
    for name in VERSIONS:
        refuse(runs, f"{name} version", lambda run, name=name: run.summary["provenance"][name])  # type: ignore[misc]
    for same in with_one_parent(runs):
        refuse(same, "parent, though seed and stage 0 are the same,", lambda run: run.summary.get("parent"))
    check_samples(runs, lambda run: run.summary["n"])


def with_one_parent(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that must have started from the same weights: of equal seed, data and settings of stage 0. (A parent is
    named by these and by the code that made it.)"""
    from symbiotic.arc import stage0_config, stage0_key

    groups: dict[str, list[Run]] = {}
    for run in runs:
        config = parse(Config, run.config)
        key = digest([stage0_key(stage0_config(config), run.summary["data"]), config.init.checkpoint])
        groups.setdefault(key, []).append(run)
    return list(groups.values())


def check_samples(runs: Sequence[Run], counts: Callable[[Run], Mapping[str, Any]]) -> None:
    for score in dict.fromkeys(name for run in runs for name in counts(run)):
        having = [run for run in runs if score in counts(run)]
        refuse(having, f"number of samples behind {score}", lambda run, score=score: counts(run)[score])  # type: ignore[misc]


def attach_results(runs: Sequence[Run], evaluated: Callable[[Path], Path | None]) -> None:
    """Raises RunError: an evaluation that never ended; AuditError: some runs were evaluated and others were not."""
    from symbiotic.studies.evaluate import read_results

    folders = {run.folder: evaluated(run.folder) for run in runs}
    without = [path.name for path, found in folders.items() if found is None]
    if without and len(without) < len(folders):
        line = f"not evaluated, while {len(folders) - len(without)} other runs are: {listed(without)}"
        here = all(path.is_dir() for path, found in folders.items() if found is None)
        right = "src/eval.py runs=FOLDER evaluates all of them" if here else "their folders are not here"
        raise AuditError(f"{line}; {right}")
    for run in runs:
        found = folders[run.folder]
        if found is not None:
            run.results, run.evaluation = read_results(found), found
    every = {name for run in runs for name in run.results.get("scores", {})}
    for run in runs:
        run.withheld = every - set(run.results.get("scores", {}))


def check_results(runs: Sequence[Run]) -> None:
    """Raises AuditError: evaluations by different code, versions or protocols, of other weights or sample counts."""
    runs = [run for run in runs if run.results]
    for key, what in IDENTITY.items():
        refuse(runs, what, lambda run, key=key: run.results.get(key))  # type: ignore[misc]
    if len({run.results["seed"] for run in runs}) > 1:  # not one seed for all: then each run's own
        refuse(runs, "seed of the images, next to its own,", lambda run: run.results["seed"] - run.seed)
    for benchmark in dict.fromkeys(name for run in runs for name in run.results["protocol"]):
        having = [run for run in runs if benchmark in run.results["protocol"]]
        refuse(having, f"protocol of {benchmark}", lambda run, b=benchmark: run.results["protocol"][b])  # type: ignore[misc]
    check_samples(runs, lambda run: {name: score["n"] for name, score in run.results["scores"].items()})


def refuse(runs: Sequence[Run], what: str, value: Callable[[Run], Any]) -> None:
    """Raises AuditError, naming the runs whose value is not that of most."""
    texts = {str(run.folder): json.dumps(value(run), sort_keys=True, default=str) for run in runs}
    counted = Counter(texts.values())
    if len(counted) < 2:
        return
    usual = counted.most_common(1)[0][0]
    odd = [path for path, found in texts.items() if found != usual]
    given = {path: apart(texts[path], usual) for path in odd[:SHOWN]}
    named = ", ".join(f"{path} ({mine})" for path, (mine, _) in given.items())
    more = f" and {len(odd) - SHOWN} more" if len(odd) > SHOWN else ""
    theirs = next(iter(given.values()))[1]
    others = f"the other {counted[usual]} runs" if counted[usual] > 1 else "the other run"
    raise AuditError(
        f"{named}{more}: other {what} than {others} ({theirs}); they do not mix: run them again, or move them"
    )


def apart(mine: str, usual: str) -> tuple[str, str]:
    """Two JSON values, of mappings only the entries that differ."""
    one, other = json.loads(mine), json.loads(usual)
    if isinstance(one, dict) and isinstance(other, dict):
        keys = differing(one, other)
        return tuple(", ".join(f"{k} {v.get(k, MISSING)}" for k in keys) for v in (one, other))  # type: ignore[return-value]
    return str(one), str(other)


def shared_facts(runs: Sequence[Run]) -> dict[str, str]:
    """What `check_provenance` found to be the same, and the commits."""
    made = runs[0].summary["provenance"]
    commits = sorted({run.summary["provenance"]["commit"] for run in runs})
    versions = {name: str(made[name]) for name in VERSIONS}
    return {"code": made["code"], "data": runs[0].summary["data"], **versions, "commits": ", ".join(commits)}
