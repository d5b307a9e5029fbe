"""CLIP score of images generated from captions, by an open_clip model from a local file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from symbiotic.data.errors import DataError
from symbiotic.evaluation.assets import asset, at_least, content_hash, versions
from symbiotic.evaluation.benchmark import Benchmark, Record, Value, device_of, mean
from symbiotic.evaluation.caption_lists import CAPTIONS_FROM, available, drawn, read_caption_list
from symbiotic.evaluation.context import Context
from symbiotic.models.towers import one_line, quiet

OPENAI = "ViT-B-32-quickgelu"
CONFIG = "open_clip_config.json"
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
WEIGHTS_FROM = "OpenAI's ViT-B/32 is published in this form as timm/vit_base_patch32_clip_224.openai"


class CLIPScore(Benchmark):
    """Mean cosine of an image and its caption, in two forms:

    `clip_score`: 100 x the mean, not clipped at 0. `clip_cosine`: the mean itself, as the Symbiotic-MoE authors
    report it (OpenAI's ViT-B/32). The images are those of the run's own size, resized as the model's config says.

    Args:
        captions: a caption list (see `caption_lists`); null: `coco/captions_val2014.json` of the assets.
        weights: a file, or a folder with one and its `open_clip_config.json`; null: `clip/` of the assets.
        architecture: name in open_clip; null: that of the config beside the weights, else OpenAI's ViT-B/32. Weights
            of OpenAI need a name that ends in -quickgelu: with another one they load, and score wrongly.
        num_images: the first captions of the list, at most.
    """

    name = "clip_score"
    needs_latents = True

    def __init__(
        self,
        captions: str | None = None,
        weights: str | None = None,
        architecture: str | None = None,
        num_images: int = 30_000,
    ) -> None:
        at_least(f"evaluation.benchmarks.{self.name}", 1, num_images=num_images)
        self.captions, self.weights, self.architecture = captions, weights, architecture
        self.num_images = num_images

    def files(self) -> tuple[Path, ClipFiles]:
        """Raises MissingAsset: the captions or the weights."""
        key = f"evaluation.benchmarks.{self.name}"
        captions = asset(self.captions, "coco/captions_val2014.json", key=f"{key}.captions", how=CAPTIONS_FROM)
        places = [f"clip/{name}" for name in WEIGHTS]
        weights = asset(self.weights, *places, key=f"{key}.weights", how=WEIGHTS_FROM)
        return captions, clip_files(weights, self.architecture, OPENAI)

    def protocol(self) -> dict[str, object]:
        captions, clip = self.files()
        return {
            **clip.protocol(),
            "captions": content_hash(captions),
            "images": available(captions, self.num_images),
            "image_size": "of the run, scaled by the model's preprocessing",
            "score": "mean cosine, not clipped; x 100 as clip_score",
        }

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        path, files = self.files()
        items, problems = read_caption_list(path)
        context.problems += problems
        gallery, chosen = drawn(model, context, path, items, self.num_images)
        clip = cache(lambda: load_clip(files, device_of(model)))

        def measure(some: Sequence[int]) -> list[Record]:
            cosines = clip().cosines([gallery[i] for i in some], [chosen[i].caption for i in some])
            return [cosine_record(chosen[i].id, chosen[i].caption, c) for i, c in zip(some, cosines, strict=True)]

        cosine = mean([record["cosine"] for record in context.measured(self.name, range(len(chosen)), measure)])
        yield "clip_score", cosine._replace(value=100 * cosine.value)
        yield "clip_cosine", cosine


def cosine_record(item: str, caption: str, cosine: float) -> Record:
    return {"id": item, "caption": caption, "cosine": round(cosine, 6)}


# --------------------------------------------------------------------------- open_clip


class ClipFiles(NamedTuple):
    """architecture: a name in open_clip, or `local-dir:` and the folder of its config."""

    architecture: str
    weights: Path

    def protocol(self) -> dict[str, str]:
        folder = self.architecture.removeprefix("local-dir:")
        local = folder != self.architecture
        name = f"{CONFIG} {content_hash(Path(folder) / CONFIG)}" if local else self.architecture
        code = versions("open_clip_torch", "torchvision")
        return {"model": name, "weights": content_hash(self.weights), "precision": "float32", **code}


def clip_files(weights: Path, architecture: str | None, otherwise: str) -> ClipFiles:
    """What to load.

    Args:
        weights: a file, or a folder with `open_clip_config.json` and a file of WEIGHTS.
        architecture: of the config of benchmarks; null: the config beside the weights, else `otherwise`.

    Raises:
        DataError: a folder without weights, or a name that would be downloaded.
    """
    if architecture is not None and ":" in architecture:
        raise DataError(
            f"architecture={architecture}: must be a name in open_clip; weights=FOLDER reads a local config"
        )
    if weights.is_dir():
        found = [weights / name for name in WEIGHTS if (weights / name).is_file()]
        if not found:
            raise DataError(f"{weights}: no {' or '.join(WEIGHTS)} in it")
        weights = found[0]
    if architecture is None:
        architecture = f"local-dir:{weights.parent}" if (weights.parent / CONFIG).is_file() else otherwise
    return ClipFiles(architecture, weights)


class Clip:
    """An open_clip model with its preprocessing and its tokenizer."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any, device: torch.device) -> None:
        self.model = model.to(device).eval().requires_grad_(False)
        self.preprocess, self.tokenizer, self.device = preprocess, tokenizer, device

    @torch.no_grad()
    def cosines(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> list[float]:
        """Cosine of each image uint8 [H, W, 3] with its caption, which is cut to the model's context (77 tokens)."""
        pixels = torch.stack([self.preprocess(Image.fromarray(image)) for image in images])
        picture = self.model.encode_image(pixels.to(self.device), normalize=True)
        text = self.model.encode_text(self.tokenizer(list(captions)).to(self.device), normalize=True)
        return (picture * text).sum(-1).float().tolist()


def load_clip(files: ClipFiles, device: torch.device, preprocess: dict[str, Any] | None = None) -> Clip:
    """The model in float32; nothing is downloaded, nothing in the file is executed.

    preprocess: replaces keys of the model's own preprocessing, such as `resize_mode`.

    Raises:
        DataError: an architecture that open_clip does not have, or weights that are not its.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # before open_clip is imported
    import open_clip
    from open_clip.factory import load_checkpoint
    from open_clip.transform import PreprocessCfg, image_transform_v2

    name, weights = files
    with quiet():
        try:
            model = open_clip.create_model(name, load_weights=False, force_preprocess_cfg=preprocess)
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # whatever a config of others makes a constructor raise
            raise DataError(f"{name}: not a model that open_clip builds offline ({one_line(error)})") from error
        try:
            load_checkpoint(model, str(weights), weights_only=True)
        except Exception as error:  # damaged files make torch and safetensors raise what they like
            hint = "; a TorchScript archive must be saved as safetensors first" if "TorchScript" in str(error) else ""
            raise DataError(f"{weights}: not weights of {name} ({one_line(error)}){hint}") from error
    transform = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return Clip(model, transform, tokenizer, device)
