"""Image towers of open_clip (SigLIP, CLIP) from local files. Nothing is downloaded, nothing in a file is executed.

key: of the config, in messages.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic.files import weights_of
from symbiotic.schema import ConfigError, Vision

CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
GET = "download open_clip_config.json and the weights of a model such as timm/ViT-B-16-SigLIP from Hugging Face"


def published(about: Vision, key: str) -> Path:
    """The file of weights. Raises ConfigError: no such file, or nothing that says what it is the weights of."""
    if about.layer < 1:
        raise ConfigError(f"{key}.layer={about.layer}: must be at least 1, the last block")
    if about.architecture is not None and ":" in about.architecture:
        what = f"{key}.architecture={about.architecture}: must be a name in open_clip"
        raise ConfigError(f"{what}; path reads local files")
    weights = weights_of(about.path, FILES, key, GET)
    if about.architecture is None and not (weights.parent / CONFIG).is_file():
        right = f"no {CONFIG} beside the weights, so {key}.architecture must be a name in open_clip"
        raise ConfigError(f"{key}.path={about.path}: {right}; {GET}")
    return weights


def designed(about: Vision, key: str) -> tuple[Any, Any, Any]:
    """The model of open_clip without its weights, its image tower, and the tower's preprocessing; from local files.

    Raises:
        ConfigError: no such architecture, or a tower without patches.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before open_clip is imported
    import open_clip
    from open_clip.transform import PreprocessCfg, image_transform_v2

    name = about.architecture or f"local-dir:{published(about, key).parent}"
    wanted = {"resize_mode": about.resize} if about.resize else None
    with quiet():
        try:
            options = {"load_weights": False, "force_preprocess_cfg": wanted, "device": torch.get_default_device()}
            model = open_clip.create_model(name, **options)
        except Exception as error:  # whatever a config of others makes a constructor raise
            what = one_line(error)
            raise ConfigError(f"{key}.architecture={name}: no model that open_clip builds offline ({what})") from error
    tower = model.visual
    if not hasattr(tower, "forward_intermediates"):
        raise ConfigError(f"{key}.architecture={name}: its image tower tells no patches; take a ViT")
    return model, tower, image_transform_v2(PreprocessCfg(**tower.preprocess_cfg), is_train=False)


def load_published(model: Any, weights: Path, about: Vision, key: str) -> None:
    """Fill a model of `designed`. Raises ConfigError: a file of other weights; nothing in it is executed."""
    from open_clip.factory import load_checkpoint

    name = about.architecture or f"local-dir:{weights.parent}"
    with quiet():
        try:
            load_checkpoint(model, str(weights), weights_only=True)
        except Exception as error:  # damaged files make torch and safetensors raise what they like
            raise ConfigError(f"{key}.path={weights}: not weights of {name} ({one_line(error)}); {GET}") from error


def features(tower: Any, x: Tensor, layer: int, normalised: bool) -> Tensor:
    """[n, P, h, w] of images [n, 3, H, W]: the output of a block, counted from the last on."""
    kwargs = {"indices": layer, "normalize_intermediates": normalised, "intermediates_only": True}
    return tower.forward_intermediates(x, **kwargs)["image_intermediates"][0]


def size_of(tower: Any) -> tuple[int, int]:
    """(height, width) of its images."""
    size = tower.image_size
    return (int(size[0]), int(size[1])) if isinstance(size, (tuple, list)) else (int(size), int(size))


def layout_of(tower: Any, key: str) -> tuple[tuple[int, int], int]:
    """(h, w) of its patches, and the pixels along a side of one. Raises ConfigError: they are no square tiles."""
    height, width = size_of(tower)
    h, w = features(tower, torch.zeros(1, 3, height, width), 1, False).shape[2:]
    if height % h or width % w or height // h != width // w:
        what = f"{h} x {w} patches of {height} x {width} pixels"
        raise ConfigError(f"{key}: {what} are no square tiles; take another ViT")
    return (int(h), int(w)), height // int(h)


def one_line(error: Exception) -> str:
    """The first line of a message, and the first below it, of torch's lists of keys."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Without open_clip's warning that a model is untrained: its weights are loaded afterwards."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
