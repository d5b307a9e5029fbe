"""What the processes of one run do together: an error that all of them meet is said once, and none is lost."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import TCPStore

from equality import free_port
from subjects import ended, started
from symbiotic import ranks, team
from symbiotic.data.errors import DataError
from symbiotic.launch import ENDED, FAILED, WRONG_CONFIG, status_of, together
from symbiotic.schema import ConfigError, RunError
from symbiotic.stop import at_once, handled


class Signalled:
    """A stream that a signal reaches before what is written does."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


def same(rank: int) -> None:
    raise RunError("step 3: the loss is not finite")


def wrong(rank: int) -> None:
    sys.stderr = Signalled(sys.stderr)  # type: ignore[assignment]
    raise ConfigError("rates.lr=-1: must be above 0")


def each_its_own(rank: int) -> None:
    raise RunError(f"disk {rank} is full")


def only_the_second(rank: int) -> None:
    if rank == 1:
        raise DataError("t2i-00000.tar: truncated")
    dist.barrier()


def second_dies(rank: int) -> None:
    if rank == 1:
        os._exit(9)
    dist.barrier()


def store_is_gone(rank: int) -> None:
    """The first process keeps it where nobody else does."""
    if rank == 0:
        team._store.wait(["met"])
        os._exit(9)
    team._store.set("met", "")
    try:
        dist.barrier()
    except RuntimeError:
        raise RunError("mine alone") from None


def a_bug(rank: int) -> None:
    raise ValueError("a bug")


def meet(store: Any, rank: int) -> None:
    """Both are here: none leaves the group while the other still joins it."""
    store.set(f"here {rank}", "")
    store.wait(["here 0", "here 1"])


def process(case: Callable[[int], None], rank: int, port: int, kept: bool) -> int:
    """One of two that torchrun started, or srun where it is the first that keeps the store; its exit status."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "1", "RANK": str(rank), "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(kept)}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    try:
        with handled(at_once), team.joined(ranks.started(), "cpu"), together(" (seed=1)"):
            meet(team._store, rank)
            case(rank)
    except team.Elsewhere as error:
        return status_of(error)
    return 0


@pytest.mark.parametrize(
    ("case", "lines", "statuses"),
    [
        (same, ["step 3: the loss is not finite"], [FAILED, FAILED]),
        (wrong, ["rates.lr=-1: must be above 0"], [WRONG_CONFIG, WRONG_CONFIG]),
        (each_its_own, ["disk 0 is full", "disk 1 is full"], [FAILED, FAILED]),
        (only_the_second, ["t2i-00000.tar: truncated"], [FAILED, FAILED]),
        (second_dies, [ENDED], [FAILED, 9]),
        (store_is_gone, ["mine alone"], [9, FAILED]),
        (a_bug, [], [FAILED, FAILED]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_two_processes_meet_is_said_once(
    case: Callable[[int], None], lines: list[str], statuses: list[int], tmp_path: Path
) -> None:
    kept = case is not store_is_gone
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if kept else None
    port = store.port if store is not None else free_port()
    folders = [tmp_path / str(rank) for rank in (0, 1)]
    both = [started(lambda r=r: process(case, r, port, kept), folder) for r, folder in enumerate(folders)]  # type: ignore[misc]
    assert [ended(one) for one in both] == statuses
    texts = [(folder / "output.txt").read_text() for folder in folders]
    said = [line for text in texts for line in text.splitlines() if line.startswith("error: ")]
    assert sorted(said) == [f"error: {line} (seed=1)" for line in lines]
    bugs = 2 if case is a_bug else 0
    assert sum(text.count("ValueError: a bug") for text in texts) == bugs, "a bug keeps its traceback everywhere"
