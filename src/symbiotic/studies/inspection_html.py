"""The router inspector as one HTML file: no script, nothing loaded from elsewhere, light and dark.

Everything that comes from outside (the prompt, words, paths) is escaped. What a cell is about stands in its `title`; a
cell that is clicked, tapped or reached by the tab key shows it at the foot of the window.
"""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from symbiotic.studies.inputs import PATCH
from symbiotic.studies.inspection_attribution import Attribution
from symbiotic.studies.inspection_inputs import Token
from symbiotic.studies.inspection_text import decimal
from symbiotic.studies.inspection_trace import Inspection, KindSummary, Layer, by_kind

HUES = 6
"""Pool colours; further pools start again from the first."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #5b6470; --page: #fff; --line: #d8dee4; --panel: #f3f5f7;
  --p0: 37 99 235; --p1: 234 108 16; --p2: 13 148 110; --p3: 200 40 140; --p4: 124 58 237; --p5: 160 130 0;
  --shared: 13 130 140; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eceff3; --dim: #9aa4b0; --page: #14171b; --line: #323941; --panel: #1e2329;
    --p0: 70 125 255; --p1: 235 115 40; --p2: 30 160 125; --p3: 225 75 165; --p4: 150 100 255; --p5: 180 145 20;
    --shared: 35 155 165; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 6rem; max-width: 80rem; color: var(--ink); background: var(--page);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .3rem; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
h3 { font-size: .85rem; margin: .5rem 0 .2rem; }
p { margin: .3rem 0; max-width: 75ch; overflow-wrap: anywhere; }
.dim { color: var(--dim); }
.prompt { font-size: 1.05rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: .5rem 0; font-size: .85rem; }
dt { color: var(--dim); }
dd { margin: 0; overflow-wrap: anywhere; }
.note { border-left: 3px solid rgb(var(--p1)); padding: .2rem .6rem; background: var(--panel); }
.picture { image-rendering: pixelated; width: min(240px, 60vw); border: 1px solid var(--line); }
.scroll { overflow-x: auto; width: max-content; max-width: 100%; margin: .6rem 0; border: 1px solid var(--line);
  border-radius: 6px; }
table, .map { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .45rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
thead th { background: var(--panel); }
tbody th { position: sticky; left: 0; background: var(--page); font-weight: 500; }
.grid tbody th { max-width: 38vw; overflow: hidden; text-overflow: ellipsis; }
i { display: inline-block; min-width: 1.8em; margin-right: 1px; padding: 0 .2em; border-radius: 3px; font-style: normal;
  text-align: center; color: var(--ink); background: rgb(var(--c) / var(--a)); }
.p0 { --c: var(--p0); } .p1 { --c: var(--p1); } .p2 { --c: var(--p2); }
.p3 { --c: var(--p3); } .p4 { --c: var(--p4); } .p5 { --c: var(--p5); }
.share { --c: var(--shared); min-width: 3.4em; }
.swatch { display: inline-block; width: .8em; height: .8em; margin-right: .35em; border: 1px solid var(--line); }
.maps { display: flex; flex-wrap: wrap; gap: 1rem; }
.map { display: grid; gap: 1px; width: max-content; }
.map .r i + i { display: none; }
.map i { min-width: 2.4em; margin: 0; }
input + label { margin: 0 1rem 0 .2rem; }
#v-routing:checked ~ * .s, #v-changed:checked ~ * .s, #v-share:checked ~ * .r { display: none; }
#v-changed:checked ~ * .same span { opacity: .15; }
.words { margin: .4rem 0; line-height: 1.9; }
:is(td, .map div, .token):focus { outline: 2px solid var(--ink); outline-offset: -1px; }
:is(td, .map div, .token):focus::after { content: attr(title); position: fixed; left: 0; right: 0; bottom: 0;
  z-index: 2; padding: .6rem 1rem; white-space: pre-wrap; background: var(--panel); border-top: 2px solid var(--ink);
  font-size: .85rem; text-align: left; }
"""


def page(inspection: Inspection) -> str:
    """The whole document."""
    prompt = escape(str(inspection.facts["prompt"]))
    parts = [head(inspection), *(f'<p class="note">{escape(note)}</p>' for note in inspection.notes)]
    parts += [picture(inspection)] if inspection.picture is not None else []
    parts += [attribution_section(inspection, inspection.attribution)] if inspection.attribution is not None else []
    if inspection.layers:
        parts += [kind_section(by_kind(inspection), inspection), grid_section(inspection)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Routing of: {prompt}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def head(inspection: Inspection) -> str:
    facts = inspection.facts
    names = {"weights": "weights", "image": "image", "time": "flow time", "seed": "seed", "against": "compared with"}
    listed = {label: facts[name] for name, label in names.items() if facts.get(name) is not None}
    if inspection.pools:
        pools = ", ".join(f"{pool} {size}" for pool, size in inspection.pools.items())
        listed["routed experts a layer"] = f"{pools}; each token uses {facts['top_k']}"
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in listed.items())
    title = f"<h1>{escape(str(facts['system']))}: routing, token by token</h1>"
    return f'{title}\n<p class="prompt">{escape(facts["task"])}: “{escape(facts["prompt"])}”</p>\n<dl>{items}</dl>'


