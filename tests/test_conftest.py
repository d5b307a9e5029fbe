"""The guards of the test session themselves."""

from __future__ import annotations

import socket

import pytest
import torch


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_other_machines_are_out_of_reach(address: tuple[str, int]) -> None:
    with socket.socket() as s, pytest.raises(RuntimeError, match="loopback only"):
        s.connect(address)
    with pytest.raises(RuntimeError, match="loopback only"):
        socket.create_connection(address)


def test_loopback_is_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("localhost", port)) as client:
            assert client.getpeername()[1] == port
