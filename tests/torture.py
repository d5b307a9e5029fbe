"""The long forms of all campaigns, and a table: `make torture`.

`python tests/torture.py [kills=400] [signals=90] [damages=60] [wholes=40] [saves=100] [ranks=12] [seed=0]
[only=R1,R9]`. Exit status 1 where anything is wrong.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import campaigns
import intruders
import saves
from subjects import grid

COUNTS = {"kills": 400, "signals": 90, "damages": 60, "wholes": 40, "saves": 100, "ranks": 12, "seed": 0}


def table(chosen: dict[str, int], root: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each row runs."""
    shared, seed = root / "shared", chosen["seed"]
    asked = signal.SIGTERM
    return {
        "R1 SIGKILL": lambda: campaigns.kills(grid(), chosen["kills"], shared, root / "kills", seed),
        "R1 SIGKILL in whole runs": lambda: campaigns.wholes(chosen["wholes"], shared, root / "wholes", seed),
        "R2 SIGKILL in a save of 200 MB": lambda: saves.saves(chosen["saves"], 200, root / "saves", seed),
        "R2 SIGKILL at every line of a save": lambda: saves.saves_at_every_line(root / "lines"),
        "R3 flips and cuts of a checkpoint": lambda: saves.mutations(300, 100, shared, root / "mutations", seed),
        "R3 SIGKILL, newest damaged": lambda: campaigns.damages(grid(), chosen["damages"], shared, root / "d", seed),
        "R5 signals": lambda: campaigns.signals(grid(), chosen["signals"], shared, root / "signals", seed),
        "R5 SIGTERM in whole runs": lambda: campaigns.wholes(chosen["wholes"], shared, root / "asked", seed, asked),
        "R6 two ranks": lambda: campaigns.ranks(chosen["ranks"], shared, root / "ranks", seed),
        "R7 one, two, one rank": lambda: campaigns.elastic(shared, root / "elastic"),
        "R9 malformed samples": lambda: intruders.malformed(root / "zoo"),
        "R12 wrong configs": lambda: intruders.wrong_configs(root / "wrong"),
        "R15 simultaneous starts": lambda: intruders.simultaneous(50, root / "claim"),
        "S1 payloads": lambda: intruders.payloads(root / "payloads"),
    }


def main() -> int:
    chosen, only = dict(COUNTS), ()
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key == "only":
            only = tuple(value.split(","))
        elif key in chosen and value.isdigit():
            chosen[key] = int(value)
        else:
            known = " ".join((*(f"{k}=NUMBER" for k in chosen), "only=ROW,ROW"))
            print(f"error: {argument}: must be one of {known}", file=sys.stderr)
            return 2
    torch.set_num_threads(1)
    failed = False
    with tempfile.TemporaryDirectory() as name:
        rows = table(chosen, Path(name))
        unknown = [row for row in only if not any(f"{title} ".startswith(f"{row} ") for title in rows)]
        if unknown:
            print(f"error: only={unknown[0]}: no such row; known: {', '.join(rows)}", file=sys.stderr)
            return 2
        for title, run in rows.items():
            if only and not any(f"{title} ".startswith(f"{row} ") for row in only):
                continue
            with contextlib.redirect_stdout(sys.stderr):
                found = run()
            wrong, seconds = found.pop("wrong"), found.pop("seconds")
            failed = failed or bool(wrong)
            facts = ", ".join(f"{key} {value}" for key, value in found.items())
            print(f"{title:36} {facts}; wrong: {len(wrong)}; {seconds:.0f} s", flush=True)
            for line in wrong[:20]:
                print(f"    {line}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