def picture(inspection: Inspection) -> str:
    """The image that is read, or the clean end of the flow, inside the file."""
    file = io.BytesIO()
    Image.fromarray(inspection.picture).save(file, format="PNG")  # type: ignore[arg-type]
    data = base64.b64encode(file.getvalue()).decode()
    what = "The image that is read"
    if inspection.facts["task"] == "generation":
        origin = "that was given" if inspection.facts["image"] else "that the model draws"
        time = inspection.facts.get("time")
        seen = "code by code" if time is None else f"at flow time {time:g}"
        what = f"The image {origin}; the forward below sees it {seen}"
    source = f"data:image/png;base64,{data}"
    return f'<img class="picture" alt="{what}" src="{source}"><p class="dim">{what}.</p>'


# --------------------------------------------------------------------------- attribution


def attribution_section(inspection: Inspection, found: Attribution) -> str:
    """The words in a line and the patches in their places, coloured by what each adds to the score."""
    largest = float(found.values_N.abs().max()) or 1.0
    chips = {token: weighed(token, float(found.values_N[token.place]), largest) for token in inspection.tokens}
    parts = []
    for is_image, group in itertools.groupby(inspection.tokens, lambda token: token.grid is not None):
        tokens = list(group)
        columns = 1 + max(token.grid[1] for token in tokens if token.grid is not None) if is_image else 0
        kind = f'map" style="grid-template-columns: repeat({columns}, auto)' if is_image else "words"
        parts.append(f'<div class="{kind}">{"".join(chips[token] for token in tokens)}</div>')
    ends = f"Input {found.score:+.3g}, nothing said {found.baseline:+.3g}"
    text = (
        f"Of {escape(found.about)}. {ends}; the values add up to the difference but for {found.gap:+.3g}. "
        '<i class="p0" style="--a:.5">more</i> <i class="p1" style="--a:.5">less</i>'
    )
    return f'<section>\n<h2>What it depends on</h2>\n<p class="dim">{text}</p>\n' + "\n".join(parts) + "\n</section>"


def weighed(token: Token, value: float, largest: float) -> str:
    """A token on the colour of its sign, as strong as its value."""
    title = f'title="{escape(token.word)} ({token.kind}, place {token.place}): {value:+.4g}" tabindex="0"'
    label = "&nbsp;" if token.grid is not None else escape(token.word)
    return (
        f'<i class="token {"p0" if value >= 0 else "p1"}" style="--a:{alpha(abs(value) / largest)}" {title}>{label}</i>'
    )


# --------------------------------------------------------------------------- by kind


def kind_section(summaries: Sequence[KindSummary], inspection: Inspection) -> str:
    compare = any(summary.changed is not None for summary in summaries)
    titles = ["kind", "layer", "tokens", "shared share", "entropy", *(["changed"] if compare else []), "most used"]
    rows = []
    for summary in summaries:
        cells = [str(summary.block), str(summary.tokens), share_chip(summary.share), decimal(summary.entropy)]
        cells += [f"{summary.changed:.0%}"] if summary.changed is not None else []
        named = " ".join(
            f"{chip(inspection, inspection.experts.index(name), share)} {share:.0%}" for name, share in summary.used[:6]
        )
        body = "".join(f"<td>{cell}</td>" for cell in [*cells, named])
        rows.append(f'<tr><th scope="row">{summary.kind}</th>{body}</tr>')
    text = "Means over the tokens of a kind. Entropy of the router over its highest value: 1 is uniform."
    if compare:
        text += " Changed: tokens whose set of experts is not that of the weights compared with."
    return (
        f'<section>\n<h2>By kind of token</h2>\n<p class="dim">{text}</p>\n{legend(inspection)}\n'
        f'<div class="scroll"><table>\n{header_row(titles)}\n<tbody>\n' + "\n".join(rows) + "\n</tbody></table></div>\n"
        "</section>"
    )


def legend(inspection: Inspection) -> str:
    pools = " ".join(f'<i class="p{n % HUES}" style="--a:.5">{escape(p)}</i>' for n, p in enumerate(inspection.pools))
    text = "The number is the expert inside its pool, the strength of the colour its gate, or its share."
    return f'<p class="dim">Pools: {pools} {text}</p>'


def header_row(titles: Sequence[str]) -> str:
    return "<thead><tr>" + "".join(f'<th scope="col">{escape(title)}</th>' for title in titles) + "</tr></thead>"


# --------------------------------------------------------------------------- token by layer


