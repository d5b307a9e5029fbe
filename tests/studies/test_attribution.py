"""Effects of factors: planted ones come back, also where combinations are left out; the interval is scipy's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from symbiotic.studies.attribution import Effect, effects
from symbiotic.studies.statistics import Seeds

DESIGN = {"pools": ["one", "two"], "rates": ["one rate", "two rates"], "shield": ["off", "on"], "shared": ["no", "yes"]}
LEVELS = {
    ", ".join(levels): dict(zip(DESIGN, levels, strict=True))
    for levels in itertools.product(*DESIGN.values())
    if not (levels[2] == "on" and levels[3] == "no")  # no shield without shared experts
}
PLANTED = {"pools": 0.3, "rates": -0.1, "shield": 0.05, "shared": 0.7}


def planted(arm: str) -> float:
    on = {factor: level == DESIGN[factor][1] for factor, level in LEVELS[arm].items()}
    return sum(PLANTED[factor] for factor, is_on in on.items() if is_on) + 0.25 * (on["pools"] and on["rates"])


def found(values: dict[str, Seeds]) -> dict[str, Effect]:
    return {one.name: one for one in effects(LEVELS, DESIGN, values)}


def test_planted_effects_come_back_from_twelve_of_sixteen_arms() -> None:
    noise = {seed: np.random.default_rng(seed).normal() for seed in range(4)}  # of a seed, the same in all arms
    told = found({arm: {seed: planted(arm) + noise[seed] for seed in noise} for arm in LEVELS})
    assert len(LEVELS) == 12
    means = {name: one.comparison.mean for name, one in told.items() if one.comparison is not None}
    assert means["pools: two"] == pytest.approx(0.3 + 0.25 / 2)
    assert means["rates: two rates"] == pytest.approx(-0.1 + 0.25 / 2)
    assert means["shield: on"] == pytest.approx(0.05)
    assert means["shared: yes"] == pytest.approx(0.7)
    assert means["pools: two × rates: two rates"] == pytest.approx(0.25)
    assert means["pools: two × shared: yes"] == pytest.approx(0.0)
    assert "shield: on × shared: yes" not in told  # no quadruple of arms can tell it
    assert {name: told[name].groups for name in ("pools: two", "shield: on", "shared: yes")} == {
        "pools: two": 6,
        "shield: on": 4,
        "shared: yes": 4,
    }


def test_the_interval_is_that_of_the_mean_difference_within_seeds() -> None:
    random = np.random.default_rng(0)
    values = {arm: {seed: float(random.normal()) for seed in range(5)} for arm in LEVELS}
    one = found(values)["shield: on"]
    pairs = [
        (a, b)
        for a, b in itertools.permutations(LEVELS, 2)
        if LEVELS[a] == LEVELS[b] | {"shield": "on"} and LEVELS[b]["shield"] == "off"
    ]
    differences = [np.mean([values[a][seed] - values[b][seed] for a, b in pairs]) for seed in range(5)]
    expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    assert one.comparison is not None
    assert one.comparison.mean == pytest.approx(np.mean(differences))
    assert one.comparison.t == pytest.approx((expected.low, expected.high))
    assert one.holm is not None
    assert one.holm >= (one.comparison.p_seeds or 0)


def test_an_arm_that_is_missing_takes_its_pair_away_and_a_seed_its_value() -> None:
    values = {arm: {0: planted(arm), 1: planted(arm) + 1} for arm in LEVELS}
    del values["two, two rates, on, yes"]
    del values["one, one rate, off, no"][1]  # type: ignore[attr-defined]
    told = found(values)
    assert told["shield: on"].groups == 3
    assert told["shield: on"].comparison is not None
    assert told["shield: on"].comparison.n == 2
    assert told["shared: yes"].comparison is not None
    assert told["shared: yes"].comparison.n == 1


def test_several_levels_are_each_held_against_the_first() -> None:
    design = {"ratio": ["1:1", "1:3", "3:1"], "split": ["profile", "random"]}
    levels = {f"{a} {b}": {"ratio": a, "split": b} for a in design["ratio"] for b in design["split"]}
    height = {"1:1": 0.0, "1:3": 2.0, "3:1": 5.0, "profile": 0.0, "random": 1.0}
    values = {arm: {0: height[of["ratio"]] + height[of["split"]]} for arm, of in levels.items()}
    told = {one.name: one.comparison.mean for one in effects(levels, design, values) if one.comparison}
    assert told == {
        "ratio: 1:3": 2.0,
        "ratio: 3:1": 5.0,
        "split: random": 1.0,
        "ratio: 1:3 × split: random": 0.0,
        "ratio: 3:1 × split: random": 0.0,
    }
