"""Aux-loss-free balancing in a fit: the biases follow the counts of the whole step, whoever computed them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factory import load_system, tiny_model
from symbiotic.callbacks.balance_bias import BalanceBias
from symbiotic.callbacks.checkpoint import StepCheckpoint, newest_valid
from symbiotic.schema import Balance, Objective, Phase, Router


def biased(rate: float = 0.01) -> dict[str, Any]:
    model = tiny_model(num_layers=2, router=Router(top_k=2, bias=True))
    objective = Objective(balance_weight=0.0, balance=Balance(bias_rate=rate))
    return {"model": model, "system": load_system("symbiotic", model), "objective": objective}


def biases(module: Any) -> torch.Tensor:
    return torch.stack([block.moe.bias for block in module.model.blocks])


def test_biases_are_multiples_of_the_rate_and_move_with_every_step(fit: Any) -> None:
    _, module = fit([BalanceBias()], steps=3, **biased())
    steps = biases(module) / 0.01
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert steps.abs().max() == pytest.approx(3.0)
    _, still = fit([BalanceBias()], steps=3, **biased(rate=0.0))
    assert biases(still).abs().sum() == 0


def test_accumulation_and_ranks_change_nothing(fit: Any) -> None:
    saved = []
    for devices in (1, 2):  # forked ranks leave nothing but their checkpoint
        folder = fit.run_dir / f"checkpoints-{devices}"
        fit(
            [BalanceBias(), StepCheckpoint(str(folder), every=3)], steps=3, micro_batches=2, devices=devices, **biased()
        )
        state = torch.load(newest_valid(folder), weights_only=True)["state_dict"]
        saved.append(torch.stack([state[name] for name in state if name.endswith("moe.bias")]))
    assert saved[0].abs().sum() > 0
    assert torch.equal(*saved)


def test_an_alarm_s_factor_raises_the_rate(fit: Any) -> None:
    class Raise(BalanceBias):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            super().on_train_start(trainer, pl_module)
            pl_module.balance_scale = 4.0

    plain, raised = (biases(fit([kind()], steps=1, **biased())[1]) for kind in (BalanceBias, Raise))
    assert torch.allclose(raised, 4 * plain)
    assert plain.abs().sum() > 0


def test_a_resume_goes_on_with_the_same_biases(fit: Any) -> None:
    folder = fit.run_dir / "checkpoints"
    whole = biases(fit([BalanceBias()], steps=6, micro_batches=2, **biased())[1])
    fit([BalanceBias(), StepCheckpoint(str(folder), every=3)], steps=6, stop=3, micro_batches=2, **biased())
    resumed = fit([BalanceBias()], steps=6, micro_batches=2, ckpt_path=newest_valid(folder), **biased())[1]
    assert torch.equal(whole, biases(resumed))


def test_a_frozen_router_s_biases_stay(fit: Any) -> None:
    """Its routing is as frozen as its columns."""
    phases = [Phase("still", 3, frozen=("und",))]
    _, module = fit([BalanceBias()], steps=3, phases=phases, **biased())
    und, gen = biases(module).chunk(2, dim=1)
    assert und.abs().sum() == 0
    assert gen.abs().sum() > 0
