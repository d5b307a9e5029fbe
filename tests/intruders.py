"""What must not get in: malformed samples, wrong configs, second processes, payloads; and what got through."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hostile import Entry, good, image, in_a_fork, number_of, pair, record, stream_of, write_shard, write_zoo
from symbiotic.claim import claimed
from symbiotic.data.account import Account
from symbiotic.data.stream import read_stream
from symbiotic.schema import RunError

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 60.0  # seconds for a worker, before a hang is a failure


def malformed(folder: Path) -> dict[str, Any]:
    """R9: every kind of bad sample and shard, 20 of each, between good ones, without and with worker processes."""
    start, wrong = time.monotonic(), list[str]()
    folder.mkdir(parents=True)
    zoo = write_zoo(folder)
    for workers in (0, 2):
        account = Account(zoo.shards, max_bad=1.0)
        stream = read_stream(stream_of(folder, zoo.shards), account, workers, PATIENCE)
        arrived = Counter((sample.shard, sample.key, number_of(sample)) for sample in stream)
        counted = Counter((bad.shard, bad.key, bad.kind) for shard in account.shards.values() for bad in shard.bad)
        for what, found, expected in (("arrived", arrived, Counter(zoo.good)), ("counted", counted, Counter(zoo.bad))):
            apart = (found - expected) + (expected - found)
            wrong += [f"{workers} workers: {one} {what} {found[one]} times, not {expected[one]}" for one in apart]
    facts = {"bad": len(zoo.bad), "kinds": len({kind for *_, kind in zoo.bad}), "good": len(zoo.good), "readings": 2}
    return {**facts, "wrong": wrong, "seconds": time.monotonic() - start}


ANSWERS = """
import contextlib, io, json, sys, time
from pathlib import Path
from hydra._internal.utils import get_args_parser
from symbiotic.launch import launch

for line in json.load(sys.stdin):
    before, start = sorted(Path.cwd().rglob("*")), time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        status = launch(get_args_parser().parse_args(line.split()))
    took = time.monotonic() - start
    written = sorted(map(str, set(Path.cwd().rglob("*")) - set(before)))
    heavy = sorted({"torch", "lightning", "numpy"} & set(sys.modules))
    print(json.dumps([status, out.getvalue(), err.getvalue(), written, heavy, took]))
"""


def answers(lines: Mapping[str, str], folder: Path) -> dict[str, list[Any]]:
    """What command lines lead to, one after the other in a process of their own: status, output, error, files that were
    written, heavy modules that were imported, seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    places = {f"SYMBIOTIC_{name.upper()}": str(folder / name) for name in ("runs", "data", "cache")}
    environment = {**os.environ, **places, "PYTHONPATH": str(ROOT / "src")}
    options: dict[str, Any] = {"capture_output": True, "text": True, "env": environment, "timeout": 900}
    command = [sys.executable, "-c", ANSWERS]
    done = subprocess.run(command, cwd=folder, input=json.dumps(list(lines)), check=False, **options)
    found = dict(zip(lines, map(json.loads, done.stdout.splitlines()), strict=False))
    assert len(found) == len(lines), done.stderr
    return found


def amiss(answer: list[Any], pattern: str) -> str | None:
    """What is wrong with how a wrong config was refused, or None."""
    status, out, err, written, heavy, _ = answer
    if (status, out, written, heavy) != (2, "", [], []):
        return f"status {status}, output {out!r}, wrote {written}, imported {heavy}"
    if not re.fullmatch(r"error: [^\n]+\n", err):
        return f"no single line: {err!r}"
    return None if re.search(pattern, err) else f"another line: {err!r}"


def wrong_configs(folder: Path) -> dict[str, Any]:
    """R12: one line, status 2, no folder, no torch."""
    from test_bad_input import WRONG

    start, found = time.monotonic(), answers(WRONG, folder)
    wrong = [f"{line}: {what}" for line, answer in found.items() if (what := amiss(answer, WRONG[line])) is not None]
    slowest = round(max(answer[-1] for answer in found.values()), 2)
    return {"configs": len(found), "slowest s": slowest, "wrong": wrong, "seconds": time.monotonic() - start}


