"""The embedded image tokenizer and the codes of a corpus: made once, cached, written anew when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from symbiotic.config import instantiate
from symbiotic.data import image_codes, image_vq
from symbiotic.data.errors import DataError
from symbiotic.data.image_codes import ImageCodes, corpus_fingerprint, encode_corpus, generation_samples
from symbiotic.data.image_vq import EmbeddedVQ, read_images
from symbiotic.data.shards import ShardIndex, ShardReader, write_shards
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.images.tokenizer import ImageTokenizer
from symbiotic.schema import ConfigError

SHORT = {"codebook_size": 32, "width": 16, "steps": 12, "batch": 16}


def short(**arguments: int) -> EmbeddedVQ:
    return EmbeddedVQ(**{**SHORT, **arguments})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(corpus: Path, cache: Path) -> ImageTokenizer:
    return short().prepare(corpus, cache)


def test_a_config_builds_it() -> None:
    node = {"_target_": "symbiotic.data.image_vq.EmbeddedVQ", **SHORT}
    assert instantiate(node, "objective.image_tokenizer").fingerprint == short().fingerprint
    with pytest.raises(ConfigError, match="no such argument"):
        instantiate({**node, "codes": 3}, "objective.image_tokenizer")
    with pytest.raises(ConfigError, match=r"codebook_size"):
        instantiate({**node, "codebook_size": "many"}, "objective.image_tokenizer")


@pytest.mark.parametrize(
    ("name", "value"), [("codebook_size", 1), ("steps", 1), ("encoder_blocks", -1), ("held_out", 1.0), ("lr", 0.0)]
)
def test_values_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"image_tokenizer\.{name}={value}: must be"):
        short(**{name: value})  # type: ignore[arg-type]


def test_the_cache_is_taken_and_says_what_it_is_worth(
    corpus: Path,
    cache: Path,
    trained: ImageTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delattr(image_vq, "timed_training")
    assert short().prepare(corpus, cache).fingerprint == trained.fingerprint
    assert "32 codes, " in (out := capsys.readouterr().out)
    assert "60 held-out images: mse 0." in out
    facts = short().figures(corpus, cache)
    assert facts["held_out"]["images"] == 60  # a tenth of 600
    assert {"mse", "psnr", "codes_used", "perplexity"} < set(facts["held_out"])
    assert facts["cpu_seconds"] > 0
    assert facts["arguments"]["steps"] == 12


def test_held_out_images_are_not_trained_on(index: ShardIndex) -> None:
    train, held_out = short().split(index)
    assert not set(train) & set(held_out)
    assert sorted([*train, *held_out]) == generation_samples(index).tolist()
    assert short(seed=1).split(index)[1].tolist() != held_out.tolist()


def test_all_that_it_depends_on_is_in_its_key(corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {short(**other).files(corpus, cache)[0] for other in ({}, {"seed": 1}, {"steps": 13}, {"patch": 5})}
    assert len(names) == 4
    monkeypatch.setattr(image_vq, "corpus_fingerprint", lambda index: "other")
    assert short().files(corpus, cache)[0] not in names


@pytest.mark.parametrize("part", ["weights", "facts"])
def test_damaged_files_are_written_anew(corpus: Path, trained: ImageTokenizer, tmp_path: Path, part: str) -> None:
    weights, facts = short().files(corpus, tmp_path)
    short().prepare(corpus, tmp_path)
    whole = weights.read_bytes()
    (weights if part == "weights" else facts).write_bytes(whole[:-9] + b"x" + whole[-8:])
    assert short().prepare(corpus, tmp_path).fingerprint == trained.fingerprint
    assert weights.read_bytes() == whole


TWO = """
import sys, time
from pathlib import Path
import torch
from symbiotic.data import image_vq

corpus, cache, me, other = map(Path, sys.argv[1:])
torch.set_num_threads(1)
training, trainings = image_vq.timed_training, []
image_vq.timed_training = lambda *a, **k: (trainings.append(1), training(*a, **k))[1]
me.touch()
while not other.exists():
    time.sleep(0.01)
