"""What all monitors together cost: `python benchmarks/monitors.py [--steps 160] [--rounds 3]`.

Two fits of the embedded model take turns in one process: one with what training needs and its log (shield, rates,
StepLog), one with every default monitor on top (routing, drift, self-checks, heat map, alarm, conflicts and leak). The
seconds between step 10 and the last one are compared, pair by pair; evaluation and sampling are in neither.
Prints a table and one line of JSON. It needs the embedded corpus (any run of `experiment=symbiotic` writes it).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from lightning.pytorch import Callback

from symbiotic.arc import Arc, make_callbacks
from symbiotic.callbacks.csv_log import CSVLog
from symbiotic.config import compose
from symbiotic.fit import make_module, make_trainer

NEEDED = ("gradient_shielding", "step_log", "lr_phases", "balance_bias", "phase_transitions")
MONITORS = ("routing_monitor", "self_checks", "collapse_alarm", "gradient_conflict", "routing_heatmap")
SETTLED = 10


class Clock(Callback):
    """Seconds from the end of step `SETTLED` to the end of the last one."""

    start = end = 0.0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == SETTLED:
            self.start = time.perf_counter()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = time.perf_counter()


def seconds(arc: Arc, dataset: Any, names: tuple[str, ...], folder: Path) -> float:
    """One fit with these callbacks of the config."""
    config = arc.config
    arc.made = make_callbacks(config)  # fresh ones: they have a memory
    made = dict(zip(arc.made, arc.callbacks(), strict=True))
    clock = Clock()
    module = make_module(config, dataset, None, latents=True)
    trainer = make_trainer(config, folder, [*(made[n] for n in made if n in names), clock], [CSVLog(str(folder))])
    trainer.callbacks = [c for c in trainer.callbacks if type(c).__name__ != "StepCheckpoint"]
    trainer.fit(module)
    return clock.end - clock.start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = [f"phases.steps={chosen.steps}", f"paths.runs={folder}", f"threads={chosen.threads}"]
        arc = Arc(compose(["experiment=symbiotic", *steps, *chosen.overrides]))
        torch.set_num_threads(arc.config.threads)
        arc.prepare_data()
        dataset = arc.dataset(arc.config, True)
        bare, full = [], []
        for n in range(chosen.rounds):
            order = ((bare, NEEDED), (full, NEEDED + MONITORS))
            for times, names in order if n % 2 == 0 else reversed(order):
                times.append(seconds(arc, dataset, names, Path(tempfile.mkdtemp(dir=folder))))
        if arc.scorers is not None:
            arc.scorers.wait()
    report(bare, full, chosen.steps - SETTLED, chosen.threads)


def report(bare: list[float], full: list[float], steps: int, threads: int) -> None:
    ratios = [b / a for a, b in zip(bare, full, strict=True)]
    print(f"\nstep without monitors  {1000 * statistics.median(bare) / steps:7.1f} ms")
    print(f"step with all monitors {1000 * statistics.median(full) / steps:7.1f} ms")
    print(f"overhead, median of pairs {100 * (statistics.median(ratios) - 1):.1f} %  "
          f"({100 * (min(ratios) - 1):.1f} to {100 * (max(ratios) - 1):.1f})")  # fmt: skip
    values = {"bare_s": bare, "monitors_s": full, "steps": steps, "threads": threads, "machine": platform.machine()}
    print(json.dumps(values | {"torch": torch.__version__, "overhead": statistics.median(ratios) - 1}))


if __name__ == "__main__":
    main()