def simultaneous(count: int, folder: Path) -> dict[str, Any]:
    """R15: of many processes that claim a folder at the same moment one gets it; the others are told whose it is."""
    start, context = time.monotonic(), multiprocessing.get_context("fork")
    barrier, pipes, started = context.Barrier(count), [], []
    for _ in range(count):
        here, there = context.Pipe()
        started.append(context.Process(target=_race, args=(folder, barrier, there)))
        started[-1].start()
        pipes.append(here)
    heard = [pipe.recv() for pipe in pipes]
    winners = [process.pid for process, text in zip(started, heard, strict=True) if text == "won"]
    for process in started:
        process.kill()
        process.join()
    wrong = [] if len(winners) == 1 else [f"{len(winners)} processes hold the folder"]
    refused = [text for text in heard if text != "won"]
    wrong += [text for text in refused if not re.search(r"(process \d+ on \S+|another process) is at work", text)]
    facts = {"starts": count, "winners": len(winners), "refused": len(refused)}
    return {**facts, "wrong": wrong, "seconds": time.monotonic() - start}


def _race(folder: Path, barrier: Any, told: Connection) -> None:
    barrier.wait()
    try:
        with claimed(folder, "train there"):
            told.send("won")
            signal.pause()
    except RunError as error:
        told.send(str(error))


class Payload:
    """What a pickle of it does when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


MEMBERS = ["pkl", "pickle", "pth", "pt", "pyd", "npy", "npz", "ten", "tensor", "mp", "msg", "cbor", "so", "py", "yaml"]
REFUSED = {"member_not_allowed": 15, "text_not_utf8": 1, "image_format": 1, "link_or_device": 1, "unsafe_name": 2}
DANGEROUS = ("subprocess.Popen", "os.system", "os.exec", "pickle.find_class", "socket.connect", "os.symlink")


def poisoned(canary: Path, outside: Path) -> list[Entry]:
    """20 samples with a payload each, and one that is good: `d0`."""
    poison = pickle.dumps(Payload(canary))
    entries = [entry for i, kind in enumerate(MEMBERS) for entry in (*good(f"a{i}", i), Entry(f"a{i}.{kind}", poison))]
    entries += [*pair("b0", poison, image(0)), *pair("b1", record(1), poison)]
    entries += [Entry("c0.json", record(0)), Entry("c0.png", b"", tarfile.SYMTYPE, str(outside))]
    return [*entries, *good("../../outside", 1), *good(str(outside), 2), *good("d0", 700)]


def watched(outside: Path) -> None:
    """From now on in this process: an error at whatever a payload would do."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        assert event not in DANGEROUS, event
        assert event != "open" or str(arguments[0]) != str(outside)

    sys.addaudithook(hook)


def payloads(folder: Path) -> dict[str, Any]:
    """S1: none is run, each is refused with its reason, and nothing is written."""
    start, canary, outside = time.monotonic(), folder / "canary", folder / "outside"
    folder.mkdir(parents=True, exist_ok=True)
    shard = write_shard(folder, "x-00000.tar", poisoned(canary, outside))
    before = sorted(folder.iterdir())

    def act() -> None:
        watched(outside)
        account = Account([shard], max_bad=1.0)
        keys = [sample.key for sample in read_stream(stream_of(folder, [shard]), account)]
        assert (keys, account.kinds) == (["d0"], REFUSED), (keys, account.kinds)

    wrong = list[str]()
    try:
        in_a_fork(act)
    except Exception as error:  # of the forked process, as its traceback
        wrong.append(str(error).strip().splitlines()[-1])
    wrong += [f"written: {path.name}" for path in sorted(folder.iterdir()) if path not in before]
    return {"payloads": sum(REFUSED.values()), "wrong": wrong, "seconds": time.monotonic() - start}
