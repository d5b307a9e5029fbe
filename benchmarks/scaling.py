"""(d) How the cost of a step grows: `python benchmarks/scaling.py [--quick]`.

Forward and backward of the whole model at `tiny`, one dial at a time: tokens (1k to 32k, rows of fixed length), experts
(8 to 256 at fixed top_k and active parameters), layers, and the length of rows of one sample at a fixed number of
tokens. The exponent is the slope of log time over log dial between the first and the last value; a linear cost has 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from harness import SIZES, Contender, Size, chosen, compared, parser, race, ratio, report
from sized import packed, unified

from symbiotic.objectives.total import term_weights, training_terms
from symbiotic.schema import Objective

DIALS: dict[str, tuple[int, ...]] = {
    "tokens": (1024, 4096, 16384, 32768),
    "experts": (8, 32, 128, 256),
    "layers": (2, 4, 8),
    "row": (128, 512, 2048),
}


def forward_backward(size: Size, samples: int) -> Callable[[], None]:
    model, batch, objective = unified(size), packed(size, samples), Objective()
    weights = term_weights(objective)

    def act() -> None:
        model.zero_grad()
        _, terms = training_terms(model, batch, objective, torch.zeros(()))
        sum((weights[name] * term for name, term in terms.items()), torch.zeros(())).backward()

    return act


def contenders(size: Size, dial: str, values: Sequence[int]) -> list[Contender]:
    sizes = [replace(size, **{dial: value}) for value in values]  # type: ignore[arg-type]
    return [
        Contender(f"{dial}={value}", forward_backward(each, 1 if dial == "row" else 2))
        for value, each in zip(values, sizes, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    asked = chosen(parser(__doc__, ("tiny",)), arguments)
    tables: dict[str, list[dict[str, Any]]] = {}
    seconds = {}
    for size in (SIZES[name] for name in asked.sizes):
        for dial, values in DIALS.items():
            if asked.quick or size.name == "micro":
                values = (size.row, size.tokens) if dial == "row" else values[:2]
            found = race(contenders(size, dial, values), asked.rounds, asked.clock)
            rows = compared(found, found[0].name)
            grown = ratio(found[-1], found[0])
            assert grown is not None
            slope = math.log(grown[0]) / math.log(values[-1] / values[0])
            rows.append({"contender": "exponent", "ms": "", f"time / {found[0].name}": f"{slope:.2f}"})
            tables[f"{size.name}: {dial}"] = rows
            seconds[f"{size.name} {dial}"] = {c.name: c.seconds for c in found}
    report("scaling: forward and backward of the model, one dial at a time", tables, asked.out, seconds)


if __name__ == "__main__":
    main()
