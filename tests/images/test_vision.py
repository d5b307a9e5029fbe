"""The vision encoder against open_clip itself, on tiny random weights; what is missing is one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from symbiotic.images.vision import VisionEncoder
from symbiotic.models.towers import CONFIG
from symbiotic.schema import ConfigError
from towers import SIGLIP, TOWER, clip_folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, open_clip.CLIP]:
    folder = tmp_path_factory.mktemp("clip") / "model"
    return folder, clip_folder(folder, TOWER)


def pictures(count: int = 3, height: int = 40, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def prepared(model: open_clip.CLIP, images: np.ndarray) -> torch.Tensor:
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg), is_train=False
    )
    return torch.stack([transform(Image.fromarray(image)) for image in images])


def test_the_vectors_are_those_of_open_clip(clip: tuple[Path, open_clip.CLIP]) -> None:
    """Those that its own pooling gets: the tower's output tokens."""
    folder, model = clip
    encoder = VisionEncoder(str(folder))
    assert (encoder.kind, encoder.patch_dim, encoder.grid(40, 24)) == ("vit", 48, (4, 4))
    images = pictures()
    with torch.no_grad():
        model.visual.output_tokens = True
        _, want = model.visual(prepared(model, images))
    got = encoder.encode(torch.from_numpy(images))
    assert want.std() > 0.1
    torch.testing.assert_close(got.flatten(1, 2), want, rtol=0, atol=1e-6)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_an_earlier_layer_has_no_last_norm(clip: tuple[Path, open_clip.CLIP]) -> None:
    folder, model = clip
    images = pictures(2)
    with torch.no_grad():
        kwargs = {"indices": [1], "intermediates_only": True, "output_fmt": "NLC"}
        want = model.visual.forward_intermediates(prepared(model, images), **kwargs)["image_intermediates"][0]
    got = VisionEncoder(str(folder), layer=2).encode(torch.from_numpy(images))
    torch.testing.assert_close(got.flatten(1, 2), want, rtol=0, atol=1e-6)
    assert VisionEncoder(str(folder), layer=2).fingerprint != VisionEncoder(str(folder)).fingerprint


def test_the_tower_of_a_siglip(tmp_path: Path) -> None:
    """A timm trunk with attention pooling, as SigLIP's: its tokens are those that it pools."""
    model = clip_folder(tmp_path / "siglip", SIGLIP)
    images = pictures(2)
    with torch.no_grad():
        want = model.visual.trunk.forward_features(prepared(model, images))
    want = want[:, model.visual.trunk.num_prefix_tokens :]
    got = VisionEncoder(str(tmp_path / "siglip")).encode(torch.from_numpy(images))
    assert got.shape == (2, 14, 14, 192)
    torch.testing.assert_close(got.flatten(1, 2), want, rtol=0, atol=1e-5)


def test_what_is_missing_or_wrong_is_one_line(clip: tuple[Path, open_clip.CLIP], tmp_path: Path) -> None:
    folder, _ = clip
    weights = folder / "open_clip_model.safetensors"
    (tmp_path / "empty").mkdir()
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes(weights.read_bytes())
    other = tmp_path / "other"
    other.mkdir()
    (other / CONFIG).write_text((folder / CONFIG).read_text())
    save_file({"a": torch.zeros(1)}, other / "open_clip_model.safetensors")
    wrong = [
        ({"path": str(tmp_path / "none")}, r"path=.*none \(looked for at .*\): no such file or folder; download"),
        ({"path": str(tmp_path / "empty")}, r"no open_clip_model\.safetensors or .* in it; download"),
        ({"path": str(alone)}, r"no open_clip_config\.json beside the weights"),
        ({"path": str(other)}, r"not weights of local-dir:"),
        ({"path": str(folder), "layer": 0}, r"layer=0: must be at least 1"),
        ({"path": str(folder), "architecture": "hf-hub:x"}, r"must be a name in open_clip"),
    ]
    for arguments, line in wrong:
        with pytest.raises(ConfigError) as error:
            VisionEncoder(**arguments)
        assert re.search(line, str(error.value)), str(error.value)
        assert "\n" not in str(error.value)
