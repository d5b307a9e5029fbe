"""The contract of every image tokenizer: a picture as a grid of numbers, and back.

Shapes: n pictures of H x W pixels, h x w codes with h = H / patch, K codes in the codebook, D numbers a code.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

KEY = "objective.image_tokenizer"
"""Where the tokenizer's source stands in the config, for messages."""


def to_input(pixels: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] -> float [n, 3, H, W] in [-1, 1], the range of the flow's latents."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(x: Tensor) -> Tensor:
    """float [n, 3, H, W] -> uint8 [n, H, W, 3]; what lies outside [-1, 1] is cut off."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class ImageTokenizer(nn.Module, ABC):
    """Pictures to codes and back. Subclasses are final; they see pictures as float [n, 3, H, W] in [-1, 1].

    codebook_size: number of codes. patch: pixels along a side that one code stands for.
    """

    codebook_size: int
    patch: int

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """12 hexadecimal digits of all that its codes depend on."""

    @abstractmethod
    def numbers(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] -> int64 [n, h, w]."""

    @abstractmethod
    def pictures(self, numbers: Tensor) -> Tensor:
        """int64 [n, h, w] -> [n, 3, H, W]."""

    @abstractmethod
    def save(self, path: Path) -> Path:
        """Write what `symbiotic.images.store.load_image_tokenizer` reads."""

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> int64 [n, h*w], row-major.

        Raises:
            ValueError: pictures of another type or shape, or sides that are no multiples of the patch.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f"pictures must be uint8 [n, height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
        self._grid(pixels.shape[1], pixels.shape[2])
        return self.numbers(to_input(pixels)).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor, height: int, width: int) -> Tensor:
        """int64 [n, h*w], row-major, and the size in pixels -> uint8 [n, H, W, 3].

        Raises:
            ValueError: codes that do not fill the picture, or that the codebook does not have.
        """
        h, w = self._grid(height, width)
        if codes.ndim != 2 or codes.shape[1] != h * w:
            raise ValueError(f"{height}x{width} pixels are {h * w} codes a picture, not {list(codes.shape)}")
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(
                f"codes must be 0 to {self.codebook_size - 1}, not {int(codes.min())} to {int(codes.max())}"
            )
        return to_pixels(self.pictures(codes.view(-1, h, w)))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if height % self.patch or width % self.patch or not height or not width:
            raise ValueError(f"{height}x{width} pixels do not divide into codes of {self.patch}x{self.patch} pixels")
        return height // self.patch, width // self.patch
