"""Do the losses that training works with agree with a second computation of them?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from symbiotic.callbacks.events import record_event
from symbiotic.callbacks.step import Probing, config_of
from symbiotic.layout import experts_seen, pool_sizes, router_of, visible_pools
from symbiotic.models.batch import IGNORE, Batch
from symbiotic.models.routing import RoutingStats
from symbiotic.objectives.total import term_weights, training_terms
from symbiotic.schema import KINDS, Balance, ConfigError, Model, System
from symbiotic.training.phases import active_phases, balance_weight

TOLERANCE = 1e-4  # relative: float32 sums over the tokens of a micro-batch


class Failures:
    """Tells of each failed check once in a run: a warning, and an event in the run record.

    `told` belongs into checkpoints, so that a resumed run tells nothing twice.
    """

    def __init__(self) -> None:
        self.told: list[str] = []

    def tell(self, trainer: Trainer, step: int, check: str, text: str) -> None:
        if check not in self.told:
            self.told.append(check)
            rank_zero_warn(text)
            record_event(trainer, step, "self_check", text, check=check)


class SelfChecks(Probing):
    """Warns once, and writes to the run record, when

    - the balance loss that a step returned is not the one that its counts and probabilities make (`recount_balance`,
      every `every` optimiser steps, on the last micro-batch of each rank), or
    - before the first step, a loss term with a weight in some phase has no gradient on any parameter, on the probe
      batch
      (`without_gradient`; not where parameters are sharded).

    That counts add up to k assignments a token is checked by `RoutingMonitor`, on what it logs.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise ConfigError(f"callbacks.self_checks.every={every}: must be at least 1")
        self.every, self.failures = every, Failures()
        self._last: tuple[Tensor, RoutingStats] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = cast(nn.Module, pl_module.model)
        if trainer.global_step or self.probe is None or any(isinstance(p, DTensor) for p in model.parameters()):
            return
        config = config_of(pl_module)
        largest = max(balance_weight(config.objective, phase) for phase in active_phases(config.phases))
        weights = term_weights(config.objective, largest)
        possible = possible_terms(self.probe, config.model, config.system, config.objective.balance)
        batch = self.probe.to(pl_module.device)
        with probing(trainer, pl_module), torch.enable_grad():
            _, terms = training_terms(cast(Any, model), batch, config.objective)
            weighed = {t: terms[t] for t in possible if weights.get(t, 0.0) > 0}
            dead = without_gradient(weighed, list(model.parameters()))
        for term in dead:
            text = f"loss term {term} has weight {weights[term]:g} and no gradient on any parameter, on the probe batch"
            self.failures.tell(trainer, 0, f"gradient/{term}", text)

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        self._last = outputs["balance"], outputs["routing"]

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if step % self.every or self._last is None or cast(Any, pl_module).skipped:
            return
        config, (returned, stats) = config_of(pl_module), self._last
        recount = recount_balance(stats, config.model, config.system, config.objective.balance)
        pairs = torch.zeros(trainer.world_size, 2, dtype=torch.float64, device=returned.device)
        pairs[trainer.global_rank] = torch.tensor([float(returned), recount], dtype=torch.float64)
        if trainer.world_size > 1:
            pairs = cast(Tensor, trainer.strategy.reduce(pairs, reduce_op="sum"))
        wrong = [(a, b) for a, b in pairs.tolist() if not abs(a - b) <= TOLERANCE * max(abs(b), 1e-12)]
        if wrong:
            text = "balance loss: the step returned {:.6g}, its counts and probabilities make {:.6g}".format(*wrong[0])
            self.failures.tell(trainer, step, "balance", text)

    def state_dict(self) -> dict[str, Any]:
        return {"told": list(self.failures.told)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.failures.told = list(state_dict["told"])


@contextmanager
def probing(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """For a forward of a probe: the precision of training, and no compiled block is compiled again for its shapes."""
    with trainer.precision_plugin.forward_context():
        if config_of(pl_module).compile == "none":
            yield
        else:
            with torch.compiler.set_stance("force_eager"):
                yield


def recount_balance(stats: RoutingStats, model: Model, system: System, cfg: Balance) -> float:
    """The balance loss by its definition, in double precision, router by router; nothing shared with `models.balance`.

    Per layer and router: n times the sum over its experts of (share of the assignments) x (mean probability), over its
    tokens, weighed by kind; times the mean weight of these tokens, over the number of routers with any. Its tokens are
    those of the kinds that use it, or with a task router, those that its experts were assigned to.
    """
    counts, probs, tokens = (value.detach().cpu().double() for value in (stats.counts, stats.probs, stats.tokens))
    by_task, top_k = system.task_router and cfg.scope == "router", router_of(model, system).top_k
    layers = []
    for counts_ME, probs_ME in zip(counts, probs, strict=True):
        values, used = [], 0
        for kinds, experts in routers_of(model, system, cfg.scope):
            member_M = torch.tensor([float(by_task or kind in kinds) for kind in KINDS], dtype=torch.float64)
            weight_M = member_M * torch.tensor([cfg.kinds.get(kind, 1.0) for kind in KINDS], dtype=torch.float64)
            tokens_M = counts_ME[:, experts].sum(1) / top_k if by_task else tokens
            number, everyone = float(weight_M @ tokens_M), float(member_M @ tokens_M)
            used += everyone > 0
            if number > 0:
                assigned, mean = weight_M @ counts_ME[:, experts], weight_M @ probs_ME[:, experts] / number
                values.append(len(experts) * float((assigned / assigned.sum()) @ mean) * number / everyone)
        layers.append(sum(values) / max(1, used))
    return sum(layers) / (max(1, len(layers)) if cfg.reduction == "mean" else 1)


def routers_of(model: Model, system: System, scope: str) -> list[tuple[list[str], list[int]]]:
    """Of every router, the kinds that use it and its experts, numbered pool after pool; scope `global`: as if one."""
    sizes, pools = pool_sizes(model, system), visible_pools(system)
    first = {pool: sum(list(sizes.values())[:i]) for i, pool in enumerate(sizes)}
    kinds_of: dict[Any, list[str]] = {}
    for kind in KINDS if sizes else ():
        kinds_of.setdefault("one" if scope == "global" else frozenset(system.visible[kind]), []).append(kind)
    found = []
    for kinds in kinds_of.values():
        seen = sorted({first[pool] for kind in kinds for pool in pools[kind]})
        size = {first[pool]: n for pool, n in sizes.items()}
        found.append((kinds, [start + i for start in seen for i in range(size[start])]))
    return found


def possible_terms(batch: Batch, model: Model, system: System, balance: Balance) -> list[str]:
    """The loss terms that can have a gradient on this batch.

    CE needs targets, flow latents, image_ce codes, both router losses routed experts. Where a router's tokens choose
    all of the experts that they see, the load is even whatever the router says: no gradient of the balance loss.
    """
    routed = bool(system.pools) and len(model.dense_layers) < model.num_layers
    valid = batch.segment >= 0
    choice = [
        kind
        for m, kind in enumerate(KINDS)
        if routed
        and experts_seen(model, system)[kind] > router_of(model, system).top_k
        and balance.kinds.get(kind, 1.0) > 0
        and bool(((batch.kind == m) & valid).any())
    ]
    found = {
        "ce": bool((batch.target != IGNORE).any()),
        "flow": len(batch.latents) > 0,
        "image_ce": len(batch.codes) > 0,
        "balance": bool(choice),
        "z": routed,
        "task": routed and system.task_router and bool(valid.any()),
    }
    return [term for term, possible in found.items() if possible]


def without_gradient(terms: dict[str, Tensor], parameters: Sequence[Tensor]) -> list[str]:
    """The terms whose gradient is zero on every parameter. Leaves `.grad` alone."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    dead = []
    for name, term in terms.items():
        graph = term.requires_grad
        grads = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True) if graph else ()
        if not any(grad is not None and bool((grad != 0).any()) for grad in grads):
            dead.append(name)
    return dead
