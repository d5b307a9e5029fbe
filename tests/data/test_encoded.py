"""Vectors in the place of pixels: what is written is what is read, and a sample only changes where its image stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from factory import load_system, tiny_model
from symbiotic.data.encoded import Encoded, encode_shard, file_of, read_with, wanted, with_vectors, write_about
from symbiotic.data.errors import DataError
from symbiotic.data.formats import generation_parts, reading_parts, record_sample
from symbiotic.data.packing import build_sample, collate
from symbiotic.data.shards import ShardIndex, ShardReader, write_shards
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.images.encoder import ImageEncoder
from symbiotic.models.batch import VAE, VIT
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import ConfigError

WORDS = Tokenizer.build(["a", "red", "digit", "what", "is", "it"])


class MeanColours(ImageEncoder):
    """A real encoder of ours: the mean colour of patches of 8 pixels, and their position."""

    def __init__(self, kind: Literal["vit", "vae"]) -> None:
        super().__init__()
        self.kind, self.patch_dim, self.fingerprint = kind, 5, f"mean-{kind}"
        self.scale = torch.nn.Parameter(torch.tensor(1 / 255))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        if height % 8 or width % 8:
            raise ValueError(f"{height}x{width} pixels do not divide into 8")
        return height // 8, width // 8

    def vectors(self, pixels: Tensor) -> Tensor:
        n, height, width, _ = pixels.shape
        colours = pixels.float().view(n, height // 8, 8, width // 8, 8, 3).mean((2, 4)) * self.scale
        rows = torch.arange(height // 8).view(1, -1, 1, 1).expand(*colours.shape[:3], 1)
        columns = torch.arange(width // 8).view(1, 1, -1, 1).expand(*colours.shape[:3], 1)
        return torch.cat([colours, rows.float(), columns.float()], -1)


@pytest.fixture
def corpus(tmp_path: Path) -> tuple[ShardIndex, ShardReader]:
    rng, size = np.random.default_rng(0), {"height": 16, "width": 24}
    images = rng.integers(0, 256, (8, 16, 24, 3), dtype=np.uint8)
    small = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    t2i = [({"task": "t2i", "caption": "a red digit", **size}, image) for image in images[:4]]
    t2i.append(({"task": "t2i", "caption": "a", "height": 8, "width": 8}, small))
    mmu = [({"task": "mmu", "question": "what is it", "answer": "digit", **size}, image) for image in images[4:]]
    paths = write_shards(tmp_path, "t2i", t2i, 3) + write_shards(tmp_path, "mmu", mmu, 10)
    paths += write_shards(tmp_path, "lm", [({"task": "lm", "text": "a digit"}, None)], 3)
    index = ShardIndex.build(paths, WORDS)
    return index, ShardReader(tmp_path, index)


def encoded(folder: Path, kind: Literal["vit", "vae"], index: ShardIndex, reader: ShardReader) -> Encoded:
    encoder, samples = MeanColours(kind), wanted(index, kind)
    write_about(folder, encoder, "float32", {})
    for shard in np.unique(index.shard[samples]):
        path = file_of(folder, str(index.shards[shard]))
        encode_shard(encoder, reader, samples[index.shard[samples] == shard], path, torch.float32, 2)
    return Encoded.open(folder, index)


@pytest.mark.parametrize("kind", ["vit", "vae"])
def test_what_is_written_is_read(kind: Literal["vit", "vae"], corpus: tuple, tmp_path: Path) -> None:
    index, reader = corpus
    found = encoded(tmp_path / kind, kind, index, reader)
    assert sorted(found.places) == sorted(wanted(index, kind)) != []
    counts = found.counts(index, reader)
    for number in range(len(index)):
        record, pixels = reader.read(number)
        plain = record_sample("k", record, pixels, WORDS)
        sample = found.put(plain, number)
        assert len(sample) == counts.num_tokens[number]
        assert len(sample.latents) == counts.num_latents[number]
        assert counts.num_ce[number] == index.num_ce[number] == (sample.target >= 0).sum()
        vectors = sample.latents if kind == "vae" else sample.vit_patches
        assert vectors.shape[1] == 5
        if number in found.places:
            want = MeanColours(kind).encode(torch.from_numpy(pixels[None].copy()))[0].flatten(0, 1).detach().numpy()
            assert np.array_equal(vectors, want)
            grid = sample.latent_grid if kind == "vae" else sample.vit_grid
            assert np.array_equal(vectors[:, 3:], grid)


def test_only_the_image_changes(tmp_path: Path) -> None:
    image = np.zeros((16, 24, 3), np.uint8)
    for kind, parts, task in (
        (VAE, generation_parts(image, "a red digit", WORDS), "t2i"),
        (VIT, reading_parts(image, "what is it", WORDS, "digit"), "mmu"),
    ):
        plain = build_sample("k", task, parts)
        changed = with_vectors(plain, kind, np.ones((2, 3, 7), np.float32))
        for name in ("tokens", "kind", "span", "causal", "target"):
            one, other = getattr(plain, name), getattr(changed, name)
            assert np.array_equal(one[plain.kind != kind], other[changed.kind != kind]), name
            assert set(one[plain.kind == kind]) == set(other[changed.kind == kind]), name
        assert (changed.kind == kind).sum() == 6
        with pytest.raises(DataError, match=r"sample k: 0 images of this kind; must be one"):
            with_vectors(plain, VIT if kind == VAE else VAE, np.ones((2, 3, 7), np.float32))


def test_pixels_are_read_with_the_encoder_itself(corpus: tuple) -> None:
    """What a benchmark reads from pixels is what the shards' vectors are."""
    index, reader = corpus
    for number in range(len(index)):
        record, pixels = reader.read(number)
        (sample,) = read_with(MeanColours("vit"), [record_sample("k", record, pixels, WORDS)])
        if record["task"] == "mmu":
            want = MeanColours("vit").encode(torch.from_numpy(pixels[None].copy()))[0].detach()
            assert np.array_equal(sample.vit_patches, want.flatten(0, 1).numpy())
        else:
            assert not len(sample.vit_patches)


