"""Published vision encoders: the image tower of a SigLIP or CLIP of open_clip, from local weights.

`VisionEncoder` is frozen and makes vectors ahead of time, which the model's `vit_in` projects; `TowerPixels` makes what
a tower inside the model takes (`models.vision_tower`). Preprocessing (size, mean, deviation, interpolation) is the
tower's own.
"""

from __future__ import annotations

from typing import Literal, final

import torch
from PIL import Image
from torch import Tensor

from symbiotic.images.encoder import ImageEncoder, fingerprint_of
from symbiotic.models.embeddings import patchify
from symbiotic.models.towers import designed, features, layout_of, load_published, published, size_of
from symbiotic.schema import Vision

KEY = "vision"


@final
class VisionEncoder(ImageEncoder):
    """
    Args:
        path: a file of weights, or the folder with one; `open_clip_config.json` beside it says what it is.
        architecture: name in open_clip; null: that of the config beside the weights. layer: the block whose output is
            taken, from the last one on: 1 with the tower's own last norm; 2 the last but one, without (as LLaVA does).
        resize: null: as the tower was trained; squash: the whole picture, its sides scaled apart.

    Raises:
        ConfigError: no such files, weights of another model, or a tower without patches.
    """

    kind = "vit"

    def __init__(
        self,
        path: str,
        architecture: str | None = None,
        layer: int = 1,
        resize: Literal["squash", "shortest", "longest"] | None = None,
    ) -> None:
        super().__init__()
        about = Vision(path, False, architecture, layer, resize)
        weights = published(about, KEY)
        model, self.tower, self.transform = designed(about, KEY)
        load_published(model, weights, about, KEY)
        self.tower.float().eval().requires_grad_(False)
        self.layer = layer
        probe = self._features(torch.zeros(1, 3, *size_of(self.tower)))
        self.h, self.w, self.patch_dim = int(probe.shape[2]), int(probe.shape[3]), int(probe.shape[1])
        self.fingerprint = fingerprint_of(weights, "vision", architecture, layer, resize)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return _any_picture(height, width, (self.h, self.w))

    def vectors(self, pixels: Tensor) -> Tensor:
        images = [self.transform(Image.fromarray(image)) for image in pixels.cpu().numpy()]
        device = next(self.tower.parameters()).device
        return self._features(torch.stack(images).to(device)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        return features(self.tower, x, self.layer, self.layer == 1)


@final
class TowerPixels(ImageEncoder):
    """What a tower inside the model takes: pixels by its preprocessing, cut into its patches, h x w of p x p x 3.

    Raises:
        ConfigError: as `VisionEncoder`, or a tower whose patches overlap.
    """

    kind = "vit"

    def __init__(self, about: Vision, key: str) -> None:
        super().__init__()
        with torch.device("meta"):
            _, tower, self.transform = designed(about, key)
            (self.h, self.w), self.side = layout_of(tower, key)
        self.patch_dim = 3 * self.side**2
        self.fingerprint = fingerprint_of(published(about, key), "pixels", about.architecture, about.resize)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return _any_picture(height, width, (self.h, self.w))

    def vectors(self, pixels: Tensor) -> Tensor:
        images = torch.stack([self.transform(Image.fromarray(image)) for image in pixels.cpu().numpy()])
        patches = patchify(images.permute(0, 2, 3, 1), self.side)
        return patches.unflatten(1, (self.h, self.w)).to(pixels.device)


def _any_picture(height: int, width: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The grid of a tower, which scales every picture to its own size."""
    if not height or not width:
        raise ValueError(f"{height}x{width} pixels are no picture")
    return grid
