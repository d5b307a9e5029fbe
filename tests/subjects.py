"""What campaigns disturb: runs that are forks of this process, what they leave a trace of, and how two are compared.

The libraries are loaded and the corpus is read before the fork: so a start costs a second.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file
from torch import Tensor

from symbiotic.arc import Arc, make_callbacks
from symbiotic.callbacks.checkpoint import checkpoint_path, checkpoints, step_of
from symbiotic.callbacks.csv_log import CSVLog, read_rows
from symbiotic.callbacks.events import read_events
from symbiotic.callbacks.in_loop_evaluation import SCORES
from symbiotic.callbacks.step import StepCallback
from symbiotic.claim import claimed
from symbiotic.config import compose
from symbiotic.files import digest, read_json
from symbiotic.fit import fit
from symbiotic.launch import interruptible, run_arc
from symbiotic.models.unified import model_of
from symbiotic.runs import state_hash
from symbiotic.schema import Config
from symbiotic.stop import Stopped, at_once, handled

STEPS = 16
TRACE, STARTS = "trace.jsonl", "starts.txt"
PATIENCE = 120.0  # seconds after which a run that does not end has hung

BASE = ("experiment=smoke", f"phases.steps={STEPS}", "log_every=1", "logger.tensorboard=null", "data.samples=12")
MEMORY = (  # everything that carries state from step to step
    *("callbacks=[default,ema]", "model.router.bias=true", "objective.balance.bias_rate=0.001"),
    *("callbacks.collapse_alarm.action=rebalance", "callbacks.collapse_alarm.ratio=0.9"),
    *("callbacks.collapse_alarm.clear=0.95", "callbacks.collapse_alarm.patience=2"),
    "phases.list=[{name:a,until:6,shield:1.0,when:{metric:train/ce,below:100.0,logs:2}},{name:b,until:16,shield:0.9}]",
)


def grid() -> list[tuple[str, ...]]:
    """Accumulation x workers x validation x interval with everything that has a memory; then systems, objectives."""
    accumulation, workers, validation, interval = (1, 3), (0, 2), (0, 5), (1, 7, 8)
    cases: list[tuple[str, ...]] = [
        (*MEMORY, f"data.micro_batches={m}", f"data.num_workers={w}", f"evaluation.every={v}", f"save_every={s}")
        for m, w, v, s in itertools.product(accumulation, workers, validation, interval)
    ]
    plain = ("evaluation.every=0", "save_every=3", "data.micro_batches=2")
    own_rates = ("standard_separable", "mot", "bagel", "tripartite", "symbiotic_bridge")
    one_rate = ("standard_moe", "dense", "multi_gate")
    cases += [(*plain, f"system={system}") for system in own_rates]
    cases += [(*plain, f"system={system}", "rates=uniform", "phases=none") for system in one_rate]
    cases += [(*plain, "system=utamoe", "phases=utamoe", "phases.stage1_steps=6", "lora=r16")]
    cases += [(*plain, "surgery=upgrad"), (*plain, "objective=autoregressive_smoke"), (*plain, "mix=und_only")]
    windows = ((1, 3, 7), (3, 5, 2))  # micro-batches, steps in a log window, save interval: a window is cut anywhere
    cases += [(*MEMORY, f"data.micro_batches={m}", f"log_every={e}", f"save_every={s}") for m, e, s in windows]
    return cases


class Trace(StepCallback):
    """One line a step: loss, batch, rates, phase, weights and moments, bit for bit."""

    def __init__(self, folder: Path, rank_fails: int | None = None) -> None:
        self.path, self.rank_fails, self._batches = folder / TRACE, rank_fails, list[str]()
        self._losses: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            with self.path.with_name(STARTS).open("a") as file:
                file.write(f"{trainer.global_step}\n")

    def on_micro_batch(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any) -> None:
        self._losses.append(float(outputs["loss"]).hex())
        parts = (batch.tokens, batch.kind, batch.latents, batch.codes, batch.noise, batch.time)
        self._batches.append(hashed(parts))

    def on_step(self, trainer: Any, pl_module: Any, step: int) -> None:
        if self.rank_fails is not None and trainer.global_rank == 1 and step == self.rank_fails:
            raise RuntimeError("this rank has had enough")
        optimizer = trainer.optimizers[0]
        moments = [value for state in optimizer.state.values() for value in state.values()]
        line = {
            "step": step,
            "losses": self._losses,
            "batches": self._batches,
            "rates": [float(group["lr"]).hex() for group in optimizer.param_groups],
            "phase": pl_module.phase(step - 1).name,
            "weights": hashed(pl_module.state_dict().values()),
            "moments": hashed(moments),
        }
        self._losses, self._batches = [], []
        with self.path.with_name(f"{trainer.global_rank}-{TRACE}").open("a") as file:
            file.write(json.dumps(line) + "\n")


def hashed(tensors: Iterable[Tensor]) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


class Subject:
    """A prepared run: `start(folder)` forks a process that trains in the folder, from where it was left."""

    def __init__(self, overrides: Sequence[str], shared: Path, folder: Path, ranks: int = 1) -> None:
        paths = (f"paths.runs={folder}", f"paths.data={shared / 'data'}", f"paths.cache={shared / 'cache'}")
        several = ("trainer=ddp", f"trainer.devices={ranks}") if ranks > 1 else ()
        self.name, self.ranks = " ".join((*overrides, *several)), ranks
        self.arc = Arc(compose([*BASE, *overrides, *several, *paths]))
        self.arc.prepare_data()
        if self.arc.scorers is not None:
            self.arc.scorers.wait()
        self.dataset = self.arc.dataset(self.arc.config, True)
        self.state: dict[str, Tensor] = model_of(self.arc.config).initialise(0).state_dict()

        self.every = self.arc.config.save_every

    def start(self, folder: Path, rank_fails: int | None = None) -> int:
        """The id of the process. Its exit status is that of `src/train.py`: 0, 128 and a signal's number, or 1."""

        def act() -> int:
            try:
                with handled(at_once), claimed(folder, "train there"):
                    self.train(folder, rank_fails)
            except Stopped as stopped:
                return stopped.status
            return 0

        return started(act, folder)

    def train(self, folder: Path, rank_fails: int | None = None, more: Sequence[Any] = ()) -> None:
        arc = copy.copy(self.arc)
        arc.config = dataclasses.replace(arc.config, run_dir=str(folder))
        arc.folder, arc.made = folder, make_callbacks(arc.config)
        callbacks = [*arc.callbacks(), Trace(folder, rank_fails), *more]
        fit(arc.config, folder, self.dataset, callbacks, [CSVLog(str(folder))], self.state, about=arc.about())

    def whole(self, folder: Path) -> float:
        """Train to the end, undisturbed; seconds that it took."""
        start = time.monotonic()
        status = ended(self.start(folder))
        assert status == 0, f"{self.name}: exit status {status}: {said(folder)}"
        return time.monotonic() - start


