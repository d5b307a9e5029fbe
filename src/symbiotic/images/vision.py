"""Vectors of a published vision encoder: the image tower of a SigLIP or CLIP of open_clip, from local weights, frozen.

The model's `vit_in` is then its projector. Preprocessing (size, mean, deviation, interpolation) is the tower's own.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, final

import torch
from PIL import Image
from torch import Tensor

from symbiotic.images.encoder import ImageEncoder, fingerprint_of, weights_of
from symbiotic.schema import ConfigError

KEY = "vision"
CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
GET = "download open_clip_config.json and the weights of a model such as timm/ViT-B-16-SigLIP from Hugging Face"


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
        if layer < 1:
            raise ConfigError(f"{KEY}.layer={layer}: must be at least 1, the last block")
        if architecture is not None and ":" in architecture:
            raise ConfigError(f"{KEY}.architecture={architecture}: must be a name in open_clip; path reads local files")
        weights = weights_of(path, FILES, KEY, GET)
        if architecture is None and not (weights.parent / CONFIG).is_file():
            right = f"no {CONFIG} beside the weights, so {KEY}.architecture must be a name in open_clip"
            raise ConfigError(f"{KEY}.path={path}: {right}; {GET}")
        self.tower, self.transform = _tower(weights, architecture or f"local-dir:{weights.parent}", resize)
        self.layer = layer
        size = self.tower.image_size
        self.size = (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) else (int(size), int(size))
        probe = self._features(torch.zeros(1, 3, *self.size))
        self.h, self.w, self.patch_dim = int(probe.shape[2]), int(probe.shape[3]), int(probe.shape[1])
        self.fingerprint = fingerprint_of(weights, "vision", architecture, layer, resize)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """That of the tower, which scales every picture to its own size."""
        if not height or not width:
            raise ValueError(f"{height}x{width} pixels are no picture")
        return self.h, self.w

    def vectors(self, pixels: Tensor) -> Tensor:
        images = [self.transform(Image.fromarray(image)) for image in pixels.cpu().numpy()]
        device = next(self.tower.parameters()).device
        return self._features(torch.stack(images).to(device)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def _features(self, x: Tensor) -> Tensor:
        """[n, P, h, w]."""
        last = self.layer == 1
        kwargs = {"indices": self.layer, "normalize_intermediates": last, "intermediates_only": True}
        return self.tower.forward_intermediates(x, **kwargs)["image_intermediates"][0]


def _tower(weights: Path, name: str, resize: str | None) -> tuple[Any, Any]:
    """The image tower in float32 and its preprocessing. Nothing is downloaded, nothing in the file is executed."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before open_clip is imported
    import open_clip
    from open_clip.factory import load_checkpoint
    from open_clip.transform import PreprocessCfg, image_transform_v2

    wanted = {"resize_mode": resize} if resize else None
    with _quiet():
        try:
            model = open_clip.create_model(name, load_weights=False, force_preprocess_cfg=wanted)
        except Exception as error:  # whatever a config of others makes a constructor raise
            what = _one_line(error)
            raise ConfigError(f"{KEY}.architecture={name}: no model that open_clip builds offline ({what})") from error
        try:
            load_checkpoint(model, str(weights), weights_only=True)
        except Exception as error:  # damaged files make torch and safetensors raise what they like
            raise ConfigError(f"{KEY}.path={weights}: not weights of {name} ({_one_line(error)}); {GET}") from error
    tower = model.visual
    if not hasattr(tower, "forward_intermediates"):
        raise ConfigError(f"{KEY}.architecture={name}: its image tower tells no patches; take a ViT")
    transform = image_transform_v2(PreprocessCfg(**tower.preprocess_cfg), is_train=False)
    return tower.float().eval().requires_grad_(False), transform


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:300]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that a model is untrained: its weights are loaded afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
