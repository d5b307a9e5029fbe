"""What a run prints before and after training, as rich tables; `render` makes plain text of them for files.

Every table is built from plain values by a function that prints nothing.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from symbiotic.layout import shield_kinds
from symbiotic.schema import Config
from symbiotic.studies.inventory import SHOWN_KINDS, Component
from symbiotic.training.phases import active_phases, balance_weight, bounds, role_factor, role_rates

NONE = "–"


def render(*parts: RenderableType, width: int = 120) -> str:
    """Plain text without colours, for `summary.txt`."""
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, legacy_windows=False)
    for part in parts:
        console.print(part)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def show(*parts: RenderableType) -> None:
    """The same on standard output; 120 columns where it is no terminal."""
    console = Console()
    console = console if console.is_terminal else Console(width=120)
    for part in parts:
        console.print(part)


def make_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    caption: str | None = None,
    wrap: Sequence[int] = (),
    words: Sequence[int] = (),
) -> RenderableType:
    """First column left, the others right; a row whose first cell is `total` stands below a line.

    wrap: columns that may break over lines. words: those of prose, which stand left and may break, too. The caption
    stands below at full width, whatever the table's.
    """
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for i, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if i and i not in words else "left"
        table.add_column(column, justify=justify, no_wrap=i > 0 and i not in wrap and i not in words)
    for row in rows:
        if row[0] == "total":
            table.add_section()
        table.add_row(*row)
    return Group(table, Padding(Text(caption, style="italic"), (0, 2))) if caption else table


# --------------------------------------------------------------------------- phases


def phase_table(config: Config, roles: Sequence[str] | None = None) -> RenderableType:
    """Steps, shield level, learning rates, balance weight, frozen roles and data mix of every phase that runs.

    roles: those that the model's parameters really have (default: all of the config). Roles that always share
    their rate share a column; a rate reads start → peak → end of the phase. A phase that may end earlier, by a metric,
    is marked, and the caption says by which.
    """
    shielded = bool(shield_kinds(config.system))
    groups = rate_groups(config, list(roles or config.rates.roles))
    rows, first = [], 0
    for phase in active_phases(config.phases):
        until = min(phase.until, config.phases.steps)
        balance = balance_weight(config.objective, phase)
        rates = [rate_text(config, group[0], first, until) for group in groups]
        level = f"{phase.shield:g}" if shielded else NONE
        frozen = ", ".join(phase.frozen) or NONE
        steps = f"{first}–{until - 1}" + ("*" if phase.when else "")
        rows.append([phase.name, steps, level, *rates, f"{balance:g}", frozen, mix_text(phase.mix)])
        first = until
    columns = ["phase", "steps", "shield", *(f"rate of {', '.join(g)}" for g in groups), "balance", "frozen", "mix"]
    if all(phase.mix is None for phase in config.phases.list):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    if config.system.task_router:
        columns.append("routed by")
        rows = [[*row, phase.route_by] for row, phase in zip(rows, active_phases(config.phases), strict=True)]
    early = [f"{p.name}: as soon as {p.when.metric} {bounds(p.when)}" for p in config.phases.list if p.when]
    title = f"Phases of joint training, system {config.system.name}"
    caption = "* or earlier, and the next phase starts then: " + "; ".join(early) if early else None
    return make_table(title, columns, rows, caption, wrap=range(3, len(columns)))


def mix_text(mix: Mapping[str, float] | None) -> str:
    """`t2i 3 : lm 2`; – where the phase goes on with the mix before it."""
    return " : ".join(f"{name} {weight:g}" for name, weight in mix.items() if weight) if mix else NONE


def rate_groups(config: Config, roles: Sequence[str]) -> list[list[str]]:
    """Roles whose rates agree in every phase, together; in the order of the config."""
    total = config.phases.steps
    starts = sorted({0, total - 1, *(p.until for p in active_phases(config.phases)[:-1]), *looked_at(0, total)})
    groups: dict[tuple[float, ...], list[str]] = {}
    by_start = [role_rates(config.rates, config.phases, step, roles) for step in starts]
    for role in roles:
        groups.setdefault(tuple(rates[role] for rates in by_start), []).append(role)
    return list(groups.values())


def looked_at(first: int, until: int) -> range:
    """At most about 500 steps of a stretch, evenly spread."""
    return range(first, until, 1 + (until - first) // 500)


def rate_text(config: Config, role: str, first: int, until: int) -> str:
    """`1e-05 → 3e-04`: the rate at the first and last step of a phase, and the peak between where it is neither."""
    rates, total = config.rates, config.phases.steps
    steps = sorted({first, until - 1, *looked_at(first, until)})
    peak = max(steps, key=lambda step: role_factor(rates, total, step, role))
    values = [f"{role_rates(rates, config.phases, step, [role])[role]:.1e}" for step in (first, peak, until - 1)]
    kept = [value for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return " → ".join(kept)


# --------------------------------------------------------------------------- parameters and tokens


def parameter_table(components: Sequence[Component], title: str = "Parameters") -> RenderableType:
    """Total, and active: what one token of a kind passes through (see `inventory.inventory`)."""
    rows = [[c.name, f"{c.total:,}", *(number(c.active[kind]) for kind in SHOWN_KINDS)] for c in components]
    sums = [sum(c.active[kind] for c in components) for kind in SHOWN_KINDS]
    rows.append(["total", f"{sum(c.total for c in components):,}", *(number(s) for s in sums)])
    columns = ["component", "total", *(f"active, {label}" for label in SHOWN_KINDS.values())]
    caption = "Active: used by one token; of a lookup table one row. Routed experts: top-k of those it sees."
    return make_table(title, columns, rows, caption)


def number(value: float) -> str:
    return f"{round(value):,}" if value else NONE


def token_table(tokens: Mapping[str, int], latents: int | None = None, steps: int | None = None) -> RenderableType:
    """Tokens per task; `latents`: how many of all are latents (the other tokens of image generation are captions)."""
    total = sum(tokens.values())
    rows = [[task, f"{n:,}", percent(n, total)] for task, n in tokens.items()]
    rows.append(["total", f"{total:,}", percent(total, total)])
    caption = None if latents is None else f"{percent(latents, total)} of all tokens are latents"
    title = "Tokens per task" if steps is None else f"Tokens per task in {steps} steps"
    return make_table(title, ["task", "tokens", "share"], rows, caption)


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else NONE


# --------------------------------------------------------------------------- split


def split_table(receipt: Mapping[str, Any]) -> RenderableType:
    """Which experts of the parent went to which pool, layer by layer, and what became of the gates.

    receipt: `experts` [{pool: [expert, ..]} per layer], `parameters` {before, after, added, latent_modules},
    `gate_identity` [{tokens_inside, max_gate_change, factor: [low, high], choice_kept} per layer], `masks_off`
    {max_logit_change} or None.
    """
    pools = list(receipt["experts"][0]) if receipt["experts"] else []
    rows = []
    for layer, (experts, gates) in enumerate(zip(receipt["experts"], receipt["gate_identity"], strict=True)):
        cells = [ranges(experts[pool]) for pool in pools]
        low, high = gates["factor"]
        factor = f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g}–{high:.4g}"
        kept = percent(gates["choice_kept"], 1) if "choice_kept" in gates else NONE  # receipts of older code
        inside = percent(gates["tokens_inside"], 1)
        rows.append([str(layer), *cells, inside, kept, f"{gates['max_gate_change']:.1e}", factor])
    n = receipt["parameters"]
    caption = (
        f"Parameters {n['before']:,} before, {n['after']:,} after ({n['added']:+,}), and {n['latent_modules']:,} for "
        "latents. Top-k inside: tokens whose old experts are all still visible; gate change and factor are theirs."
    )
    masks_off = receipt.get("masks_off")
    if masks_off is not None:
        caption += f" With the masks off, logits change by {masks_off['max_logit_change']:.1e} at most."
    measured = ["top-k inside", "choice kept", "gate change", "gate factor"]
    columns = ["layer", *(f"pool {pool} ({_size(receipt, pool)})" for pool in pools), *measured]
    return make_table("Split: experts of the parent by pool", columns, rows, caption, wrap=range(1, 1 + len(pools)))


def _size(receipt: Mapping[str, Any], pool: str) -> int:
    """Experts of a pool in a layer: as many in each."""
    return len(receipt["experts"][0][pool])


def ranges(numbers: Iterable[int]) -> str:
    """`0–3 7 9–10` of [0, 1, 2, 3, 7, 9, 10]."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return " ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs) or NONE