class WholeRun:
    """All of the arc: stage 0, split, training, evaluation, summary, as `src/train.py` runs it. What a run shares with
    others but for the corpus lies in `<folder>/cache`: so every run makes its parent."""

    OVERRIDES = (
        *("experiment=smoke", "logger.tensorboard=null", "evaluation.every=0", "data.samples=12", "log_every=2"),
        *("phases.steps=6", "save_every=2", "init.stage0.max_steps=6", "callbacks.gradient_conflict=null"),
    )
    STATES = ("model.safetensors", "init.safetensors", "cache/stage0/*/parent.safetensors")
    TEXTS = ("scores.jsonl", "events.jsonl", "predictions/*.jsonl", "cache/stage0/*/scores-*.json")

    def __init__(self, shared: Path) -> None:
        self.shared = shared
        arc = Arc(self.config(shared / "corpus"))
        arc.prepare_data()
        if arc.scorers is not None:
            arc.scorers.wait()

    def config(self, folder: Path) -> Config:
        paths = (f"paths.data={self.shared / 'data'}", f"paths.cache={folder / 'cache'}", f"run_dir={folder}")
        return compose([*self.OVERRIDES, *paths])

    def start(self, folder: Path, arm: Callable[[], None] = int) -> int:
        """The id of the process; arm: see `crash`."""

        def act() -> int:
            config = self.config(folder)
            arm()
            return interruptible(lambda: int(run_arc(config) * 0))

        return started(act, folder)

    def whole(self, folder: Path, arm: Callable[[], None] = int) -> None:
        status = ended(self.start(folder, arm))
        assert status == 0, f"exit status {status}: {said(folder)}"

    def left(self, folder: Path) -> dict[str, str]:
        """What counts of a run that has ended: the bits of its weights, its scores, events, rows and summary."""
        found = {p.name: state_hash(load_file(p)) for name in self.STATES for p in sorted(folder.glob(name))}
        found |= {p.name: digest(p.read_text()) for name in self.TEXTS for p in sorted(folder.glob(name))}
        summary = read_json(folder / "summary.json") or {}
        return found | {"metrics.csv": digest(logged(folder)), "summary.json": digest(summary.get("scores"))}


