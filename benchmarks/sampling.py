"""(f) Sampling and evaluation: `python benchmarks/sampling.py [--quick]`.

Images by rectified flow with guidance, ours (caption and free rows in one batch) against one forward for each; image
codes and words with the keys and values of what stands before, against computing every token again at every step. Words
also by the length of the prompt: milliseconds a token and row.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from harness import SIZES, Contender, Size, chosen, compared, parser, race, ratio, report, spread
from sized import PATCH, unified
from torch import Tensor

from symbiotic.data.packing import GenImage, Sample, Text, build_sample
from symbiotic.evaluation.prompts import one_a_row
from symbiotic.generation.images import euler_times, sample_latents, start_noise
from symbiotic.generation.text import greedy
from symbiotic.models.batch import Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import Sampler

NEVER, ROWS, SIDE, STEPS = -1, 8, 32, 12


def pictures(words: int) -> list[Sample]:
    import numpy as np

    image = GenImage(np.zeros((SIDE, SIDE, 3), np.uint8))
    return [build_sample("caption", "t2i", [Text(list(range(3, 3 + words))), image]) for _ in range(ROWS)]


@torch.no_grad()
def two_forwards(model: UnifiedModel, caption: Batch, free: Batch, noise: Tensor, sampler: Sampler) -> Tensor:
    """Euler steps of the velocity prediction, a forward with and one without caption."""
    x, times = noise.reshape(-1, PATCH), euler_times(sampler.steps, sampler.time_shift)
    for now, then in itertools.pairwise(times):
        by = []
        for batch in (caption, free):
            time = torch.full((len(x),), now)
            by.append(model(dataclasses.replace(batch, latents=x, noise=x, time=time)).prediction)
        x = x + (then - now) * (by[1] + sampler.guidance * (by[0] - by[1]))
    return x


@torch.no_grad()
def again(model: UnifiedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Greedy decoding that computes every token again at every step."""
    rows = [list(prompt) for prompt in prompts]
    for _ in range(new):
        batch = one_a_row([build_sample("p", "lm", [Text(row)]) for row in rows])
        last = torch.zeros_like(batch.tokens, dtype=torch.bool)
        last[:, -1] = True
        for row, token in zip(rows, model(batch, logits_at=last).logits.argmax(-1).tolist(), strict=True):
            row.append(token)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def images(model: UnifiedModel, size: Size) -> list[Contender]:
    sampler, noise = Sampler(STEPS, 3.0), start_noise(0, range(ROWS), (SIDE // 4) ** 2, PATCH)
    caption, free = pictures(min(24, size.vocab - 4)), pictures(1)
    both, apart = one_a_row(caption + free), (one_a_row(caption), one_a_row(free))
    return [
        Contender("two forwards a step", lambda: two_forwards(model, *apart, noise, sampler)),
        Contender("ours", lambda: sample_latents(model, both, noise, sampler, "velocity")),
    ]


def words(model: UnifiedModel, size: Size, length: int, new: int) -> list[Contender]:
    prompts = torch.randint(3, size.vocab, (ROWS, length), generator=torch.Generator().manual_seed(0)).tolist()
    batch = one_a_row([build_sample("p", "lm", [Text(prompt)]) for prompt in prompts])
    assert greedy(model, batch, NEVER, 3) == again(model, prompts, 3)
    return [
        Contender(f"every token again, {length}", lambda: again(model, prompts, new)),
        Contender(f"ours, {length}", lambda: greedy(model, batch, NEVER, new)),
        Contender(f"ours, first word, {length}", lambda: greedy(model, batch, NEVER, 1)),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    asked = chosen(parser(__doc__, ("tiny", "small")), arguments)
    tables: dict[str, list[dict[str, Any]]] = {}
    seconds = {}
    for size in (SIZES[name] for name in asked.sizes):
        model = unified(size).eval()
        found = race(images(model, size), asked.rounds, asked.clock)
        tables[f"{size.name}: {ROWS} images of {(SIDE // 4) ** 2} latents, {STEPS} steps"] = compared(
            found, found[0].name
        )
        seconds[f"{size.name} images"] = {c.name: c.seconds for c in found}
        rows, new = [], 4 if asked.quick else 8
        for length in (16,) if asked.quick else (16, 128, 512, 1024):
            naive, ours, first = race(words(model, size, length, new), asked.rounds, asked.clock)
            each = 1000 / (ROWS * new)
            row = {"prompt": length, "every token again, ms": f"{naive.median * each:.2f}"}
            row |= {"ours, ms": f"{ours.median * each:.2f}", "time / again": spread(ratio(ours, naive))}
            further = 1000 * (ours.median - first.median) / (ROWS * (new - 1))
            rows.append(row | {"behind the first word, ms": f"{further:.2f}"})
            seconds[f"{size.name} words {length}"] = {c.name: c.seconds for c in (naive, ours, first)}
        tables[f"{size.name}: {ROWS} rows of words, {new} new tokens, a token and row"] = rows
    report("sampling: images and words", tables, asked.out, seconds)


if __name__ == "__main__":
    main()
