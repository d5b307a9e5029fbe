"""The terms of the training loss, and what each is weighed with."""

from __future__ import annotations

import torch
from torch import Tensor

from symbiotic.models.balance import balance_loss
from symbiotic.models.batch import Batch
from symbiotic.models.unified import Output, UnifiedModel
from symbiotic.objectives.autoregressive import image_ce, shifted
from symbiotic.objectives.flow import flow_loss, noised
from symbiotic.objectives.text import ce_loss
from symbiotic.schema import GENERATION_TERMS, Objective


def task_terms(objective: Objective) -> dict[str, str]:
    """Task -> the term that is its loss. The CE of captions is a text loss (Symbiotic-MoE)."""
    return {"understanding": "ce", "generation": GENERATION_TERMS[objective.name]}


def model_input(batch: Batch) -> Batch:
    """A batch as the loader gives it (its latents clean) -> as the model sees it in training."""
    return shifted(batch) if len(batch.codes) else noised(batch)


def training_terms(
    model: UnifiedModel,
    batch: Batch,
    objective: Objective,
    shield: Tensor | None = None,
    by_truth: Tensor | None = None,
) -> tuple[Output, dict[str, Tensor]]:
    """The training forward of a batch as the loader gives it, and the terms of its loss."""
    out = model(model_input(batch), shield=shield, by_truth=by_truth)
    return out, loss_terms(model, out, batch, objective)


def loss_terms(model: UnifiedModel, out: Output, batch: Batch, objective: Objective) -> dict[str, Tensor]:
    """`ce`, `flow` or `image_ce`, `balance`, `z`, and with a task router `task`, each [] and unweighted. The latents of
    `batch` are clean: they are the target.

    The normalisers of CE and of the generation loss are those of the whole optimiser step, so that the mean over
    micro-batches, however they are shared out, is the loss of the step.
    """
    with torch.autocast(out.z.device.type, enabled=False):
        balance = balance_loss(out.routing, model.routers_RM.float(), model.own_experts, objective.balance)
    return {
        "ce": ce_loss(out.logits, batch) / batch.ce_norm,
        GENERATION_TERMS[objective.name]: generation_loss(out.prediction, batch, objective) / batch.flow_norm,
        "balance": balance,
        "z": out.z,
        **({} if out.task is None else {"task": out.task}),
    }


def generation_loss(prediction: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """Sum over the latents, []."""
    if objective.name == "autoregressive":
        return image_ce(prediction, batch)
    return flow_loss(prediction, batch, objective.prediction)


def term_weights(objective: Objective, balance: float | None = None) -> dict[str, float]:
    """Weight of every term; `balance` replaces `objective.balance_weight`."""
    weight = objective.balance_weight if balance is None else balance
    term = GENERATION_TERMS[objective.name]
    made = {term: getattr(objective, f"{term}_weight")}
    routed = {"balance": weight, "z": objective.z_weight, "task": objective.task_weight}
    return {"ce": objective.ce_weight, **made, **routed}
