"""The shield level and the learning rates of a fit are those of the config, also after a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from symbiotic.callbacks.checkpoint import StepCheckpoint, newest_valid
from symbiotic.callbacks.gradient_shielding import GradientShielding
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.schema import Phase


class Record(Callback):
    """What held when the optimiser stepped."""

    def __init__(self) -> None:
        self.shield: dict[int, float] = {}
        self.lr: dict[int, dict[str, float]] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.shield[trainer.global_step] = float(pl_module.shield)
        self.lr[trainer.global_step] = {g["role"]: g["lr"] for g in optimizer.param_groups}


def test_shield_and_rates_follow_the_phases(fit: Any) -> None:
    phases = [Phase("shield", 2, shield=1.0, rate={"gen": 0.5}), Phase("joint", 4, shield=0.75)]
    record = Record()
    fit([GradientShielding(), LRPhases(), record], steps=4, phases=phases, micro_batches=2)
    assert record.shield == {0: 1.0, 1: 1.0, 2: 0.75, 3: 0.75}
    assert [record.lr[s]["gen"] for s in range(4)] == pytest.approx([0.0025, 0.005, 0.01, 0.01])  # warm-up of 2
    assert [record.lr[s]["und"] for s in range(4)] == pytest.approx([0.0005, 0.001, 0.001, 0.001])


def test_a_resume_inside_a_phase_has_its_level_and_rates(fit: Any) -> None:
    whole, tail = Record(), Record()
    fit([GradientShielding(), LRPhases(), whole], steps=6)
    folder = fit.run_dir / "checkpoints"
    fit([GradientShielding(), LRPhases(), StepCheckpoint(str(folder), every=4)], steps=6, stop=4)
    fit([GradientShielding(), LRPhases(), tail], steps=6, ckpt_path=newest_valid(folder))
    assert list(tail.shield) == [4, 5]
    assert tail.shield == {s: whole.shield[s] for s in (4, 5)}
    assert tail.lr == {s: whole.lr[s] for s in (4, 5)}


def test_a_frozen_role_does_not_move_by_a_bit(fit: Any) -> None:
    """Weight decay is on: a zeroed gradient would still drift."""
    phases = [Phase("still", 3, frozen=("und",)), Phase("joint", 3)]
    _, module = fit([LRPhases()], steps=3, phases=phases)
    fresh = type(module)(module.config, module.make_optimizer, module.make_loader)
    fresh.configure_model()
    before, after = dict(fresh.model.named_parameters()), dict(module.model.named_parameters())
    names = [n for n in before if ".moe.pools.und" in n or ".moe.shared.all" in n]
    assert names
    assert all(torch.equal(before[n], after[n]) for n in names)
    assert not torch.equal(before["embed.weight"], after["embed.weight"])
