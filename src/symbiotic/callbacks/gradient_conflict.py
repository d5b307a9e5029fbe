"""Do understanding and generation pull the parameters apart, and what gets past the shield?"""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from symbiotic.callbacks.log import log_metrics
from symbiotic.callbacks.step import Probing, config_of
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.total import task_terms, term_weights, training_terms
from symbiotic.schema import ConfigError
from symbiotic.training.conflict import leaks, products, role_conflicts, shielded_layers, squares, task_gradients

TASKS = ("understanding", "generation")


class GradientConflict(Probing):
    """Every `every` optimiser steps, and after the first, the gradients of each task's loss on the probe.

    Logs `conflict/ROLE/{und,gen,ratio,cosine,opposed}` (see `role_conflicts`; the losses weighed as in training) and,
    where the system has shield targets, `leak/{all,layer0,…}` (see `leaks`): the norm of the generation gradient on
    their weights at the level of this step, relative to no shield. At level 0 it is 1 by definition. At level 1 it is 0
    in the last layer and, under `strict`, everywhere; under `output` and `weights` some reaches lower layers through
    attention to other tokens, a little more under `weights`, which lets it pass through the shared experts themselves.

    One forward and two backward passes on the probe, and one of each more for the leak; room for two more gradients.
    Nothing of the training is touched: the passes go around `.grad`, DDP and torch.compile, and keep no count.
    A probe without latents has no conflicts: nothing is logged. All ranks measure the same.
    `speed/gradient_conflict`: seconds that it took. Of sharded parameters there are no whole gradients: nothing is
    logged, which is said once.
    """

    def __init__(self, every: int = 50) -> None:
        if every < 1:
            raise ConfigError(f"callbacks.gradient_conflict.every={every}: must be at least 1")
        self.every = every
        self._probed = 0
        self._off = False
        self._clock = 0.0
        self._steps: list[float] = []  # seconds of every step since the last probe

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._off = any(isinstance(parameter, DTensor) for parameter in pl_module.parameters())
        if self._off and trainer.is_global_zero:
            print(
                "conflicts of gradients are not measured: they are whole nowhere, as parameters are sharded", flush=True
            )
        if self.probe is None:
            raise RuntimeError("GradientConflict.probe was not set before the fit")
        self._batch = self.probe.to(pl_module.device)
        self._clock = time.perf_counter()

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self._off or len(self._batch.latents) == 0:
            return
        self._steps.append(time.perf_counter() - self._clock)
        if step == 1 or step % self.every == 0:
            level = float(cast(Tensor, pl_module.shield))  # waits for the step, so that the clock starts behind it
            start = time.perf_counter()
            with self.eager(pl_module):
                metrics = self.measure(trainer, pl_module, level)
            seconds = time.perf_counter() - start
            log_metrics(trainer, {**metrics, "speed/gradient_conflict": seconds}, step)
            self.report(trainer, seconds)
        self._clock = time.perf_counter()

    def eager(self, pl_module: LightningModule) -> AbstractContextManager[Any]:
        """Around forward and backward: compiled, the training's blocks would be compiled again for the probe's shapes,
        and recomputed blocks must be of the same make as those of the forward."""
        compiled = config_of(pl_module).compile != "none"
        return cast(Any, torch.compiler.set_stance)("force_eager") if compiled else nullcontext()

    def measure(self, trainer: Trainer, pl_module: LightningModule, level: float) -> dict[str, float]:
        """The metrics of this moment, by one transfer to the host. level: of the shield."""
        model, roles = cast(UnifiedModel, pl_module.model), roles_of(trainer)
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        layers = shielded_layers(parameters, model.cfg, model.system)
        gradients = task_gradients(self.losses(trainer, pl_module, cast(Tensor, pl_module.shield)), parameters)
        und, gen = (gradients[task] for task in TASKS)
        found = [*products(und, gen)]
        if layers:
            shielded = squares(gen, layers)
            wanted = {name: parameters[name] for name in layers}
            found += [shielded, self.unshielded(trainer, pl_module, wanted) if level > 0 else shielded]
        host = [part.tolist() for part in torch.cat(found).cpu().split([len(part) for part in found])]
        metrics = role_conflicts(host[:3], [roles[parameter] for parameter in parameters.values()])
        return metrics | (leaks(host[3], host[4], list(layers.values())) if layers else {})

    def unshielded(self, trainer: Trainer, pl_module: LightningModule, wanted: dict[str, nn.Parameter]) -> Tensor:
        """[P] squared norms of the generation gradient on these parameters, were there no shield."""
        losses = self.losses(trainer, pl_module, None)
        return squares(task_gradients({"generation": losses["generation"]}, wanted)["generation"], wanted)

    def losses(self, trainer: Trainer, pl_module: LightningModule, shield: Tensor | None) -> dict[str, Tensor]:
        """Task -> its loss on the probe, weighed and computed (autocast) as in training."""
        model, config = cast(UnifiedModel, pl_module.model), config_of(pl_module)
        with torch.enable_grad(), trainer.precision_plugin.train_step_context():
            _, terms = training_terms(model, self._batch, config.objective, shield, cast(Tensor, pl_module.by_truth))
        weights = term_weights(config.objective)
        return {task: weights[term] * terms[term] for task, term in task_terms(config.objective).items()}

    def report(self, trainer: Trainer, seconds: float) -> None:
        """One line after the second probe (the first one allocates): what all of them cost."""
        self._probed += 1
        if self._probed == 2 and trainer.is_global_zero:
            share = seconds / (self.every * statistics.median(self._steps))
            cost = f"{seconds:.2g} s a probe every {self.every} steps, {share:.1%} of the step time"
            print(f"gradient conflict: {cost}", flush=True)
        self._steps = []


def roles_of(trainer: Trainer) -> dict[Tensor, str]:
    """Parameter -> the role of its parameter group."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return {parameter: str(group["role"]) for group in groups for parameter in group["params"]}
