"""Next-token cross-entropy on text."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from symbiotic.models.batch import IGNORE, Batch


def ce_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Sum of the cross-entropy over the places with a target; logits [n, vocabulary] at those places, row-major.

    The caller divides by the number of targets of the whole optimiser step (`batch.ce_norm`). Returns [].
    """
    target = batch.target[batch.target != IGNORE]
    return F.cross_entropy(logits.float(), target, reduction="sum")
