"""The unified model: text and read images in, text out; noisy latents in, predicted clean latents (or velocity) out,
or image codes in, logits of the next one out.

One forward serves training, evaluation and sampling; the routing comes back with it, nothing is hooked.
Suffixes: B rows, T places a row, N = B*T tokens, D width, V read patches, L latents, P numbers a patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from symbiotic.models.attention import by_stream
from symbiotic.models.batch import IGNORE, VIT, Batch
from symbiotic.models.cache import KVCache
from symbiotic.models.embeddings import GridEmbedding, TimeEmbedding
from symbiotic.models.fused import RMSNorm
from symbiotic.models.lora import attach
from symbiotic.models.moe import LayerStats, LayerTrace
from symbiotic.models.places import Places, latent_rows
from symbiotic.models.routing import Columns, RoutingStats
from symbiotic.models.transformer import Block, initial, run_blocks
from symbiotic.schema import KINDS, Config, Lora, Model, RunError, System

if TYPE_CHECKING:
    from symbiotic.models.vision_tower import VisionTower


@dataclass
class Output:
    """The ingredients of the losses, and the routing."""

    logits: Tensor  # [n, vocabulary] at the n places asked for, row-major
    prediction: Tensor  # [L, P] of the flow head at the latents, or [L, codebook] logits
    z: Tensor  # [] mean over layers
    routing: RoutingStats  # what the balance loss is made of
    trace: list[LayerTrace]  # of every MoE layer, where it was asked for
    task: Tensor | None = None  # [] cross-entropy of the task routers, mean over layers; None without any


class UnifiedModel(nn.Module):
    """A decoder transformer over packed text, read patches and latents.

    latents=False builds the understanding-only parent (stage 0): no latent projections, no time embedding.
    codebook: number of codes of the image tokenizer; 0: latents are patches of numbers, and have a flow time.
    Parameters are created empty; call `initialise` or load a state.
    """

    visible_experts: Tensor  # [M, E] experts that tokens of a kind may use
    own_experts: Tensor  # [M, E] those of their router: the same, but where a task router may send them elsewhere
    routers_RM: Tensor
    recompute = False  # activation checkpointing of the blocks

    def __init__(self, model: Model, system: System, latents: bool = True, codebook: int = 0) -> None:
        super().__init__()
        self.cfg, self.system, self.latents, self.codebook = model, system, latents, codebook
        width = model.width
        self.embed = nn.Embedding(model.vocab_size, width)
        self.vision = vision_tower(model)
        self.vit_dim = self.vision.patch_dim if self.vision else model.vit_dim or model.patch_dim
        self.vit_in = projector(self.vision.width if self.vision else self.vit_dim, model.projector_hidden, width)
        self.vit_grid = GridEmbedding(model.max_grid, width)
        self.blocks = nn.ModuleList(Block(model, system, layer) for layer in range(model.num_layers))
        self.norm = nn.ModuleDict({s: RMSNorm(width, eps=model.norm_eps) for s in system.streams})
        self.text_head = None if model.tied_head else nn.Linear(width, model.vocab_size, bias=False)
        if latents:
            self.latent_in = nn.Embedding(codebook + 1, width) if codebook else nn.Linear(model.patch_dim, width)
            self.latent_grid = GridEmbedding(model.max_grid, width)
            self.time_in = None if codebook else TimeEmbedding(width)
            self.latent_head = nn.Linear(width, codebook or model.patch_dim)
        columns = Columns(model, system)
        everywhere = torch.full_like(columns.visible_ME, columns.by_task)
        self.register_buffer("visible_experts", columns.visible_ME | everywhere, persistent=False)
        self.register_buffer("own_experts", columns.visible_ME, persistent=False)
        self.register_buffer("routers_RM", columns.routers_RM, persistent=False)

    @torch.no_grad()
    def initialise(self, seed: int) -> UnifiedModel:
        """Fresh parameters, each a function of (seed, its name); those of a vision tower as they were published."""
        for name, parameter in self.named_parameters():
            if not name.startswith("vision."):
                parameter.copy_(initial(name, parameter, seed, self.cfg.init_std, self.cfg.num_layers))
        if self.vision:
            self.vision.load()
        return self

    def adapt(self, lora: Lora, seed: int) -> UnifiedModel:
        """With low-rank updates of the targeted weights, fresh from (seed, name); the outputs stay."""
        attach(self, lora, lambda name, empty: initial(name, empty, seed, self.cfg.init_std, self.cfg.num_layers))
        return self

    def forward(
        self,
        batch: Batch,
        *,
        shield: Tensor | None = None,
        by_truth: Tensor | None = None,
        logits_at: Tensor | None = None,
        trace: bool = False,
        cache: KVCache | None = None,
        embedded: Tensor | None = None,
    ) -> Output:
        """batch.latents are taken as they are: noised by `objectives.flow.noised`, or the sampler's x_t; and so are
        batch.codes, shifted by `objectives.autoregressive.shifted`.

        shield: [] level of the gradient shield in [0, 1]. logits_at: [B, T] bool, by default the places with a
        target. trace: keep what every MoE layer did token by token. by_truth: see `Places`. cache: of the tokens that
        stand before these. embedded: [N, D] in the place of `embedding(batch)`, to ask what an output owes to them.
        """
        places, position_N = Places(batch, shield, trace, by_truth, cache), batch.position.reshape(-1)
        x_ND = self.embedding(batch) if embedded is None else embedded
        x_ND, layers = run_blocks(self.blocks, x_ND, position_N, places, self.cfg, self.recompute and not trace)
        x_ND = by_stream(dict(self.norm.items()), self.system, x_ND, places)
        wanted = (batch.target != IGNORE if logits_at is None else logits_at).reshape(-1)
        hidden = x_ND[wanted]
        logits = hidden @ self.embed.weight.T if self.text_head is None else self.text_head(hidden)
        prediction = self.latent_head(x_ND[latent_rows(batch)]) if self.latents else batch.latents
        if cache is not None:
            cache.keep(batch)
        stats = self.routing(layers, places)
        z = torch.stack([layer.z for layer in layers]).mean() if layers else x_ND.new_zeros(())
        losses = [layer.task.loss for layer in layers if layer.task is not None]
        task = torch.stack(losses).mean() if losses else None
        traces = [layer.trace for layer in layers if layer.trace is not None]
        return Output(logits, prediction, z, stats, traces, task)

    @property
    def groups_RE(self) -> Tensor | None:
        """[R, E] bool, the experts of each group that a task router chooses among; None without task routers."""
        return (self.routers_RM @ self.own_experts.float()) > 0 if self.system.task_router else None

    def embedding(self, batch: Batch) -> Tensor:
        """[N, D]: words; read patches with their grid place; latents with grid place and flow time, or codes with the
        grid place of the one that they predict."""
        kind_N = batch.kind.reshape(-1)
        x_ND = self.embed(batch.tokens.reshape(-1))
        dtype = self.embed.weight.dtype
        patches = _as_wide(batch.vit_patches, self.vit_dim).to(dtype)
        read = self.vit_in(self.vision(patches) if self.vision else patches) + self.vit_grid(batch.vit_grid)
        x_ND = x_ND.index_copy(0, (kind_N == VIT).nonzero().squeeze(-1), read.to(x_ND.dtype))
        if self.latents:
            latents = batch.codes if self.codebook else _as_wide(batch.latents, self.cfg.patch_dim).to(dtype)
            made = self.latent_in(latents)
            made = made + self.latent_grid(batch.latent_grid)
            if self.time_in is not None:
                made = made + self.time_in(batch.time)
            x_ND = x_ND.index_copy(0, latent_rows(batch).nonzero().squeeze(-1), made.to(x_ND.dtype))
        return x_ND

    def routing(self, layers: list[LayerStats], places: Places) -> RoutingStats:
        if not layers:
            none = places.tokens_M.new_zeros(0, len(KINDS), 0)
            return RoutingStats(none, none, places.tokens_M)
        counts, probs = (torch.stack(parts) for parts in zip(*((s.counts_ME, s.probs_ME) for s in layers), strict=True))
        tasks = [layer.task for layer in layers if layer.task is not None]
        predicted, sent = (torch.stack([t[i] for t in tasks]) if tasks else None for i in (1, 2))
        return RoutingStats(counts, probs, places.tokens_M, predicted, sent)


def _as_wide(patches: Tensor, width: int) -> Tensor:
    """No patches at all are as wide as any. Raises RunError: patches of another width."""
    if len(patches) and patches.shape[1] != width:
        what = f"patches of {patches.shape[1]} numbers, the model takes {width}"
        raise RunError(f"{what}; where it was trained on vectors of an encoder, data.vision says which")
    return patches if len(patches) else patches.new_zeros(0, width)


def vision_tower(model: Model) -> VisionTower | None:
    if model.vision is None:
        return None
    from symbiotic.models.vision_tower import VisionTower  # open_clip takes seconds to import

    return VisionTower(model.vision)


def projector(vectors: int, hidden: int | None, width: int) -> nn.Module:
    """From what is read to the width of the model: one linear layer, or two with a GELU between (LLaVA-1.5, arXiv
    2310.03744)."""
    if hidden is None:
        return nn.Linear(vectors, width)
    return nn.Sequential(nn.Linear(vectors, hidden), nn.GELU(), nn.Linear(hidden, width))


def model_of(config: Config, latents: bool = True) -> UnifiedModel:
    """The model of a run, its parameters empty."""
    return UnifiedModel(config.model, config.system, latents, config.objective.codebook_size)