def started(act: Callable[[], int], folder: Path) -> int:
    """The id of a forked process that does it, with what it says in `<folder>/output.txt`; its exit status is what
    `act` returns, 1 after an error."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        output = (folder / "output.txt").open("a", buffering=1)
        sys.stdout = sys.stderr = output
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        # Lightning forks no ranks where this process was forked after a look for GPUs (by another test, say).
        torch.cuda._is_in_bad_fork = lambda: False
        status = act()
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def ended(process: int, patience: float = PATIENCE) -> int:
    """The exit status of a process, as a shell would give it; one that does not end is killed, and fails here."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status) % 256 if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
        time.sleep(0.01)
    kill(family(process), signal.SIGKILL)
    os.waitpid(process, 0)
    raise AssertionError(f"process {process} did not end within {patience:g} s")


def family(process: int) -> list[int]:
    """The process and all that descend from it, which are still there."""
    found, new = [], [process]
    while new:
        found += new
        children = []
        for one in new:
            for task in Path(f"/proc/{one}/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    children += [int(child) for child in task.read_text().split()]
        new = children
    return found


def alive(process: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def kill(processes: Sequence[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def said(folder: Path) -> str:
    return " | ".join((folder / "output.txt").read_text().splitlines()[-6:])


# --------------------------------------------------------------------------- what two runs must agree in


def lines(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rank and line of every step that any process took; a line that a kill cut off is left out."""
    for path in sorted(folder.glob(f"*-{TRACE}")):
        for text in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield path.name, json.loads(text)


def starts(folder: Path) -> list[int]:
    """The steps that the starts of a run began to train from, in their order."""
    path = folder / STARTS
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def steps(folder: Path) -> list[int]:
    """The steps that all starts of a run took, in their order, on the first rank."""
    return [line["step"] for rank, line in lines(folder) if rank == f"0-{TRACE}"]


def sound_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints whose bytes are those of their manifests, found without the code that is tested."""
    found = []
    for path in checkpoints(folder):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about = json.loads(Path(f"{path}.json").read_text())
            if hashlib.sha256(path.read_bytes()).hexdigest() == about["sha256"]:
                found.append(step_of(path))
    return found


def newest_sound(folder: Path) -> int:
    return max(sound_steps(folder), default=0)


def readable(path: Path) -> bool:
    """Whether the bytes under a final name are a whole checkpoint, be its manifest there yet or not."""
    with contextlib.suppress(Exception):
        return bool(torch.load(path, weights_only=True, mmap=True))
    return False


def whole_run(folder: Path) -> Path:
    return checkpoint_path(folder / "checkpoints", STEPS)


def apart(folder: Path, reference: Path) -> list[str]:
    """What differs between a disturbed run that has ended and an undisturbed one: trace, checkpoint, logs, events."""
    known = {(rank, line["step"]): line for rank, line in lines(reference)}
    found = [
        f"step {line['step']}: {key} differs"
        for rank, line in lines(folder)
        for key in line
        if line[key] != known[rank, line["step"]][key]
    ]
    seen = {(rank, line["step"]) for rank, line in lines(folder)}
    found += [f"no trace of step {step}" for _, step in sorted(set(known) - seen)]
    one, other = (torch.load(whole_run(path), weights_only=True) for path in (folder, reference))
    found += [f"checkpoint: {key}" for key in unlike(one, other)]
    if logged(folder) != logged(reference):
        found.append("metrics.csv")
    found += ["events.jsonl"] if read_events(folder) != read_events(reference) else []
    scores = [(path / SCORES).read_bytes() if (path / SCORES).exists() else b"" for path in (folder, reference)]
    return found + (["scores.jsonl"] if scores[0] != scores[1] else [])


def unlike(one: Any, other: Any, key: str = "") -> list[str]:
    """Keys below which two nested states differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys((*one, *other))
        return [bad for k in keys for bad in unlike(one.get(k), other.get(k), f"{key}/{k}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [bad for n, (a, b) in enumerate(zip(one, other, strict=True)) for bad in unlike(a, b, f"{key}/{n}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num()) else [key]
    same = one == other or (isinstance(one, float) and isinstance(other, float) and math.isnan(one + other))
    return [] if same else [key]


def logged(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in read_rows(folder / "metrics.csv")]
