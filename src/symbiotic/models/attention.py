"""Attention of one block: a copy of norms and projections per stream, one global softmax over all tokens.

Suffixes: B rows, T places a row, N = B*T tokens, D width, H query heads, G key/value heads, h head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from symbiotic.models.fused import RMSNorm, rotate, scale_gradient
from symbiotic.models.lora import Adaptable
from symbiotic.models.places import Places
from symbiotic.schema import Attention as AttentionConfig
from symbiotic.schema import Model, System


def by_stream(parts: Mapping[str, Callable[[Tensor], Tensor]], system: System, x: Tensor, places: Places) -> Tensor:
    """Apply each stream's copy to the tokens of its kinds. One stream: no gather at all."""
    if len(parts) == 1:
        return next(iter(parts.values()))(x)
    out: Tensor | None = None
    for name, part in parts.items():
        index = places.index(system.streams[name])
        y = part(x[index])
        out = y.new_zeros(len(x), *y.shape[1:]) if out is None else out
        out = out.index_copy(0, index, y)
    assert out is not None
    return out


def rope_angles(position_N: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [N, 1, h/2] of the rotary position embedding (RoFormer, arXiv 2104.09864)."""
    rates = theta ** (-torch.arange(0, head_dim, 2, device=position_N.device, dtype=torch.float32) / head_dim)
    angles = position_N.float()[:, None, None] * rates
    return angles.cos(), angles.sin()


class Projections(Adaptable):
    """One stream's norm, Q, K, V, O and QK-norm."""

    def __init__(self, cfg: AttentionConfig, width: int, eps: float) -> None:
        super().__init__()
        self.cfg = cfg
        queries, keys = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
        self.norm = RMSNorm(width, eps=eps)
        self.q = nn.Linear(width, queries, bias=cfg.qkv_bias)
        self.k = nn.Linear(width, keys, bias=cfg.qkv_bias)
        self.v = nn.Linear(width, keys, bias=cfg.qkv_bias)
        self.o = nn.Linear(queries, width, bias=False)
        if cfg.qk_norm != "none":
            head = cfg.qk_norm == "head"
            self.q_norm = RMSNorm(cfg.head_dim if head else queries, eps=eps)
            self.k_norm = RMSNorm(cfg.head_dim if head else keys, eps=eps)

    def qkv(self, x_ND: Tensor) -> Tensor:
        """[N, (H + 2G) * h], normed where the config says so."""
        x_ND = self.norm(x_ND)
        q, k, v = (self.updated(name, getattr(self, name)(x_ND), x_ND) for name in "qkv")
        if self.cfg.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        elif self.cfg.qk_norm == "head":
            q = self.q_norm(q.unflatten(-1, (-1, self.cfg.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.cfg.head_dim))).flatten(-2)
        return torch.cat([q, k, v], dim=-1)

    def out(self, y_NF: Tensor) -> Tensor:
        """[N, D]"""
        return self.updated("o", self.o(y_NF), y_NF)


class Attention(nn.ModuleDict):
    """Grouped-query attention; its entries are the streams' `Projections`."""

    def __init__(self, model: Model, system: System) -> None:
        super().__init__({s: Projections(model.attention, model.width, model.norm_eps) for s in system.streams})
        self.cfg, self.system = model.attention, system

    def forward(self, x_ND: Tensor, places: Places, angles: tuple[Tensor, Tensor]) -> Tensor:
        cfg = self.cfg
        qkv = by_stream({s: p.qkv for s, p in self.items()}, self.system, x_ND, places)  # type: ignore[misc]
        qk, v = qkv.unflatten(-1, (-1, cfg.head_dim)).split([cfg.num_heads + cfg.num_kv_heads, cfg.num_kv_heads], 1)
        q, k = rotate(qk, angles).split([cfg.num_heads, cfg.num_kv_heads], 1)
        y_NF = self.attend(q, k, v, places).flatten(1)
        return by_stream({s: p.out for s, p in self.items()}, self.system, y_NF, places)  # type: ignore[misc]

    def attend(self, q_NHh: Tensor, k_NGh: Tensor, v_NGh: Tensor, places: Places) -> Tensor:
        """Under the `strict` shield latent queries read keys and values of other tokens with scaled gradient (ours).

        Latents only, whatever else is in the scope of the targets: no other token has a generation loss to keep out.
        """
        y_NHh = self.softmax(q_NHh, k_NGh, v_NGh, places)
        if self.system.shield.mode != "strict" or places.shield is None:
            return y_NHh
        latent_N11 = places.is_kind(("vae",))[:, None, None]
        scale = torch.where(latent_N11, 1.0, 1.0 - places.shield)
        strict_NHh = self.softmax(q_NHh, scale_gradient(k_NGh, scale), scale_gradient(v_NGh, scale), places)
        return torch.where(latent_N11, strict_NHh, y_NHh)

    def softmax(self, q_NHh: Tensor, k_NGh: Tensor, v_NGh: Tensor, places: Places) -> Tensor:
        """[N, H, h]: scaled dot products over the packed rows under the batch's mask."""
        if places.runs and not torch.compiler.is_compiling():
            return self.by_sample(q_NHh, k_NGh, v_NGh, places)
        groups = self.cfg.num_heads // self.cfg.num_kv_heads
        rows = (x.unflatten(0, places.shape).transpose(1, 2) for x in (q_NHh, k_NGh, v_NGh))
        q, k, v = rows
        if places.cache is not None:
            k, v = places.cache.extended(self, k, v)
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=places.mask)
        return y.transpose(1, 2).flatten(0, 1)

    def by_sample(self, q_NHh: Tensor, k_NGh: Tensor, v_NGh: Tensor, places: Places) -> Tensor:
        """The same, one call a sample: a row of m samples has m times as many pairs as they have by themselves."""
        groups = self.cfg.num_heads // self.cfg.num_kv_heads
        k, v = (x.repeat_interleave(groups, 1) for x in (k_NGh, v_NGh)) if groups > 1 else (k_NGh, v_NGh)
        samples = zip(*(x.split(places.runs) for x in (q_NHh, k, v)), places.run_masks, strict=True)
        parts = []
        for *qkv, mask in samples:
            q, k, v = (x.transpose(0, 1)[None] for x in qkv)
            parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1))
        return torch.cat(parts)
