"""A real HTTP server on loopback that serves a folder in ranges, and can be made to fail as servers do."""

from __future__ import annotations

import base64
import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Served:
    """What the server does, and what it was asked for.

    drop: every so many GETs its connection ends in the middle of the body. busy: every so many are answered 503.
    bytes_per_s: throttles. stall: seconds of silence before the body of the first GET. ranges: False: it ignores them.
    login: user:password that it wants. asked: (path, first byte, last byte) of every GET, with the query in `queries`.
    """

    folder: Path
    drop: int = 0
    busy: int = 0
    bytes_per_s: float = 0.0
    stall: float = 0.0
    ranges: bool = True
    login: str = ""
    asked: list[tuple[str, int, int]] = field(default_factory=list)
    queries: set[str] = field(default_factory=set)
    failed: int = 0
    port: int = 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def sent(self, path: str) -> int:
        """Bytes that were asked for of a file."""
        return sum(last - first + 1 for name, first, last in self.asked if name == path)


def handler_of(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            path, _, query = self.path.lstrip("/").partition("?")
            served.queries.add(query)
            file = served.folder / path
            wanted = "Basic " + base64.b64encode(served.login.encode()).decode()
            if served.login and self.headers.get("Authorization") != wanted:
                return self.status(401)
            if not file.is_file():
                return self.status(404)
            body = file.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if served.ranges else None
            first, last = (int(asked[1]), min(int(asked[2]), len(body) - 1)) if asked else (0, len(body) - 1)
            if with_body:
                served.asked.append((path, first, last))
                if served.busy and len(served.asked) % served.busy == 0:
                    served.failed += 1
                    return self.status(503)
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(body)}")
            self.send_header("Content-Length", str(last - first + 1))
            self.send_header("ETag", hashlib.md5(body).hexdigest())
            self.end_headers()
            if with_body:
                self.body(body[first : last + 1])

        def body(self, body: bytes) -> None:
            if served.stall and len(served.asked) == 1:
                time.sleep(served.stall)
            if served.drop and len(served.asked) % served.drop == 0:
                served.failed += 1
                self.wfile.write(body[: len(body) // 2])
                self.close_connection = True
                return
            step = int(served.bytes_per_s / 50) or len(body) or 1
            for at in range(0, len(body), step):
                self.wfile.write(body[at : at + step])
                if served.bytes_per_s:
                    time.sleep(0.02)

        def status(self, number: int) -> None:
            self.send_response(number)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no error here."""


@contextmanager
def serving(folder: Path, **faults: object) -> Iterator[Served]:
    served = Served(folder, **faults)  # type: ignore[arg-type]
    server = _Server(("127.0.0.1", 0), handler_of(served))
    served.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