def test_a_model_takes_them(corpus: tuple, tmp_path: Path) -> None:
    """Latents of 5 numbers and vectors of 5 numbers, one batch with text alone, and one without any image."""
    index, reader = corpus
    both = [encoded(tmp_path / kind, kind, index, reader) for kind in ("vit", "vae")]
    samples = []
    for number in range(len(index)):
        sample = record_sample(str(number), *reader.read(number), WORDS)
        for one in both:
            sample = one.put(sample, number)
        samples.append(sample)
    cfg = tiny_model(patch_dim=5, vit_dim=5, vocab_size=64)
    model = UnifiedModel(cfg, load_system("symbiotic", cfg)).initialise(0)
    out = model(collate(samples, 64))
    assert out.prediction.shape[1] == 5
    text = build_sample("t", "lm", generation_parts(np.zeros((4, 4, 3), np.uint8), "a", WORDS)[:2])
    assert model(collate([text], 16)).logits.isfinite().all()  # its empty patches are as wide as those of pixels
    wide = tiny_model(patch_dim=5, vit_dim=7)
    assert UnifiedModel(wide, load_system("symbiotic", wide)).vit_in.in_features == 7


def test_what_is_missing_is_one_line(corpus: tuple, tmp_path: Path) -> None:
    index, reader = corpus
    found = encoded(tmp_path / "vae", "vae", index, reader)
    shard = file_of(found.folder, "t2i-00001.tar")
    with pytest.raises(ConfigError, match=r"data\.encoded=.*none: no readable encoder\.json in it"):
        Encoded.open(tmp_path / "none", index)
    with pytest.raises(ConfigError, match=r"holds vectors of encoder mean-vae as float32, not of mean-vit as float32"):
        write_about(found.folder, MeanColours("vit"), "float32", {})
    body = shard.read_bytes()
    shard.write_bytes(body[:-4])
    with pytest.raises(
        DataError, match=r"t2i-00001\.safetensors: .* it is cut off; .*encode_shards\.py writes it anew"
    ):
        Encoded.open(found.folder, index)
    shard.unlink()
    with pytest.raises(DataError, match=r"t2i-00001\.safetensors: no such file; python src/encode_shards\.py"):
        Encoded.open(found.folder, index)
    sizes = json.loads((shard.parent / f"{shard.name}.json").read_text())["sizes"]
    assert re.search(r"\[16, 24\]|\[8, 8\]", sizes)
