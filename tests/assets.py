"""A folder of assets as SYMBIOTIC_ASSETS names it, with tiny random weights: the official image metrics run on it,
and none of their numbers means anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from symbiotic.evaluation.fid import INCEPTION_FILE

TINY = "symbiotic-tiny"
"""Name of the small extractor in torch-fidelity's registry, see `register_tiny`."""
FEATURES = 6
PROMPTS = {"anime": ["red 7 on black bar top", "blue 1 on gray"], "photo": ["white 0", "red 3 on teal", "blue 2"]}


def register_tiny() -> str:
    """A feature extractor of torch-fidelity for tests: a linear map of the image's four quarters."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

    class TinyExtractor(FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
            super().__init__(name, features)
            self.weight = torch.load(feature_extractor_weights_path, weights_only=True)["weight"]

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            quarters = torch.nn.functional.adaptive_avg_pool2d(x.float() / 128, 2).flatten(1)  # [n, 12]
            features = quarters @ self.weight.to(x.device)
            made = {"features": features, "logits": features}
            return tuple(made[name] for name in self.features_list)

    if TINY not in FEATURE_EXTRACTORS_REGISTRY:
        register_feature_extractor(TINY, TinyExtractor)
    return TINY


def write_assets(folder: Path, images: int = 24) -> Path:
    """inception/ (of the small extractor), coco/, clip/, hps/: all that the image metrics look for."""
    (folder / "inception").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    torch.save({"weight": torch.randn(12, FEATURES, generator=generator)}, folder / "inception" / INCEPTION_FILE)
    write_coco(folder / "coco", images)
    write_clip(folder / "clip", 1)
    write_hps(folder / "hps")
    return folder


def write_coco(folder: Path, count: int, size: tuple[int, int] = (30, 40)) -> Path:
    """captions_val2014.json with two captions an image, and val2014/ with the images; the file's path."""
    (folder / "val2014").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(100, 100 + count):
        name = f"COCO_val2014_{number:012d}.png"
        coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
        coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC).save(folder / "val2014" / name)
        images.append({"id": number, "file_name": name})
        texts = {2 * number + 1: f"second of {number}", 2 * number: f"red {number} on black"}
        annotations += [{"id": i, "image_id": number, "caption": text} for i, text in texts.items()]
    path = folder / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path


def clip_config() -> dict[str, Any]:
    """A CLIP of two small transformers with open_clip's own vocabulary, in the layout of `open_clip_config.json`."""
    vision = {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    return {"model_cfg": {"embed_dim": 8, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}}


def random_clip(seed: int) -> dict[str, torch.Tensor]:
    """The state of such a model, with weights so large that texts and images differ."""
    from open_clip.model import CLIP

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = CLIP(**clip_config()["model_cfg"]).state_dict()
        return {name: torch.randn_like(x) * 0.3 if x.ndim > 1 else x for name, x in state.items()}


def write_clip(folder: Path, seed: int) -> Path:
    """open_clip_model.safetensors beside open_clip_config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(clip_config()))
    save_file(random_clip(seed), folder / "open_clip_model.safetensors")
    return folder


def write_hps(folder: Path, version: str = "v2.1") -> Path:
    """HPS_v2.1_compressed.pt with its key `state_dict`, the config of its small model, and two lists of prompts."""
    (folder / "benchmark").mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(clip_config()))
    checkpoint = {"epoch": 1, "state_dict": random_clip(2)}
    torch.save(checkpoint, folder / f"HPS_{version}_compressed.pt")
    for name, prompts in PROMPTS.items():
        (folder / "benchmark" / f"{name}.json").write_text(json.dumps(prompts))
    return folder


def write_inception(path: Path) -> Path:
    """Random weights of torch-fidelity's real InceptionV3 (95 MB); its features differ from image to image."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            """Keeps what it was initialised with."""

    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Untrained("untrained", ["2048"], feature_extractor_weights_path=str(path))
        for parameter in net.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter)
    torch.save(net.state_dict(), path)
    return path
