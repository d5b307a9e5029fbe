"""The two small networks that judge generated pictures, and how a picture becomes their input.

Shapes: n pictures, H x W pixels (20 x 20 in the embedded corpus), d features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from symbiotic.data.glyphs import BACKGROUNDS, FOREGROUNDS, GENERATION_SIZE, LAYOUTS
from symbiotic.data.tokenizer import BOS, EOS, PAD, Tokenizer

VALUES: tuple[tuple[object, ...], ...] = (tuple(range(10)), tuple(FOREGROUNDS), tuple(BACKGROUNDS), tuple(LAYOUTS))
"""What each attribute may be, in the order of `captions.ATTRIBUTES`: digit, foreground, background, layout."""

FEATURES = 32
CONTEXT = 24  # words of a caption, with <bos> and <eos>
EMBEDDING = 48


def to_input(images: Tensor) -> Tensor:
    """uint8 [n, H, W, 3] -> float [n, 3, H, W] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


class Classifier(nn.Module):
    """Convolutions with four heads. Group norm: a picture is judged the same in any batch."""

    def __init__(self) -> None:
        super().__init__()
        sides = [side // 4 for side in GENERATION_SIZE]
        self.body = nn.Sequential(
            *self.stage(3, 32, 1), *self.stage(32, 48, 2), *self.stage(48, 48, 2), nn.Flatten(),
            nn.Linear(48 * sides[0] * sides[1], 128), nn.GELU(), nn.Linear(128, FEATURES),
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Linear(FEATURES, len(values)) for values in VALUES)

    @staticmethod
    def stage(channels: int, out: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(4, out), nn.GELU()]

    def features(self, x: Tensor) -> Tensor:
        """[n, 3, H, W] -> [n, d]: what the four heads read."""
        return self.body(x)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of the four attributes, [n, values] each."""
        features = nn.functional.gelu(self.features(x))
        return [head(features) for head in self.heads]


def build_clip(vocab_size: int) -> Any:
    """A small `open_clip` CLIP on the corpus's pictures and the project's word tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before open_clip is imported: it must never look for weights
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=4, image_size=GENERATION_SIZE)
    text = CLIPTextCfg(
        context_length=CONTEXT, vocab_size=vocab_size, width=64, heads=2, layers=2, pool_type="eos", eos_id=EOS
    )
    return CLIP(EMBEDDING, vision, text)


def clip_text(captions: Sequence[str], tokenizer: Tokenizer) -> Tensor:
    """[n, CONTEXT] token ids: `<bos> words <eos>`, padded; longer captions are cut before `<eos>`."""
    ids = np.full((len(captions), CONTEXT), PAD, dtype=np.int64)
    for row, caption in zip(ids, captions, strict=True):
        words = [BOS, *tokenizer.encode(caption)[: CONTEXT - 2], EOS]
        row[: len(words)] = words
    return torch.from_numpy(ids)
