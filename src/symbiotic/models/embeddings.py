"""What turns patches and flow times into token embeddings, and images into patches and back.

Shapes: n images, H x W pixels, C channels, p the patch side, h = H/p, w = W/p; N tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def patchify(images: Tensor, p: int) -> Tensor:
    """[n, H, W, C] -> [n, h*w, p*p*C]: patches row-major over the image; inside a patch (y, x, channel).

    Raises:
        ValueError: a side of the images is no multiple of p.
    """
    n, height, width, channels = images.shape
    if height % p or width % p:
        raise ValueError(f"images of {height} x {width} pixels cannot be cut into {p} x {p} patches")
    patches = images.reshape(n, height // p, p, width // p, p, channels).permute(0, 1, 3, 2, 4, 5)
    return patches.reshape(n, (height // p) * (width // p), p * p * channels)


def unpatchify(patches: Tensor, h: int, w: int, p: int, channels: int = 3) -> Tensor:
    """[n, h*w, p*p*C] -> [n, h*p, w*p, C]: the inverse of `patchify`."""
    images = patches.reshape(-1, h, w, p, p, channels).permute(0, 1, 3, 2, 4, 5)
    return images.reshape(-1, h * p, w * p, channels)


class GridEmbedding(nn.Module):
    """A learned vector for the row plus one for the column of a patch."""

    def __init__(self, max_grid: int, width: int) -> None:
        super().__init__()
        self.row = nn.Embedding(max_grid, width)
        self.column = nn.Embedding(max_grid, width)

    def forward(self, grid_N2: Tensor) -> Tensor:
        return self.row(grid_N2[:, 0]) + self.column(grid_N2[:, 1])


class TimeEmbedding(nn.Module):
    """Flow time in [0, 1] -> sinusoids -> two-layer perceptron. It is added to the latents; there is no time token."""

    def __init__(self, width: int, frequencies: int = 64) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.w_in = nn.Linear(2 * frequencies, width)
        self.w_out = nn.Linear(width, width)

    def forward(self, time_N: Tensor) -> Tensor:
        scale = math.log(1000.0) / (self.frequencies - 1)
        rates = torch.exp(torch.arange(self.frequencies, device=time_N.device, dtype=torch.float32) * scale)
        angles = time_N.float()[:, None] * rates
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.w_in.weight.dtype)
        return self.w_out(F.silu(self.w_in(waves)))