def grid_section(inspection: Inspection) -> str:
    views = {"routing": "routing", "share": "shared share"}
    if any(layer.changed_N is not None for layer in inspection.layers):
        views["changed"] = "changed experts"
    buttons = "".join(
        f'<input type="radio" name="view" id="v-{view}"{" checked" if view == "routing" else ""}>'
        f'<label for="v-{view}">{text}</label>'
        for view, text in views.items()
    )
    rows = []
    for token in inspection.tokens:
        cells = "".join(f"<td {box(inspection, layer, token)}</td>" for layer in inspection.layers)
        label = f"{swatch(inspection, token)}{escape(token.word)}"
        rows.append(f'<tr><th scope="row" title="{escape(token.word)}">{label}</th><td>{token.kind}</td>{cells}</tr>')
    titles = ["token", "kind", *(f"layer {layer.block}" for layer in inspection.layers)]
    return (
        f"<section>\n<h2>Token by layer</h2>\n{buttons}\n"
        '<p class="dim">Click or tap a cell for its experts, gates and contributions. Shared share: '
        "|shared| / (|shared| + |routed|), the norms of what the experts add.</p>\n"
        + maps(inspection)
        + f'<div class="scroll"><table class="grid">\n{header_row(titles)}\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>\n</section>"
    )


def box(inspection: Inspection, layer: Layer, token: Token) -> str:
    """Attributes and content of a cell, from behind its tag's name."""
    n = token.place
    gates, order = layer.gates_NK[n].sort(descending=True, stable=True)
    chosen = list(zip(layer.experts_NK[n][order].tolist(), gates.tolist(), strict=True))
    chips = "".join(chip(inspection, expert, gate) for expert, gate in chosen)
    same = ' class="same"' if layer.changed_N is not None and not layer.changed_N[n] else ""
    title = escape(about(inspection, layer, token, chosen))
    share = share_chip(float(layer.share_N[n]))
    return f'tabindex="0" title="{title}"{same}><span class="r">{chips}</span><span class="s">{share}</span>'


def about(inspection: Inspection, layer: Layer, token: Token, chosen: Sequence[tuple[int, float]]) -> str:
    """What the title of a cell says, in lines."""
    n = token.place
    lines = [f"{token.word} ({token.kind}, place {n}), layer {layer.block}"]
    lines += [
        f"{inspection.experts[expert]}: gate {gate:.3f}, probability {float(layer.probs_NE[n, expert]):.3f}"
        for expert, gate in chosen
    ]
    lines.append(f"entropy of the router {float(layer.entropy_N[n]):.2f} of 1")
    added = f"shared {float(layer.shared_N[n]):.3g}, routed {float(layer.routed_N[n]):.3g}"
    lines.append(f"adds: {added}; shared share {float(layer.share_N[n]):.2f}")
    if layer.changed_N is not None:
        lines.append("another set of experts than with the other weights" if layer.changed_N[n] else "the same experts")
    return "\n".join(lines)


def chip(inspection: Inspection, expert: int, strength: float) -> str:
    """The expert's number inside its pool, on the colour of the pool."""
    ends = list(itertools.accumulate(inspection.pools.values()))
    pool = next(i for i, end in enumerate(ends) if expert < end)
    number = expert - ([0, *ends][pool])
    return f'<i class="p{pool % HUES}" style="--a:{alpha(strength)}">{number}</i>'


def share_chip(share: float) -> str:
    return f'<i class="share" style="--a:{alpha(share)}">{decimal(share)}</i>'


def alpha(strength: float) -> str:
    """Opacity of a colour, up to where the ink on it is still readable (contrast 4.5 in both schemes)."""
    return f"{0.05 + 0.6 * min(1.0, max(0.0, strength)):.2f}"


# --------------------------------------------------------------------------- images


def maps(inspection: Inspection) -> str:
    """The patches of the image in their places, layer by layer; nothing where there is no image."""
    patches = [(token, token.grid[1]) for token in inspection.tokens if token.grid is not None]
    if not patches:
        return ""
    width = 1 + max(column for _, column in patches)
    figures = []
    for layer in inspection.layers:
        cells = "".join(f"<div {box(inspection, layer, token)}</div>" for token, _ in patches)
        grid = f'<div class="map" style="grid-template-columns: repeat({width}, auto)">{cells}</div>'
        figures.append(f"<div><h3>layer {layer.block}</h3>{grid}</div>")
    title = "<h3>Patches in their places (of several experts, the one with the highest gate)</h3>"
    return f'<div>{title}\n<div class="maps">{"".join(figures)}</div></div>\n'


def swatch(inspection: Inspection, token: Token) -> str:
    """The mean colour of a patch, in front of its name."""
    if token.grid is None or inspection.picture is None:
        return ""
    row, column = (PATCH * number for number in token.grid)
    pixels = inspection.picture[row : row + PATCH, column : column + PATCH]
    red, green, blue = (int(value) for value in np.round(pixels.reshape(-1, 3).mean(0)))
    return f'<span class="swatch" style="background: rgb({red} {green} {blue})"></span>'
