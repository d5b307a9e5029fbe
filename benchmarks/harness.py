"""What the benchmarks share: contenders that take turns in one process, ratios with their spread, JSON and Markdown.

One round runs every contender once, in turn, every second round backwards, so that what else the machine does hits all
of them; the ratio of two contenders is taken round by round, and its median and range are told. Times are those of the
processor (`time.process_time`, all threads), which other processes disturb less; `--clock wall` for the clock.
A peer that is not installed is a row that says so: `pip install -c constraints.txt -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from symbiotic.allocator import keep_freed_memory

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class Size:
    """Numbers of a layer or a model: width d, experts E, top k, expert hidden f, tokens; rows of `row` tokens."""

    name: str
    d: int
    experts: int
    top_k: int
    f: int
    tokens: int
    row: int = 256
    layers: int = 4
    head: int = 64
    vocab: int = 4096

    @property
    def heads(self) -> int:
        return max(1, self.d // self.head)


SIZES = {
    size.name: size
    for size in (
        Size("micro", 32, 4, 2, 32, 64, row=32, layers=1, head=16, vocab=64),  # for the tests: nothing to be learnt
        Size("tiny", 128, 16, 2, 256, 2048, row=128, head=32, vocab=1024),
        Size("small", 384, 32, 2, 512, 4096, row=512),
        Size("medium", 768, 64, 8, 512, 4096, row=1024),
    )
}


@dataclass
class Contender:
    """Something to time. act: one repetition, None where it cannot run here, and `why`."""

    name: str
    act: Callable[[], object] | None
    why: str = ""
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def missing(name: str, package: str) -> Contender:
    """The row of a peer that is not installed."""
    return Contender(name, None, f"{package} is not installed: pip install -c constraints.txt -e '.[bench]'")


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def race(contenders: Sequence[Contender], rounds: int, clock: str = "cpu") -> Sequence[Contender]:
    """Fill in the seconds of every round, after one that is not counted."""
    now, running = CLOCKS[clock], [c for c in contenders if c.act is not None]
    for contender in running:
        contender.act()  # type: ignore[misc]
    for number in range(rounds):
        for contender in running if number % 2 == 0 else reversed(running):
            begun = now()
            contender.act()  # type: ignore[misc]
            contender.seconds.append(now() - begun)
    return contenders


def ratio(a: Contender, b: Contender) -> tuple[float, float, float] | None:
    """Median, least and largest of a's seconds over b's, round by round; None where one of them did not run."""
    if not a.seconds or not b.seconds:
        return None
    ratios = [x / y for x, y in zip(a.seconds, b.seconds, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def spread(found: tuple[float, float, float] | None, digits: int = 2) -> str:
    return "–" if found is None else f"{found[0]:.{digits}f} ({found[1]:.{digits}f}–{found[2]:.{digits}f})"


def compared(contenders: Sequence[Contender], to: str) -> list[dict[str, Any]]:
    """A row of each contender: milliseconds, and its time over that of the contender named `to`."""
    base = next(c for c in contenders if c.name == to)
    return [
        {"contender": c.name, "ms": f"{1000 * c.median:.2f}", f"time / {to}": spread(ratio(c, base))}
        if c.seconds
        else {"contender": c.name, "ms": "–", f"time / {to}": c.why}
        for c in contenders
    ]


def backward(act: Callable[[], torch.Tensor], inputs: Iterable[torch.Tensor], grad: torch.Tensor | None = None) -> Any:
    """The repetition of a forward and a backward: gradients of the inputs are made and dropped."""
    kept = [tensor for tensor in inputs if tensor.requires_grad]

    def repetition() -> None:
        y = act()
        torch.autograd.grad(y, kept, torch.ones_like(y) if grad is None else grad, allow_unused=True)

    return repetition


def peak_megabytes(act: Callable[[], object]) -> float:
    """MB by which it raises the peak resident memory of a forked process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            act()
            os.write(writing, str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    told = os.read(reading, 64)
    os.close(reading)
    return int(told) / 1024 if told else float("nan")


def facts() -> dict[str, Any]:
    """Machine, date, commit and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    commit = (git.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "load": f"{os.getloadavg()[0]:.1f}",
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([str(row.get(name, "")) for name in names] for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def report(question: str, tables: dict[str, list[dict[str, Any]]], out: Path | None, seconds: Any = None) -> None:
    """Print the tables as Markdown with the facts of the machine; with `out`, NAME.md and NAME.json there too."""
    about = facts()
    name = question.split(":")[0]
    text = f"# {question}\n\n" + " · ".join(f"{key} {value}" for key, value in about.items()) + "\n"
    text += "".join(f"\n## {title}\n\n{markdown(rows)}\n" for title, rows in tables.items() if rows)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.md").write_text(text)
        kept = {"question": question, **about, "tables": tables, "seconds": seconds}
        (out / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def parser(about: str | None, sizes: Sequence[str] = ("tiny", "small", "medium")) -> argparse.ArgumentParser:
    """The arguments that all benchmarks take."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(sizes))
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--quick", action="store_true", help="the smallest size, three rounds")
    made.add_argument("--clock", choices=list(CLOCKS), default="cpu")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, default=ROOT / "build" / "bench", help="folder of the JSON and Markdown")
    return made


def chosen(made: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, `--quick` spelt out; sets the number of threads."""
    found = made.parse_args(arguments)
    if found.quick:
        found.sizes, found.rounds = found.sizes[:1], min(found.rounds, 3)
    torch.set_num_threads(found.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as a run does
    return found
