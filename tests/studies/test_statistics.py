"""Statistics against scipy, against counting by hand, and by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from symbiotic.studies.statistics import (
    bootstrap_interval,
    by_question,
    compare,
    describe,
    holm,
    mcnemar,
    p_beyond,
    resampling_interval,
    share_interval,
    sign_flip,
    t_interval,
)

VALUES = [0.031, -0.012, 0.055, 0.008, 0.019]
NAN = math.nan


def test_spread_by_hand() -> None:
    made = describe([0.4, None, 0.6, NAN])
    assert (made.mean, made.n) == (0.5, 2)
    assert made.sd == pytest.approx(math.sqrt(0.02))
    assert describe([0.4]).sd is None
    assert describe([NAN]).mean is None


def test_t_interval_by_hand() -> None:
    """Three differences of mean 2 and deviation 1; with 2 degrees of freedom t has the closed quantile 4.302653."""
    half = 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025)) / math.sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), rel=1e-12)


def test_pairs_are_those_of_seeds_that_both_have() -> None:
    found = compare({0: 1.0, 1: 5.0, 2: 4.0, 3: NAN}, {1: 3.0, 2: 1.0, 3: 0.0, 4: 9.0})
    assert found is not None
    assert (found.mean, found.n, found.positive) == (2.5, 2, 2)
    expected = stats.ttest_rel([5.0, 4.0], [3.0, 1.0])
    assert found.p_seeds == pytest.approx(expected.pvalue)
    assert found.t == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert compare({0: 1.0}, {1: 1.0}) is None
    assert compare({0: NAN}, {0: 1.0}) is None


@pytest.mark.parametrize("first", [{0: 0.9}, {0: 0.9, 1: 0.8, 2: 0.7}])
def test_one_seed_and_equal_differences_have_no_interval(first: dict[int, float]) -> None:
    found = compare(first, {seed: value - 0.1 for seed, value in first.items()})
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    assert (found.t, found.bootstrap, found.p_seeds, found.sure) == (None, None, None, False)


def test_the_bootstrap_is_scipys() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=40)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert bootstrap_interval(values.tolist(), resamples=20_000) == pytest.approx(tuple(theirs), abs=0.01)
    assert bootstrap_interval(VALUES) == bootstrap_interval(list(reversed(VALUES)))
    assert bootstrap_interval([0.5] * 3) is None


def test_a_bootstrap_of_three_is_their_range() -> None:
    assert bootstrap_interval([0.1, 0.2, 0.4]) == pytest.approx((0.1, 0.4))


def test_coverage_of_both_intervals_over_three_seeds() -> None:
    """The t interval keeps its 95 %; the bootstrap's is 75 %, which is why it decides nothing."""
    rng = np.random.default_rng(0)
    samples = rng.normal(0.3, 1.0, size=(2000, 3))
    covered = {"t": 0, "range": 0}
    for row in samples:
        low, high = t_interval(row.tolist())
        covered["t"] += low < 0.3 < high
        covered["range"] += row.min() < 0.3 < row.max()
    assert covered["t"] / 2000 == pytest.approx(0.95, abs=0.015)
    assert covered["range"] / 2000 == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("margin", [-0.02, 0.0, 0.02, 0.06])
def test_p_is_below_a_twentieth_exactly_where_the_interval_excludes_the_margin(margin: float) -> None:
    rng = np.random.default_rng(3)
    for _ in range(200):
        values = rng.normal(0.02, 0.03, size=4).tolist()
        low, high = t_interval(values)
        assert (p_beyond(values, (margin,)) < 0.05) == (not low <= margin <= high)
        width = abs(margin) + 0.03
        assert (p_beyond(values, (-width, width)) < 0.05) == (-width < low and high < width)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, None]) == pytest.approx([0.03, 0.06, 0.06, None])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


# --------------------------------------------------------------------------- over questions


def test_mcnemar_by_hand() -> None:
    """8 against 2 discordant questions: twice the tail of Binomial(10, 1/2)."""
    tail = sum(math.comb(10, k) for k in (8, 9, 10)) / 2**10
    assert mcnemar(8, 2) == pytest.approx(2 * tail)
    assert mcnemar(0, 0) == 1.0


def test_sign_flips_are_all_counted() -> None:
    for sums in ([3, 1, -2, 0, 1], [1, 1, 1], [2, -2], [0, 0], [3, 3, 3, -1]):
        patterns = [
            abs(sum(s * v for s, v in zip(signs, sums, strict=True)))
            for signs in itertools.product((1, -1), repeat=len(sums))
        ]
        exact = sum(value >= abs(sum(sums)) for value in patterns) / len(patterns)
        assert sign_flip(sums) == pytest.approx(exact), sums


@pytest.mark.parametrize(("better", "worse"), [(8, 2), (5, 5), (1, 0), (40, 21)])
def test_with_one_seed_a_sign_flip_is_mcnemar(better: int, worse: int) -> None:
    assert sign_flip([1] * better + [-1] * worse + [0] * 50) == pytest.approx(mcnemar(better, worse))


def test_questions_by_hand() -> None:
    first = {0: {"a": 1.0, "b": 1.0, "c": 0.0, "x": 1.0}, 1: {"a": 1.0, "b": 0.0, "c": 0.0}}
    second = {0: {"a": 0.0, "b": 1.0, "c": 1.0}, 1: {"a": 0.0, "b": 0.0, "c": 0.0}, 2: {"a": 1.0}}
    found = by_question(first, second)
    assert found is not None
    assert (found.n, found.better, found.worse, found.dropped) == (3, 1, 1, 1)
    assert found.mean == pytest.approx((2 - 1) / 6)
    assert found.p == pytest.approx(sign_flip([2, 0, -1]))
    assert found.mcnemar == {0: 1.0, 1: 1.0}
    assert by_question({0: {"a": 1.0}}, {0: {"b": 1.0}}) is None
    assert by_question({0: {"a": 1.0}}, {1: {"a": 1.0}}) is None


def test_a_question_with_all_its_seeds_is_one_unit() -> None:
    """The same questions are hard in every seed: taking questions x seeds as independent rejects too often, the
    sign-flip over questions does not. Two arms that are the same but for chance, question by question."""
    rng = np.random.default_rng(5)
    questions, seeds, ours, naive = 60, 3, 0, 0
    for _ in range(400):
        luck = rng.choice([-1, 0, 1], size=questions, p=[0.15, 0.7, 0.15])
        kept = rng.random((seeds, questions)) < 0.9
        differences = luck * kept
        ours += sign_flip(differences.sum(0).tolist()) < 0.05
        naive += mcnemar(int((differences > 0).sum()), int((differences < 0).sum())) < 0.05
    assert ours / 400 < 0.07
    assert naive / 400 > 0.15


def test_the_interval_over_questions_covers() -> None:
    rng = np.random.default_rng(6)
    hits = 0
    for _ in range(300):
        p = rng.beta(2, 2, size=120)
        answers = {s: {str(q): float(rng.random() < p[q]) for q in range(120)} for s in range(3)}
        found = share_interval(answers)
        assert found is not None
        hits += found[0] <= 0.5 <= found[1]
    assert hits / 300 > 0.9
    assert share_interval({}) is None


def test_resampling_intervals_of_runs_add_in_squares() -> None:
    assert resampling_interval([(20.0, 18.0, 23.0)]) == (18.0, 23.0)
    low, high = resampling_interval([(20.0, 17.0, 24.0), (22.0, 18.0, 25.0)]) or (NAN, NAN)
    assert (low, high) == pytest.approx((21 - 5 / 2, 21 + 5 / 2))
    assert resampling_interval([]) is None
