"""How far a step on this machine is from the forecast's operations: `python benchmarks/forecast.py [--steps 60]`.

The same operations that `symbiotic.studies.forecast` counts, of the tokens that a fit of the embedded model saw, at the
speed of a product of two matrices of 1024 x 1024 here: their share of the measured step is what the forecast calls
`mfu`. Fits and products take turns. It needs an idle machine and the embedded corpus.
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
from monitors import NEEDED, SETTLED, seconds

from symbiotic.arc import Arc
from symbiotic.config import compose
from symbiotic.schema import KINDS
from symbiotic.studies.forecast_costs import Setting, shapes_of, step_flops


def peak_flops(size: int = 1024, rounds: int = 10) -> float:
    """Operations a second of `torch.mm`, one thread: the median."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def counted(dataset: Any, steps: int, micro_batches: int) -> Setting:
    """Tokens a step and their kinds, of the steps that are timed; words to predict among them."""
    kinds, targets = torch.zeros(len(KINDS)), 0
    items = range(SETTLED * micro_batches, steps * micro_batches)
    for item in items:
        batch = dataset[item]
        kinds += torch.bincount(batch.kind[batch.kind >= 0].flatten(), minlength=len(KINDS))[: len(KINDS)]
        targets += int((batch.target >= 0).sum())
        row_tokens = batch.tokens.shape[1]
    total = float(kinds.sum())
    shares = dict(zip(KINDS, (kinds / total).tolist(), strict=True))
    return Setting(total / (steps - SETTLED), row_tokens, shares, targets / total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        arc = Arc(
            compose(["experiment=symbiotic", f"phases.steps={chosen.steps}", f"paths.runs={folder}", "threads=1"])
        )
        arc.prepare_data()
        if arc.scorers is not None:
            arc.scorers.wait()
        config, dataset = arc.config, arc.dataset(arc.config, True)
        setting = counted(dataset, chosen.steps, config.data.micro_batches)
        flops = step_flops(shapes_of(config.model, config.system), config.model, config.system, setting, False)
        shares, steps = [], []
        for _ in range(chosen.rounds):
            before = peak_flops()
            took = seconds(arc, dataset, NEEDED, Path(tempfile.mkdtemp(dir=folder))) / (chosen.steps - SETTLED)
            steps.append(took)
            shares.append(flops / took / statistics.mean([before, peak_flops()]))
    share, step = statistics.median(shares), statistics.median(steps)
    print(f"\n{setting.tokens:.0f} tokens a step, {flops / 1e9:.1f} billion operations, {1000 * step:.0f} ms")
    print(f"mfu: {share:.2f} of torch.mm ({min(shares):.2f} to {max(shares):.2f})")
    print(json.dumps({"mfu": shares, "step_s": steps, "flops": flops, "machine": platform.machine()}))


if __name__ == "__main__":
    main()
