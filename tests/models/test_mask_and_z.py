"""The attention mask and the router z-loss against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from symbiotic.data.packing import GenImage, Text, build_sample, collate
from symbiotic.models.balance import z_loss
from symbiotic.models.batch import Batch
from symbiotic.models.places import attention_mask


def packed() -> Batch:
    """One row of eight places: a word and an image of 2 patches, two words, the second sample, and padding."""
    image = np.zeros((4, 8, 3), np.uint8)
    one = build_sample("one", "t2i", [Text([1]), GenImage(image), Text([2])])
    two = build_sample("two", "lm", [Text([1, 3, 2], loss=True)])
    return collate([one, two], 8, rows=[[0, 1]])


def test_mask_by_hand() -> None:
    expected = """
        x.......
        xxx.....
        xxx.....
        xxxx....
        ....x...
        ....xx..
        ....xxx.
        .......x
    """
    seen = attention_mask(packed())[0, 0]
    assert ["".join("x" if s else "." for s in row) for row in seen.tolist()] == expected.split()


def test_a_causal_image_is_causal_inside() -> None:
    batch = packed()
    seen = attention_mask(replace(batch, causal=batch.span >= 0))[0, 0]
    assert seen[2, 1]
    assert not seen[1, 2]


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 5.0], [math.log(3.0), 0.0, 5.0], [9.0, 9.0, 9.0]])
    visible = torch.tensor([[True, True, False]] * 3)
    valid = torch.tensor([True, True, False])  # the third is padding
    expected = (math.log(2.0) ** 2 + math.log(4.0) ** 2) / 2
    assert z_loss(logits, visible, valid).item() == pytest.approx(expected)