found = image_vq.EmbeddedVQ(codebook_size=32, width=16, steps=12, batch=16).prepare(corpus, cache)
print(found.fingerprint, len(trainings))
"""


def test_of_two_processes_one_trains(corpus: Path, trained: ImageTokenizer, tmp_path: Path) -> None:
    """Both stand before an empty cache when they start."""
    gates = [tmp_path / "a", tmp_path / "b"]
    command = [sys.executable, "-c", TWO, str(corpus), str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(Path(image_vq.__file__).parents[2])}
    both = [
        subprocess.Popen([*command, str(me), str(other)], env=environment, stdout=subprocess.PIPE, text=True)
        for me, other in (gates, gates[::-1])
    ]
    said = [process.communicate(timeout=120)[0].splitlines()[-1].split() for process in both]
    assert [fingerprint for fingerprint, _ in said] == [trained.fingerprint] * 2
    assert sorted(count for _, count in said) == ["0", "1"]


def test_images_that_do_not_fit_are_one_line(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"images of 20x20 pixels do not divide by objective.image_tokenizer.patch=8"):
        short(patch=8).prepare(corpus, tmp_path)
    with pytest.raises(DataError, match=r"540 patches cannot fill .*codebook_size=1000"):
        short(patch=20, codebook_size=1000).prepare(corpus, tmp_path)
    with pytest.raises(DataError, match=r"index\.npz"):
        short().prepare(tmp_path, tmp_path)


# --------------------------------------------------------------------------- the codes of a corpus


def test_every_generation_image_has_its_codes(
    corpus: Path, index: ShardIndex, trained: ImageTokenizer, cache: Path
) -> None:
    codes = encode_corpus(trained, corpus / "shards", index, cache, batch=64)
    assert len(codes) == len(index)
    assert np.array_equal(np.diff(codes.offsets), index.num_latents)
    assert codes.flat.dtype == np.uint8
    reader = ShardReader(corpus / "shards", index)
    for sample in (*generation_samples(index)[[0, 63, 64, -1]], index.members_of("t2i_long")[5]):
        pixels = torch.from_numpy(np.array(reader.read(int(sample))[1]))
        assert codes[int(sample)].tolist() == trained.encode(pixels[None])[0].tolist()
    assert len(codes[int(index.members_of("lm")[0])]) == 0


def test_codes_are_cached_and_damaged_ones_written_anew(
    corpus: Path, index: ShardIndex, trained: ImageTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode_corpus(trained, corpus / "shards", index, tmp_path)
    (path,) = (tmp_path / "image_codes").glob("*.npz")
    whole = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(image_codes, "_encode")
        again = encode_corpus(trained, corpus / "shards", index, tmp_path)
    assert np.array_equal(again.flat, first.flat)
    assert (int(again.codebook_size), int(again.patch)) == (32, 4)
    for damaged in (whole[:200], whole[:400] + b"damaged" + whole[407:]):
        path.write_bytes(damaged)
        assert np.array_equal(encode_corpus(trained, corpus / "shards", index, tmp_path).flat, first.flat)
        assert path.read_bytes() == whole


def test_another_tokenizer_or_corpus_has_its_own_file(
    corpus: Path, index: ShardIndex, trained: ImageTokenizer, tmp_path: Path
) -> None:
    other = short(seed=1).prepare(corpus, tmp_path)
    for tokenizer in (trained, other):
        encode_corpus(tokenizer, corpus / "shards", index, tmp_path)
    assert len(list((tmp_path / "image_codes").glob("*.npz"))) == 2
    changed = ShardIndex.load(corpus / "index.npz")
    changed.png[generation_samples(index)[3], 2] += 1
    assert corpus_fingerprint(changed) != corpus_fingerprint(index)


def test_images_of_several_sizes(trained: ImageTokenizer, tmp_path: Path) -> None:
    tokenizer = Tokenizer.build({"red"})
    sizes = [(20, 20), (20, 20), (8, 12), (20, 20)]
    rng = np.random.default_rng(0)
    pixels = [rng.integers(256, size=(*size, 3), dtype=np.uint8) for size in sizes]
    records = [{"task": "t2i", "caption": "red", "height": h, "width": w} for h, w in sizes]
    paths = write_shards(tmp_path, "t2i", zip(records, pixels, strict=True), 10)
    index = ShardIndex.build(paths, tokenizer)
    codes = encode_corpus(trained, tmp_path, index, tmp_path)
    assert [len(codes[i]) for i in range(4)] == [25, 25, 6, 25]
    assert codes[2].tolist() == trained.encode(torch.from_numpy(pixels[2])[None])[0].tolist()
    with pytest.raises(DataError, match="images of several sizes"):
        read_images(ShardReader(tmp_path, index), generation_samples(index))


def test_codes_of_large_codebooks_fit(tmp_path: Path) -> None:
    codes = ImageCodes(np.array([70_000], np.int32), np.array([0, 1]), np.array(100_000), np.array(16))
    codes.save(tmp_path / "codes.npz")
    found = ImageCodes.load(tmp_path / "codes.npz")
    assert found is not None
    assert found[0].tolist() == [70_000]
