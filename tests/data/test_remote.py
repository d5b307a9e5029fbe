"""Files in stores: over a real server with ranges, dropped connections, throttling and faults; each block once."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from people import TOKENIZER, img2dataset, texts
from served import Served, serving
from symbiotic.data import remote
from symbiotic.data.adapters import Origin
from symbiotic.data.checks import Checks
from symbiotic.data.cursor import Cursor
from symbiotic.data.errors import DataError
from symbiotic.data.remote import Fetching, Opener, RemoteSource, addresses
from symbiotic.data.streamed import StreamData
from symbiotic.schema import ConfigError

SIZE = 100_000


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 8192)


@pytest.fixture
def body(tmp_path: Path) -> bytes:
    content = np.random.default_rng(0).bytes(SIZE)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x.tar").write_bytes(content)
    return content


@pytest.fixture
def server(tmp_path: Path, body: bytes) -> Iterator[Served]:
    with serving(tmp_path / "store") as served:
        yield served


def fetching(tmp_path: Path, **changes: Any) -> Fetching:
    return Fetching(str(tmp_path / "cache"), **{"wait": 0.001, "timeout": 5.0, **changes})


def opened(server: Served, tmp_path: Path, name: str = "x.tar", **changes: Any) -> RemoteSource:
    return RemoteSource("shown", f"{server.address}/{name}", fetching(tmp_path, **changes))


# --------------------------------------------------------------------------- bytes


def test_any_range_is_the_files_and_each_block_is_fetched_once(server: Served, tmp_path: Path, body: bytes) -> None:
    rng = np.random.default_rng(1)
    for _ in range(3):  # opened again: from the cache
        with opened(server, tmp_path) as source:
            assert source.size == SIZE
            for start in rng.integers(SIZE, size=40).tolist():
                length = int(rng.integers(30_000))
                assert source.read(start, length) == body[start : start + length]
            assert source.read(SIZE, 10) == b""
            assert source.read(0, SIZE) == body
    assert server.sent("x.tar") == SIZE
    with opened(server, tmp_path) as source:
        server.folder.rename(tmp_path / "away")  # all of it is there: nobody is asked
    with opened(server, tmp_path) as source:
        assert source.read(0, SIZE) == body


@pytest.mark.parametrize("fault", [{"drop": 3}, {"busy": 2}, {"drop": 2, "busy": 3}])
def test_dropped_connections_and_busy_servers_are_borne(
    fault: dict[str, int], tmp_path: Path, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path / "store", **fault) as server, opened(server, tmp_path) as source:
        assert source.read(0, SIZE) == body
        assert server.failed >= 4
    assert caplog.text.count("trying again") >= server.failed


def test_a_slow_server_is_waited_for_and_a_silent_one_is_asked_again(tmp_path: Path, body: bytes) -> None:
    start = time.monotonic()
    with serving(tmp_path / "store", bytes_per_s=200_000.0) as server, opened(server, tmp_path, timeout=0.3) as source:
        assert source.read(0, SIZE) == body
        assert time.monotonic() - start > 0.4
        assert server.sent("x.tar") == SIZE
    (tmp_path / "again").mkdir()
    with serving(tmp_path / "store", stall=1.0) as server:
        source = opened(server, tmp_path / "again", timeout=0.2)
        assert source.read(0, 100) == body[:100]
        assert len(server.asked) == 2
        source.__exit__()


@pytest.mark.parametrize(
    ("faults", "name", "line"),
    [
        ({}, "none.tar", r"shown: cannot be read \((no such file|status 404)\)"),
        ({"busy": 1}, "x.tar", r"shown: not to be had in 3 attempts \(status 503\); started again, a run goes on"),
        ({"drop": 1}, "x.tar", r"shown: not to be had in 3 attempts \("),
        ({"ranges": False}, "x.tar", r"shown: its server answers with the whole file; it must serve ranges"),
        ({"login": "me:secret-word"}, "x.tar", r"shown: cannot be read \(status 401\)"),
    ],
)
def test_what_cannot_be_had_is_one_line(faults: Any, name: str, line: str, tmp_path: Path, body: bytes) -> None:
    def read() -> None:
        with opened(server, tmp_path, name, retries=2) as source:
            source.read(0, 10)

    with serving(tmp_path / "store", **faults) as server, pytest.raises(DataError, match=line) as caught:
        read()
    assert "\n" not in str(caught.value)
    assert server.address not in str(caught.value)


def test_a_server_that_is_away_is_asked_again(tmp_path: Path, body: bytes) -> None:
    with serving(tmp_path / "store") as server:
        pass
    with pytest.raises(DataError, match=r"shown: not to be had in 3 attempts \(Cannot connect"):
        opened(server, tmp_path, retries=2)


def test_a_damaged_cache_is_fetched_again(server: Served, tmp_path: Path, body: bytes) -> None:
    with opened(server, tmp_path) as source:
        source.read(0, SIZE)
        data = source.folder / "data"
    for spoil in (lambda b: b[:9000] + b"\0" + b[9001:], lambda b: b[:50_000], lambda b: b""):
        server.asked.clear()
        data.write_bytes(spoil(data.read_bytes()))
        with opened(server, tmp_path) as source:
            assert source.read(0, SIZE) == body
        assert 8192 <= server.sent("x.tar") <= SIZE
    (data.parent / "table").write_bytes(b"")
    with opened(server, tmp_path) as source:
        assert source.read(0, SIZE) == body


def test_another_file_under_the_name_is_refused(server: Served, tmp_path: Path) -> None:
    with opened(server, tmp_path) as source:
        source.read(0, 10)
    (tmp_path / "store" / "x.tar").write_bytes(bytes(SIZE))
    with pytest.raises(DataError, match=r"shown: it is not the one that was read before; remove .*/blocks/"):
        opened(server, tmp_path)


def test_the_cache_keeps_to_its_size(server: Served, tmp_path: Path, body: bytes) -> None:
    for number in range(5):
        (tmp_path / "store" / f"{number}.tar").write_bytes(body)
        with RemoteSource(str(number), f"{server.address}/{number}.tar", fetching(tmp_path, cache_gb=2.2e-4)) as source:
            assert source.read(0, SIZE) == body
        at = tmp_path / "cache" / "blocks"
        os.utime(source.folder / "about.json", (number, number))
    left = {json.loads((entry / "about.json").read_text())["name"] for entry in at.iterdir()}
    assert left == {"2", "3", "4"}


def _read(address: str, folder: str) -> None:
    remote.BLOCK = 8192
    with RemoteSource("shown", address, Fetching(folder)) as source:
        assert len(source.read(0, SIZE)) == SIZE


def test_processes_share_what_was_fetched(server: Served, tmp_path: Path) -> None:
    """Forked behind a first request, as workers of a loader are: fsspec's own thread does not live on in them."""
    with opened(server, tmp_path) as source:
        source.read(0, 10)
    context = multiprocessing.get_context("fork")
    arguments = (f"{server.address}/x.tar", str(tmp_path / "cache"))
    processes = [context.Process(target=_read, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert server.sent("x.tar") == SIZE


def test_a_store_of_fsspec(tmp_path: Path, body: bytes) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe({"/bucket/a-0.tar": body, "/bucket/a-1.tar": body[:5000], "/bucket/b": b""})
    found = addresses("memory://bucket/a-*.tar", "files")
    assert list(found) == ["memory://bucket/a-0.tar", "memory://bucket/a-1.tar"]
    with Opener(found, fetching(tmp_path))("memory://bucket/a-1.tar") as source:
        assert source.read(100, 10_000) == body[100:5000]


# --------------------------------------------------------------------------- names


def test_ranges_of_names_and_secrets() -> None:
    signed = "https://me:secret-word@host/x-{008..010}.tar?X-Amz-Signature=abcdef&v=1"
    found = addresses(signed, "files")
    assert list(found) == [
        f"https://<redacted>@host/x-{n:03d}.tar?X-Amz-Signature=<redacted>&v=1" for n in (8, 9, 10)
    ]  # fmt: skip
    assert found[next(iter(found))] == "https://me:secret-word@host/x-008.tar?X-Amz-Signature=abcdef&v=1"


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("file:///etc/passwd", r"files=file:///etc/passwd: not read; must be a file, or an address of http, https"),
        ("pipe://cat", r"files=pipe://cat: not read"),
        ("simplecache::http://host/x.tar", r"not read"),
        ("http://host/x-*.tar", r"no such files; name them, over HTTP as NAME-\{00000\.\.00099\}\.tar"),
        ("memory://none/*.tar", r"no such files"),
        ("http://host/x\n.tar", r"not read"),
    ],
)
def test_other_addresses_are_refused(address: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        addresses(address, "files")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "line"),
    [({"cache_gb": 0.0}, "cache_gb=0: must be positive"), ({"retries": -1}, "retries=-1: must not be negative")],
)
def test_numbers_out_of_range_are_one_line(change: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=line):
        fetching(tmp_path, **change).check("")


