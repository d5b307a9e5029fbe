"""Campaigns: runs that are killed, asked to stop and resumed at random moments, held against undisturbed ones.

`torture.py` runs the long forms, `test_campaigns.py` short ones. Kills come at random times, wherever the run is:
building the model, in a step, writing a checkpoint, evaluating, drawing; or before a file operation that is spread over
all of a run (`crash.py`). `test_mutants.py` shows that the campaigns find what they are for.
"""

from __future__ import annotations

import itertools
import math
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from crash import at_file
from subjects import (
    MEMORY,
    PATIENCE,
    STEPS,
    Subject,
    WholeRun,
    alive,
    apart,
    ended,
    family,
    kill,
    lines,
    newest_sound,
    readable,
    said,
    sound_steps,
    starts,
    steps,
    whole_run,
)
from symbiotic.callbacks.checkpoint import checkpoint_path, checkpoints
from symbiotic.callbacks.csv_log import read_rows
from symbiotic.claim import owner


def disturb(
    subject: Subject,
    folder: Path,
    seconds: float,
    rng: random.Random,
    times: int,
    number: Callable[[], int] = lambda: signal.SIGKILL,
    damaged: float = 0.0,
) -> tuple[int, list[str]]:
    """Send a signal at up to `times` random moments of a run of about `seconds`, starting it again each time, and let
    it end. Returns how often it was hit, and what was wrong on the way. damaged: in which share of the stops a bit of
    the newest of two checkpoints is turned."""
    hits, wrong, saved = 0, list[str](), folder / "checkpoints"
    for _ in range(times):
        sent, before, began, earlier = number(), newest_sound(saved), len(starts(folder)), len(steps(folder))
        process = subject.start(folder)
        time.sleep(rng.uniform(0.0, 0.8 * seconds))
        everyone = family(process)
        to_all = sent != signal.SIGKILL and rng.random() < 0.5  # as `timeout` and service managers do
        kill(everyone if to_all else [process], sent)
        status = ended(process)
        wrong += left_behind(everyone)
        wrong += misplaced(folder, began, before)
        wrong += lost(subject, folder, steps(folder)[earlier:], before, sent)
        if status == 0:
            break  # it was faster
        hits += 1
        if status != 128 + sent:
            wrong.append(f"exit status {status} after {signal.Signals(sent).name}: {said(folder)}")
        if rng.random() < damaged and len(sound_steps(saved)) > 1:
            turn_a_bit(checkpoint_path(saved, newest_sound(saved)), rng)
    before, began = newest_sound(saved), len(starts(folder))
    subject.whole(folder)
    return hits, wrong + misplaced(folder, began, before)


def left_behind(everyone: Sequence[int], patience: float = 10.0) -> list[str]:
    """Workers of loaders, and ranks, end with the process that they work for."""
    until = time.monotonic() + patience
    while any(map(alive, everyone)) and time.monotonic() < until:
        time.sleep(0.02)
    return [f"process {process} is still there after {patience:.0f} s" for process in everyone if alive(process)]


def misplaced(folder: Path, began: int, before: int) -> list[str]:
    """A start that came to train goes on from the newest sound checkpoint that it found. began: starts before it."""
    return [f"it went on from step {s}, not {before}" for s in starts(folder)[began:] if s != before]


def lost(subject: Subject, folder: Path, taken: Sequence[int], before: int, sent: int) -> list[str]:
    """What a signal cost: nothing that was saved, at most `save_every` steps, and no step at all where it asked for an
    end. taken: the steps of this start; before: step of the newest sound checkpoint by then."""
    found = checkpoints(folder / "checkpoints")
    wrong = [f"unreadable: {path.name}" for path in found if not readable(path)]
    newest, last = newest_sound(folder / "checkpoints"), max([before, *taken[-1:]])
    if newest < before:
        wrong.append(f"the checkpoint of step {before} is gone, the newest is of step {newest}")
    if last - newest > (0 if sent != signal.SIGKILL else subject.every or STEPS):
        wrong.append(f"after {signal.Signals(sent).name} at step {last} the newest checkpoint is of step {newest}")
    return wrong


