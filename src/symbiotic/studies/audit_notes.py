"""What an audit says and does not refuse: one line each, for the head of a report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from symbiotic.studies.runs_of import listed

if TYPE_CHECKING:
    from symbiotic.studies.audit import Arm


def notes(arms: Sequence[Arm], step: int | None) -> list[str]:
    """Unequal seeds, scores without a number, alarms and users that changed the training, steps left out, controls that
    did not see the same understanding tokens."""
    seeds = {arm.name: tuple(run.seed for run in arm.runs) for arm in arms}
    lines = []
    if len(set(seeds.values())) > 1:
        listing = "; ".join(f"{name}: {', '.join(map(str, found))}" for name, found in seeds.items())
        lines.append(f"arms have different seeds ({listing}); each pair is compared over the seeds that both have")
    lines += [
        f"no number for {listed(names)}: {arm.name}, seed {seed}; its means are over the others"
        for arm in arms
        for seed, names in without_number(arm, step).items()
    ]
    lines += [
        f"the collapse alarm changed the training of {arm.name}, seed {', '.join(map(str, arm.intervened))}"
        for arm in arms
        if arm.intervened
    ]
    lines += [
        f"{arm.name}, seed {seed}, was changed after it had begun: {', '.join(keys)} (changes.json of its folder)"
        for arm in arms
        for seed, keys in arm.changed.items()
    ]
    lines += [
        f"{arm.name}, seed {seed}: {count} steps were left out, as their loss or gradient was not finite"
        for arm in arms
        for seed, count in arm.skipped.items()
    ]
    named = {arm.name: arm for arm in arms}
    for arm in arms:
        unlike = unmatched(arm, named[arm.control]) if arm.control is not None else []
        lines += [f"{arm.control} is no control of {arm.name} at matched tokens: {one}" for one in unlike]
    return lines


def without_number(arm: Arm, step: int | None) -> dict[int, list[str]]:
    """Seed -> scores that were measured in it, or in another seed of the arm, and that it has no number of, as its
    training diverged or the benchmark failed."""
    names = dict.fromkeys(name for run in arm.runs for name in run.names(step) if arm.has(name))
    found = {run.seed: [name for name in names if run.score(name, step) is None] for run in arm.runs}
    return {seed: lost for seed, lost in found.items() if lost}


def unmatched(arm: Arm, control: Arm) -> list[str]:
    """Understanding tasks of which a control saw another number of tokens, where both counted them."""
    counted = [{run.seed: run.summary.get("tokens") or {} for run in one.runs} for one in (arm, control)]
    lines = []
    for seed in sorted(set(counted[0]) & set(counted[1])):
        mine, its = counted[0][seed], counted[1][seed]
        tasks = [task for task in mine if not task.startswith("t2i") and task not in ("latents", "places")]
        lines += [
            f"seed {seed}, {task}: {its.get(task, 0)} tokens, not {mine[task]}"
            for task in tasks
            if its and its.get(task, 0) != mine[task]
        ]
    return lines
