"""What `src/generate.py` does: images of a run, drawn as in training and evaluation.

    00000.png …     one image a job, in the order of the prompts
    images.jsonl    file, prompt, seed, number, guidance, sampler, size, run, weights, code of each
    grid.png        the first `GRID` images above their captions

Batches are the consecutive jobs of one seed. A batch is drawn when one of its images is not there with the same facts
in its text chunks, and then as a whole, so that an interrupted call leaves the bytes that an uninterrupted one does.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.evaluation.benchmark import batches, measuring, write_jsonl
from symbiotic.evaluation.context import Context, whole_lines
from symbiotic.evaluation.grid import draw_grid, save_png
from symbiotic.evaluation.images import image_facts, load_image, save_image
from symbiotic.evaluation.prompts import pictures
from symbiotic.runs import digest, locked, source_hash, state_hash
from symbiotic.schema import SAMPLING, ConfigError
from symbiotic.studies.evaluate import CODE, weights_name
from symbiotic.studies.generate import Job, Request, pixels
from symbiotic.studies.inputs import size_fault, unknown_line
from symbiotic.trained import Trained, open_run, resampled

GRID = 64

Facts = dict[str, str]


def draw(request: Request, jobs: Sequence[Job]) -> tuple[Path, int]:
    """The folder of the images, and how many had to be made.

    Raises:
        ConfigError, RunError, DataError: what is missing or wrong, in one line.
    """
    trained = open_run(
        request.run,
        checkpoint=request.checkpoint,
        step=request.step,
        ema=request.ema,
        data=request.data,
        device=request.device,
    )
    if not trained.model.latents:
        what = "are an understanding-only parent, which draws nothing"
        raise ConfigError(f"run={request.run}: the weights in {trained.weights.name} {what}")
    context = sampling(request, trained)
    facts = facts_of(jobs, context, trained)
    warning = unknown_line((job.prompt for job in jobs), trained.tokenizer)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    folder = Path(request.out) if request.out else trained.folder / "generated" / slug(jobs, facts)
    with readable_errors("write images", folder), locked(folder / ".lock"):
        made = draw_missing(folder, jobs, facts, context, trained)
        remove_others(folder, len(jobs))
        write_index(folder, jobs, facts)
    return folder, made


def sampling(request: Request, trained: Trained) -> Context:
    """The run's words and objective, with the sampler and the size that are asked for.

    Raises:
        ConfigError: a size that the model cannot draw, or a key that its objective does not have.
    """
    size = pixels(request.size) or trained.size
    fault = size_fault(*size, trained.config.model.max_grid)
    if fault:
        raise ConfigError(f"size={size[0]}x{size[1]}: {fault}")
    keys = ("guidance", *(key for keys in SAMPLING.values() for key in keys))
    objective = resampled(trained.config.objective, {key: getattr(request, key) for key in keys})
    return Context(trained.tokenizer, objective, size, batch_size=request.batch_size)


def facts_of(jobs: Sequence[Job], context: Context, trained: Trained) -> list[Facts]:
    """Everything that decides each image, for its text chunks."""
    shared = {
        "size": "{}x{}".format(*context.size),
        "run": trained.folder.resolve().name,
        "weights": f"{weights_name(trained)} {state_hash(trained.model.state_dict())}",
        "code": source_hash(*CODE),
    }
    return [dataclasses.replace(context, seed=job.seed).facts(job.prompt, job.number) | shared for job in jobs]


def slug(jobs: Sequence[Job], facts: Sequence[Facts]) -> str:
    """`red-7-on-gray-1a2b3c`: readable, and another folder for another request."""
    words = re.sub(r"[^a-z0-9]+", "-", jobs[0].prompt.lower()).strip("-")[:40].strip("-")
    return "-".join(part for part in (words, digest(list(facts))[:6]) if part)


def draw_missing(folder: Path, jobs: Sequence[Job], facts: Sequence[Facts], context: Context, trained: Trained) -> int:
    """Returns how many images were not there."""
    made = 0
    with measuring(trained.model):
        for some in batches_of(jobs, context.batch_size):
            lacking = [i for i in some if not is_there(folder / f"{i:05d}.png", facts[i])]
            if not lacking:
                continue
            drawn = pictures(
                trained.model,
                [jobs[i].prompt for i in some],
                context.tokenizer,
                context.objective,
                size=context.size,
                seed=jobs[some[0]].seed,
                numbers=[jobs[i].number for i in some],
                batch_size=len(some),
            ).numpy()
            for i, image in zip(some, drawn, strict=True):
                save_image(folder / f"{i:05d}.png", image, facts[i])
            made += len(lacking)
    return made


def batches_of(jobs: Sequence[Job], size: int) -> Iterator[Sequence[int]]:
    """Places of consecutive jobs of one seed, at most `size` at a time."""
    for _, group in itertools.groupby(range(len(jobs)), key=lambda i: jobs[i].seed):
        yield from batches(list(group), size)


def is_there(path: Path, facts: Facts) -> bool:
    """Whether the image was made from exactly this."""
    try:
        return path.is_file() and image_facts(path) == facts
    except DataError:
        return False


def remove_others(folder: Path, count: int) -> None:
    """Images of an earlier, larger request for the same folder, which its index lists."""
    index = folder / "images.jsonl"
    listed = [str(row.get("file")) for row in whole_lines(index)] if index.is_file() else []
    for name in listed:
        if re.fullmatch(r"\d{5}\.png", name) and int(name[:5]) >= count:
            (folder / name).unlink(missing_ok=True)


def write_index(folder: Path, jobs: Sequence[Job], facts: Sequence[Facts]) -> None:
    files = [f"{i:05d}.png" for i in range(len(jobs))]
    rows = zip(files, jobs, facts, strict=True)
    write_jsonl(
        folder / "images.jsonl",
        ({"file": file, **fact, "seed": job.seed, "number": job.number} for file, job, fact in rows),
    )
    shown = files[:GRID]
    grid = draw_grid([load_image(folder / file) for file in shown], [job.prompt for job in jobs[: len(shown)]])
    save_png(grid, folder / "grid.png")