def turn_a_bit(path: Path, rng: random.Random) -> None:
    damaged = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(damaged))
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)


def kills(
    cases: Sequence[Sequence[str]], count: int, shared: Path, folder: Path, seed: int = 0, times: int = 4
) -> dict[str, Any]:
    """R1: SIGKILLs at random moments over the cases, in turn, until there were `count`."""
    return _campaign(cases, count, shared, folder, seed, times, lambda rng: signal.SIGKILL)


def damages(
    cases: Sequence[Sequence[str]], count: int, shared: Path, folder: Path, seed: int = 0, times: int = 6
) -> dict[str, Any]:
    """R3 in runs: SIGKILLs, after half of which a bit of the newest checkpoint is turned: the older one is taken."""
    return _campaign(cases, count, shared, folder, seed, times, lambda rng: signal.SIGKILL, damaged=0.5)


def signals(
    cases: Sequence[Sequence[str]], count: int, shared: Path, folder: Path, seed: int = 0, times: int = 3
) -> dict[str, Any]:
    """R5: SIGINT, SIGTERM and SIGUSR1 at random moments."""
    choices = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    return _campaign(cases, count, shared, folder, seed, times, lambda rng: rng.choice(choices))


def _campaign(
    cases: Sequence[Sequence[str]],
    count: int,
    shared: Path,
    folder: Path,
    seed: int,
    times: int,
    choose: Callable[[random.Random], int],
    damaged: float = 0.0,
) -> dict[str, Any]:
    rng, hits, runs, begun, wrong, start = random.Random(seed), 0, 0, 0, list[str](), time.monotonic()
    subjects: dict[int, tuple[Subject, Path, float]] = {}
    for turn in itertools.count():
        if hits >= count:
            break
        which = turn % len(cases)
        if which not in subjects:
            subject, reference = Subject(cases[which], shared, folder / f"{which}"), folder / f"{which}" / "reference"
            subjects[which] = subject, reference, subject.whole(reference)
        subject, reference, seconds = subjects[which]
        disturbed = folder / f"{which}" / f"run{turn}"
        more, bad = disturb(subject, disturbed, seconds, rng, min(times, count - hits), lambda: choose(rng), damaged)
        bad += apart(disturbed, reference)
        wrong += [f"{subject.name}: {line}" for line in bad]
        hits, runs, begun = hits + more, runs + 1, begun + len(starts(disturbed))
    facts = {"hits": hits, "runs": runs, "cases": len(subjects), "starts held": begun}
    return {**facts, "wrong": wrong, "seconds": time.monotonic() - start}


