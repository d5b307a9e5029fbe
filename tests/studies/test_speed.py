"""The first step at which a score reaches a target."""

from __future__ import annotations

import math

import pytest

from symbiotic.studies.speed import parsed, reached, steps_to


def test_errors_fall_on_a_line_of_their_logarithms() -> None:
    """An error that falls by the same factor a step is met exactly, wherever the evaluations lie."""
    steps = [0, 70, 150, 400]
    series = (steps, [2.0 * math.exp(-step / 50) for step in steps])
    for target in (1.0, 0.3, 0.01):
        assert steps_to(series, target, "lower") == pytest.approx(-50 * math.log(target / 2))


def test_shares_rise_on_a_line() -> None:
    series = ([0, 100, 200], [0.0, 0.5, 0.4])
    assert steps_to(series, 0.25, "higher") == 50.0
    assert steps_to(series, 0.5, "higher") == 100.0  # the first time, though it falls again


def test_who_never_gets_there_has_no_step() -> None:
    assert steps_to(([0, 100], [1.0, 0.5]), 0.4, "lower") is None
    assert steps_to(([0, 100], [0.3, 0.1]), 0.4, "lower") is None  # was there from the start
    assert steps_to(([], []), 0.4, "lower") is None


def test_names_say_score_and_target() -> None:
    assert parsed("steps_to/flow_error@0.05") == ("flow_error", 0.05)
    assert parsed("steps_to/fid@tiny@1e-3") == ("fid@tiny", 0.001)
    assert parsed("flow_error") is parsed("steps_to/flow_error") is parsed("steps_to/flow_error@1.2.3") is None
    assert reached("steps_to/embedded_acc@0.5", ([0, 10], [0.0, 1.0])) == 5.0
