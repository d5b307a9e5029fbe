"""The batch: the one contract between data and model.

Shapes: B rows, T token places a row, V patches that are read (kind vit), L latents that are generated (kind
vae), P numbers a patch. A latent is a patch of numbers (objective flow) or one code of an image tokenizer (objective
autoregressive): of `latents` and `codes`, one is in use. A row holds several packed samples; nothing attends across
them. There is no mask in a batch: masks are derived from `segment` and `span` where they are used.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

TEXT, PROMPT, VIT, VAE = range(4)
IGNORE = -100  # target of a token without a next-token loss


@dataclass
class Batch:
    """One micro-batch. `V` and `L` patches stand in the row-major order of the tokens of their kind."""

    tokens: Tensor  # [B, T] int64: token id; 0 where the place is no text or prompt token
    kind: Tensor  # [B, T] int64: TEXT | PROMPT | VIT | VAE; TEXT at padding
    position: Tensor  # [B, T] int64: position inside the sample, from 0
    segment: Tensor  # [B, T] int64: number of the sample inside the row, from 0; -1 is padding
    span: Tensor  # [B, T] int64: number of the image inside the row, from 0; -1 outside images
    causal: Tensor  # [B, T] bool: the token's image span is causal inside (discrete image tokens)
    target: Tensor  # [B, T] int64: next token to predict from this place, or IGNORE
    task: Tensor  # [B, T] int64: index in schema.TASKS; -1 at padding
    vit_patches: Tensor  # [V, P] float, in [-1, 1]
    vit_grid: Tensor  # [V, 2] int64: row and column of the patch in its image
    latents: Tensor  # [L, P] float: the clean data; `objectives.flow.noised` puts x_t in their place for the model.
    # [L, 0] where images are codes
    codes: Tensor  # [L] int64: the image's codes; `objectives.autoregressive.shifted` puts in the place of each the one
    # before it, for the model. [0] where images are patches
    latent_grid: Tensor  # [L, 2] int64
    noise: Tensor  # [L, P] float: the flow's noise end
    time: Tensor  # [L] float in [0, 1]: flow time, equal inside an image; 0 is data, 1 is noise
    ce_norm: Tensor  # [] float: targets in the whole optimiser step / micro-batches in the step
    flow_norm: Tensor  # [] float: latents (of either sort) in the whole optimiser step / micro-batches in the step

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on another device (Lightning calls this)."""
        fields = dataclasses.fields(self)
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields}
        return Batch(**moved)

    def pin_memory(self) -> Batch:
        fields = dataclasses.fields(self)
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields})
