"""Our own small VQ autoencoder: convolutions on the grid of patches, a codebook between them.

Shapes as in `images.tokenizer`; C channels inside.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from symbiotic.files import write_bytes
from symbiotic.images.quantiser import Codebook
from symbiotic.images.tokenizer import ImageTokenizer


class Block(nn.Module):
    """Residual 3x3 convolution. Channels are normalised at each place by themselves: context is one patch wide."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.wide = nn.Conv2d(channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[n, C, h, w] -> the same."""
        normed = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.out(nn.functional.gelu(self.wide(normed)))


@final
class VQAutoencoder(ImageTokenizer):
    """VQ-VAE (arXiv 1711.00937) for pictures of a few patches: any size that divides by the patch.

    Args:
        codebook_size, patch: see `ImageTokenizer`. width: channels. dim: numbers a code (few, as in ViT-VQGAN, arXiv
        2110.04627). encoder_blocks, decoder_blocks: each widens what a code sees, and is seen by, by one patch on
        every side; without encoder blocks a code is a function of its own patch.
    """

    def __init__(
        self,
        codebook_size: int = 64,
        patch: int = 4,
        width: int = 64,
        dim: int = 8,
        encoder_blocks: int = 1,
        decoder_blocks: int = 2,
    ) -> None:
        super().__init__()
        self.codebook_size, self.patch = codebook_size, patch
        self.arguments = {"codebook_size": codebook_size, "patch": patch, "width": width, "dim": dim}
        self.arguments |= {"encoder_blocks": encoder_blocks, "decoder_blocks": decoder_blocks}
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, patch, patch), *(Block(width) for _ in range(encoder_blocks)),
            nn.GELU(), nn.Conv2d(width, dim, 1),
        )  # fmt: skip
        self.codebook = Codebook(codebook_size, dim)
        self.decoder = nn.Sequential(
            nn.Conv2d(dim, width, 1), *(Block(width) for _ in range(decoder_blocks)),
            nn.GELU(), nn.Conv2d(width, 3 * patch * patch, 1), nn.PixelShuffle(patch),
        )  # fmt: skip

    def numbers(self, x: Tensor) -> Tensor:
        z = self.encoder(x).permute(0, 2, 3, 1)
        return self.codebook(z.flatten(0, 2)).view(z.shape[:3])

    def pictures(self, numbers: Tensor) -> Tensor:
        return self.decoder(self.codebook.codes[numbers].permute(0, 3, 1, 2))

    @property
    def fingerprint(self) -> str:
        """Of the arguments and the weights."""
        sha = hashlib.sha256(json.dumps(self.arguments, sort_keys=True).encode())
        for name, value in sorted(self.state_dict().items()):
            sha.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()[:12]

    def save(self, path: Path) -> Path:
        from safetensors.torch import save

        state = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        content = save(state, {"image_tokenizer": json.dumps({"kind": "autoencoder", "arguments": self.arguments})})
        return write_bytes(path, content)

    @classmethod
    def restore(cls, arguments: dict[str, Any], state: dict[str, Tensor]) -> VQAutoencoder:
        """Back from what `save` wrote."""
        with torch.random.fork_rng(devices=[]):
            tokenizer = cls(**arguments)
        tokenizer.load_state_dict(state)
        return tokenizer.eval().requires_grad_(False)
