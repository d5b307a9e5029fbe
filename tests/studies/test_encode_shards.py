"""The command that encodes the images of shards: what it writes, that it goes on where it stopped, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from symbiotic.data.shards import write_shards
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.images.vision import VisionEncoder
from symbiotic.models.towers import CONFIG
from symbiotic.studies.encode_shards import main

TOWER = {"image_size": 16, "layers": 2, "width": 24, "head_width": 12, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A folder with shards, a tokenizer and a tiny CLIP; the pictures that are read."""
    base = tmp_path_factory.mktemp("given")
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    size = {"height": 16, "width": 24}
    (base / "shards").mkdir()
    mmu = [({"task": "mmu", "question": "what", "answer": "it", **size}, image) for image in images]
    write_shards(base / "shards", "mmu", mmu, 2)
    write_shards(base / "shards", "t2i", [({"task": "t2i", "caption": "it", **size}, images[0])], 2)
    Tokenizer.build(["what", "it"]).save(base / "tokenizer.json")
    (base / "clip").mkdir()
    content = {"model_cfg": {"embed_dim": 24, "vision_cfg": TOWER, "text_cfg": TEXT}, "preprocess_cfg": {}}
    (base / "clip" / CONFIG).write_text(json.dumps(content))
    model = open_clip.create_model(f"local-dir:{base / 'clip'}", load_weights=False)
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    save_file(state, base / "clip" / "open_clip_model.safetensors")
    return base, images


def arguments(base: Path, out: Path) -> dict[str, str]:
    named = {"shards": base / "shards", "tokenizer": base / "tokenizer.json", "path": base / "clip", "out": out}
    return {key: str(value) for key, value in named.items()} | {"encoder": "vision"}


def test_the_vectors_of_the_shards_are_those_of_the_encoder(
    given: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, images = given
    command = [f"{k}={v}" for k, v in {**arguments(base, tmp_path / "out"), "layer": 2, "resize": "squash"}.items()]
    assert main([*command, "dtype=float32"]) == 0
    assert "5 images of vit tokens, 24 numbers each; 3 shards encoded now" in capsys.readouterr().out
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"mmu-0000{i}.safetensors" for i in range(3)]
    found = {key: value for file in files for key, value in load_file(file).items()}
    want = VisionEncoder(str(base / "clip"), layer=2, resize="squash").encode(torch.from_numpy(images))
    assert all(torch.equal(found[f"mmu-{i:06d}"], want[i]) for i in range(5))
    about = json.loads((tmp_path / "out" / "encoder.json").read_text())
    assert about["encoder"] == {"encoder": "vision", "path": str(base / "clip"), "layer": 2, "resize": "squash"}

    kept = files[1].stat().st_mtime_ns
    files[0].with_name(f"{files[0].name}.json").unlink()  # as a kill leaves it
    assert main([*command, "dtype=float32"]) == 0
    assert "1 shards encoded now" in capsys.readouterr().out
    assert files[1].stat().st_mtime_ns == kept
    assert main([*command, "dtype=float16"]) == 2
    assert "must be another folder" in capsys.readouterr().err


REFUSED = {
    "token=2": r"token=2: has no effect with encoder=vision",
    "batch=0": r"batch=0: must be at least 1",
    "max_bad=2": r"max_bad=2: must lie in \[0, 1\]",
    "encoder=vqgan": r"encoder='vqgan': must be one of kl, vision",
    "dtype=int8": r"dtype='int8': must be one of float16",
    "device=tpu": r"device=tpu: must be cpu, cuda",
    "path=/none": r"vision\.path=/none \(looked for at /none\): no such file or folder; download",
    "shards=/none.tar": r"shards=/none\.tar: no such file",
    "tokenizer=/none.json": r"tokenizer=/none\.json: no such file",
}


@pytest.mark.parametrize("change", REFUSED)
def test_a_wrong_request_is_one_line(
    change: str, given: tuple[Path, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, _, value = change.partition("=")
    asked = arguments(given[0], tmp_path / "out") | {key: value}
    assert main([f"{k}={v}" for k, v in asked.items()]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(REFUSED[change], line), line
