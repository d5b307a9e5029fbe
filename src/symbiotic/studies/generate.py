"""`python src/generate.py run=… prompt=…`: images of any run, by the sampler of training and evaluation.

This file reads the command line; `drawing` does the work, and torch is imported when there is something to draw.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from symbiotic.schema import ConfigError
from symbiotic.studies.batch_file import check_file, check_text, read_rows, report_left_out
from symbiotic.studies.request import (
    check_device,
    check_weights_choice,
    command,
    flag,
    number,
    parse_request,
    run_folder,
    whole,
)

USAGE = """\
python src/generate.py run=FOLDER prompt="WORDS" [key=value ...]

Draws images from captions: PNG files that carry prompt, seed, guidance, sampler, run and weights in their text chunks,
an index (images.jsonl), and grid.png, the first 64 above their captions. Image j of a prompt depends on the prompt, the
seed and j alone, and the same call makes the same bytes. Images that are there already are not made again.

  run=FOLDER       the folder of a run (it holds config.yaml)
  prompt=WORDS     a caption; or
  prompts=FILE     .txt, one caption a line; .jsonl, {"prompt": "…", "n": 4, "seed": 0} a line, where n and seed may be
                   left out. A line that cannot be used is named, the others are drawn, and the exit status is 1
  n=4              images of each prompt, numbers 0 to n-1
  seed=0           draws, with each image's number, the noise that it starts from
  guidance=X       image sampling (default: the run's own); further, of a run with the objective flow,
  steps=N  time_shift=X
                   and of one with the objective autoregressive,
  temperature=X  top_k=N  top_p=X
  size=HxW         pixels (default: those of the images it was trained on)
  out=FOLDER       where the images go (default: generated/… in the run folder)
  checkpoint=FILE  weights, .safetensors or .ckpt (default: those that the run ended with)
  step=N           the checkpoint of this optimiser step; 0: what joint training started from
  ema=true         the averaged weights that the run ended with
  data=FOLDER      where the corpora lie, if they were moved
  batch_size=32    images at a time
  device=cpu       where the model runs

python src/generate.py run=runs/symbiotic/symbiotic-…-seed0 prompt="red 7 on gray bar left" n=8 guidance=3
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `USAGE` says what the keys mean."""

    run: str
    prompt: str | None = None
    prompts: str | None = None
    n: int = 4
    seed: int = 0
    guidance: float | None = None
    steps: int | None = None
    time_shift: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    size: str | None = None
    out: str | None = None
    checkpoint: str | None = None
    step: int | None = None
    ema: bool = False
    data: str | None = None
    batch_size: int = 32
    device: str = "cpu"


@dataclass(frozen=True)
class Line:
    """A line of a file of prompts; null: as on the command line."""

    prompt: str
    n: int | None = None
    seed: int | None = None


class Job(NamedTuple):
    """One image."""

    prompt: str
    seed: int
    number: int


MOST = 100_000
"""Images of one prompt."""

READ = dict.fromkeys(("n", "seed", "steps", "step", "top_k", "batch_size"), whole)
READ |= dict.fromkeys(("guidance", "time_shift", "temperature", "top_p"), number) | {"ema": flag}


def check_request(request: Request) -> None:
    """Raises ConfigError where values are out of range, exclude each other, or name what is not there."""
    if (request.prompt is None) == (request.prompts is None):
        raise ConfigError("prompt=WORDS draws one caption, prompts=FILE those of a file; give one of the two")
    check_line(Line("of the file" if request.prompt is None else request.prompt, request.n, request.seed))
    for name, least in (("steps", 1), ("guidance", 0), ("temperature", 0), ("top_k", 0), ("batch_size", 1)):
        value = getattr(request, name)
        if value is not None and not least <= value < math.inf:
            raise ConfigError(f"{name}={value:g}: must be at least {least}")
    if request.time_shift is not None and not 0 < request.time_shift < math.inf:
        raise ConfigError(f"time_shift={request.time_shift:g}: must be positive; 1 is none")
    if request.top_p is not None and not 0 < request.top_p <= 1:
        raise ConfigError(f"top_p={request.top_p:g}: must lie in (0, 1]; 1 is none")
    pixels(request.size)
    check_device(request.device)
    check_weights_choice(request.checkpoint, request.step, request.ema)
    run_folder(request.run)
    if request.prompts is not None:
        check_file("prompts", request.prompts)


def check_line(line: Line) -> None:
    """Raises ConfigError."""
    check_text("prompt", line.prompt)
    for name, least in (("n", 1), ("seed", 0)):
        value = getattr(line, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}")
    if line.n is not None and line.n > MOST:
        raise ConfigError(f"n={line.n}: must be at most {MOST}")


def pixels(size: str | None) -> tuple[int, int] | None:
    """(height, width) of `HxW`. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)x(\d+)", size or "")
    if size is not None and not found:
        raise ConfigError(f"size={size}: must be height and width in pixels, as in 20x20")
    return (int(found[1]), int(found[2])) if found else None


def read_jobs(request: Request) -> tuple[list[Job], list[str]]:
    """Every image that is asked for, and what is wrong with lines of the file.

    Raises:
        RunError: a file without a usable line.
    """
    lines, problems = [Line(request.prompt or "")], list[str]()
    if request.prompts is not None:
        lines, problems = read_rows(request.prompts, Line, "prompt", check_line)
    jobs = []
    for line in lines:
        count = request.n if line.n is None else line.n
        seed = request.seed if line.seed is None else line.seed
        jobs += [Job(line.prompt, seed, number) for number in range(count)]
    return jobs, problems


def generate(request: Request) -> None:
    """Draw what is not there yet, and print where it lies.

    Raises:
        ConfigError, RunError, DataError: what is missing or wrong, in one line; a bad line after all others are drawn.
    """
    jobs, problems = read_jobs(request)
    from symbiotic.studies.drawing import draw  # torch: seconds

    folder, made = draw(request, jobs)
    print(f"{len(jobs)} images{f', {len(jobs) - made} of them there before' if made < len(jobs) else ''}: {folder}")
    print(f"grid  {folder / 'grid.png'}\nindex {folder / 'images.jsonl'}")
    report_left_out(problems, f"the images of the others are in {folder}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def act(given: Sequence[str]) -> None:
        request = parse_request(Request, given, READ)
        check_request(request)
        generate(request)

    return command(USAGE, act, arguments)
