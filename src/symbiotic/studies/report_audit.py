"""The audit in a report: in what the arms differ, what each costs, what is absent."""

from __future__ import annotations

from collections.abc import Sequence

from symbiotic.schema import KINDS
from symbiotic.studies.audit import Audit, KeyDifference
from symbiotic.studies.budget import FAMILIES, Budget, Part
from symbiotic.studies.curves import KIND_NAMES
from symbiotic.studies.report_document import Block, Cell, Column, Folded, Items, Row, Table, Text
from symbiotic.studies.report_tables import NONE

SAME = "="
LONG = 160
"""Characters of a value that are shown."""


def audit_blocks(audit: Audit) -> list[Block]:
    blocks: list[Block] = [Items(audit.problems)] if audit.problems else [Text(["No run of the study is missing."])]
    blocks.append(difference_table(audit) if audit.differences else Text(["The arms differ in no key of the config."]))
    blocks += [cost_table(audit), tokens_table(audit)]
    if audit.overheads:
        blocks.append(overhead_table(audit))
    return [*blocks, Folded("Parameters of every component", [component_table(audit)])]


# --------------------------------------------------------------------------- config keys


def difference_table(audit: Audit) -> Table:
    """One row a key; the reference arm's value first, of the others those that are not the same."""
    reference = str(audit.study.reference)
    others = [arm.name for arm in audit.arms if arm.name != reference]
    rows = [Row(found.key, key_cells(found, reference, others), note=found.group) for found in audit.differences]
    columns = [Column("key"), Column("declared factor"), Column(reference, "reference"), *map(Column, others)]
    text = f"Every config key in which arms differ, and the declared factor that covers it. {SAME} as in {reference}."
    return Table(text, columns, rows, words=True)


def key_cells(found: KeyDifference, reference: str, others: Sequence[str]) -> list[Cell]:
    base = found.values[reference]
    texts = [SAME if found.values[name] == base else found.values[name] for name in others]
    return [Cell(found.factor), *(Cell(shortened(text)) for text in (base, *texts))]


def shortened(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]}… ({len(text)} characters)"


# --------------------------------------------------------------------------- costs


def cost_table(audit: Audit) -> Table:
    """Parameters, those that a token of each kind uses, and operations of a token in training."""
    rows = []
    for name, made in audit.budgets.items():
        active = [count(made.active[kind]) for kind in KINDS]
        flops = [f"{made.flops.training[kind] / 1e6:.2f}" for kind in KINDS]
        seconds = NONE if made.seconds is None else f"{made.seconds:.0f}"
        texts = [count(made.total), count(made.trainable), *active, *flops, str(made.steps), seconds]
        rows.append(Row(name, [*map(Cell, texts)]))
    columns = [Column("arm"), Column("parameters"), Column("trainable")]
    columns += [Column("active", KIND_NAMES[kind]) for kind in KINDS]
    columns += [Column("training MFLOP", KIND_NAMES[kind]) for kind in KINDS]
    columns += [Column("steps"), Column("joint training, s", "mean over seeds")]
    lengths = " or ".join(dict.fromkeys(str(made.row_tokens) for made in audit.budgets.values()))
    text = (
        "What an arm costs: parameters, those that one token of a kind uses, and floating-point operations of one "
        f"token in training (matrix products and attention in rows of {lengths}; 3 forwards, 4 where recomputed)."
    )
    return Table(text, columns, rows)


def tokens_table(audit: Audit) -> Block:
    """Tokens that joint training saw of each task."""
    tasks = list(dict.fromkeys(task for made in audit.budgets.values() for task in made.tokens))
    if not tasks:
        return Text(["These runs did not count the tokens of each task."])
    rows = [Row(name, [Cell(ranged(made, task)) for task in tasks]) for name, made in audit.budgets.items()]
    text = "Tokens seen in joint training by task, over the seeds of an arm; latents are those of both image tasks."
    return Table(text, [Column("arm"), *map(Column, tasks)], rows)


def ranged(made: Budget, task: str) -> str:
    low, high = made.tokens.get(task, (0, 0))
    return count(low) if low == high else f"{count(low)} to {count(high)}"


def overhead_table(audit: Audit) -> Table:
    """Parameters more or less than the reference arm, in all and in the components where any arm differs."""
    wanted = [f for f in FAMILIES if any(found.get(f) for found in audit.overheads.values())]
    rows = []
    for name, found in audit.overheads.items():
        added = audit.budgets[name].split.get("added")
        texts = [signed(sum(found.values())), NONE if added is None else signed(added)]
        rows.append(Row(name, [*map(Cell, texts), *(Cell(signed(found.get(family, 0))) for family in wanted)]))
    columns = [Column("arm"), Column("all"), Column("added by the split", "from the receipt"), *map(Column, wanted)]
    text = f"Parameters more or less than {audit.study.reference}, and the components where any arm differs."
    return Table(text, columns, rows)


def component_table(audit: Audit) -> Table:
    """Components by arms: all parameters, and below them what is not trained and what a token of each kind uses."""
    parts = {arm: {part.name: part for part in made.parts} for arm, made in audit.budgets.items()}
    names = sorted(dict.fromkeys(name for found in parts.values() for name in found), key=family_of)
    rows = [Row(name, [component_cell(found.get(name)) for found in parts.values()]) for name in names]
    text = "Parameters by component; below, how many of them one token of a kind uses."
    return Table(text, [Column("component"), *map(Column, parts)], rows)


def family_of(component: str) -> int:
    return next((i for i, family in enumerate(FAMILIES) if component.startswith(family)), len(FAMILIES))


def component_cell(part: Part | None) -> Cell:
    if part is None:
        return Cell(NONE)
    used: dict[str, list[str]] = {}
    for kind in KINDS:
        if part.active[kind]:
            used.setdefault(count(part.active[kind]), []).append(KIND_NAMES[kind])
    notes = [
        f"{number} {', '.join(kinds)}" if len(kinds) < len(KINDS) else f"{number} each"
        for number, kinds in used.items()
    ]
    notes += [f"{count(part.trainable)} trained"] if part.trainable != part.total else []
    return Cell(count(part.total), "; ".join(notes))


def count(value: float) -> str:
    """`1,587,648`."""
    return f"{value:,.0f}"


def signed(value: int) -> str:
    return f"{value:+,}".replace("-", "−") if value else "0"
