"""The LightningModule: builds the model, computes the loss of one micro-batch, returns what the monitors read.

Nothing is logged here (a `self.log` costs more than a small model's layer): callbacks collect the returned tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from symbiotic.data.stream_plan import StreamLoader
from symbiotic.layout import shield_kinds
from symbiotic.models.batch import Batch
from symbiotic.models.sharding import shard
from symbiotic.models.unified import UnifiedModel, model_of
from symbiotic.objectives.total import task_terms, term_weights, training_terms
from symbiotic.schema import Config, Phase
from symbiotic.training.phases import phase_at
from symbiotic.training.roles import assign_roles, role_lr
from symbiotic.training.sharded import clip, total_norm
from symbiotic.training.surgery import TaskGradients, project_on_momentum

MakeOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
MakeLoader = Callable[[int, int, int], DataLoader | StreamLoader]  # (rank, world size, first optimiser step) -> loader


class SymbioticModule(lightning.LightningModule):
    """One fit: stage 0 or joint training, as `config` says.

    Args:
        state: the parameters to start from; None initialises them from the seed.
        latents: whether the model generates (False: the stage-0 parent).
        optimizer: builds the optimiser from parameter groups, each with `role` and `lr`.
        loader: builds the training loader of one rank.
    """

    model: UnifiedModel
    shield: Tensor
    by_truth: Tensor

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
        self.register_buffer("by_truth", torch.zeros((), dtype=torch.bool), persistent=False)
        self.transitions: dict[int, int] = {}  # phases that a condition ended (see `training.phases`)
        self.tasks: TaskGradients | None = None  # where the gradients of the tasks are combined (`config.surgery`)
        self.guard: Callable[[Tensor], bool] | None = None  # whether a step with this gradient norm may be taken
        self.skipped = False  # whether the last one was not
        self.balance_scale = 1.0  # factor on the balance weight and the bias rate; an alarm raises it

    def phase(self, step: int) -> Phase:
        """The phase of optimiser step `step` (from 0)."""
        return phase_at(self.config.phases, step, self.transitions)

    def configure_model(self) -> None:
        """Called by Lightning on every rank, more than once: builds only the first time."""
        if "model" in self._modules:
            return
        self.model = model_of(self.config, self.latents)
        if self.start_state is None:
            self.model.initialise(self.config.seed)
        else:
            self.model.load_state_dict(dict(self.start_state))
        self.model.adapt(self.config.lora, self.config.seed)
        self.model.recompute = self.config.recompute
        if self.config.compile != "none":
            if self.config.surgery.method not in ("none", "maop"):  # it goes back through a graph more than once
                torch._functorch.config.donated_buffer = False
            for block in self.model.blocks:
                block.compile(backend=self.config.compile)
        if self.device_mesh is not None:  # of a strategy that shards
            shard(self.model, self.device_mesh)
            self.start_state = None  # every rank had all of it

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """The loss of one micro-batch, its terms, and the routing."""
        phase = self.phase(self.global_step)
        if isinstance(self.model, FSDPModule):  # gradients go between the ranks once a step, not once a micro-batch
            accumulated = self.trainer.accumulate_grad_batches
            self.model.set_requires_gradient_sync((batch_idx + 1) % accumulated == 0)
        self.by_truth.fill_(phase.route_by == "truth")  # in place, so that no compiled block is compiled again
        out, terms = training_terms(self.model, batch, self.config.objective, self.shield, self.by_truth)
        weights = term_weights(self.config.objective, phase.balance)
        weights["balance"] *= self.balance_scale
        weighted = {name: weights[name] * term for name, term in terms.items()}
        loss = sum(weighted.values(), torch.zeros_like(out.z))
        if self.tasks is not None:
            self.tasks.losses = {task: weighted[term] for task, term in task_terms(self.config.objective).items()}
        return {
            "loss": loss,
            **{name: term.detach() for name, term in terms.items()},
            "routing": out.routing.detach(),
            "tokens": out.routing.tokens,
        }

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One parameter group a role (and mesh, where parameters are sharded), in the order of the config.

        Raises:
            ConfigError: a parameter without a role, or with two.
        """
        rates, parameters = self.config.rates, dict(self.model.named_parameters())
        groups = {role: [parameters[name] for name in names] for role, names in self.by_role().items()}
        surgery = self.config.surgery
        if surgery.method not in ("none", "maop"):
            treated = [role for role in groups if role in surgery.roles or not surgery.roles]
            self.tasks = TaskGradients(surgery, [p for role in treated for p in groups[role]])
        return self.make_optimizer(
            [
                {"params": part, "role": role, "lr": role_lr(role, rates.lr, rates.by_role)}
                for role, group in groups.items()
                for part in by_mesh(group)
            ]
        )

    def by_role(self) -> dict[str, list[str]]:
        """Role -> the names of its parameters, in the order of the config and of the model.

        Raises:
            ConfigError: a parameter without a role, or with two.
        """
        names = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        roles = assign_roles(names, self.config.rates.roles)
        listed = {role: [name for name in names if roles[name] == role] for role in self.config.rates.roles}
        return {role: mine for role, mine in listed.items() if mine}

    def names(self) -> dict[Tensor, str]:
        """Parameter of the model -> its name, in the model's order."""
        return {parameter: name for name, parameter in self.model.named_parameters()}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """With surgery between the tasks, two more passes: the gradient of each task by itself."""
        if self.tasks is not None:
            self.tasks.add(self.trainer.accumulate_grad_batches)
        super().backward(loss, *args, **kwargs)

    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        if self.tasks is not None:
            self.tasks.clear()

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        """Combine the tasks' gradients, clip, take out what opposes the momentum: each where the config says so.

        The global norm is clipped here, as Lightning's own clipping refuses fused optimisers under mixed precision; and
        it is what the guard looks at. Without gradients an optimiser's step changes nothing at all.
        """
        if self.tasks is not None:
            self.tasks.combine()
        given = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        norm = total_norm(given)
        self.skipped = self.guard is not None and not self.guard(norm)
        if self.skipped:
            optimizer.zero_grad(set_to_none=True)
            return
        if self.config.rates.clip > 0:
            clip(list(self.model.parameters()), self.config.rates.clip, norm)
        if self.config.surgery.method == "maop" and not self.shielding():
            project_on_momentum(optimizer, self.config.surgery.roles)

    def shielding(self) -> bool:
        """Whether this step lets nothing of the generation gradient through the shield's targets."""
        return self.phase(self.global_step).shield >= 1 and bool(shield_kinds(self.config.system))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["progress"] = {"transitions": dict(self.transitions), "balance_scale": self.balance_scale}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        progress = checkpoint.get("progress", {"transitions": {}, "balance_scale": 1.0})
        self.transitions, self.balance_scale = dict(progress["transitions"]), float(progress["balance_scale"])
        count_batches(checkpoint, checkpoint["global_step"] * self.trainer.accumulate_grad_batches)

    def train_dataloader(self) -> DataLoader | StreamLoader:
        """Starts at the step that training is at, so that a resumed run reads on where it stopped."""
        trainer = self.trainer
        return self.make_loader(trainer.global_rank, trainer.world_size, trainer.global_step)


def by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters on the same mesh together, as fused optimiser steps need them; one list where none is sharded."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        groups.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return list(groups.values())


def count_batches(checkpoint: dict[str, Any], done: int) -> None:
    """Let Lightning's loop have seen `done` batches. It counts those of a rank: on another number of ranks they are
    others at the same step, and accumulation would begin in the middle of a step and the epoch end early."""
    counts = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    for part in ("total", "current"):
        more = done - counts[part]["ready"]
        counts[part] = {name: count + more for name, count in counts[part].items()}
