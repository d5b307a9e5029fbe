"""Phases, rates and roles: what holds at a step is a function of the step."""

from __future__ import annotations

import itertools
import math

import pytest
from omegaconf import OmegaConf

from factory import SYSTEMS, build
from symbiotic.schema import Condition, ConfigError, Mix, Phase, Phases, Rates, Schedule
from symbiotic.training.phases import (
    active_phases,
    holds,
    lr_factor,
    mix_schedule,
    phase_at,
    phase_index,
    role_rates,
)
from symbiotic.training.roles import assign_roles

PHASES = Phases(
    steps=450,
    shield_steps=80,
    release_scale=0.1,
    list=(Phase("shield", 80, shield=1.0, rate={"gen": 0.5}), Phase("joint", 450, shield=0.9)),
)
RATES = Rates(roles={}, lr=3e-4, optimizer={}, by_role={"gen": 3e-3, "und": None}, warmup=30, decay=0.3)


def test_the_phase_changes_exactly_at_its_bound() -> None:
    assert [phase_at(PHASES, s).name for s in (0, 79, 80, 449, 450, 9999)] == ["shield"] * 2 + ["joint"] * 4
    assert [phase_at(PHASES, s).shield for s in (0, 79, 80)] == [1.0, 1.0, 0.9]


def test_a_phase_of_no_steps_is_left_out() -> None:
    none = Phases(450, 0, 1.0, (Phase("shield", 0, shield=1.0), Phase("joint", 450)))
    assert [p.name for p in active_phases(none)] == ["joint"]
    assert phase_at(none, 0).shield == 0.0


def test_warm_up_constant_decay() -> None:
    factor = [lr_factor(30, 0.3, 450, s) for s in range(450)]
    assert factor[0] == pytest.approx(1 / 30)
    assert factor[29:316] == [1.0] * 287
    assert factor[315] == 1.0
    assert factor[316] < 1.0
    assert factor[449] == pytest.approx(1 / 135)
    assert all(a >= b for a, b in itertools.pairwise(factor[30:]))
    assert lr_factor(0, 0.0, 10, 0) == 1.0
    assert lr_factor(0, 0.0, 10, 9) == 1.0


def test_role_rates_multiply_base_schedule_and_phase() -> None:
    early, late = (role_rates(RATES, PHASES, s, ("gen", "und", "shared")) for s in (40, 100))
    assert early == pytest.approx({"gen": 1.5e-3, "und": 3e-4, "shared": 3e-4})
    assert late == pytest.approx({"gen": 3e-3, "und": 3e-4, "shared": 3e-4})


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_parameter_of_every_system_has_exactly_one_role(name: str, project_root) -> None:  # type: ignore[no-untyped-def]
    """(e), with the shipped patterns and the real parameter names."""
    roles = OmegaConf.to_container(OmegaConf.load(project_root / "conf/rates/roles.yaml").roles)
    assigned = assign_roles((n for n, _ in build(name).named_parameters()), roles)  # type: ignore[arg-type]
    partitioned = name not in ("dense", "standard_moe", "multi_gate")
    assert ("task" in assigned.values()) == (name == "utamoe")
    assert ("gen" in assigned.values()) == partitioned
    assert ("common" in assigned.values()) == (name in ("standard_moe", "multi_gate", "symbiotic_bridge"))
    assert assigned["latent_head.weight"] == "latent"
    if name == "bagel":
        assert assigned["blocks.0.attention.gen.q.weight"] == "gen"


def test_an_uncovered_or_doubly_covered_parameter_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'b\.weight' is covered by no role"):
        assign_roles(["a.weight", "b.weight"], {"one": ["^a"]})
    with pytest.raises(ConfigError, match=r"'a\.weight' matches the roles one, two"):
        assign_roles(["a.weight"], {"one": ["^a"], "two": ["weight"]})


EARLY = Phases(
    100,
    0,
    1.0,
    (
        Phase("a", 20, shield=1.0, when=Condition("train/ce", below=1.0)),
        Phase("b", 60, shield=0.5, frozen=("und",)),
        Phase("c", 100, mix={"lm": 1.0}),
    ),
)


def test_a_transition_ends_a_phase_early_and_moves_no_other() -> None:
    at = [phase_at(EARLY, s, {0: 7}).name for s in (0, 6, 7, 19, 59, 60, 99, 500)]
    assert at == ["a", "a", "b", "b", "b", "c", "c", "c"]
    assert [phase_index(EARLY, s) for s in (6, 7, 19, 20)] == [0, 0, 0, 1]
    assert phase_at(EARLY, 7, {0: 7}).shield == 0.5


@pytest.mark.parametrize(
    ("condition", "value", "held"),
    [
        (Condition("m", above=0.5), 0.6, True),
        (Condition("m", above=0.5), 0.5, False),
        (Condition("m", below=0.5), 0.4, True),
        (Condition("m", above=0.2, below=0.5), 0.6, False),
        (Condition("m", above=0.2, below=0.5), 0.3, True),
        (Condition("m", below=0.5), float("nan"), False),
    ],
)
def test_a_condition_holds_between_its_bounds(condition: Condition, value: float, held: bool) -> None:
    assert holds(condition, value) == held


def test_the_mix_schedule_starts_with_the_mix_and_lists_changes_only() -> None:
    mix = Mix({"lm": 2.0, "t2i": 1.0})
    assert mix_schedule(EARLY, mix) == [(0, mix.weights), (60, {"lm": 1.0})]
    first = Phases(9, 0, 1.0, (Phase("a", 4, mix={"t2i": 1.0}), Phase("b", 9, mix={"t2i": 1.0})))
    assert mix_schedule(first, mix) == [(0, {"t2i": 1.0})]
    assert mix_schedule(PHASES, mix) == [(0, mix.weights)]


def test_a_role_has_a_course_of_its_own() -> None:
    own = {"gen": Schedule(warmup=10, decay=0.5, shape="cosine")}
    rates = Rates({"gen": (), "und": ()}, 1.0, {}, warmup=0, decay=0.2, schedules=own)
    flat = Phases(100, 0, 1.0, (Phase("all", 100),))
    at = {s: role_rates(rates, flat, s, ("gen", "und")) for s in (0, 4, 9, 50, 75, 90)}
    assert [at[s]["gen"] for s in (0, 4, 9, 50)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert at[75]["gen"] == pytest.approx(0.5)  # the middle of the cosine
    assert at[90]["gen"] == pytest.approx(0.5 - 0.5 * math.cos(math.pi * 0.2))
    assert [at[s]["und"] for s in (0, 75, 90)] == pytest.approx([1.0, 1.0, 0.5])
