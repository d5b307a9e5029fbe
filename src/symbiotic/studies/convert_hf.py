"""`python src/convert_hf.py folder=IN out=OUT to=parent|hf|experts`: checkpoints converted from disk to disk.

This file reads the command line and keeps the record; `convert/disk.py` does the work. torch is imported then.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from symbiotic.files import write_json
from symbiotic.schema import ConfigError
from symbiotic.studies.request import command, parse_request, whole

RECORD = "conversion.json"
USAGE = """\
python src/convert_hf.py folder=IN out=OUT to=parent|hf|experts [key=value ...]

Converts a checkpoint on the disk (config.json and safetensors, as on the Hugging Face hub), tensor by tensor: memory is
that of the largest parameter, whatever the size of the model.

  to=parent        a mixture-of-experts checkpoint as one file in the layout of this project, for init_from=OUT:
                   a run then reads it without putting thousands of experts together
  to=hf            the checkpoint again, of a folder that to=parent wrote
  to=experts       a dense checkpoint (Llama, Mistral, Qwen2, Qwen3) as a mixture of experts that computes the same:
                   every expert a copy of the layer's FFN, half of it in the shared expert where the family has one

  experts=N        copies in a layer (to=experts, default: 8)
  top_k=N          experts that a token uses (to=experts, default: 2)
  family=NAME      what it becomes: qwen2_moe of Llama, Mistral and Qwen2; qwen3_moe (default) or dots1 of Qwen3
  seed=N           draws the routers (to=experts, default: 0)
  shard=MB         size of a file of weights (to=hf and to=experts, default: 5120)

python src/convert_hf.py folder=OLMoE-1B-7B out=olmoe-parent to=parent
python src/convert_hf.py folder=Qwen3-0.6B out=qwen3-8x0.6b to=experts experts=8 top_k=2 family=dots1
"""


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `USAGE` says what the keys mean."""

    folder: str
    out: str
    to: Literal["parent", "hf", "experts"]
    experts: int | None = None
    top_k: int | None = None
    family: str | None = None
    seed: int | None = None
    shard: int | None = None


OF_EXPERTS = ("experts", "top_k", "family", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return command(USAGE, act, arguments)


def act(arguments: Sequence[str]) -> None:
    request = parse_request(Request, arguments, dict.fromkeys(("experts", "top_k", "seed", "shard"), whole))
    check(request)
    print(convert(request))


def check(request: Request) -> None:
    """Raises ConfigError: a key that has no effect, or folders that cannot be."""
    vain = [key for key in OF_EXPERTS if request.to != "experts" and getattr(request, key) is not None]
    vain += ["shard"] if request.to == "parent" and request.shard is not None else []
    if vain:
        raise ConfigError(f"{vain[0]}={getattr(request, vain[0])}: has no effect with to={request.to}")
    if request.shard is not None and request.shard < 1:
        raise ConfigError(f"shard={request.shard}: must be at least 1")
    folder, out = Path(request.folder), Path(request.out)
    if not folder.is_dir():
        raise ConfigError(f"folder={folder}: no such folder; must be the folder of a Hugging Face checkpoint")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out={out}: is there already; must be a new folder, or an empty one")


def convert(request: Request) -> str:
    """Writes the folder, with a record in it; returns the line that says so.

    Raises:
        ConfigError, RunError: what cannot be converted, in one line.
    """
    from symbiotic.convert.disk import to_checkpoint, to_experts, to_parent

    folder, out, limit = Path(request.folder), Path(request.out), (request.shard or 5120) * 2**20
    begun, architecture = time.perf_counter(), None
    if request.to == "experts":
        numbers = (8 if request.experts is None else request.experts, 2 if request.top_k is None else request.top_k)
        made, architecture = to_experts(folder, out, *numbers, request.family, request.seed or 0, limit)
    else:
        made = to_parent(folder, out) if request.to == "parent" else to_checkpoint(folder, out, limit)
    seconds = round(time.perf_counter() - begun, 1)
    write_json(out / RECORD, {"from": folder.name, "to": request.to, "architecture": architecture, **made})
    size, n = sum(made["files"].values()), made["parameters"]
    what = f"{len(made['files'])} file{'s' * (len(made['files']) > 1)}, {size / 2**20:,.0f} MB"
    return f"{out}: {n['before']:,} parameters before, {n['after']:,} after, {what}, in {seconds} s"
