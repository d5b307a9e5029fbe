"""How soon a run gets there: the first step at which a score reaches a target, as a score of its own.

`steps_to/flow_error@0.05` is the step at which the flow error fell to 0.05, by evaluations in the course of training:
on a straight line between the two around it (of the logarithms, where errors fall by factors). A run that never got
there has no such step, and is not a slow one: it is told, not counted.
"""

from __future__ import annotations

import math
import re

from symbiotic.evaluation.names import STEPS_TO, metric
from symbiotic.studies.curves import Series

NAME = re.compile(rf"{STEPS_TO}(?P<score>.+)@(?P<target>[-+.\de]+)")


def parsed(name: str) -> tuple[str, float] | None:
    """Score and target of `steps_to/SCORE@TARGET`; None for another name."""
    found = NAME.fullmatch(name)
    try:
        return (found["score"], float(found["target"])) if found else None
    except ValueError:
        return None


def steps_to(series: Series, target: float, better: str) -> float | None:
    """The first step at which the series reaches the target; None where it never does, or begins beyond it."""
    sign = 1.0 if better == "higher" else -1.0
    steps, values = series
    if not steps or sign * values[0] >= sign * target:
        return None
    for i in range(1, len(steps)):
        if sign * values[i] >= sign * target:
            before, after = values[i - 1], values[i]
            if better == "lower" and min(before, after, target) > 0:
                before, after, goal = (math.log(value) for value in (before, after, target))
            else:
                goal = target
            return steps[i - 1] + (steps[i] - steps[i - 1]) * (goal - before) / (after - before)
    return None


def reached(name: str, series: Series) -> float | None:
    """Of a score named `steps_to/SCORE@TARGET`, whose series over the steps this is."""
    found = parsed(name)
    return None if found is None else steps_to(series, found[1], metric(found[0]).better)
