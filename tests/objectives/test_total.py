"""The terms of the loss: what they are compared with, and what they are weighed with."""

from __future__ import annotations

import pytest
import torch

from factory import build, random_batch
from symbiotic.models.batch import IGNORE
from symbiotic.objectives.flow import noised
from symbiotic.objectives.total import term_weights, training_terms
from symbiotic.schema import Balance, Objective


def test_the_terms_by_hand() -> None:
    """The network sees noised latents and is compared with the clean ones."""
    net, batch = build("symbiotic"), random_batch()
    out, terms = training_terms(net, batch, Objective(prediction="x", balance=Balance(reduction="sum")))
    assert not torch.equal(noised(batch).latents, batch.latents)
    assert torch.equal(out.prediction, net(noised(batch)).prediction)
    error = (out.prediction - batch.latents).square().mean(-1).sum() / batch.flow_norm
    assert float(terms["flow"].detach()) == pytest.approx(float(error.detach()))
    wanted = batch.target[batch.target != IGNORE]
    ce = torch.nn.functional.cross_entropy(out.logits, wanted, reduction="sum") / batch.ce_norm
    assert float(terms["ce"].detach()) == pytest.approx(float(ce.detach()))
    _, mean = training_terms(net, batch, Objective())
    assert float(terms["balance"].detach()) == pytest.approx(3 * float(mean["balance"].detach()))


def test_velocity_is_compared_with_noise_minus_clean_data() -> None:
    net, batch = build("symbiotic"), random_batch()
    out, terms = training_terms(net, batch, Objective(prediction="velocity"))
    error = (out.prediction - (batch.noise - batch.latents)).square().mean(-1).sum() / batch.flow_norm
    assert float(terms["flow"].detach()) == pytest.approx(float(error.detach()))


def test_a_phase_replaces_the_balance_weight() -> None:
    objective = Objective(ce_weight=2.0, flow_weight=3.0, balance_weight=0.1, z_weight=0.5)
    assert term_weights(objective) == {"ce": 2.0, "flow": 3.0, "task": 1.0, "balance": 0.1, "z": 0.5}
    assert term_weights(objective, 0.0)["balance"] == 0.0
