"""`python src/check_data.py shards=…`: what is in shards, and what is wrong with them.

This file reads the command line; `data_tables` does the work, and is imported when there is something to check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from symbiotic.data.tar import find_files, suffixes_of
from symbiotic.schema import ConfigError
from symbiotic.studies.request import command, flag, number, parse_request, whole

USAGE = """\
python src/check_data.py shards=FOLDER [key=value ...]

Reads every sample of tar shards once, as training would, and prints samples by task, bad samples by kind with an
example of each, and duplicates across shards. A sample is KEY.json, and next to it KEY.png, .jpg, .jpeg or .webp where
its task needs an image. Nothing else is opened, whatever a shard holds, and no command is run. With format= the data
of others are read as data=sources would read them.

  shards=FOLDER    all .tar files in it; or a file, or a pattern such as 'data/t2i-*.tar'; several with commas between
  format=own       img2dataset, llava, text or interleaved: tars of such samples, or .jsonl, .json and .parquet files
  images=FOLDER    or tars: where the images lie that records of llava and interleaved name
  task=t2i         of img2dataset: t2i, t2i_long, or mmu (captioning)
  text=text        of text: the key of the text. caption=caption: of img2dataset, the key of the caption
  fit=none         crop or keep: images are scaled to side= pixels, and cut to a square or not
  side=N           a multiple of 4
  tokenizer=FILE   a tokenizer.json: tokens are counted
  row_tokens=N     of tokens a sample may have at most; needs tokenizer=
  max_bad=.01      share of bad samples that a training would bear, from 0 to 1
  max_pixels=64000000
                   that an image may announce; larger ones are refused before they are decoded
  decode=true      false: read the headers of images only, which is faster and finds no damage inside
  out=FOLDER       write data_account.json (counts by set and shard) and bad_samples.jsonl (a line a bad sample)

Exit status: 0, all samples are good; 1, some are bad (the line says whether more than max_bad), or there are none;
2, a wrong argument. Duplicates are told and change no status: training walks through all samples anyway.

python src/check_data.py shards=data/…/shards tokenizer=data/…/tokenizer.json
"""

READ = {"row_tokens": whole, "max_pixels": whole, "side": whole, "max_bad": number, "decode": flag}


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `USAGE` says what the keys mean."""

    shards: str
    tokenizer: str | None = None
    row_tokens: int | None = None
    max_bad: float = 0.01
    max_pixels: int = 64_000_000
    decode: bool = True
    out: str | None = None
    format: Literal["own", "img2dataset", "llava", "text", "interleaved"] = "own"
    images: str | None = None
    task: Literal["t2i", "t2i_long", "mmu"] = "t2i"
    text: str = "text"
    caption: str = "caption"
    fit: Literal["none", "crop", "keep"] = "none"
    side: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """Of `shards`."""
        return tuple(part.strip() for part in self.shards.split(",") if part.strip())


def check_request(request: Request) -> list[str]:
    """The files.

    Raises:
        ConfigError: values that are out of range, or name what is not there.
    """
    if not 0 <= request.max_bad <= 1:
        raise ConfigError(f"max_bad={request.max_bad:g}: must lie in [0, 1]")
    for key in ("max_pixels", "row_tokens"):
        value = getattr(request, key)
        if value is not None and value < 1:
            raise ConfigError(f"{key}={value}: must be at least 1")
    if request.tokenizer is not None and not Path(request.tokenizer).is_file():
        raise ConfigError(f"tokenizer={request.tokenizer}: no such file")
    if request.row_tokens is not None and request.tokenizer is None:
        raise ConfigError(f"row_tokens={request.row_tokens}: needs tokenizer=FILE to count tokens with")
    if request.out is not None and Path(request.out).exists() and not Path(request.out).is_dir():
        raise ConfigError(f"out={request.out}: must be a folder")
    return find_files(request.parts, "shards", suffixes_of(request.format))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""

    def act(given: Sequence[str]) -> None:
        request = parse_request(Request, given, READ)
        shards = check_request(request)
        from symbiotic.studies.data_tables import check_shards  # torch: seconds

        check_shards(request, shards)

    return command(USAGE, act, arguments)
