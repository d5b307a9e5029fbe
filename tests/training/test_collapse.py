"""The collapse alarm's decisions, on tables of numbers."""

from __future__ import annotations

import io
import math

import pytest
import torch

from symbiotic.callbacks.collapse_alarm import HIDDEN
from symbiotic.schema import KINDS
from symbiotic.training.collapse import (
    Reading,
    Settings,
    State,
    acted,
    behind_pooled,
    collapse_floor,
    due,
    names,
    plain,
    readings,
    restored,
    update,
)
from symbiotic.training.routing_metrics import (
    capacity_rate,
    capacity_sums,
    random_capacity_rate,
    random_rates,
    summarise,
)

NAN = math.nan
HERE, THERE = (2, "vae"), (0, "text")
SETTINGS = Settings(ratio=0.3, clear=0.5, patience=3)


def collapsed(num_tokens: int, top_k: int, num_experts: int) -> torch.Tensor:
    return torch.zeros(num_experts).index_fill(0, torch.arange(top_k), float(num_tokens))


@pytest.mark.parametrize("factor", [1.0, 1.25])
@pytest.mark.parametrize(("top_k", "num_experts"), [(1, 4), (2, 8), (2, 16), (8, 128)])
def test_evenness_is_0_at_total_collapse_and_1_by_chance_whatever_the_layout(
    top_k: int, num_experts: int, factor: float
) -> None:
    visible, floor = torch.ones(num_experts, dtype=torch.bool), collapse_floor(top_k, num_experts, factor)
    random = random_capacity_rate(4096, top_k, num_experts, factor)
    rate = float(capacity_rate(collapsed(4096, top_k, num_experts), visible, factor))
    assert rate == pytest.approx(floor, abs=1e-3)
    assert Reading(rate, random, floor).evenness == pytest.approx(0.0, abs=2e-3)
    assert Reading(random, random, floor).evenness == pytest.approx(1.0)


def test_evenness_is_a_share_of_the_way_and_may_pass_1() -> None:
    assert Reading(0.6, 0.95, 0.25).evenness == pytest.approx(0.5)
    assert Reading(1.0, 0.95, 0.25).evenness == pytest.approx(0.75 / 0.7)


@pytest.mark.parametrize(
    "reading",
    [Reading(1.0, 1.0, 1.0), Reading(0.5, NAN, 0.25), Reading(NAN, 0.9, 0.25)],
    ids=["as many experts as choices", "no baseline", "no rate"],
)
def test_evenness_is_nan_where_there_is_nothing_to_compare(reading: Reading) -> None:
    assert math.isnan(reading.evenness)


def test_a_kind_that_uses_all_experts_or_sees_none_cannot_collapse() -> None:
    assert collapse_floor(4, 4) == 1.0
    assert collapse_floor(4, 5, factor=1.5) == 1.0
    assert collapse_floor(2, 0) == 1.0


def test_readings_are_those_of_the_monitors_names() -> None:
    """Two layers, of which the second has collapsed for latents; no read image in the window."""
    counts = torch.zeros(2, len(KINDS), 8)
    counts[:, 0], counts[0, 3], counts[1, 3] = 16.0, 16.0, collapsed(64, 2, 8)
    tokens = torch.tensor([64.0, 0.0, 0.0, 64.0])
    visible = torch.ones(len(KINDS), 8, dtype=torch.bool)
    random = torch.tensor(random_rates(tokens.tolist(), visible, 2, (1.0,)))
    metrics = summarise({**capacity_sums(counts, tokens, visible, (1.0,)), "random": random}, visible, (1.0,))
    found = readings(metrics, "capacity@1", dict.fromkeys(("text", "vit", "vae"), collapse_floor(2, 8)))
    assert set(found) == {(0, "text"), (0, "vae"), (1, "text"), (1, "vae")}
    assert found[1, "vae"].rate == pytest.approx(0.25)
    assert found[1, "vae"].random == pytest.approx(random_capacity_rate(64, 2, 8))
    assert found[1, "vae"].evenness == pytest.approx(0.0)
    assert found[0, "vae"].evenness > 1.0
    assert str(found[1, "vae"]) == "capacity 0.25, 0.91 expected by chance, 0.25 at total collapse"
    assert readings({"train/ce": 1.0}, "capacity@1", {"text": 0.25}) == {}


