"""Sequences, targets, spans; packing to rows; the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from symbiotic.data.errors import DataError
from symbiotic.data.packing import GenImage, ReadImage, Sample, Text, build_sample, collate, pack
from symbiotic.models.batch import IGNORE, PROMPT, TEXT, VAE, VIT
from symbiotic.models.embeddings import patchify
from symbiotic.schema import TASKS


def picture(height: int = 8, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def reading(key: str = "r", n: int = 0) -> Sample:
    return build_sample(key, "mmu", [Text([1, 3]), ReadImage(picture()), Text([4, 10]), Text([11, *[12] * n, 2], True)])


def generation(key: str = "g") -> Sample:
    return build_sample(key, "t2i", [Text([1]), Text([20, 21, 5], True), GenImage(picture(seed=1))])


def test_patches_are_those_of_the_model() -> None:
    sample = generation()
    pixels = torch.from_numpy(picture(seed=1)).float()[None] / 127.5 - 1
    torch.testing.assert_close(torch.from_numpy(sample.latents), patchify(pixels, 4)[0])
    assert sample.latent_grid.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    assert np.abs(sample.latents).max() <= 1


def test_a_read_image_stands_between_text_and_the_answer_is_the_target() -> None:
    sample = reading()
    assert sample.kind.tolist() == [TEXT] * 2 + [VIT] * 6 + [TEXT] * 4
    assert sample.tokens.tolist() == [1, 3] + [0] * 6 + [4, 10, 11, 2]
    assert sample.span.tolist() == [-1] * 2 + [0] * 6 + [-1] * 4
    assert sample.target.tolist() == [IGNORE] * 9 + [11, 2, IGNORE]
    assert sample.task == TASKS.index("mmu")
    assert not sample.causal.any()


def test_a_caption_is_prompt_and_target_and_latents_are_not() -> None:
    sample = generation()
    assert sample.kind.tolist() == [PROMPT] * 4 + [VAE] * 6
    assert sample.target.tolist() == [20, 21, 5] + [IGNORE] * 7
    assert len(sample.latents) == 6
    assert len(sample.vit_patches) == 0


def test_an_odd_image_is_refused_with_the_sample_named() -> None:
    with pytest.raises(DataError, match="sample k7: an image of 8x10 pixels does not divide into patches of 4x4"):
        build_sample("k7", "t2i", [GenImage(picture(8, 10))])
    with pytest.raises(DataError, match="must be uint8"):
        build_sample("k7", "t2i", [GenImage(picture().astype(np.float32))])


def test_rows_hold_every_sample_once_and_are_never_too_long() -> None:
    lengths = np.random.default_rng(0).integers(5, 40, 200).tolist()
    rows = pack(lengths, 64)
    assert sorted(number for row in rows for number in row) == list(range(200))
    assert max(sum(lengths[number] for number in row) for row in rows) <= 64
    assert len(rows) <= 1.25 * sum(lengths) / 64  # first-fit-decreasing: at most 11/9 of the best
    assert rows == pack(lengths, 64)
    with pytest.raises(DataError, match="65 tokens does not fit a row"):
        pack([3, 65], 64)


def test_samples_are_found_again_in_the_batch() -> None:
    samples = [reading("a"), generation("b"), reading("c", 3), generation("d")]
    rows = [[2, 1], [3, 0]]
    batch = collate(samples, 32, rows=rows, times=[0.0, 0.25, 0.0, 0.75])
    for row, numbers in enumerate(rows):
        start, image = 0, 0
        for segment, number in enumerate(numbers):
            sample, here = samples[number], slice(start, start + len(samples[number]))
            assert batch.tokens[row, here].tolist() == sample.tokens.tolist()
            assert batch.kind[row, here].tolist() == sample.kind.tolist()
            assert batch.target[row, here].tolist() == sample.target.tolist()
            assert batch.position[row, here].tolist() == list(range(len(sample)))
            assert set(batch.segment[row, here].tolist()) == {segment}
            assert set(batch.task[row, here].tolist()) == {sample.task}
            assert batch.span[row, here].tolist() == [s + image if s >= 0 else -1 for s in sample.span]
            start, image = here.stop, image + 1
        rest = slice(start, None)
        assert set(batch.segment[row, rest].tolist()) == {-1}
        assert set(batch.target[row, rest].tolist()) == {IGNORE}
        assert set(batch.task[row, rest].tolist()) == {-1}
        assert set(batch.span[row, rest].tolist()) == {-1}


def test_patches_follow_the_order_of_their_tokens() -> None:
    samples = [generation("a"), generation("b"), reading("c")]
    noises = [np.full((6, 48), 1.0, np.float32), np.full((6, 48), 2.0, np.float32), np.zeros((0, 48), np.float32)]
    batch = collate(samples, 32, rows=[[1, 2], [0]], times=[0.25, 0.75, 0.0], noises=noises)
    assert batch.time.tolist() == [0.75] * 6 + [0.25] * 6
    assert batch.noise[:, 0].tolist() == [2.0] * 6 + [1.0] * 6
    assert len(batch.vit_patches) == int((batch.kind == VIT).sum()) == 6
    assert len(batch.latents) == int((batch.kind == VAE).sum()) == 12
    assert batch.flow_norm == 12
    assert batch.ce_norm == int((batch.target != IGNORE).sum()) == 3 + 3 + 2


def test_norms_are_at_least_one_and_can_be_given() -> None:
    text = build_sample("t", "lm", [Text([1, 9])])
    batch = collate([text], 8)
    assert (float(batch.ce_norm), float(batch.flow_norm)) == (1.0, 1.0)
    assert len(batch.latents) == 0
    assert float(collate([text], 8, ce_norm=7.5).ce_norm) == 7.5
    with pytest.raises(DataError, match="at least one sample"):
        collate([], 8)
