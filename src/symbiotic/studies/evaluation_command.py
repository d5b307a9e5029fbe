"""The command line of `src/eval.py`: a typed config, the evaluation of one run or many, a table, the report.

Imports torch only when there is something to evaluate.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from symbiotic.checks.evaluation import EMBEDDED
from symbiotic.config import CONF, compose_evaluation
from symbiotic.evaluation.names import metric
from symbiotic.schema import EvalConfig, RunError
from symbiotic.studies.request import command, run_folder

USAGE = """\
python src/eval.py run=FOLDER [key=value ...]
python src/eval.py runs=FOLDER [study=NAME] [key=value ...]

The first measures one checkpoint of a run: a table here, results.json, records, images and their grid in
FOLDER/evaluation/. The second audits and measures every finished run below FOLDER, and writes the report. What has
been measured is not measured again, and what was interrupted goes on.

  run=FOLDER         the folder of a run (it holds config.yaml), or of a cached parent
  evaluation=…       what is measured: {options}
  evaluation.benchmarks.NAME.KEY=PATH
                     where an asset lies; without it, in the folder that SYMBIOTIC_ASSETS names. What is missing is
                     said in the table, and the rest is measured
  only=[a,b]         only these benchmarks: {embedded}, or configured ones
  checkpoint=FILE    of one run: these weights, .safetensors or .ckpt (default: those that the run ended with)
  step=N             of one run: the checkpoint of this optimiser step; 0: what joint training started from
  ema=true           of one run: the averaged weights that the run ended with
  seed=N             draws the noise that images start from (default: the run's own)
  sampler.steps=N  sampler.guidance=X  sampler.time_shift=X  sampler.temperature=X  sampler.top_k=N  sampler.top_p=X
                     image sampling (default: the run's own); part of the protocol
  data=FOLDER        where the corpora lie, if they were moved
  device=cpu         where the model runs;   threads=1   torch threads

  runs=FOLDER        every finished run below it
  study=NAME         what is compared, and the hypotheses: conf/study/NAME.yaml (default: arms are found from the runs)
  factors=[a,b]      config keys in which arms may differ (default: those of the study)
  report=FOLDER      where the report goes (default: report/ in the folder of runs)
  evaluate=false     report what has been evaluated

--cfg job prints the composed config, with the keys of all assets. Exit status: 0, also with assets missing; 1 where a
benchmark's files cannot be used, after all others ran; 2 for a wrong key or value.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    options = ", ".join(sorted(path.stem for path in (CONF / "evaluation").glob("*.yaml")))
    return command(USAGE.format(options=options, embedded=", ".join(EMBEDDED)), act, arguments)


def act(arguments: Sequence[str]) -> None:
    """
    Raises:
        ConfigError, RunError: what is wrong, in one line; also when a benchmark failed, after all others.
    """
    shown = [argument for argument in arguments if argument not in ("--cfg", "-c", "job")]
    config = compose_evaluation(shown)
    if len(shown) < len(arguments):
        print(yaml.safe_dump(asdict(config), sort_keys=False, width=120), end="")
        return
    runs = [run_folder(config.run)] if config.run is not None else audited_runs(config, Path(str(config.runs)))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched, by any library
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as in training (see launch.run_arc)
    failed = evaluate(config, runs) if config.evaluate else []
    if config.runs is not None:
        report(config, Path(config.runs), shlex.join(["python", "src/eval.py", *arguments]))
    if failed:
        raise RunError(f"{len(failed)} not measured: {'; '.join(failed)}")


def audited_runs(config: EvalConfig, root: Path) -> list[Path]:
    """The runs that enter the study; audited before time is spent on them.

    Raises:
        AuditError, RunError: they cannot be compared, or there is none.
    """
    from symbiotic.studies.audit import audit_runs
    from symbiotic.studies.study import read_study

    audit = audit_runs(root, read_study(config.study), config.factors)
    for problem in audit.problems:
        print(f"audit: {problem}", flush=True)
    runs = [run.folder for arm in audit.arms for run in arm.runs]
    if config.evaluate:
        check_there(runs)
    return runs


def check_there(runs: Sequence[Path]) -> None:
    """Raises RunError: runs that are rows of a study's results here, and folders elsewhere."""
    absent = [run.name for run in runs if not run.is_dir()]
    if absent:
        from symbiotic.studies.runs_of import listed

        raise RunError(
            f"{listed(absent)}: rows without folders, on which nothing can be measured; evaluate=false reports them"
        )


def evaluate(config: EvalConfig, runs: Sequence[Path]) -> list[str]:
    """Every run, and a table of each; returns the lines of what failed."""
    start = time.perf_counter()
    import torch

    from symbiotic.runs import read_json
    from symbiotic.studies import console
    from symbiotic.studies.anchors import measure_anchors
    from symbiotic.studies.benchmarks import benchmark_names
    from symbiotic.studies.evaluate import SECONDS, evaluate_run, read_results

    torch.set_num_threads(config.threads)
    asked = benchmark_names(config.evaluation, config.only)
    failed: list[str] = []
    said: set[str] = set()  # the same files are missing for every run
    print(f"imports: {time.perf_counter() - start:.1f} s", flush=True)
    for number, run in enumerate(runs, 1):
        print(f"{run}" + (f" ({number} of {len(runs)})" if len(runs) > 1 else ""), flush=True)
        folder = evaluate_run(config, run)
        results, seconds = read_results(folder), read_json(folder / SECONDS) or {}
        if config.runs is not None:
            measure_anchors(config, run, folder)
        absent = {key: {n: line for n, line in results[key].items() if n in asked} for key in ("missing", "failed")}
        console.show(table(results))
        lines = [line for line in notes({**results, **absent}, seconds, folder) if line not in said]
        print("\n".join(lines), flush=True)  # not wrapped: they hold paths
        said |= {line for line in lines if line.startswith("not measured")}
        failed += [f"{run.name}: {name}: {line}" for name, line in absent["failed"].items()]
    return failed


def report(config: EvalConfig, runs: Path, command: str) -> None:
    from symbiotic.studies.report import write_report

    folder = Path(config.report) if config.report is not None else runs / "report"
    written = write_report(runs, config.study, config.factors, folder, config, command)
    print("\n".join(map(str, written)))


# --------------------------------------------------------------------------- the table


def table(results: Mapping[str, Any]) -> Any:
    """Every score with its samples, chance and interval; below, what was not measured, and why."""
    from symbiotic.studies import console

    rows = [row(name, score) for name, score in results["scores"].items()]
    title = f"{results['run']}, {results['weights']}, seed {results['seed']}"
    return console.make_table(title, ["score", "n", "chance", "value", "95 % interval"], rows)


def row(name: str, score: Mapping[str, Any]) -> list[str]:
    """Of a share of right answers without an interval of its own, Wilson's."""
    from symbiotic.studies.console import NONE

    facts, value, n = metric(name), score["value"], score["n"]
    low, high = score["low"], score["high"]
    if low is None and facts.share and value is not None and n:
        low, high = wilson(value, n)
    digits = facts.digits
    interval = NONE if low is None or high is None else f"{low:.{digits}f} to {high:.{digits}f}"
    chance = NONE if facts.chance is None else f"{facts.chance:.{digits}f}"
    return [name, str(n), chance, NONE if value is None else f"{value:.{digits}f}", interval]


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a share of n (Wilson 1927)."""
    middle, spread = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def notes(results: Mapping[str, Any], seconds: Mapping[str, float], folder: Path) -> list[str]:
    """What was not measured, what could not be used, where the time went, where the files are."""
    lines = [f"not measured: {name}: {line}" for name, line in results["missing"].items()]
    lines += [f"FAILED: {name}: {line}" for name, line in results["failed"].items()]
    if results["left_out"]:
        lines.append("left out: " + "  ".join(f"{name} {count}" for name, count in results["left_out"].items()))
    lines += [f"left out: {line}" for line in results["problems"][:SHOWN]]
    if len(results["problems"]) > SHOWN:
        lines.append(f"left out: {len(results['problems']) - SHOWN} more; see results.json")
    lines.append("time: " + "  ".join(f"{name} {value:.1f} s" for name, value in seconds.items()))
    return [*lines, f"results: {folder / 'results.json'}"]


SHOWN = 10
"""Items left out that are named on the terminal."""
