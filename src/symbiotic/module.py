"""The LightningModule: builds the model, computes the loss of one micro-batch, returns what the monitors read.

Nothing is logged here (a `self.log` costs more than a small model's layer): callbacks collect the returned tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from symbiotic.models.batch import Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.flow import flow_loss, noised
from symbiotic.objectives.text import ce_loss
from symbiotic.schema import Config
from symbiotic.training.phases import phase_at
from symbiotic.training.roles import assign_roles, role_lr

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
MakeLoader = Callable[[int, int, int], DataLoader]  # (rank, world size, first optimiser step) -> loader


class SymbioticModule(lightning.LightningModule):
    """One fit: stage 0 or joint training, as `config` says.

    Args:
        state: the parameters to start from; None initialises them from the seed.
        latents: whether the model generates (False: the stage-0 parent).
        optimizer: builds the optimiser from parameter groups, each with `role` and `lr`.
        loader: builds the training loader of one rank.
    """

    model: UnifiedModel

    def __init__(
        self,
        config: Config,
        optimizer: MakeOptimizer,
        loader: MakeLoader,
        state: Mapping[str, Tensor] | None = None,
        latents: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.latents = config, latents
        self.rates, self.phases = config.rates, config.phases
        self.make_optimizer, self.make_loader, self.start_state = optimizer, loader, state
        self.register_buffer("shield", torch.zeros(()), persistent=False)

    def configure_model(self) -> None:
        """Called by Lightning on every rank, more than once: builds only the first time."""
        if "model" in self._modules:
            return
        self.model = UnifiedModel(self.config.model, self.config.system, self.latents)
        if self.start_state is None:
            self.model.initialise(self.config.seed)
        else:
            self.model.load_state_dict(dict(self.start_state))

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The loss of one micro-batch. The normalisers are those of the whole optimiser step, so that the mean over
        micro-batches, however they are shared out, is the loss of the step."""
        out = self.model(noised(batch), shield=self.shield)
        objective, phase = self.config.objective, phase_at(self.config.phases, self.global_step)
        ce = ce_loss(out.logits, batch) / batch.ce_norm
        flow = flow_loss(out.prediction, batch, objective.prediction) / batch.flow_norm
        balance_weight = objective.balance_weight if phase.balance is None else phase.balance
        loss = objective.ce_weight * ce + objective.flow_weight * flow
        loss = loss + balance_weight * out.balance + objective.z_weight * out.z
        parts = {"ce": ce, "flow": flow, "balance": out.balance, "z": out.z}
        return {
            "loss": loss,
            **{name: value.detach() for name, value in parts.items()},
            "routing": out.routing.detach(),
            "tokens": out.routing.tokens,
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One parameter group a role, in the order of the config.

        Raises:
            ConfigError: a parameter without a role, or with two.
        """
        rates = self.config.rates
        parameters = dict(self.model.named_parameters())
        roles = assign_roles(parameters, rates.roles)
        groups: dict[str, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(roles[name], []).append(parameter)
        ordered = [role for role in rates.roles if role in groups]
        return self.make_optimizer(
            [{"params": groups[r], "role": r, "lr": role_lr(r, rates.lr, rates.by_role)} for r in ordered]
        )

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip the global norm here: Lightning's own clipping refuses fused optimisers under mixed precision."""
        if self.config.rates.clip > 0:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.rates.clip)

    def train_dataloader(self) -> DataLoader:
        """Starts at the step that training is at, so that a resumed run reads on where it stopped."""
        trainer = self.trainer
        return self.make_loader(trainer.global_rank, trainer.world_size, trainer.global_step)
