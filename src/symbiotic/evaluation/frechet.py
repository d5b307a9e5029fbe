"""Frechet distance between two Gaussians fitted to features (the formula of FID, arXiv 1706.08500).

`|mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1^1/2 C_2 C_1^1/2)^1/2)`, in float64. On other features than those of the
official Inception network the number must not be called FID.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from symbiotic.evaluation.benchmark import Value


class Gaussian(NamedTuple):
    mean: np.ndarray  # [d] float64
    covariance: np.ndarray  # [d, d] float64, divided by n - 1


def fit(features: np.ndarray) -> Gaussian:
    """Mean and covariance of features [n, d].

    Raises:
        ValueError: fewer than two samples.
    """
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 samples, not {len(features)}")
    features = features.astype(np.float64)
    return Gaussian(features.mean(0), np.cov(features, rowvar=False).reshape(features.shape[1], -1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared distance, at least 0. The root is taken of a symmetric matrix, so that it stays real."""
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)
    gap = a.mean - b.mean
    distance = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum()
    return max(0.0, float(distance))


def frechet_interval(made: np.ndarray, target: Gaussian, value: float, resamples: int) -> tuple[float, float]:
    """95 % interval of the distance `value` of features [n, d], by the bootstrap over them.

    The plain bootstrap of a Frechet distance is biased upwards (resampled sets are less diverse), so the interval is
    the spread of the resampled distances around their own mean, put around the distance (ours).
    """
    draw = np.random.default_rng(0)
    again = [frechet_distance(fit(made[draw.integers(0, len(made), len(made))]), target) for _ in range(resamples)]
    low, high = np.quantile(again, [0.025, 0.975]) - np.mean(again)
    return max(0.0, value + float(low)), value + float(high)


def frechet_value(made: np.ndarray, real: np.ndarray, resamples: int = 100) -> Value:
    """Distance of features [n, d], with its `frechet_interval`; NaN of fewer than two samples."""
    if len(made) < 2 or len(real) < 2:
        return Value(float("nan"), len(made))
    target = fit(real)
    value = frechet_distance(fit(made), target)
    return Value(value, len(made), *frechet_interval(made, target, value, resamples))
