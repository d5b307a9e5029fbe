"""The image tower inside the model: what it reads is what the frozen encoder makes ahead of time, and it can learn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from factory import build, load_system, tiny_model
from symbiotic.data.encoded import read_with
from symbiotic.data.formats import generation_parts, reading_parts
from symbiotic.data.packing import Sample, build_sample, collate
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.images.vision import TowerPixels, VisionEncoder
from symbiotic.layout import parameter_names
from symbiotic.models.batch import Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.models.vision_tower import VisionTower
from symbiotic.schema import ConfigError, RunError, Vision
from symbiotic.studies.inventory import inventory
from towers import SIGLIP, TOWER, clip_folder

WORDS = Tokenizer.build(["a", "red", "digit", "what", "is", "it"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tower") / "clip"
    clip_folder(path, TOWER)
    return path


def samples() -> list[Sample]:
    """Two that read an image, of different sizes, and one that draws one."""
    rng = np.random.default_rng(0)
    read = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((16, 24, 3), (40, 20, 3))]
    drawn = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    made = [build_sample(str(i), "mmu", reading_parts(x, "what is it", WORDS, "digit")) for i, x in enumerate(read)]
    return [*made, build_sample("t", "t2i", generation_parts(drawn, "a red digit", WORDS))]


def pixels(about: Vision) -> Batch:
    return collate(read_with(TowerPixels(about, "model.vision"), samples()), 64)


def towered(about: Vision, **changes: object) -> UnifiedModel:
    model = tiny_model(vocab_size=64, vision=about, **changes)
    return UnifiedModel(model, load_system("symbiotic", model)).initialise(0)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_frozen_tower_inside_reads_what_the_encoder_makes_ahead_of_time(folder: Path, layer: int) -> None:
    about = Vision(str(folder), trained=False, layer=layer)
    inside, encoder = towered(about), VisionEncoder(str(folder), layer=layer)
    ahead = build("symbiotic", vocab_size=64, vit_dim=encoder.patch_dim)
    ahead.load_state_dict({k: v for k, v in inside.state_dict().items() if not k.startswith("vision.")})
    made = collate(read_with(encoder, samples()), 64)
    batch = pixels(about)
    assert torch.equal(batch.kind, made.kind)
    one, other = inside(batch), ahead(made)
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.prediction, other.prediction, rtol=0, atol=1e-5)
    one.logits.logsumexp(-1).sum().backward()
    assert inside.vit_in.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in inside.vision.parameters())


def published_gradients(folder: Path, images: list[np.ndarray], by_vectors: Tensor, layer: int) -> dict[str, Tensor]:
    """Through open_clip's own model, whole."""
    whole = VisionEncoder(str(folder))
    tower = whole.tower.requires_grad_(True)
    x = torch.stack([whole.transform(Image.fromarray(image)) for image in images])
    kwargs = {"indices": layer, "normalize_intermediates": layer == 1, "intermediates_only": True}
    vectors = tower.forward_intermediates(x, output_fmt="NLC", **kwargs)["image_intermediates"][0]
    vectors.flatten(0, 1).backward(by_vectors)
    return {name: p.grad for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("vision", "layer"), [(TOWER, 1), (TOWER, 2), (SIGLIP, 1), (SIGLIP, 2)])
def test_a_trained_tower_has_the_gradients_of_open_clip_and_no_parameter_without(
    vision: dict, layer: int, tmp_path: Path
) -> None:
    clip_folder(tmp_path / "clip", vision)
    about = Vision(str(tmp_path / "clip"), layer=layer)
    tower = VisionTower(about)
    tower.load()
    images = list(np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    patches = TowerPixels(about, "model.vision").encode(torch.from_numpy(np.stack(images))).flatten(0, 2)
    vectors = tower(patches)
    by_vectors = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0))
    vectors.backward(by_vectors)
    found = {name.removeprefix("tower."): p.grad for name, p in tower.named_parameters()}
    expected = published_gradients(tmp_path / "clip", images, by_vectors, layer)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()), msg=name)


def test_without_an_image_its_parameters_stay_in_the_graph(folder: Path) -> None:
    net = towered(Vision(str(folder)))
    text = build_sample("t", "lm", generation_parts(np.zeros((4, 4, 3), np.uint8), "a", WORDS)[:2])
    net(collate([text], 16)).logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.vision.parameters())


def test_a_projector_of_two_layers(folder: Path) -> None:
    """LLaVA-1.5: Linear, GELU, Linear."""
    net = towered(Vision(str(folder)), projector_hidden=20)
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert [shapes[f"vit_in.{i}.weight"] for i in (0, 2)] == [(20, 48), (32, 20)]
    known = set(parameter_names(net.cfg, net.system))
    assert {name for name in shapes if not name.startswith("vision.")} == known - {"vision.tower"}
    x = torch.randn(3, 48)
    by_hand = net.vit_in[2](torch.nn.functional.gelu(net.vit_in[0](x)))
    assert torch.equal(net.vit_in(x), by_hand)
    counted = {component.name: component for component in inventory(shapes, net.cfg, net.system)}
    total = sum(p.numel() for p in net.vision.parameters())
    assert counted["vision tower"].total == counted["vision tower"].active["vit"] == total
    assert counted["vision tower"].active["text"] == 0


def test_it_starts_as_it_was_published_whatever_the_seed(folder: Path) -> None:
    about = Vision(str(folder))
    one = towered(about)
    other = UnifiedModel(one.cfg, one.system).initialise(1)
    published = VisionEncoder(str(folder)).tower.state_dict()
    for name, tensor in one.vision.tower.state_dict().items():
        assert torch.equal(tensor, published[name])
        assert torch.equal(tensor, other.vision.tower.state_dict()[name])
    assert not torch.equal(one.vit_in.weight, other.vit_in.weight)
    assert not one.train().vision.tower.training  # dropout is no part of it
    with torch.device("meta"):
        assert all(p.is_meta for p in UnifiedModel(one.cfg, one.system).parameters())


def test_what_cannot_be_is_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.vision\.path=.*none .*: no such file or folder; download"):
        VisionTower(Vision(str(tmp_path / "none")))
    with pytest.raises(ConfigError, match=r"^model\.vision\.layer=4: must be at most 3, the blocks of the tower"):
        VisionTower(Vision(str(folder), layer=4))
    with pytest.raises(ConfigError, match=r"^model\.vision\.layer=0: must be at least 1"):
        VisionTower(Vision(str(folder), layer=0))
    net = towered(Vision(str(folder)))
    batch = dataclasses.replace(pixels(net.vision.about), vit_patches=torch.zeros(17, 192))
    with pytest.raises(RunError, match=r"17 patches are no whole images of 4 x 4 patches"):
        net(batch)
