"""The Frechet distance against scipy's matrix root and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

from symbiotic.evaluation.frechet import Gaussian, fit, frechet_distance, frechet_value, matrix_root, sample_distance


def features(n: int, d: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


@pytest.mark.parametrize(("n", "d"), [(50, 3), (200, 32), (1000, 64)])
def test_agrees_with_the_formula(n: int, d: int) -> None:
    a, b = features(n, d, 0), features(n + 7, d, 1)
    c, e = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(c @ e)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + e - 2 * root.real)
    assert frechet_distance(fit(a), fit(b)) == pytest.approx(expected, rel=1e-9)


def test_equal_covariances_leave_the_distance_of_the_means() -> None:
    a = features(100, 8, 0)
    shift = np.arange(8.0)
    assert frechet_distance(fit(a), fit(a + shift)) == pytest.approx((shift**2).sum(), rel=1e-9)


def test_commuting_covariances() -> None:
    """Diagonal ones: the sum of squared differences of the standard deviations."""
    a = Gaussian(np.zeros(3), np.diag([1.0, 4.0, 9.0]))
    b = Gaussian(np.array([1.0, 0.0, 0.0]), np.diag([4.0, 4.0, 1.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 0 + 4)


def test_symmetric_and_zero_to_itself_also_when_singular() -> None:
    few = features(5, 20, 0)  # rank 4
    other = features(9, 20, 1)
    assert frechet_distance(fit(few), fit(few)) == pytest.approx(0, abs=1e-5 * np.trace(fit(few).covariance))
    assert frechet_distance(fit(few), fit(other)) == pytest.approx(frechet_distance(fit(other), fit(few)), rel=1e-5)


def test_one_feature_and_too_few_samples() -> None:
    assert fit(np.array([[1.0], [3.0]])).covariance.tolist() == [[2.0]]
    with pytest.raises(ValueError, match="at least 2"):
        fit(np.zeros((1, 4)))


@pytest.mark.parametrize(("n", "d"), [(50, 3), (20, 64), (5, 20)])
def test_the_distance_of_samples_is_that_of_their_gaussian(n: int, d: int) -> None:
    made, target = features(n, d, 0), fit(features(100, d, 1))
    expected = frechet_distance(fit(made), target)
    assert sample_distance(made, target, matrix_root(target.covariance)) == pytest.approx(expected, rel=1e-6)


def test_the_interval_is_the_spread_of_resampled_distances_around_the_distance() -> None:
    made, real = features(40, 4, 0), features(50, 4, 1)
    value = frechet_value(made, real, resamples=20)
    draw = np.random.default_rng(0)
    again = [frechet_distance(fit(made[draw.integers(0, 40, 40)]), fit(real)) for _ in range(20)]
    low, high = np.quantile(again, [0.025, 0.975]) - np.mean(again)
    assert value == pytest.approx((frechet_distance(fit(made), fit(real)), 40, value[0] + low, value[0] + high))
