"""Processes of one gloo group that call functions of a test file, as often as a test likes."""

from __future__ import annotations

import importlib.util
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 60.0  # seconds that the start or a call may take


class Ranks:
    """`ranks(function, *arguments)` calls a top-level function of the test file `file` on every rank.

    The processes are spawned, not forked: a fork of a process with threads can hang. They start with the first call,
    and anew after one that failed; they find each other through a file in `folder`, on the loopback device.
    """

    def __init__(self, file: str, folder: Path, world: int = 2) -> None:
        self.file, self.folder, self.world = file, folder, world
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        self.starts = 0

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returned on each rank. What it raises on any of them fails here and ends them all."""
        if not self.processes:
            self._start()
        try:
            for connection in self.connections:
                connection.send_bytes(pickle.dumps((function.__name__, arguments)))
            return self._answers()
        except Exception:
            self.close(patience=0.0)
            raise

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.starts += 1
        store = str(self.folder / f"group-{self.starts}")
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, store, self.file, there))
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def _answers(self) -> list[Any]:
        """One from each rank; the first error ends the waiting, for the others may wait for the rank that has it."""
        values: dict[int, Any] = {}
        while len(values) < self.world:
            waiting = {c: rank for rank, c in enumerate(self.connections) if rank not in values}
            ready = wait(list(waiting), TIMEOUT)
            if not ready:
                raise TimeoutError(f"ranks {list(waiting.values())} did not answer within {TIMEOUT:g} seconds")
            for connection in ready:
                rank = waiting[connection]  # type: ignore[index]
                values[rank] = self._answer(rank)
        return [values[rank] for rank in range(self.world)]

    def _answer(self, rank: int) -> Any:
        try:
            error, value = pickle.loads(self.connections[rank].recv_bytes())
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(TIMEOUT)
            raise RuntimeError(f"rank {rank} ended with exit code {self.processes[rank].exitcode}") from None
        if error is not None:
            raise AssertionError(f"rank {rank}:\n{error}")
        return value

    def close(self, patience: float = TIMEOUT) -> None:
        """End the processes; those that do not end by themselves are killed, each by its own id."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(patience)
            if process.is_alive():
                process.kill()
                process.join()
        self.processes, self.connections = [], []


def _serve(rank: int, world: int, store: str, file: str, connection: Connection) -> None:
    """A rank's process: the steps of the test file, one after another, until the test closes the connection."""
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    spec = importlib.util.spec_from_file_location("_steps", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["_steps"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    warnings.simplefilter("error")
    while True:
        try:
            name, arguments = pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            break
        connection.send_bytes(pickle.dumps(_call(getattr(module, name), arguments)))
    dist.destroy_process_group()


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[str | None, Any]:
    try:
        return None, function(*arguments)
    except Exception:
        return traceback.format_exc(), None
