"""Image codes one by one: next-token prediction on the codes of a vector-quantised image tokenizer.

The codes of an image stand in row-major order and are causal. Unlike a word, a code is predicted at its own place: what
stands there as input is the code before it, or a start at the first place of an image, with the grid place of the code
to come (ours). So every loss of generation lies on tokens of kind vae, and pools, shields and monitors mean the same
under both objectives.
Suffixes: L codes, K size of the codebook.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

from symbiotic.models.batch import Batch

START = 0  # input at the first place of an image; code c is c + 1 as an input


def shifted(batch: Batch) -> Batch:
    """The batch as the model sees it in training: in the place of each code the one before it."""
    codes = batch.codes
    first = (batch.latent_grid == 0).all(-1)
    return dataclasses.replace(batch, codes=torch.where(first, START, codes.roll(1) + 1))


def image_ce(logits_LK: Tensor, batch: Batch) -> Tensor:
    """Sum over the codes of the cross-entropy of each, in nats. Returns [].

    The caller divides by the number of codes of the whole optimiser step (`batch.flow_norm`).
    """
    if not len(batch.codes):
        return logits_LK.sum()
    return F.cross_entropy(logits_LK.float(), batch.codes, reduction="sum")
