"""(e) What a start costs: `python benchmarks/startup.py [--quick] [--first-step]`.

Commands in processes of their own, in turn, by the clock: `--help`, a key that does not exist, a value that is out of
range, a dry run, the imports that they must not pay, and which of these they did; with `--first-step` the smoke run to
its end, and the embedded run with one step of joint training, corpus and parent made by a first round.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

from harness import ROOT, Contender, chosen, compared, parser, race, report

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import lightning": ["-c", "import lightning"],
    "--help": ["src/train.py", "--help"],
    "unknown key": ["src/train.py", "experiment=symbiotic", "model.widht=4"],
    "bad value": ["src/train.py", "experiment=symbiotic", "model.num_layers=0"],
    "--cfg job": ["src/train.py", "experiment=symbiotic", "--cfg", "job"],
    "dry run": ["src/train.py", "experiment=symbiotic", "dry_run=true"],
    "evaluation, unknown key": ["src/eval.py", "rnus=x"],
}
FIRST = {
    "smoke run": ["src/train.py", "experiment=smoke"],
    "embedded, first step": ["src/train.py", "experiment=symbiotic", "phases.steps=2", "phases.shield_steps=1"],
}


def started(arguments: list[str], folder: str) -> Callable[[], subprocess.CompletedProcess[str]]:
    paths = {f"SYMBIOTIC_{name}": f"{folder}/{name.lower()}" for name in ("RUNS", "DATA", "CACHE")}
    env = {**os.environ, **paths, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return lambda: subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


def imported(arguments: list[str], folder: str) -> str:
    """Which of the heavy packages the command imports, by `-X importtime`; and its exit status."""
    told = started(["-X", "importtime", *arguments], folder)()
    names = {line.rsplit("|", 1)[-1].strip() for line in told.stderr.splitlines() if line.startswith("import time:")}
    heavy = [name for name in ("hydra", "torch", "lightning", "transformers") if name in names]
    return f"{', '.join(heavy) or 'none'}; exit {told.returncode}"


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, ("tiny",))
    made.add_argument("--first-step", action="store_true")
    made.add_argument("--commands", nargs="+", choices=list(COMMANDS), default=list(COMMANDS))
    asked = chosen(made, arguments)
    with tempfile.TemporaryDirectory() as folder:
        commands = {name: COMMANDS[name] for name in asked.commands}
        found = race([Contender(n, started(c, folder)) for n, c in commands.items()], asked.rounds, "wall")
        rows = compared(found, asked.commands[0])
        for row, command in zip(rows, commands.values(), strict=True):
            row["imports"] = imported(command, folder)
        tables = {"commands": rows}
        if asked.first_step:
            runs = [Contender(name, started(command, folder)) for name, command in FIRST.items()]
            tables["runs, corpus and parent cached by the first round"] = compared(race(runs, 1, "wall"), "smoke run")
    report("startup: what a start costs", tables, asked.out, {c.name: c.seconds for c in found})


if __name__ == "__main__":
    main()
