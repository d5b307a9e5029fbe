"""Rectified flow: one direction, two predictions, sums that the step's normalisers turn into means."""

from __future__ import annotations

import pytest
import torch

from factory import random_batch
from symbiotic.models.batch import IGNORE
from symbiotic.models.embeddings import patchify, unpatchify
from symbiotic.objectives.flow import data_from, flow_loss, interpolate, logit_normal, noised, shift_time, velocity_from
from symbiotic.objectives.text import ce_loss


def test_the_ends_are_data_and_noise() -> None:
    data, noise = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(interpolate(data, noise, torch.zeros(5)), data)
    assert torch.equal(interpolate(data, noise, torch.ones(5)), noise)


@pytest.mark.parametrize("kind", ["x", "velocity"])
def test_true_prediction_gives_the_velocity_the_data_and_no_loss(kind: str) -> None:
    batch = random_batch(4, ("latents",))
    x_t = noised(batch).latents
    truth = batch.latents if kind == "x" else batch.noise - batch.latents
    torch.testing.assert_close(velocity_from(truth, x_t, batch.time, kind), batch.noise - batch.latents)
    torch.testing.assert_close(data_from(truth, x_t, batch.time, kind), batch.latents)
    assert float(flow_loss(truth, batch, kind)) == 0.0
    assert float(flow_loss(truth + 0.5, batch, kind)) == pytest.approx(0.25 * len(batch.latents), rel=1e-5)


def test_a_batch_without_latents_has_a_flow_loss_of_zero_in_the_graph() -> None:
    batch = random_batch(2, ("lm",))
    prediction = torch.zeros(0, 48, requires_grad=True)
    assert float(flow_loss(prediction, batch, "x").detach()) == 0.0


def test_cross_entropy_sums_over_the_targets_only() -> None:
    batch = random_batch()
    count = int((batch.target != IGNORE).sum())
    logits = torch.zeros(count, 64)
    assert float(ce_loss(logits, batch)) == pytest.approx(count * torch.log(torch.tensor(64.0)).item(), rel=1e-5)


def test_time_distribution_and_shift() -> None:
    n = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    t = logit_normal(n, 0.8, 1.0)
    assert float(t.median()) == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item(), abs=5e-3)
    ends = shift_time(torch.tensor([0.0, 0.5, 1.0]), 3.0)
    assert ends.tolist() == pytest.approx([0.0, 0.75, 1.0])


def test_patches_round_trip_and_order() -> None:
    images = torch.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    patches = patchify(images, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[0, 1].reshape(4, 4, 3), images[0, :4, 4:8])
    assert torch.equal(unpatchify(patches, 2, 3, 4), images)
    with pytest.raises(ValueError, match="cannot be cut"):
        patchify(images, 5)
