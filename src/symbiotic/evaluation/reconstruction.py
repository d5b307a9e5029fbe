"""What the embedded image tokenizer is worth: reconstruction, use of the codebook, and whether the judges of images
read a reconstruction as they read the original.

`python -m symbiotic.evaluation.reconstruction DATA_FOLDER --cache FOLDER` trains it unless it is there, prints the
figures, and keeps them in the JSON beside its weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symbiotic.data.errors import DataError
from symbiotic.data.glyphs import Attributes
from symbiotic.data.image_vq import EmbeddedVQ, read_images
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.evaluation.captions import ATTRIBUTES, read_captions
from symbiotic.evaluation.frechet import frechet_value
from symbiotic.evaluation.scorers import Scorers, load_scorers
from symbiotic.files import write_json
from symbiotic.images.tokenizer import ImageTokenizer
from symbiotic.images.training import measure
from symbiotic.schema import ConfigError

Figures = dict[str, Any]


def judged(tokenizer: ImageTokenizer, judge: Scorers, pixels: Tensor, truth: Sequence[tuple[Any, ...]]) -> Figures:
    """uint8 [n, H, W, 3] and their attributes -> shares of the pictures.

    right: after encoding and decoding, the judge sees all attributes as they are; and each attribute by itself.
    right_before: the same of the pictures themselves, the most that can be asked for. fd: Frechet distance of the
    two in the judge's features: what generated pictures have at least.
    """
    again = tokenizer.decode(tokenizer.encode(pixels), pixels.shape[1], pixels.shape[2])
    seen = np.array(judge.attributes(again), dtype=object)
    before, true = (np.array(list(rows), dtype=object) for rows in (judge.attributes(pixels), truth))
    found = {"right": float((seen == true).all(1).mean()), "right_before": float((before == true).all(1).mean())}
    found["fd"] = frechet_value(judge.features(again), judge.features(pixels)).value
    return found | {name: float((seen == true)[:, i].mean()) for i, name in enumerate(ATTRIBUTES)}


def examples(source: EmbeddedVQ, data: Path) -> Iterator[tuple[str, Tensor, list[tuple[Any, ...]]]]:
    """Name, pixels and attributes of the pictures that it is judged on: those held out of its training, and the
    reference pictures of the captions, half of which show combinations that no training picture does."""
    index = ShardIndex.load(data / "index.npz")
    reader, samples = ShardReader(data / "shards", index), source.split(index)[1]
    records = [Attributes.of(reader.read(int(sample))[0]).record() for sample in samples]
    yield "held_out", read_images(reader, samples), [tuple(record.values()) for record in records]
    captions, pixels = read_captions(data / "benchmarks" / "generation", sys.maxsize, [])
    for name, new in (("captions_seen", False), ("captions_new", True)):
        chosen = [i for i, caption in enumerate(captions) if caption.held_out is new]
        yield name, torch.from_numpy(pixels[chosen]), [captions[i].attributes for i in chosen]


def report(source: EmbeddedVQ, data: Path, cache: Path, preset: str = "default") -> Figures:
    """Prepare tokenizer and judges, measure, and write the figures beside the weights; `judged` is added to them.

    Raises:
        ConfigError, DataError: what is wrong, in one line.
    """
    tokenizer = source.prepare(data, cache)
    judge = load_scorers(data, preset, say=lambda line: print(line, flush=True))
    found = {
        name: measure(tokenizer, pixels) | judged(tokenizer, judge, pixels, truth)
        for name, pixels, truth in examples(source, data)
    }
    figures = source.figures(data, cache) | {"judged": found}
    write_json(source.files(data, cache)[1], figures)
    return figures


COLUMNS = {
    "images": (6, "d"), "mse": (8, ".5f"), "psnr": (6, ".2f"), "codes_used": (10, ".3f"), "perplexity": (10, ".1f"),
    "codes_kept": (10, ".3f"), "fd": (6, ".3f"), "right": (6, ".3f"), "right_before": (12, ".3f"),
    **dict.fromkeys(ATTRIBUTES, (10, ".3f")),
}  # fmt: skip
"""Of the printed table: width, and format of the values."""


def lines(figures: Figures) -> Iterator[str]:
    """The figures as text."""
    made = figures["arguments"]
    yield f"{made['codebook_size']} codes of {made['patch']}x{made['patch']} pixels, {made['steps']} steps"
    yield f"trained in {figures['cpu_seconds']:.0f} s of CPU, {figures['seconds']:.0f} s on the clock"
    yield " ".join(["pictures".ljust(13), *(name.rjust(width) for name, (width, _) in COLUMNS.items())])
    for name, row in figures["judged"].items():
        yield " ".join([name.ljust(13), *(f"{row[key]:{width}{kind}}" for key, (width, kind) in COLUMNS.items())])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m symbiotic.evaluation.reconstruction", description=__doc__)
    parser.add_argument("data", type=Path, help="a corpus folder, as written by symbiotic.data.embedded")
    parser.add_argument("--cache", type=Path, required=True, help="where it is kept: paths.cache of the runs")
    parser.add_argument("--preset", default="default", help="of the judges")
    for name in ("codebook_size", "width", "dim", "encoder_blocks", "decoder_blocks", "steps", "batch", "seed"):
        parser.add_argument(f"--{name}", type=int, default=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    data, cache, preset = (given.pop(name) for name in ("data", "cache", "preset"))
    torch.set_num_threads(1)
    try:
        source = EmbeddedVQ(**given)
        figures = report(source, data, cache, preset)
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join([str(source.files(data, cache)[0]), *lines(figures)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
