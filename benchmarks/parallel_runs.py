"""How a study scales with processes: `python benchmarks/parallel_runs.py [--study smoke] [--rounds 3]`.

The arms of one seed of a study are run by 1, 2 and, where there are so many cores, 4 processes of one thread each, in
turn, every time in a new folder of runs; corpus, judges and parents are made once before. Wall seconds of the whole
command, with start-up, pre-run audit, evaluation and report. Prints a table, ratios of each round to its first
measurement, and one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def seconds(study: str, processes: int, folder: Path, cache: Path, more: list[str]) -> float:
    """One study from nothing but what is cached."""
    launcher = [f"hydra.launcher.n_jobs={processes}", "hydra/launcher=joblib", "threads=1"]
    command = [sys.executable, str(ROOT / "src/train.py"), f"study={study}", "seed=0", *launcher, *more]
    paths = {"SYMBIOTIC_RUNS": str(folder), "SYMBIOTIC_DATA": str(cache / "data"), "SYMBIOTIC_CACHE": str(cache)}
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **paths}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - start


def main() -> None:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", default="smoke")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[n for n in (1, 2, 4) if n <= max(2, cores)])
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    times: dict[int, list[float]] = {n: [] for n in chosen.processes}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        seconds(chosen.study, max(chosen.processes), Path(folder) / "first", cache, chosen.overrides)
        for number in range(chosen.rounds):
            order = chosen.processes if number % 2 == 0 else chosen.processes[::-1]
            for n in order:
                runs = Path(folder) / f"{number}-{n}"
                times[n].append(seconds(chosen.study, n, runs, cache, chosen.overrides))
    report(times, chosen.study, cores)


def report(times: dict[int, list[float]], study: str, cores: int) -> None:
    first = min(times)
    print(f"\nstudy {study}, seed 0, {cores} cores\nprocesses  seconds (median)  speed against {first} (pairs)")
    ratios = {n: [a / b for a, b in zip(times[first], found, strict=True)] for n, found in times.items()}
    for n, found in times.items():
        spread = f"{min(ratios[n]):.2f} to {max(ratios[n]):.2f}"
        print(f"{n:9d}  {statistics.median(found):16.1f}  {statistics.median(ratios[n]):.2f} ({spread})")
    print(json.dumps({"study": study, "seconds": times, "cores": cores, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