# --------------------------------------------------------------------------- streams


def test_a_stream_goes_on_at_shard_and_offset_without_what_lies_before(tmp_path: Path) -> None:
    """With a cache that was lost: of the shard that it was in, only what is left is fetched, but for a block."""
    img2dataset(tmp_path / "store", 1, 60)
    size = (tmp_path / "store" / "00000.tar").stat().st_size
    with serving(tmp_path / "store", drop=7) as server:
        name = f"{server.address}/00000.tar"
        made = [cursor(name, tmp_path / folder) for folder in ("one", "two")]
        for _ in range(40):
            made[0].take()
        state = json.loads(json.dumps(made[0].state()))
        made[1].restore(state)
        server.asked.clear()
        assert [made[1].take() for _ in range(20)] == [made[0].take() for _ in range(20)]
        first = min(first for _, first, _ in server.asked)
        assert state["offset"] - remote.BLOCK <= first <= state["offset"]
        assert state["offset"] > size // 3


def cursor(name: str, cache: Path) -> Cursor:
    origin = Origin((name,), "img2dataset")
    opener = Opener({name: name}, Fetching(str(cache), wait=0.001))
    return Cursor("t2i", [name], Checks(TOKENIZER, 64, origin=origin, keep=True), 0, window=10, open_source=opener)


