"""Latents of a published variational autoencoder: `diffusers.AutoencoderKL` (extra `hf`) from a local folder.

z = (mean - shift) * scale, shift and scale of its own `config.json` (Stable Diffusion: 0 and 0.18215; FLUX: 0.1159 and
0.3611), as diffusers' pipelines have them; the decoder gets z / scale + shift. p x p neighbouring latents make a token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from symbiotic.files import weights_of
from symbiotic.images.encoder import ImageEncoder, fingerprint_of
from symbiotic.images.tokenizer import to_input, to_pixels
from symbiotic.models.embeddings import patchify, unpatchify
from symbiotic.schema import ConfigError

KEY = "data.autoencoder"
FILES = ("diffusion_pytorch_model.safetensors",)
HF = "pip install 'symbiotic[hf]'"
GET = "download the folder vae/ of the model (stabilityai/sd-vae-ft-mse, FLUX.1's) with config.json and safetensors"


@final
class KLAutoencoder(ImageEncoder):
    """
    Args:
        path: the folder, with `config.json` and `diffusion_pytorch_model.safetensors`. token: p, latents along a side
            that are one token.

    Raises:
        ConfigError: no such files, files of another kind, or diffusers is missing.
    """

    kind = "vae"

    def __init__(self, path: str, token: int = 2) -> None:
        super().__init__()
        if token < 1:
            raise ConfigError(f"{KEY}.token={token}: must be at least 1")
        weights = weights_of(path, FILES, KEY, GET)
        config = _config(weights.parent, path)
        self.network = _network(weights.parent, path)
        self.token, self.patch = token, token * 2 ** (len(self.network.config.block_out_channels) - 1)
        self.channels = int(self.network.config.latent_channels)
        self.scale, self.shift = scaling(config)
        self.patch_dim = token * token * self.channels
        self.fingerprint = fingerprint_of(weights, "kl", token, self.scale, self.shift)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch or width % self.patch or not height or not width:
            size = f"{self.patch}x{self.patch}"
            raise ValueError(f"{height}x{width} pixels do not divide into tokens of {size} pixels")
        return height // self.patch, width // self.patch

    def vectors(self, pixels: Tensor) -> Tensor:
        mean_nchw = self.network.encode(to_input(pixels)).latent_dist.mode()
        z_nhwc = ((mean_nchw - self.shift) * self.scale).permute(0, 2, 3, 1)
        h, w = z_nhwc.shape[1] // self.token, z_nhwc.shape[2] // self.token
        return patchify(z_nhwc, self.token).unflatten(1, (h, w))

    @torch.no_grad()
    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """[n, h*w, P], row-major, and the size in pixels -> uint8 [n, H, W, 3] on the CPU.

        Raises:
            ValueError: latents that do not fill the picture.
        """
        h, w = self.grid(height, width)
        if latents.shape[1:] != (h * w, self.patch_dim):
            what = f"{height}x{width} pixels are {h * w} tokens of {self.patch_dim} numbers"
            raise ValueError(f"{what}, not {list(latents.shape[1:])}")
        latents = latents.to(next(self.network.parameters()).device)
        z_nhwc = unpatchify(latents.float(), h, w, self.token, self.channels)
        x = self.network.decode(z_nhwc.permute(0, 3, 1, 2) / self.scale + self.shift).sample
        return to_pixels(x).cpu()


def scaling(config: dict[str, Any]) -> tuple[float, float]:
    """(scale, shift) of a `config.json`; what it leaves out is as in diffusers.

    Raises:
        ConfigError: latents that are normalised channel by channel.
    """
    for key in ("latents_mean", "latents_std"):
        if config.get(key) is not None:
            raise ConfigError(f"{KEY}: config.json: {key}: latents by channel are not read; must be null")
    scale, shift = config.get("scaling_factor"), config.get("shift_factor")
    return float(0.18215 if scale is None else scale), float(shift or 0.0)


def _config(folder: Path, path: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{KEY}.path={path}: no readable config.json beside the weights ({error}); {GET}") from None
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderKL":
        name = config.get("_class_name") if isinstance(config, dict) else None
        raise ConfigError(f"{KEY}.path={path}: config.json is of {name}; must be of AutoencoderKL; {GET}")
    return config


def _network(folder: Path, path: str) -> Any:
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise ConfigError(f"{KEY}: an AutoencoderKL is read by diffusers, which is not installed: {HF}") from error
    try:
        network = AutoencoderKL.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300]
        raise ConfigError(f"{KEY}.path={path}: not weights of its config.json ({what}); {GET}") from error
    return network.float().eval().requires_grad_(False)
