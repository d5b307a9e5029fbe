"""The attention mask and the router z-loss against values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from factory import build, random_batch
from symbiotic.data.packing import GenImage, Text, build_sample, collate
from symbiotic.models import places
from symbiotic.models.balance import z_loss
from symbiotic.models.batch import Batch
from symbiotic.models.places import additive, attention_mask, cut, worth_cutting


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


def test_samples_are_cut_out_of_their_rows_where_that_saves_enough() -> None:
    """Runs of 4 and 3 places and one of padding: 8 x 8 pairs in place of 16 + 9 + 1; 38 saved by three calls."""
    batch = packed()
    assert worth_cutting(batch.segment, 12) == [4, 3, 1]
    assert worth_cutting(batch.segment, 13) == []
    two = torch.cat([batch.segment, torch.zeros_like(batch.segment)])
    assert worth_cutting(two, 0) == [4, 3, 1, 8]
    mask = additive(attention_mask(replace(batch, segment=two, span=two * 0 - 1, causal=two > 9)))
    masks = cut(mask, [4, 3, 1, 8])
    assert [tuple(m.shape[-2:]) for m in masks] == [(4, 4), (3, 3), (1, 1), (8, 8)]
    assert torch.equal(masks[1], mask[:1, :, 4:7, 4:7])


@pytest.mark.parametrize("system", ["symbiotic", "bagel"])
def test_attention_by_sample_is_attention_by_rows(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions and gradients of the whole model, the samples of every row computed one by one, or together."""
    model, batch, found = build(system), random_batch(9), []
    for runs in ([], worth_cutting(batch.segment, 0)):
        monkeypatch.setattr(places, "worth_cutting", lambda segment, runs=runs: runs)
        out = model(batch)
        loss = out.logits.square().sum() + out.prediction.square().sum()
        found.append(
            [out.logits, out.prediction, *torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)]
        )
    assert len(runs) > batch.kind.shape[0]
    for one, other in zip(*found, strict=True):
        largest = float(one.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * largest)


def test_z_loss_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 5.0], [math.log(3.0), 0.0, 5.0], [9.0, 9.0, 9.0]])
    visible = torch.tensor([[True, True, False]] * 3)
    valid = torch.tensor([True, True, False])  # the third is padding
    expected = (math.log(2.0) ** 2 + math.log(4.0) ** 2) / 2
    assert z_loss(logits, visible, valid).item() == pytest.approx(expected)