def follow(values: list[float], settings: Settings = SETTINGS) -> list[str]:
    """What each log of one place leads to: raised, cleared, or the present state."""
    state, out = State(), []
    for value in values:
        state, raised, cleared = update(state, {HERE: value}, settings)
        out.append("raised" if raised else "cleared" if cleared else "+" if state.raised else "-")
    return out


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.1, 0.1, 0.1], ["-", "-", "raised", "+"]),
        ([0.1, 0.1, 0.3, 0.1, 0.1, 0.1], ["-"] * 5 + ["raised"]),  # at the ratio is not below it
        ([0.1] * 3 + [0.4, 0.5, 0.51], ["-", "-", "raised", "+", "+", "cleared"]),  # only above `clear`
        ([0.1] * 3 + [0.9, 0.1, 0.1, 0.1], ["-", "-", "raised", "cleared", "-", "-", "raised"]),
        ([0.1, 0.1, NAN, 0.1], ["-", "-", "-", "raised"]),
        ([0.1] * 3 + [NAN, 0.9], ["-", "-", "raised", "+", "cleared"]),
        ([1.0, 0.9, 1.2, NAN], ["-"] * 4),
        ([-0.05] * 3, ["-", "-", "raised"]),  # below the floor, where its rounding binds
    ],
)
def test_raised_after_patience_and_cleared_with_hysteresis(values: list[float], expected: list[str]) -> None:
    assert follow(values) == expected


def test_patience_1_raises_at_once() -> None:
    assert follow([0.2, 0.6, 0.2], Settings(ratio=0.3, clear=0.5, patience=1)) == ["raised", "cleared", "raised"]


def test_places_are_counted_apart_and_an_absent_one_stays_as_it_is() -> None:
    state, changes = State(), []
    for values in ({HERE: 0.1, THERE: 0.1}, {THERE: 0.1}, {HERE: 0.1, THERE: 0.1}, {HERE: 0.1, THERE: 0.9}):
        state, raised, cleared = update(state, values, SETTINGS)
        changes.append((raised, cleared))
    assert changes == [((), ()), ((), ()), ((THERE,), ()), ((HERE,), (THERE,))]
    assert state.raised == (HERE,)
    assert state.logs == 4


def test_an_update_leaves_the_old_state_alone() -> None:
    before, _, _ = update(State(), {HERE: 0.1}, SETTINGS)
    update(before, {HERE: 0.1}, SETTINGS)
    acted(before, "balance")
    assert (before.logs, before.below, before.acted) == (1, {HERE: 1}, {})


def test_an_action_is_due_at_once_and_then_after_the_cooldown() -> None:
    state, when = State(), []
    for log in range(1, 9):
        state, _, _ = update(state, {HERE: 0.1}, SETTINGS)
        if due(state, "pool gen of layer 2", cooldown=3):
            state = acted(state, "pool gen of layer 2")
            when.append(log)
    assert when == [1, 4, 7]
    assert due(state, "pool gen of layer 0", cooldown=3)


def test_the_state_survives_a_file_of_plain_values() -> None:
    state = acted(State(7, {HERE: 3, THERE: 0}, (HERE,)), "balance")
    file = io.BytesIO()
    torch.save(plain(state), file)
    file.seek(0)
    assert restored(torch.load(file, weights_only=True)) == state
    assert restored(plain(State())) == State()


def test_places_are_named_by_kind() -> None:
    assert names([(2, "vae"), (0, "vae"), (1, "text")]) == "text in layer 1; vae in layers 0, 2"


@pytest.mark.parametrize(
    ("num_experts", "top_k", "tokens"), [(12, 2, 2000), (16, 2, 400), (128, 8, 256), (256, 8, 1024), (64, 1, 1024)]
)
def test_half_of_the_experts_each_is_hidden_at_any_size(num_experts: int, top_k: int, tokens: int) -> None:
    """Two kinds on one half each: pooled as even as can be, .50 per kind."""
    half = torch.zeros(num_experts, dtype=torch.double)
    half[: num_experts // 2] = 2 * top_k * tokens / num_experts
    visible = torch.ones(num_experts, dtype=torch.bool)
    rates = [float(capacity_rate(counts, visible)) for counts in (half, half + half.flip(0))]
    assert rates[0] == pytest.approx(0.5, abs=0.01)
    own = Reading(rates[0], random_capacity_rate(tokens, top_k, num_experts), collapse_floor(top_k, num_experts))
    whole = Reading(rates[1], random_capacity_rate(2 * tokens, top_k, num_experts), 0.0)
    assert behind_pooled({(0, "vae"): own}, {0: whole})[0, "vae"] < HIDDEN
    assert behind_pooled({(0, "vae"): own}, {0: own}) == {(0, "vae"): 1.0}
