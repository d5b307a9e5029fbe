"""The contract of continuous image encoders: a picture as a grid of vectors, which are cached or computed.

Shapes: n pictures of H x W pixels, h x w tokens, P numbers a token.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

WEIGHTS = (".safetensors", ".pt", ".ckpt", ".bin")


class ImageEncoder(nn.Module, ABC):
    """Pictures to vectors. Subclasses are final, frozen and in float32.

    kind: of the tokens that its vectors are, `vit` (images that are read) or `vae` (images that are generated).
    patch_dim: P. fingerprint: 12 hexadecimal digits of all that its vectors depend on.
    """

    kind: Literal["vit", "vae"]
    patch_dim: int
    fingerprint: str

    @property
    def device(self) -> torch.device:
        """Where it computes: on the CPU where it has no weights."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    @abstractmethod
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of a picture of this size in pixels. Raises ValueError: one that does not divide into tokens."""

    @abstractmethod
    def vectors(self, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> float32 [n, h, w, P]."""

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> float32 [n, h, w, P].

        Raises:
            ValueError: pictures of another type or shape, or a size that does not divide into tokens.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pictures must be uint8 [n, height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
        h, w = self.grid(pixels.shape[1], pixels.shape[2])
        made = self.vectors(pixels).float()
        assert made.shape == (len(pixels), h, w, self.patch_dim)
        return made


def fingerprint_of(weights: Path, *about: object) -> str:
    """Of the bytes of a file and of what else counts."""
    with weights.open("rb") as file:
        sha = hashlib.file_digest(file, "sha256")
    sha.update(repr(about).encode())
    return sha.hexdigest()[:12]
