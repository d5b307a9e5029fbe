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
    root = matrix_root(a.covariance)
    cross = np.linalg.eigvalsh(root @ b.covariance @ root).clip(min=0)
    gap = a.mean - b.mean
    distance = gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(cross).sum()
    return max(0.0, float(distance))


def matrix_root(covariance: np.ndarray) -> np.ndarray:
    """Of a symmetric matrix without negative eigenvalues."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def sample_distance(features: np.ndarray, target: Gaussian, root: np.ndarray) -> float:
    """`frechet_distance(fit(features), target)`, from the samples [n, d] and the root of the target's covariance.

    The eigenvalues under the root are those of a matrix of min(n, d) rows: fast for few samples.
    """
    scaled = (features - features.mean(0)) / np.sqrt(len(features) - 1)
    few = len(scaled) < scaled.shape[1]
    half = scaled @ root if few else root
    cross = np.linalg.eigvalsh(half @ half.T if few else half @ (scaled.T @ scaled) @ half).clip(min=0)
    gap = features.mean(0) - target.mean
    own = np.square(scaled).sum()
    return max(0.0, float(gap @ gap + own + np.trace(target.covariance) - 2 * np.sqrt(cross).sum()))


def frechet_interval(made: np.ndarray, target: Gaussian, value: float, resamples: int) -> tuple[float, float]:
    """95 % interval of the distance `value` of features [n, d], by the bootstrap over them.

    The plain bootstrap of a Frechet distance is biased upwards (resampled sets are less diverse), so the interval is
    the spread of the resampled distances around their own mean, put around the distance (ours).
    """
    draw, made, root = np.random.default_rng(0), made.astype(np.float64), matrix_root(target.covariance)
    again = [sample_distance(made[draw.integers(0, len(made), len(made))], target, root) for _ in range(resamples)]
    low, high = np.quantile(again, [0.025, 0.975]) - np.mean(again)
    return max(0.0, value + float(low)), value + float(high)


def frechet_value(made: np.ndarray, real: np.ndarray, resamples: int = 100) -> Value:
    """Distance of features [n, d], with its `frechet_interval`; NaN of fewer than two samples."""
    if len(made) < 2 or len(real) < 2:
        return Value(float("nan"), len(made))
    target = fit(real)
    value = frechet_distance(fit(made), target)
    return Value(value, len(made), *frechet_interval(made, target, value, resamples))
