"""Were several processes started for this run, by torchrun or srun, and which one is this? Standard library only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Ranks:
    """Of one run, as whatever started them tells. by: `torchrun` or `srun`."""

    by: str
    rank: int
    size: int
    nodes: int

    @property
    def per_node(self) -> int:
        return self.size // self.nodes


_SAID_BY = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE"),
    "srun": ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NUM_NODES"),
}
"""Starter -> variables: that it did, rank, ranks, nodes. Those of a SLURM *job* would not do: its script has them too,
which is one process however many tasks the job asks for."""


_planned: Ranks | None = None


@contextmanager
def planned(size: int, nodes: int) -> Iterator[None]:
    """Inside, it is as if srun had started so many processes: a job is checked before it is submitted."""
    global _planned
    _planned = Ranks("srun", 0, size, nodes) if size > 1 else None
    try:
        yield
    finally:
        _planned = None


def started(environment: Mapping[str, str] | None = None) -> Ranks | None:
    """The ranks of this run; None for a single process, whoever started it."""
    if _planned is not None:
        return _planned
    said = os.environ if environment is None else environment
    for by, (sign, *names) in _SAID_BY.items():
        numbers = [said.get(name, "") for name in names]
        if sign in said and all(number.isdigit() for number in numbers):
            rank, size, nodes = map(int, numbers)
            return Ranks(by, rank, size, max(1, nodes)) if size > 1 else None
    return None