def test_remote_and_local_files_are_one_source(tmp_path: Path) -> None:
    img2dataset(tmp_path / "store", 2, 10)
    texts(tmp_path / "store" / "a.jsonl", 30)
    texts(tmp_path / "b.jsonl", 20)
    TOKENIZER.save(tmp_path / "tokenizer.json")
    with serving(tmp_path / "store", login="me:secret-word") as server:
        host = server.address.replace("http://", "http://me:secret-word@")
        pairs = f"{host}/{{00000..00001}}.tar?token=hidden"
        sources = {
            "t2i": {"format": "img2dataset", "files": pairs, "fit": "crop", "side": 8},
            "lm": {"format": "text", "files": [f"{host}/a.jsonl", str(tmp_path / "b.jsonl")]},
        }  # fmt: skip
        words = str(tmp_path / "tokenizer.json")
        made = StreamData(str(tmp_path / "data"), sources, words, 64, cache=str(tmp_path / "cache"), wait=0.001)
        corpus = made.prepare()
        assert server.queries == {"token=hidden", ""}
    account = json.loads((corpus / "data_account.json").read_text())
    assert {name: row["good"] for name, row in account["sets"].items()} == {"t2i": 20, "lm": 50}
    for path in (file for top in (corpus, tmp_path / "cache") for file in top.rglob("*") if file.is_file()):
        assert b"secret-word" not in path.read_bytes(), path
        assert b"hidden" not in path.read_bytes(), path
