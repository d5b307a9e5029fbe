"""Which experts are chosen a little more readily after this step? (Aux-loss-free balancing, arXiv 2408.15664.)"""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer

from symbiotic.callbacks.log import Window
from symbiotic.callbacks.step import StepCallback, config_of, phase_of
from symbiotic.layout import pool_sizes, router_pools
from symbiotic.models.moe import MoE
from symbiotic.models.routing import Columns, bias_update
from symbiotic.training.roles import assign_roles


class BalanceBias(StepCallback):
    """After every optimiser step `b += u sign(mean load - load)`, per router, from the step's counts over all ranks.

    u is `objective.balance.bias_rate`, times the factor that an alarm may have set. The biases are buffers of the model
    and saved with it; those of a router whose role is frozen stay. Does nothing at a rate of 0.
    """

    def __init__(self) -> None:
        self.window = Window()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        config = config_of(pl_module)
        if not config.objective.balance.bias_rate:
            self.rate = 0.0
            return
        self.rate, self.columns = config.objective.balance.bias_rate, Columns(config.model, config.system)
        sizes, pools = pool_sizes(config.model, config.system), router_pools(config.system)
        roles = assign_roles((f"blocks.0.moe.routers.{name}" for name in pools), config.rates.roles)
        self.roles_C = [
            role for role, pool in zip(roles.values(), pools.values(), strict=True) for _ in range(sizes[pool])
        ]

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self.rate:
            self.window.add({"counts": outputs["routing"].counts})

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if not self.rate:
            return
        module = cast(Any, pl_module)
        counts_LME = self.window.total(trainer)["counts"]
        self.window.clear()
        if module.skipped:
            return
        layers = [layer for layer in module.model.modules() if isinstance(layer, MoE) and layer.bias is not None]
        update_LC = bias_update(counts_LME, self.columns, self.rate * module.balance_scale)
        frozen = phase_of(pl_module, step - 1).frozen
        update_LC *= torch.tensor([role not in frozen for role in self.roles_C], device=update_LC.device)
        for layer, update_C in zip(layers, update_LC, strict=True):
            assert isinstance(layer.bias, torch.Tensor)
            layer.bias += update_C.to(layer.bias)