# --------------------------------------------------------------------------- summary


def summary_table(
    scores: Mapping[str, Mapping[str, Any]], title: str = "Scores", caption: str | None = None
) -> RenderableType:
    """Scores of every stage, its anchors first: {"stage 0": {name: score}, "iteration 0": .., "step 450": ..}.

    A score is a number or (number, samples). The last column is the change from the last but one stage, here from
    iteration 0 to the end; a score that a stage lacks reads –.
    """
    stages = list(scores)
    names = list(dict.fromkeys(name for stage in stages for name in scores[stage]))
    rows = []
    for name in names:
        values = [value_of(scores[stage].get(name)) for stage in stages]
        counts = [count for stage in stages if (count := count_of(scores[stage].get(name)))]
        change = values[-1] - values[-2] if len(values) > 1 else math.nan
        rows.append([name, str(counts[-1]) if counts else NONE, *map(score, values), score(change, sign=True)])
    change_column = f"change from {stages[-2]}" if len(stages) > 1 else "change"
    return make_table(title, ["score", "n", *stages, change_column], rows, caption)


def value_of(entry: Any) -> float:
    entry = entry[0] if isinstance(entry, tuple | list) else entry
    return math.nan if entry is None else float(entry)


def count_of(entry: Any) -> int | None:
    return int(entry[1]) if isinstance(entry, tuple | list) else None


def score(value: float, sign: bool = False) -> str:
    return NONE if math.isnan(value) else format(value, "+.3f" if sign else ".3f")


def path_list(paths: Mapping[str, Any]) -> str:
    """`grid  …/samples/step=000450.png`, one a line."""
    width = max((len(name) for name in paths), default=0)
    return "\n".join(f"{name:<{width}}  {path}" for name, path in paths.items())
