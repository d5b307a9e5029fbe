"""What each factor of a study does: main effects and interactions, from the arms of its design alone.

No model is fitted. An effect is a difference between arms that are equal in every other factor, averaged over all such
pairs, within each seed; the interval is over seeds. So it can be told where combinations are left out (no shield
without shared experts): only pairs that are there count, and what has none is not told.

    main effect of f, level l      mean of  y(f=l) - y(f=base)                                over pairs of arms
    interaction of (f, l), (g, m)  mean of  [y(l, m) - y(base, m)] - [y(l, base) - y(base, base)]   over quadruples:
                                   how much more f does where g is at m
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from symbiotic.studies.statistics import Comparison, Seeds, compare, holm

Levels = Mapping[str, Mapping[str, str]]
"""Arm -> factor -> level."""

Change = tuple[str, str, str]
"""Factor, the level it is held against, and the other."""


@dataclass(frozen=True)
class Effect:
    """
    Args:
        changes: one of a main effect, two of an interaction. groups: pairs or quadruples of arms that it averages.
        comparison: over seeds that all of these arms have; None without such a seed. holm: its p over seeds, adjusted
            for all effects on the same score.
    """

    changes: tuple[Change, ...]
    groups: int
    comparison: Comparison | None
    holm: float | None = None

    @property
    def name(self) -> str:
        return " × ".join(f"{factor}: {level}" for factor, _, level in self.changes)


def effects(levels: Levels, design: Mapping[str, Sequence[str]], values: Mapping[str, Seeds]) -> list[Effect]:
    """Main effects, then interactions of two factors, that any arms can tell.

    Args:
        levels: of the arms. design: factor -> its levels, the one that the others are held against first.
        values: arm -> seed -> score.
    """
    changes = [(factor, known[0], level) for factor, known in design.items() for level in known[1:]]
    pairs = [one for one in itertools.combinations(changes, 2) if one[0][0] != one[1][0]]
    found = [effect(levels, values, chosen) for chosen in [*((change,) for change in changes), *pairs]]
    told = [one for one in found if one.groups]
    adjusted = holm([one.comparison.p_seeds if one.comparison else None for one in told])
    return [Effect(one.changes, one.groups, one.comparison, p) for one, p in zip(told, adjusted, strict=True)]


def effect(levels: Levels, values: Mapping[str, Seeds], changes: tuple[Change, ...]) -> Effect:
    """One effect; without groups where the design has no arms for it."""
    groups, first, second = sides(levels, values, changes)
    return Effect(changes, groups, compare(first, second))


def sides(levels: Levels, values: Mapping[str, Seeds], changes: tuple[Change, ...]) -> tuple[int, Seeds, Seeds]:
    """How many groups of arms tell an effect, and by seed the means of what counts for it and against it."""
    groups = matched({arm: of for arm, of in levels.items() if arm in values}, changes)
    arms = {arm for group in groups for arm in group.values()}
    seeds = sorted(set.intersection(*(set(values[arm]) for arm in arms))) if arms else []
    found: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for seed in seeds:
        for positive, side in zip((True, False), found, strict=True):
            summed = [
                sum(values[arm][seed] for signs, arm in group.items() if (signs.count(False) % 2 == 0) == positive)
                for group in groups
            ]
            side[seed] = sum(summed) / len(groups)
    return len(groups), *found


def named(text: str, design: Mapping[str, Sequence[str]]) -> tuple[Change, ...] | None:
    """The changes of an effect's name, as in `pools: two × rates: two`; None where the design has no such."""
    words = [part.partition(": ") for part in text.split(" × ")]
    known = all(level in design.get(factor, ())[1:] for factor, _, level in words)
    apart = len({factor for factor, _, _ in words}) == len(words) <= 2
    return tuple((factor, design[factor][0], level) for factor, _, level in words) if known and apart else None


def matched(levels: Levels, changes: tuple[Change, ...]) -> list[dict[tuple[bool, ...], str]]:
    """Groups of arms that are equal in every other factor and have all combinations of these changes: whether each
    change is made -> arm."""
    varied = {factor for factor, _, _ in changes}
    groups: dict[tuple[tuple[str, str], ...], dict[tuple[bool, ...], str]] = {}
    for arm, of in levels.items():
        if all(of[factor] in (base, level) for factor, base, level in changes):
            rest = tuple(sorted((factor, level) for factor, level in of.items() if factor not in varied))
            groups.setdefault(rest, {})[tuple(of[factor] == level for factor, _, level in changes)] = arm
    return [group for group in groups.values() if len(group) == 2 ** len(changes)]
