"""Is this step safe to take? A single sample that makes the loss infinite ruins all weights, silently."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from symbiotic.callbacks.events import record_event
from symbiotic.callbacks.step import StepCallback
from symbiotic.models.batch import Batch
from symbiotic.schema import FINITE_POLICIES, ConfigError, RunError

SHOWN = 5  # samples named in a message; the event has them all


class FiniteCheck(StepCallback):
    """Before every optimiser step, loss and gradient norm of all ranks are looked at; if one is not finite, the step is
    not taken, and the samples that make it so are named with their shard.

    policy: `stop` ends the run there. `skip` goes on without the step: no weight, no moment of the optimiser and no
    selection bias changes. It is recorded as an event, and the run ends after `limit` of them.
    """

    def __init__(self, policy: str = "stop", limit: int = 10) -> None:
        if policy not in FINITE_POLICIES:
            raise ConfigError(f"callbacks.finite_check.policy={policy}: must be one of {', '.join(FINITE_POLICIES)}")
        if limit < 1:
            raise ConfigError(f"callbacks.finite_check.limit={limit}: must be at least 1")
        self.policy, self.limit, self.skipped = policy, limit, 0
        self._losses: list[Tensor] = []  # of the micro-batches of this step, on this rank

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses = []
        cast(Any, pl_module).guard = lambda norm: self.look(trainer, pl_module, norm)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def look(self, trainer: Trainer, pl_module: LightningModule, norm: Tensor) -> bool:
        """Whether the step may be taken; norm: [] of all gradients, before clipping.

        Raises:
            RunError: not finite under `stop`, or once too often under `skip`.
        """
        losses, self._losses = torch.stack(self._losses), []
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None  # whose overflows they are
        fine = losses.isfinite().all() & (norm.isfinite() | scaled)
        if trainer.world_size > 1:
            fine = trainer.strategy.reduce(fine.double(), reduce_op="sum") == trainer.world_size
        if fine:
            return True
        step, finite = trainer.global_step + 1, losses.isfinite().tolist()
        lost = not all(everyone(trainer, finite))
        names = everyone(trainer, self.suspects(trainer, pl_module, finite, lost))
        what = "the loss is not finite" if lost else "the loss is finite, its gradient is not"
        text = f"{what} {blame(names)}"
        self.skipped += 1
        if self.policy == "stop":
            way = "callbacks.finite_check.policy=skip goes on without such steps"
            raise RunError(f"step {step}: {text}. It was not taken, so the newest checkpoint is sound; {way}")
        if self.skipped > self.limit:
            allowed = f"callbacks.finite_check.limit={self.limit} allows no more such steps"
            raise RunError(f"step {step}: {text}. It was not taken: {allowed}")
        record_event(trainer, step, "skipped", f"{text}; the step is left out", samples=names)
        return False

    def suspects(self, trainer: Trainer, pl_module: LightningModule, finite: list[bool], lost: bool) -> Iterator[str]:
        """`shard: key` of the samples of this rank that have no finite loss by themselves; or no finite gradient, where
        no loss was lost on any rank.

        finite: whether the loss of each micro-batch is. With sharded parameters no sample can be asked alone: all of a
        micro-batch are named.
        """
        loader = cast(Any, trainer.train_dataloader)
        count = trainer.accumulate_grad_batches * trainer.world_size
        first = trainer.global_step * count + trainer.global_rank
        sharded = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        for n, fine in enumerate(finite):
            if fine and lost:
                continue
            for name, batch in loader.dataset.alone(first + n * trainer.world_size):
                if sharded or not self.sound(pl_module, batch.to(pl_module.device), with_gradient=not lost):
                    yield name

    @staticmethod
    def sound(pl_module: LightningModule, batch: Batch, with_gradient: bool) -> bool:
        """Whether the loss of a batch is finite (and its gradient); nothing is kept of it."""
        module = cast(Any, pl_module)
        with torch.set_grad_enabled(with_gradient), pl_module.trainer.precision_plugin.forward_context():
            loss = module.training_step(batch, 0)["loss"]
        values = [loss]
        if with_gradient:
            parameters = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            values += [gradient.norm() for gradient in found if gradient is not None]
        return bool(torch.stack(values).isfinite().all())

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = int(state_dict["skipped"])


def everyone(trainer: Trainer, items: Iterable[Any]) -> list[Any]:
    """Those of all ranks, in their order."""
    if trainer.world_size == 1:
        return list(items)
    gathered: list[list[Any]] = [[] for _ in range(trainer.world_size)]
    torch.distributed.all_gather_object(gathered, list(items))
    return list(itertools.chain.from_iterable(gathered))


def blame(names: list[str]) -> str:
    """`at SHARD: KEY, …`; without a name it is no single sample's doing."""
    if not names:
        return "though that of every single sample is: look at the learning rate"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"at {', '.join(names[:SHOWN])}{more}"
