"""Models and batches of given sizes, for the benchmarks."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from harness import Size

from symbiotic.config import compose
from symbiotic.models.batch import IGNORE, PROMPT, TEXT, VAE, VIT, Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import Attention, Model, Router, System

PATCH = 48  # numbers in one patch


@functools.cache
def system_of(name: str, shared: bool = True) -> System:
    """A system of conf/system; shared=False: without its shared experts and their shield."""
    system = compose(["experiment=smoke", f"system={name}"]).system
    if shared:
        return system
    return dataclasses.replace(system, shared={}, shield=dataclasses.replace(system.shield, mode="none", targets={}))


def model_of_size(size: Size, shared: int = 0) -> Model:
    """The backbone; shared: hidden width of the shared expert."""
    attention = Attention(size.heads, size.heads, size.head)
    router = Router(top_k=size.top_k)
    grid = max(16, math.isqrt(size.row) + 1)
    return Model(
        size.d, size.layers, size.vocab, size.experts, size.f, shared, attention, router, patch_dim=PATCH, max_grid=grid
    )


def unified(size: Size, system: str = "symbiotic") -> UnifiedModel:
    """The whole model; the shared expert is as wide as a routed one (of a dense model, k wider: see `MoE`)."""
    return UnifiedModel(model_of_size(size, size.f), system_of(system)).initialise(0)


def packed(size: Size, samples: int = 2, text_only: bool = False) -> Batch:
    """Rows of `samples` samples of equal length, by turns text -> image (words, then latents to generate) and
    understanding (an image to read, then words); half of the tokens are words. text_only: words alone."""
    torch.manual_seed(1)
    rows, length = size.tokens // size.row, size.row // samples
    words = length // 2
    t2i = torch.tensor([PROMPT] * words + [VAE] * (length - words))
    mmu = torch.tensor([VIT] * (length - words) + [TEXT] * words)
    row = torch.cat([t2i if i % 2 == 0 else mmu for i in range(samples)])
    kind = torch.full_like(row, TEXT) if text_only else row
    kind = kind.expand(rows, -1).contiguous()
    segment = torch.arange(samples).repeat_interleave(length).expand(rows, -1).contiguous()
    image = (kind == VAE) | (kind == VIT)
    tokens = torch.randint(size.vocab, kind.shape).masked_fill(image, 0)
    target = torch.where(image, IGNORE, tokens.roll(-1, 1))
    target[:, -1] = IGNORE
    read, made = int((kind == VIT).sum()), int((kind == VAE).sum())
    side = math.isqrt(length) + 1
    grid = torch.stack([torch.arange(length) // side, torch.arange(length) % side], 1)
    return Batch(
        tokens=tokens,
        kind=kind,
        position=torch.arange(length).repeat(samples).expand(rows, -1).contiguous(),
        segment=segment,
        span=torch.where(image, segment, -1),
        causal=torch.zeros_like(image),
        target=target,
        task=torch.where(kind == PROMPT, 0, 3),
        vit_patches=torch.randn(read, PATCH),
        vit_grid=grid.repeat(1 + read // length, 1)[:read],
        latents=torch.randn(made, PATCH),
        codes=torch.zeros(0, dtype=torch.long),
        latent_grid=grid.repeat(1 + made // length, 1)[:made],
        noise=torch.randn(made, PATCH),
        time=torch.rand(made),
        ce_norm=torch.tensor(float(max(1, int((target != IGNORE).sum())))),
        flow_norm=torch.tensor(float(max(1, made))),
    )
