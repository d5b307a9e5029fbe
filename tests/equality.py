"""Is sharded equal to unsharded? `python tests/equality.py` trains the same run in every mode and prints a table.

    python tests/equality.py                              # symbiotic, 6 steps, a few minutes on two cores
    python tests/equality.py steps=4 system=tripartite    # any override of src/train.py

Each mode is a real start of `src/train.py`, with its own stage 0: gradient clipping, the shield at two levels, the
balance loss of every micro-batch, and at least two micro-batches a rank and step are in it. CPU, gloo, loopback.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from symbiotic.callbacks.csv_log import read_rows
from symbiotic.config import compose

ROOT = Path(__file__).resolve().parents[1]
MODES: dict[str, tuple[int, tuple[str, ...]]] = {
    "one process": (0, ()),
    "DDP, 2": (2, ("trainer=ddp",)),
    "FSDP2, 1": (0, ("trainer=fsdp",)),
    "FSDP2, 2": (2, ("trainer=fsdp",)),
    "EP 2, 2": (2, ("trainer=fsdp", "trainer.expert_parallel=2")),
    "FSDP2, 4": (4, ("trainer=fsdp",)),
    "FSDP2 x EP 2, 4": (4, ("trainer=fsdp", "trainer.expert_parallel=2")),
}
"""Name -> processes that torchrun starts (0: none does), overrides."""
BASE = ("experiment=smoke", "log_every=1", "logger.tensorboard=null", "data.micro_batches=8", "data.samples=8")


def command(processes: int, overrides: Sequence[str]) -> list[str]:
    """`src/train.py` started by torchrun, on the loopback device; processes=0: by itself."""
    starter = [sys.executable]
    if processes:
        many = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
        starter += ["-m", "torch.distributed.run", *many]
    return [*starter, str(ROOT / "src" / "train.py"), *overrides]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment() -> dict[str, str]:
    return os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}


def folders(shared: Path, runs: Path, cache: Path) -> list[str]:
    return [f"paths.runs={runs}", f"paths.data={shared / 'data'}", f"paths.cache={cache}"]


def trained(processes: int, overrides: Sequence[str]) -> Path:
    """The folder of a run that went to its end."""
    done = subprocess.run(
        command(processes, overrides), capture_output=True, text=True, check=False, env=environment(), timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder_of(overrides)


def folder_of(overrides: Sequence[str]) -> Path:
    """The run folder, which is the same wherever the run runs."""
    where = ("trainer=", "trainer.expert_parallel=")
    return Path(compose([word for word in overrides if not word.startswith(where)]).run_dir)


def logged(run: Path, start: str) -> torch.Tensor:
    """[steps, columns] float64 of joint training, the columns whose names begin so."""
    rows = [row for row in read_rows(run / "metrics.csv") if row.get("train/loss")]
    names = sorted(name for name in rows[0] if name.startswith(start) and rows[0][name])
    return torch.tensor([[float(row[name]) for name in names] for row in rows], dtype=torch.float64)


def difference(one: Path, other: Path) -> dict[str, float]:
    """The largest relative difference of the losses and gradient norms of all steps, and the largest of a weight."""
    found = {}
    for what in ("train/", "grad_norm/"):
        a, b = logged(one, what), logged(other, what)
        assert a.shape == b.shape, f"{what}: {tuple(a.shape)} and {tuple(b.shape)}"
        found[what] = float(((a - b).abs() / a.abs().clamp(min=1e-12)).max())
    a, b = (load_file(run / "model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    return found | {"weights": max(float((a[name] - b[name]).abs().max()) for name in a)}


def main(more: Sequence[str]) -> None:
    steps = next((word.partition("=")[2] for word in more if word.startswith("steps=")), "6")
    more = [*BASE, f"phases.steps={steps}", "phases.shield_steps=2", *(w for w in more if not w.startswith("steps="))]
    folder = Path(tempfile.mkdtemp(prefix="equality-"))
    try:
        print(f"{' '.join(more)}\ntorch {torch.__version__}; largest relative difference from one process\n")
        print("| mode, ranks | losses | gradient norms | weights (absolute) |\n|---|---:|---:|---:|")
        runs = {}
        for mode, (processes, overrides) in MODES.items():
            place = folder / str(len(runs))
            runs[mode] = trained(processes, [*more, *overrides, *folders(folder, place, place / "cache")])
            found = difference(runs["one process"], runs[mode])
            print(f"| {mode} | " + " | ".join(f"{value:.1e}" for value in found.values()) + " |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
