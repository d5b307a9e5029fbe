"""What the router inspector prints: token by layer grids that fit a terminal, and a summary by kind of token."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from symbiotic.studies.console import NONE, make_table
from symbiotic.studies.inspection_attribution import Attribution
from symbiotic.studies.inspection_trace import Inspection, KindSummary, Layer, by_kind, used

WIDTH = 120
NAMED = 3
"""Experts that a cell names; of more it says how many."""


@dataclass(frozen=True)
class Row:
    """A token, or (when there are several places) all patches of an image."""

    places: tuple[int, ...]
    label: str
    kind: str


def report(inspection: Inspection, rows: int = 40, patches: bool = False) -> list[RenderableType]:
    """Facts, notes, the grids of gates and of the shared share, the summary by kind.

    rows: tokens shown at most. patches: one row for each patch of an image, in place of one for all of them.
    """
    parts: list[RenderableType] = [Text(line) for line in header(inspection)]
    if inspection.attribution is not None:
        parts.append(attribution_table(inspection, inspection.attribution, rows, patches))
    if not inspection.layers:
        return parts
    listed = list(listed_rows(inspection, patches))
    shown, left = listed[:rows], len(listed) - rows
    more = f" {left} more rows: rows={len(listed)} shows them." if left > 0 else ""
    gates = "Experts of each token and their gates; of an image, the share of its assignments." + more
    share = "|shared| / (|shared| + |routed|), of what the layer adds; of an image, the mean." + more
    parts += grids("Routing", inspection.layers, shown, lambda layer, row: cell(layer, row, inspection.experts), gates)
    parts += grids("Share of the shared experts", inspection.layers, shown, share_cell, share)
    return [*parts, kind_table(by_kind(inspection))]


def header(inspection: Inspection) -> list[str]:
    facts = {name: value for name, value in inspection.facts.items() if value is not None}
    lines = [f"{facts['system']}, {facts['task']}: {facts['prompt']!r}", f"weights {facts['weights']}"]
    lines += [f"image {facts['image']}"] if "image" in facts else []
    lines += [f"flow time {facts['time']:g}, noise of seed {facts['seed']}"] if "time" in facts else []
    pools = ", ".join(f"{pool} {size}" for pool, size in inspection.pools.items())
    lines += [f"compared with {facts['against']}"] if "against" in facts else []
    lines += [f"routed experts a layer: {pools}; top {facts['top_k']}"] if pools else []
    return lines + [f"note: {note}" for note in inspection.notes] + [""]


def listed_rows(inspection: Inspection, patches: bool) -> Iterator[Row]:
    """Words one by one; neighbouring patches together, unless they are wanted one by one."""
    for is_image, group in itertools.groupby(inspection.tokens, lambda token: token.grid is not None):
        tokens = list(group)
        if is_image and not patches:
            yield Row(tuple(token.place for token in tokens), f"{len(tokens)} patches", tokens[0].kind)
        else:
            yield from (Row((token.place,), token.word, token.kind) for token in tokens)


# --------------------------------------------------------------------------- attribution


def attribution_table(inspection: Inspection, found: Attribution, rows: int, patches: bool) -> RenderableType:
    """Tokens by what they add to the score, the largest first; of an image the sum of its patches."""
    values = {row: float(found.values_N[list(row.places)].sum()) for row in listed_rows(inspection, patches)}
    body = [[escape(row.label), row.kind, signed(values[row])] for row in sorted(values, key=lambda r: -abs(values[r]))]
    caption = (
        f"Of {found.about}. Input {signed(found.score)}, nothing said {signed(found.baseline)}; the values add up to "
        f"the difference but for {signed(found.gap)}."
    )
    return make_table("What it depends on", ["token", "kind", "adds"], body[:rows], caption)


def signed(value: float) -> str:
    return f"{value:+.3g}"


# --------------------------------------------------------------------------- grids


def grids(
    title: str, layers: Sequence[Layer], rows: Sequence[Row], content: Callable[[Layer, Row], str], caption: str
) -> list[RenderableType]:
    """Tokens down, layers across, in as many tables as the width needs."""
    cells = [[content(layer, row) for layer in layers] for row in rows]
    wide = max(len(text) for row in cells for text in row) + 2
    label = max(len(row.label) for row in rows) + max(len(row.kind) for row in rows) + 6
    count = max(1, (WIDTH - label) // max(wide, len("layer 00") + 2))
    tables = []
    for start in range(0, len(layers), count):
        columns = ["token", "kind", *(f"layer {layer.block}" for layer in layers[start : start + count])]
        body = [[escape(r.label), r.kind, *c[start : start + count]] for r, c in zip(rows, cells, strict=True)]
        last = start + count >= len(layers)
        tables.append(make_table(title, columns, body, caption if last else None))
    return tables


def cell(layer: Layer, row: Row, experts: Sequence[str]) -> str:
    """`und3 .71 und5 .29`, highest gate first; of several tokens `und3 40% und1 33% +4`."""
    index = list(row.places)
    if len(index) == 1:
        gates, order = layer.gates_NK[index[0]].sort(descending=True, stable=True)
        chosen = layer.experts_NK[index[0]][order].tolist()
        parts = [f"{experts[e]} {decimal(g)}" for e, g in zip(chosen, gates.tolist(), strict=True)]
    else:
        parts = [f"{name} {share:.0%}" for name, share in used(layer.experts_NK[torch.tensor(index)], experts)]
    more = [f"+{len(parts) - NAMED}"] if len(parts) > NAMED else []
    return " ".join(parts[:NAMED] + more)


def share_cell(layer: Layer, row: Row) -> str:
    return decimal(float(layer.share_N[list(row.places)].mean()))


def decimal(value: float) -> str:
    """`.71`, `1.00`."""
    return f"{value:.2f}".removeprefix("0")


# --------------------------------------------------------------------------- kinds


def kind_table(summaries: Sequence[KindSummary]) -> RenderableType:
    compare = any(summary.changed is not None for summary in summaries)
    rows = []
    for summary in summaries:
        changed = NONE if summary.changed is None else f"{summary.changed:.0%}"
        named = " ".join(f"{name} {share:.0%}" for name, share in summary.used[: 2 * NAMED])
        cells = [f"{summary.kind}, layer {summary.block}", str(summary.tokens), decimal(summary.share)]
        rows.append([*cells, decimal(summary.entropy), *([changed] if compare else []), named])
    columns = ["kind", "tokens", "shared share", "entropy", *(["changed"] if compare else []), "most used experts"]
    caption = (
        "Means over the tokens. Entropy of the router over its highest value: 1 is uniform. Experts: share of the "
    )
    caption += "assignments."
    if compare:
        caption += " Changed: tokens whose set of experts is not that of the weights compared with."
    return make_table("By kind of token", columns, rows, caption)
