"""What every test runs under: one thread, no network beyond loopback, no writes outside its temporary folder."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before any library reads them; processes started by a test inherit them.
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", WANDB_MODE="offline"
)

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    torch.set_num_threads(1)
    gc.set_threshold(100_000, 20, 20)  # composing a config makes so many objects that a fourth of its time went here


def pytest_collection_finish() -> None:
    gc.freeze()  # the libraries and the tests themselves stay to the end


def is_local(family: int, address: Any) -> bool:
    """Whether a socket address stays on this machine: not of the internet families, or loopback."""
    if family not in (socket.AF_INET, socket.AF_INET6):
        return True
    host = str(address[0])
    return host in ("localhost", "::1", "0.0.0.0", "::") or host.startswith(("127.", "::ffff:127."))


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A connection to another machine fails the test that opens it."""
    connect, connect_ex, lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(address: Any) -> None:
        raise RuntimeError(f"a test opened a network connection to {address!r}; tests use loopback only")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        return connect(self, address) if is_local(self.family, address) else refuse(address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        if not is_local(self.family, address):
            refuse(address)
        return connect_ex(self, address)

    def guarded_lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name not in (None, "", socket.gethostname()) and not is_local(socket.AF_INET, (name,)):
            refuse(name)
        return lookup(host, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded_connect)
    patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
    patch.setattr(socket, "getaddrinfo", guarded_lookup)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all test processes of this session share, for what is expensive and safe to write twice."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The repository: README.md, conf/ and src/ lie here."""
    return ROOT
