"""`python src/merge_lora.py run=…`: a run's low-rank updates added to its weights, as a file that opens without them.

This file reads the command line; `models/lora.py` does the sum, and torch is imported when there is something to add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from symbiotic.schema import ConfigError, RunError
from symbiotic.studies.request import check_weights_choice, command, flag, parse_request, run_folder, whole

USAGE = """\
python src/merge_lora.py run=FOLDER [key=value ...]

Adds the low-rank updates of a run (lora=r16) to the weights beside them: W + (alpha / rank) A B. The file that it
writes opens wherever checkpoint=FILE is taken, and answers and draws as the run does.

  run=FOLDER       the folder of a run (it holds config.yaml)
  out=FILE         the file to write (default: merged.safetensors in the run folder)
  checkpoint=FILE  weights, .safetensors or .ckpt (default: those that the run ended with)
  step=N           the checkpoint of this optimiser step
  ema=true         the averaged weights that the run ended with

python src/merge_lora.py run=runs/utamoe/utamoe-…-seed0
python src/ask.py run=runs/utamoe/utamoe-…-seed0 checkpoint=runs/utamoe/utamoe-…-seed0/merged.safetensors question="…"
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `USAGE` says what the keys mean."""

    run: str
    out: str | None = None
    checkpoint: str | None = None
    step: int | None = None
    ema: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return command(USAGE, act, arguments)


def act(arguments: Sequence[str]) -> None:
    request = parse_request(Request, arguments, {"step": whole, "ema": flag})
    check_weights_choice(request.checkpoint, request.step, request.ema)
    folder = run_folder(request.run)
    out = Path(request.out) if request.out else folder / "merged.safetensors"
    if out.suffix != ".safetensors" or not out.absolute().parent.is_dir():
        raise ConfigError(f"out={out}: must be a .safetensors file in a folder that exists")
    print(merge_run(folder, out, request))


def merge_run(folder: Path, out: Path, request: Request) -> str:
    """Writes the file; returns the line that says so.

    Raises:
        ConfigError: the file would replace the weights that it is made of. RunError: they have no low-rank updates.
    """
    from symbiotic.models.lora import is_lora, merge
    from symbiotic.runs import load_state, save_state
    from symbiotic.trained import read_config, weights_file

    config, path = read_config(folder), weights_file(folder, request.checkpoint, request.step, request.ema)
    if out.absolute() == path.absolute():
        raise ConfigError(f"out={out}: these are the weights that are merged; must be another file")
    state = load_state(path)
    updates = [name for name in state if is_lora(name) and name.endswith(".a")]
    if not updates:
        raise RunError(f"{path}: no low-rank updates in it; only runs with lora=r16 have any")
    save_state(out, merge(state, config.lora))
    return f"{out}: {len(updates)} low-rank updates of {path} added to their weights"
