"""Tests that need a process group of their own, in a process of their own: a device mesh leaves threads behind, and a
process with such threads can fork no ranks for the tests after it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes


def in_a_process(test: Callable[..., None]) -> Callable[..., None]:
    """The test in a forked process that is the one rank of a gloo group; what it raises is raised here."""

    @functools.wraps(test)
    def run(*args: Any, **arguments: Any) -> None:
        start_processes(_call, (test, args, arguments), nprocs=1, start_method="fork")

    return run


def _call(rank: int, test: Callable[..., None], args: tuple[Any, ...], arguments: dict[str, Any]) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=rank, world_size=1)
    test(*args, **arguments)
    dist.destroy_process_group()
