"""The router inspector, `python src/inspect_run.py run=… prompt=…`: what the experts of a run do with one prompt.

This file reads the command line and writes the results; it imports torch only when there is something to compute.
`inspection_trace` runs the model, `inspection_text` and `inspection_html` show what it did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from symbiotic.schema import ConfigError, RunError
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

if TYPE_CHECKING:
    from symbiotic.studies.inspection_trace import Inspection

USAGE = """\
python src/inspect_run.py run=FOLDER prompt="WORDS" [key=value ...]

Shows which experts every token of one prompt uses in every layer, with which gates, and how much of what the layer
adds comes from the shared experts, and on request what the output depends on: on the terminal, and as inspection.txt,
.html and .json.

  run=FOLDER       the folder of a run (it holds config.yaml), or of a cached parent
  prompt=WORDS     a question, or a caption
  image=FILE       understanding: the image that is read; generation: the image that is noised
  task=…           understanding (default) | generation: the prompt is a caption. The model draws its image, which is
                   mixed with the noise that it started from; one forward on that is shown
  time=0.5         generation: flow time in [0, 1]; 0 is the image, 1 is noise
  seed=0           generation: draws the noise
  attribute=true   also what the model's answer, or the image, depends on: integrated gradients of its score on every
                   word and patch (needs captum, of the extra eval)
  checkpoint=FILE  weights to look at, .safetensors or .ckpt (default: those that the run ended with)
  step=N           the checkpoint of this optimiser step; 0: what joint training started from
  against=init     compare with other weights on the same tokens: init, or a file
  out=FOLDER       where the three files go (default: inspection/… in the run folder)
  data=FOLDER      where the corpus lies, if it was moved (its tokenizer is needed)
  rows=40          tokens shown on the terminal and in the text; the HTML shows all
  all=true         one row for every patch of an image too, in place of one row an image
  device=cpu       where the model runs

python src/inspect_run.py run=runs/symbiotic/symbiotic-…-seed0 prompt="what number is it ?" image=digits.png
python src/inspect_run.py run=runs/symbiotic/symbiotic-…-seed0 task=generation prompt="red 7 on gray bar left"
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `USAGE` says what the keys mean."""

    run: str
    prompt: str
    image: str | None = None
    task: Literal["understanding", "generation"] = "understanding"
    time: float = 0.5
    seed: int = 0
    checkpoint: str | None = None
    step: int | None = None
    against: str | None = None
    attribute: bool = False
    out: str | None = None
    data: str | None = None
    rows: int = 40
    all: bool = False
    device: str = "cpu"


READ = {"time": number, "seed": whole, "step": whole, "rows": whole, "all": flag, "attribute": flag}


def check_request(request: Request) -> None:
    """Raises ConfigError where values are out of range, exclude each other, or name what is not there."""
    if not request.prompt.strip():
        raise ConfigError("prompt=: must hold at least one word")
    if not 0 <= request.time <= 1:
        raise ConfigError(f"time={request.time:g}: must lie in [0, 1]; 0 is the image, 1 is noise")
    for name, least in (("seed", 0), ("rows", 1)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}")
    check_device(request.device)
    check_weights_choice(request.checkpoint, request.step)
    run_folder(request.run)
    if request.image is not None and not Path(request.image).is_file():
        raise ConfigError(f"image={request.image}: no such file")


def slug(request: Request, weights: str) -> str:
    """`generation-red-7-on-gray-1a2b3c`: readable, and another folder for another request."""
    from symbiotic.runs import digest

    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:40].strip("-")
    asked = (request.prompt, request.image, request.time, request.seed, request.against, request.attribute, weights)
    return "-".join(part for part in (request.task, words, digest(asked)[:6]) if part)


def write(folder: Path, inspection: Inspection, text: str) -> list[Path]:
    """`inspection.txt`, `.html` and `.json`; each appears whole or not at all.

    Raises:
        RunError: the folder cannot be written.
    """
    from symbiotic.runs import write_json, write_text
    from symbiotic.studies.inspection_html import page
    from symbiotic.studies.inspection_trace import numbers

    try:
        return [
            write_text(folder / "inspection.txt", text),
            write_text(folder / "inspection.html", page(inspection)),
            write_json(folder / "inspection.json", numbers(inspection)),
        ]
    except OSError as error:
        raise RunError(f"{folder}: cannot be written: {error.strerror}; out=FOLDER chooses another one") from error


def inspect(request: Request) -> list[Path]:
    """Run the model, print what it did, write the three files. Returns their paths.

    Raises:
        ConfigError, RunError, DataError: what is missing or wrong, in one line.
    """
    from symbiotic.studies import console
    from symbiotic.studies.inspection_text import report
    from symbiotic.studies.inspection_trace import trace

    inspection = trace(request)
    parts = report(inspection, request.rows, request.all)
    weights = str(inspection.facts["weights"])
    folder = Path(request.out) if request.out else Path(request.run) / "inspection" / slug(request, weights)
    paths = write(folder, inspection, console.render(*parts))
    console.show(*parts)
    print(console.path_list({path.suffix[1:]: path for path in paths}))
    return paths


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def act(given: Sequence[str]) -> None:
        request = parse_request(Request, given, READ)
        check_request(request)
        inspect(request)

    return command(USAGE, act, arguments)
