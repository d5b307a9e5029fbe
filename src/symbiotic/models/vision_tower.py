"""The image tower of a SigLIP or CLIP inside the unified model, frozen or trained with it (LLaVA, arXiv 2304.08485).

Shapes: V read patches of n images, h x w each; P = 3 p p numbers of a patch; D the tower's width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from symbiotic.models.embeddings import unpatchify
from symbiotic.models.towers import designed, features, layout_of, load_published, published, size_of
from symbiotic.schema import ConfigError, RunError, Vision

KEY = "model.vision"


class VisionTower(nn.Module):
    """Patches of images, by the tower's own preprocessing (`images.vision.TowerPixels`), to a vector each.

    What comes behind the layer that is taken is cut off, so every parameter that is left has a gradient. The tower
    stays in evaluation mode: dropout is no part of it.

    Raises:
        ConfigError: see `models.towers.designed`.
    """

    def __init__(self, about: Vision) -> None:
        super().__init__()
        self.about = about
        _, self.tower, _ = designed(about, KEY)
        cut(self.tower, about.layer)
        self.tower.float().eval().requires_grad_(about.trained)
        (self.h, self.w), self.side = layout_of(self.tower, KEY)
        self.patch_dim = 3 * self.side**2
        self.width = int(self._vectors(torch.zeros(1, 3, *size_of(self.tower))).shape[1])

    def forward(self, patches_VP: Tensor) -> Tensor:
        """[V, P] -> [V, D]; whole images, one after the other. Raises RunError: they are not whole."""
        tokens = self.h * self.w
        if len(patches_VP) % tokens:
            raise RunError(f"{len(patches_VP)} patches are no whole images of {self.h} x {self.w} patches")
        if not len(patches_VP):  # every parameter stays in the graph, as DDP needs it
            nothing = sum((p.sum() * 0.0 for p in self.parameters() if p.requires_grad), patches_VP.new_zeros(()))
            return patches_VP.new_zeros(0, self.width) + nothing
        images = unpatchify(patches_VP.view(-1, tokens, self.patch_dim), self.h, self.w, self.side).permute(0, 3, 1, 2)
        return self._vectors(images).flatten(2).mT.flatten(0, 1)

    def _vectors(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.about.trained and torch.is_grad_enabled()):
            return features(self.tower, images, layer=1, normalised=self.about.layer == 1)

    def train(self, mode: bool = True) -> VisionTower:
        return super().train(False)

    @torch.no_grad()
    def load(self) -> None:
        """The published weights. Raises ConfigError: a file of others."""
        model, tower, _ = designed(self.about, KEY)
        load_published(model, published(self.about, KEY), self.about, KEY)
        cut(tower, self.about.layer)
        self.tower.load_state_dict(tower.state_dict())


def cut(tower: Any, layer: int) -> None:
    """Take off what stands behind block `layer`, counted from the last on, and what pools.

    Raises:
        ConfigError: there are fewer blocks.
    """
    trunk = getattr(tower, "trunk", tower)  # of timm, or open_clip's own
    blocks = len(trunk.blocks if trunk is not tower else tower.transformer.resblocks)
    if layer > blocks:
        raise ConfigError(f"{KEY}.layer={layer}: must be at most {blocks}, the blocks of the tower")
    trunk.prune_intermediate_layers([blocks - layer], prune_norm=layer > 1, prune_head=True)
    if trunk is not tower:
        tower.head = nn.Identity()
    elif tower.attn_pool is not None:
        tower.attn_pool = None
