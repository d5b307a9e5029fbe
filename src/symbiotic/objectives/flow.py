"""Rectified flow on latents. The direction is stated here, once.

The two ends are called `data` (t = 0) and `noise` (t = 1):

    x_t = (1 - t) * data + t * noise          velocity = d x_t / d t = noise - data

(Symbiotic-MoE; rectified flow, arXiv 2209.03003.) The network predicts the clean data (`x`) or the velocity.
Suffixes: L latents, P numbers a latent patch.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from symbiotic.models.batch import Batch


# x_t = (1 - t) data + t noise
def interpolate(data_LP: Tensor, noise_LP: Tensor, time_L: Tensor) -> Tensor:
    """The point x_t between data (t = 0) and noise (t = 1)."""
    t = time_L[:, None]
    return (1 - t) * data_LP + t * noise_LP


def noised(batch: Batch) -> Batch:
    """The batch as the model sees it in training: x_t in the place of the clean latents."""
    return dataclasses.replace(batch, latents=interpolate(batch.latents, batch.noise, batch.time))


# velocity = noise - data = (x_t - data) / t
def velocity_from(prediction_LP: Tensor, x_t_LP: Tensor, time_L: Tensor, kind: str) -> Tensor:
    """The velocity that a prediction of `kind` (`x` or `velocity`) stands for. t is kept from 0 where it divides."""
    if kind == "velocity":
        return prediction_LP
    return (x_t_LP - prediction_LP) / time_L[:, None].clamp(min=1e-3)


# data = x_t - t velocity
def data_from(prediction_LP: Tensor, x_t_LP: Tensor, time_L: Tensor, kind: str) -> Tensor:
    """The clean data that a prediction of `kind` stands for."""
    return prediction_LP if kind == "x" else x_t_LP - time_L[:, None] * prediction_LP


def flow_loss(prediction_LP: Tensor, batch: Batch, kind: str) -> Tensor:
    """Sum over the latents of the mean squared error over P, on the data or on the velocity. Returns [].

    The caller divides by the number of latents of the whole optimiser step (`batch.flow_norm`).
    """
    target_LP = batch.latents if kind == "x" else batch.noise - batch.latents
    return (prediction_LP.float() - target_LP).square().mean(-1).sum() if len(target_LP) else prediction_LP.sum()


def logit_normal(normal: Tensor, mean: float, std: float) -> Tensor:
    """t = sigmoid(n), n ~ Normal(mean, std), from standard normal draws."""
    return torch.sigmoid(mean + std * normal)


def shift_time(time: Tensor, shift: float) -> Tensor:
    """`s t / (1 + (s - 1) t)`: more of the steps near the noise end for s > 1; the ends stay (arXiv 2403.03206)."""
    return shift * time / (1 + (shift - 1) * time)
