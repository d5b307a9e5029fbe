"""What reliability costs: `python benchmarks/reliability.py [--rounds 7] [--megabytes 200] [--steps 60]`.

1. A checkpoint: ours (beside its target, on the disk, renamed, SHA-256, manifest) against `torch.save` and an fsync, in
   turn; the ratio of each pair, and how far each raises the peak memory of a process of its own.
2. The check for finite losses and gradients: fits of the embedded model with and without it, in turn.
3. The account of a stream: its samples read with every one counted and with none, in turn, as a share of that step.
It needs an idle machine, and for the second and third part the embedded corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from monitors import NEEDED, SETTLED, seconds

from symbiotic.arc import Arc
from symbiotic.callbacks.checkpoint import AtomicCheckpointIO, checkpoint_path
from symbiotic.config import compose
from symbiotic.data.checks import Checks
from symbiotic.data.cursor import Cursor
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.files import sync

READ = 2000
"""Samples of a stream that are read."""


def plain(state: dict[str, Any], folder: Path) -> None:
    torch.save(state, folder / "plain.ckpt")
    sync(folder / "plain.ckpt")


def ours(state: dict[str, Any], folder: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(state, checkpoint_path(folder, 1))


def timed(act: Callable[..., None], *arguments: Any) -> float:
    start = time.perf_counter()
    act(*arguments)
    return time.perf_counter() - start


def peak(act: Callable[..., None], *arguments: Any) -> float:
    """MB by which it raises the peak memory of a forked process."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        act(*arguments)
        os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        os._exit(0)
    os.waitpid(process, 0)
    return int(os.read(reading, 64)) / 1024


def checkpoints(megabytes: int, rounds: int, folder: Path) -> dict[str, Any]:
    state = {"state_dict": {str(n): torch.randn(2**18) for n in range(megabytes)}, "global_step": 1}
    pairs = []
    for n in range(rounds):
        order = (plain, ours) if n % 2 == 0 else (ours, plain)
        times = {act: timed(act, state, folder) for act in order}
        pairs.append((times[plain], times[ours]))
    ratios = [b / a for a, b in pairs]
    return {"ratio": statistics.median(ratios), "from": min(ratios), "to": max(ratios), "megabytes": megabytes,
            "plain_s": statistics.median(a for a, _ in pairs), "ours_s": statistics.median(b for _, b in pairs),
            "plain_peak_mb": peak(plain, state, folder), "ours_peak_mb": peak(ours, state, folder)}  # fmt: skip


def embedded(steps: int, folder: Path) -> Arc:
    """A run of the embedded model that is about to begin."""
    arc = Arc(
        compose(["experiment=symbiotic", "phases=none", f"phases.steps={steps}", f"paths.runs={folder}", "threads=1"])
    )
    torch.set_num_threads(1)
    arc.prepare_data()
    if arc.scorers is not None:
        arc.scorers.wait()
    return arc


def finite(arc: Arc, steps: int, rounds: int, folder: Path) -> dict[str, Any]:
    dataset, shares, bare = arc.dataset(arc.config, True), [], []
    for n in range(rounds):
        order = (NEEDED, (*NEEDED, "finite_check"))
        times = {names: seconds(arc, dataset, names, Path(tempfile.mkdtemp(dir=folder)))
                 for names in (order if n % 2 == 0 else reversed(order))}  # fmt: skip
        shares.append(times[order[1]] / times[order[0]] - 1)
        bare.append(times[order[0]])
    step = statistics.median(bare) / (steps - SETTLED)
    return {"share": statistics.median(shares), "from": min(shares), "to": max(shares), "step_s": step}


class Uncounted(Cursor):
    def _count(self, *_: Any, **__: Any) -> None:
        pass

    def _check(self, *_: Any, **__: Any) -> None:
        pass


def accounting(arc: Arc, rounds: int, step: float) -> dict[str, Any]:
    """step: seconds of one."""
    shards = sorted(str(path) for path in (arc.data / "shards").glob("*.tar"))
    checks = Checks(Tokenizer.load(arc.data / "tokenizer.json"), keep=True)
    pairs = []
    for n in range(rounds):
        order = (Uncounted, Cursor) if n % 2 == 0 else (Cursor, Uncounted)
        times = {kind: timed(read, kind("embedded", shards, checks, 0)) for kind in order}
        pairs.append((times[Uncounted], times[Cursor]))
    samples = arc.config.data.samples * arc.config.data.micro_batches
    cost = statistics.median(b - a for a, b in pairs) / READ
    shares = [(b - a) / READ * samples / step for a, b in pairs]
    return {"share": statistics.median(shares), "from": min(shares), "to": max(shares), "samples": samples,
            "us_per_sample": 1e6 * cost, "of_reading": statistics.median(b / a for a, b in pairs) - 1}  # fmt: skip


def read(cursor: Cursor) -> None:
    for _ in range(READ):
        cursor.take()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    chosen = parser.parse_args()
    torch.set_num_threads(1)  # a process that is forked from one with OpenMP's threads waits for them for ever
    with tempfile.TemporaryDirectory(dir=".") as name:
        save = checkpoints(chosen.megabytes, chosen.rounds, Path(name))
        arc = embedded(chosen.steps, Path(name))
        check = finite(arc, chosen.steps, min(chosen.rounds, 5), Path(name))
        account = accounting(arc, chosen.rounds, check["step_s"])
    spread = f"({save['from']:.2f} to {save['to']:.2f})"
    print(f"\ncheckpoint of {save['megabytes']} MB: {save['ours_s']:.2f} s, {save['ratio']:.2f} of torch.save {spread}")
    print(f"peak memory: {save['ours_peak_mb']:+.0f} MB, torch.save {save['plain_peak_mb']:+.0f} MB")
    spread = f"({100 * check['from']:.1f} to {100 * check['to']:.1f})"
    print(f"finite check: {100 * check['share']:.1f} % of the step {spread}")
    spread = f"({100 * account['from']:.2f} to {100 * account['to']:.2f})"
    print(f"accounting: {account['us_per_sample']:.1f} us a sample, {100 * account['share']:.2f} % of a step {spread}")
    facts = {
        "checkpoint": save,
        "finite_check": check,
        "accounting": account,
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