def wholes(count: int, shared: Path, folder: Path, seed: int = 0, number: int = signal.SIGKILL) -> dict[str, Any]:
    """R1, R5: whole runs (stage 0, split, training, evaluation, summary), hit before file operations that are spread
    over all of it. Then the same command is started again, hit once more, and has to end as an undisturbed one."""
    rng, wrong, hits, start = random.Random(seed), list[str](), 0, time.monotonic()
    subject = WholeRun(shared)
    subject.whole(folder / "reference", at_file(0, [str(folder / "reference")], log=folder / "count"))
    known, total = subject.left(folder / "reference"), int((folder / "count").read_text())
    for turn in range(count):
        disturbed, offset = folder / f"run{turn}", rng.random()
        points = (1 + int((turn + offset) / count * total), rng.randint(1, total // 2))
        for point in points:
            status = ended(subject.start(disturbed, at_file(point, [str(disturbed)], number)))
            hits += status != 0
            if status not in (0, 128 + number):
                wrong.append(f"before file operation {point}: exit status {status}: {said(disturbed)}")
        subject.whole(disturbed)
        left = subject.left(disturbed)
        wrong += [f"file operations {points}: {name} differs" for name in known if left.get(name) != known[name]]
    return {"hits": hits, "runs": count, "moments": total, "wrong": wrong, "seconds": time.monotonic() - start}


def ranks(count: int, shared: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """R6: two ranks; one is killed, terminated or fails, or the process that started them is killed. All are gone
    within ten seconds with a status that is not 0, and the run goes on to the end of an undisturbed one."""
    rng, wrong, slowest, start = random.Random(seed), [], 0.0, time.monotonic()
    subject = Subject((*MEMORY, "data.micro_batches=4", "save_every=3", "evaluation.every=0"), shared, folder, ranks=2)
    seconds = subject.whole(folder / "reference")
    hits = 0
    for turn in itertools.count():  # a run that was faster is no hit
        if hits >= count:
            break
        disturbed, way = folder / f"run{turn}", ("killed", "terminated", "fails", "parent killed")[turn % 4]
        process = subject.start(disturbed, rank_fails=rng.randint(2, STEPS - 1) if way == "fails" else None)
        time.sleep(rng.uniform(0.2, 0.7) * seconds if way != "fails" else 0.0)
        everyone = family(process)
        hit = everyone[0] if way == "parent killed" else everyone[-1]
        if way != "fails":
            kill([hit], signal.SIGTERM if way == "terminated" else signal.SIGKILL)
        since = time.monotonic()
        status = ended(process)
        if way == "fails":
            since, everyone = time.monotonic(), []
        while any(map(alive, everyone)) or owner(disturbed) is not None:  # a rank forked since then holds the folder
            assert time.monotonic() - since < PATIENCE, f"{way}: {owner(disturbed)} is still there"
            time.sleep(0.05)
        took = time.monotonic() - since
        hits, slowest = hits + (status != 0), max(slowest, took)
        wrong += [f"{way}: still there after {took:.1f} s"] if took > 10 else []
        if status == 0 and not whole_run(disturbed).exists():
            wrong.append(f"{way}: exit status 0, and the run has not ended")
        subject.whole(disturbed)
        wrong += [f"{way}: {line}" for line in apart(disturbed, folder / "reference")]
    return {"hits": hits, "slowest s": round(slowest, 1), "wrong": wrong, "seconds": time.monotonic() - start}


def in_turns(subjects: Sequence[Subject], folder: Path, stops: Sequence[int | None]) -> None:
    """Each goes on where the one before was stopped, at its first checkpoint of that step; None: to the end."""
    for subject, until in zip(subjects, stops, strict=True):
        process = subject.start(folder)
        while until is not None and alive(process):
            if (folder / "checkpoints" / f"step={until:06d}.ckpt.json").exists():
                kill([process], signal.SIGTERM)
                break
            time.sleep(0.002)
        ended(process)


def elastic(shared: Path, folder: Path) -> dict[str, Any]:
    """R7: one rank, then two, then one, at the same micro-batches: the same samples, the loss within 1e-5."""
    start, overrides = time.monotonic(), (*MEMORY, "data.micro_batches=4", "save_every=5", "evaluation.every=0")
    subjects = [Subject(overrides, shared, folder, ranks=n) for n in (1, 2, 1)]
    subjects[0].whole(folder / "reference")
    in_turns(subjects, folder / "run", (5, 10, None))
    known = {line["step"]: line for _, line in lines(folder / "reference")}
    batches, wrong = dict[int, set[str]](), list[str]()
    for _, line in lines(folder / "run"):
        batches.setdefault(line["step"], set()).update(line["batches"])
    losses = [
        {int(row["step"]): float(row["train/loss"]) for row in read_rows(one / "metrics.csv") if row["train/loss"]}
        for one in (folder / "run", folder / "reference")
    ]
    for step, loss in losses[1].items():
        wrong += [] if batches[step] == set(known[step]["batches"]) else [f"step {step}: other samples"]
        by = abs(losses[0].get(step, math.nan) / loss - 1)
        wrong += [] if by < 1e-5 else [f"step {step}: the loss differs by {by:.1e}"]
    return {"hits": 2, "steps": len(losses[1]), "wrong": wrong, "seconds": time.monotonic() - start}
