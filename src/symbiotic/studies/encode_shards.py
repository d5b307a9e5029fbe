"""`python src/encode_shards.py shards=…`: latents of a VAE, or vectors of a vision encoder, made once and kept.

This file reads the command line and walks over the shards; `data/encoded.py` writes what a run reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from symbiotic.data.tar import find_shards
from symbiotic.schema import ConfigError
from symbiotic.studies.request import check_device, command, number, parse_request, whole

if TYPE_CHECKING:
    from symbiotic.data.shards import ShardIndex, ShardReader
    from symbiotic.images.encoder import ImageEncoder

USAGE = """\
python src/encode_shards.py shards=FOLDER tokenizer=FILE encoder=kl|vision path=WEIGHTS out=FOLDER [key=value ...]

Encodes the images of tar shards and writes one safetensors file for each shard, which a run reads in the place of
pixels: data.encoded=[FOLDER]. A shard that was encoded is not encoded again, so the command goes on where it was
stopped. What is in the shards, and what is bad in them, is told by src/check_data.py.

  shards=FOLDER    all .tar files in it; or a file, or a pattern such as 'data/t2i-*.tar'; several with commas between
  tokenizer=FILE   a tokenizer.json, or the folder of a pretrained model: samples are indexed as a run does
  encoder=kl       images that are generated (t2i, t2i_long): latents of an AutoencoderKL (pip install 'symbiotic[hf]'),
                   scaled and shifted as its config.json says
  encoder=vision   images that are read (mmu): the patches of the image tower of a SigLIP or CLIP, by open_clip
  path=WEIGHTS     kl: the folder with config.json and diffusion_pytorch_model.safetensors;
                   vision: a file of weights, or a folder with one and its open_clip_config.json
  out=FOLDER       where to write

  token=2          kl: latents along a side that make one token
  architecture=NAME, layer=1, resize=squash
                   vision: the name in open_clip, where there is no config beside the weights; the block, from the
                   last; how pictures come to the tower's size (default: as it was trained)
  dtype=float16    bfloat16, float32
  batch=16         images at a time
  device=cpu
  max_bad=.01      share of bad samples that is borne

python src/encode_shards.py shards=/data/mine tokenizer=/data/mine/tokenizer.json encoder=kl path=/models/flux/vae out=/data/mine-kl
"""  # noqa: E501

READ = {"token": whole, "layer": whole, "batch": whole, "max_bad": number}
OWN = {"kl": ("token",), "vision": ("architecture", "layer", "resize")}


@dataclass(frozen=True)
class Request:
    """What the command line asks for; `USAGE` says what the keys mean."""

    shards: str
    tokenizer: str
    encoder: Literal["kl", "vision"]
    path: str
    out: str
    token: int | None = None
    architecture: str | None = None
    layer: int | None = None
    resize: Literal["squash", "shortest", "longest"] | None = None
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    batch: int = 16
    device: str = "cpu"
    max_bad: float = 0.01


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return command(USAGE, act, arguments)


def act(arguments: Sequence[str]) -> None:
    request = parse_request(Request, arguments, READ)
    shards = check(request)
    print(encode(request, shards))


def check(request: Request) -> list[str]:
    """The shards.

    Raises:
        ConfigError: a key that has no effect, a value out of range, or shards that are not there.
    """
    for encoder, keys in OWN.items():
        vain = next((key for key in keys if encoder != request.encoder and getattr(request, key) is not None), None)
        if vain:
            raise ConfigError(f"{vain}={getattr(request, vain)}: has no effect with encoder={request.encoder}")
    if request.batch < 1:
        raise ConfigError(f"batch={request.batch}: must be at least 1")
    if not 0 <= request.max_bad <= 1:
        raise ConfigError(f"max_bad={request.max_bad:g}: must lie in [0, 1]")
    check_device(request.device)
    found = [str(Path(p).absolute()) for p in find_shards(_listed(request.shards), "shards")]
    stems = [Path(shard).stem for shard in found]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice:
        raise ConfigError(f"shards={request.shards}: two are called {twice}.tar; encode their folders one by one")
    if Path(request.out).exists() and not Path(request.out).is_dir():
        raise ConfigError(f"out={request.out}: must be a folder")
    return found


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def made(request: Request) -> tuple[ImageEncoder, dict[str, Any]]:
    """The encoder, on its device, and its arguments.

    Raises:
        ConfigError: its files are missing or wrong, or its package is.
    """
    from symbiotic.images.kl import KLAutoencoder
    from symbiotic.images.vision import VisionEncoder

    given = {key: getattr(request, key) for key in OWN[request.encoder] if getattr(request, key) is not None}
    encoder = (KLAutoencoder if request.encoder == "kl" else VisionEncoder)(request.path, **given)
    return encoder.to(request.device), {"encoder": request.encoder, "path": request.path, **given}


def encode(request: Request, shards: list[str]) -> str:
    """Writes what is missing; returns the line that says so.

    Raises:
        ConfigError, DataError: what is wrong, in one line.
    """
    import torch

    from symbiotic.data.encoded import encode_shard, file_of, wanted, write_about

    encoder, arguments = made(request)
    index, reader = indexed(request, shards)
    out, dtype = Path(request.out), getattr(torch, request.dtype)
    write_about(out, encoder, request.dtype, arguments)
    samples, written, numbers = wanted(index, encoder.kind), 0, 0
    for shard in sorted(set(index.shard[samples].tolist())):
        path = file_of(out, str(index.shards[shard]))
        if path.with_name(f"{path.name}.json").is_file():
            continue
        numbers += encode_shard(encoder, reader, samples[index.shard[samples] == shard], path, dtype, request.batch)
        written += 1
        print(f"{path.name}", flush=True)
    what = f"{len(samples):,} images of {encoder.kind} tokens, {encoder.patch_dim} numbers each"
    return f"{out}: {what}; {written} shards encoded now, {numbers:,} numbers; encoder {encoder.fingerprint}"


def indexed(request: Request, shards: list[str]) -> tuple[ShardIndex, ShardReader]:
    """The index that a run would make; its account is kept in the folder that is written."""
    from symbiotic.data.account import Account
    from symbiotic.data.checks import Checks
    from symbiotic.data.shards import REINDEX, ShardIndex, ShardReader
    from symbiotic.data.tokenizer import Tokenizer, words_of

    tokenizer = Tokenizer.of_text(words_of(request.tokenizer, "tokenizer"), request.tokenizer)
    folder = Path(request.out) / "account"
    folder.mkdir(parents=True, exist_ok=True)
    account = Account(shards, request.max_bad, folder)
    index = ShardIndex.scan(Path("/"), shards, Checks(tokenizer, None, decode=False), account)
    return index, ShardReader(Path("/"), index, REINDEX)
