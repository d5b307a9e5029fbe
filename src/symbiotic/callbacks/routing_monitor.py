"""How evenly do the tokens of each kind use the experts, layer by layer, and how far has the routing moved?"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from symbiotic.callbacks.log import Window, log_metrics
from symbiotic.callbacks.self_checks import Failures, probing
from symbiotic.callbacks.step import Probing
from symbiotic.layout import groups, router_of
from symbiotic.models.batch import VAE, VIT, Batch
from symbiotic.models.moe import MoE
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.total import model_input
from symbiotic.schema import KINDS, ConfigError
from symbiotic.training.routing_metrics import by_layer, capacity_sums, drift, miscount, random_rates, summarise
from symbiotic.training.task_metrics import task_metrics

DRIFTING = ("text", "vit")  # kinds whose routing was trained before joint training


class RoutingMonitor(Probing):
    """Logs `routing_metrics.summarise` of the routing every `every` optimiser steps, and how far it has drifted.

    Training micro-batches only, over all ranks; padding is not in the counts. Capacity rates are of a micro-batch, the
    atom that depends on neither ranks nor accumulation, averaged over the window; everything else is of the window's
    counts. `routing/drift/KIND` and `routing/layer{i}/drift/KIND` (text, vit): `routing_metrics.drift` on the probe
    since the start of the fit; only where a probe was set.

    With task routers: `task_metrics`; where routed and shared experts are mixed: `task/alpha`, `task/layer{i}/alpha`.

    Tells once when the counts are not k for each token, layer and kind; the tokens are counted from the batch.
    Reads outputs["routing"] (`RoutingStats`) and the tables of pl_module.model.
    per_layer=False leaves the `routing/layer{i}/` entries out.
    """

    def __init__(self, every: int = 10, factors: Sequence[float] = (1.0, 1.25), per_layer: bool = True) -> None:
        if every < 1 or not factors or min(factors) <= 0:
            raise ConfigError(f"callbacks.routing_monitor: every={every} must be at least 1, factors={factors} above 0")
        self.every, self.factors, self.per_layer = every, tuple(factors), per_layer
        self.window, self.failures = Window(), Failures()
        self.reference: dict[str, Tensor] = {}  # kind -> [L, n, E] probabilities at the start
        self._rows: Batch | None = None  # of the probe, on the device of the model
        self._tokens: list[Tensor] = []  # [M] of each micro-batch whose random baseline is not in the window yet

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rows = None if self.probe is None else drifting_rows(self.probe).to(pl_module.device)
        if trainer.global_step == 0:
            self.reference = self.probabilities(trainer, pl_module)

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        stats, tokens = outputs["routing"], num_tokens(batch)
        model: Any = pl_module.model
        self.window.add(
            capacity_sums(stats.counts, tokens, model.visible_experts, self.factors, model.groups_RE)
            | ({} if stats.sent is None else {"predicted": stats.predicted, "sent": stats.sent})
        )
        self._tokens.append(tokens)

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if step % self.every == 0:
            metrics = self.metrics(trainer, pl_module) | self.drift(trainer, pl_module)
            log_metrics(trainer, {n: v for n, v in metrics.items() if self.per_layer or "/layer" not in n}, step)
            self.window.clear()

    def metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The metrics of the window."""
        model: Any = pl_module.model
        self.add_baselines(model)
        sums = self.window.total(trainer)
        host = torch.cat([value.reshape(-1) for value in sums.values()]).cpu().split([v.numel() for v in sums.values()])
        sums = {name: part.view_as(sums[name]) for name, part in zip(sums, host, strict=True)}
        problem = miscount(sums["counts"], sums["tokens"], router_of(model.cfg, model.system).top_k)
        if problem:
            self.failures.tell(trainer, trainer.global_step, "counts", problem)
        sees_RE = None if model.groups_RE is None else model.groups_RE.cpu()
        found = summarise(sums, model.visible_experts.cpu(), self.factors, sees_RE) | alphas(model)
        if "sent" in sums:
            names = ["+".join(row) for row in groups(model.system)]
            found |= task_metrics(sums["predicted"], sums["sent"], model.routers_RM.cpu(), names)
        return found

    def add_baselines(self, model: Any) -> None:
        """Bring the token counts to the host, and the random baselines of the micro-batches into the window.

        One by one, so that it is the same sum wherever a checkpoint was saved in between.
        """
        if self._tokens:
            visible, device = model.own_experts.cpu(), self._tokens[0].device
            top_k = router_of(model.cfg, model.system).top_k
            for tokens in torch.stack(self._tokens).tolist():
                rates = random_rates(tokens, visible, top_k, self.factors)
                self.window.add({"random": torch.tensor(rates, dtype=torch.float64, device=device)})
            self._tokens = []

    # ------------------------------------------------------------------ drift

    def drift(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """How far the probe's routing is from that at the start; empty without a probe or without MoE layers."""
        now = self.probabilities(trainer, pl_module) if self.reference else {}
        values = {kind: drift(now[kind], self.reference[kind].to(now[kind].device)) for kind in now}
        return {name: value for kind in now for name, value in by_layer(f"drift/{kind}", values[kind]).items()}

    def probabilities(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor]:
        """Kind -> [L, n, E] of its n tokens in the probe."""
        if self._rows is None or not len(self._rows.kind):
            return {}
        with probing(trainer, pl_module):
            return probe_probabilities(pl_module.model, self._rows)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ state

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.add_baselines(pl_module.model)
        self.window.save(trainer, checkpoint, "routing_monitor")
        reference = {kind: value.cpu() for kind, value in self.reference.items()}
        checkpoint["routing_monitor"] = {"reference": reference, "told": list(self.failures.told)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.load(trainer, checkpoint, "routing_monitor")
        state: Mapping[str, Any] = checkpoint.get("routing_monitor", {"reference": {}, "told": []})
        self.reference, self.failures.told = dict(state["reference"]), list(state["told"])


def alphas(model: UnifiedModel) -> dict[str, float]:
    """The share of the routed experts in every layer that mixes them with the shared ones; empty where none does."""
    layers = [layer.mix.detach() for layer in model.modules() if isinstance(layer, MoE) and layer.mix is not None]
    whole = [mix.full_tensor() if isinstance(mix, DTensor) else mix for mix in layers]
    return by_layer("alpha", torch.cat(whole).double().sigmoid().cpu(), "task") if whole else {}


def num_tokens(batch: Batch) -> Tensor:
    """[M] float64 tokens of each kind, padding left out; without a transfer to the host."""
    valid = (batch.segment >= 0).reshape(-1).double()
    return valid.new_zeros(len(KINDS)).index_add_(0, batch.kind.reshape(-1), valid)


def drifting(batch: Batch) -> dict[str, Tensor]:
    """Kind of `DRIFTING` -> [B, T] bool, where its tokens stand."""
    return {kind: (batch.kind == KINDS.index(kind)) & (batch.segment >= 0) for kind in DRIFTING}


def drifting_rows(batch: Batch) -> Batch:
    """The rows that hold a token of `DRIFTING`: nothing attends across rows, so its routing is that in the batch."""
    keep_B = torch.stack(list(drifting(batch).values())).any(0).any(1)
    whole = {"ce_norm": batch.ce_norm, "flow_norm": batch.flow_norm}
    reads, makes = (keep_B[(batch.kind == kind).nonzero()[:, 0]] for kind in (VIT, VAE))
    patches = {name: getattr(batch, name)[reads] for name in ("vit_patches", "vit_grid")}
    patches |= {name: getattr(batch, name)[makes] for name in ("latents", "latent_grid", "noise", "time")}
    patches["codes"] = batch.codes[makes] if len(batch.codes) else batch.codes
    rest = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name not in whole | patches}
    return Batch(**whole, **patches, **{name: value[keep_B] for name, value in rest.items()})


@torch.no_grad()
def probe_probabilities(model: UnifiedModel, probe: Batch) -> dict[str, Tensor]:
    """Kind of `DRIFTING` -> float32 [L, n, E], the router's probabilities of its n tokens (those with any)."""
    trace = model(model_input(probe), logits_at=torch.zeros_like(probe.segment, dtype=torch.bool), trace=True).trace
    rows = {kind: places.reshape(-1).nonzero().squeeze(-1) for kind, places in drifting(probe).items() if trace}
    found = {kind: [layer.probs_NE[index].float() for layer in trace] for kind, index in rows.items() if len(index)}
    return {kind: torch.stack(layers) for kind, layers in found.items()}
