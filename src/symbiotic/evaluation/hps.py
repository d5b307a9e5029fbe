"""Human preference score of generated images (HPSv2, arXiv 2306.09341): a CLIP ViT-H/14 tuned on preferences.

The official package is not needed: its model is open_clip's ViT-H-14 with the weights of the checkpoint, its score
the cosine of image and prompt. It scales the longest side of an image to 224 (bicubic) and pads with black to a square,
where CLIP scales the shortest one and crops. It computes in half precision on a GPU, here float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from torch import nn

from symbiotic.data.errors import DataError
from symbiotic.evaluation.assets import asset, at_least, content_hash
from symbiotic.evaluation.benchmark import Benchmark, Record, Value, device_of, mean
from symbiotic.evaluation.caption_lists import Captioned, available, drawn, read_caption_list
from symbiotic.evaluation.clip_score import ClipFiles, clip_files, cosine_record, load_clip
from symbiotic.evaluation.context import Context
from symbiotic.schema import ConfigError

KEY = "evaluation.benchmarks.hps_v2"
CHECKPOINTS = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
CHECKPOINT_FROM = "the checkpoints are published as xswu/HPSv2"
PROMPTS_FROM = "the prompts are published with the data set zhwang/HPDv2 (benchmark/*.json)"
PREPROCESSING = {"resize_mode": "longest", "interpolation": "bicubic", "fill_color": 0}


class HPSv2(Benchmark):
    """Mean cosine of an image and its prompt by the HPS model, as `hps_v2` or `hps_v2.1` (two models, not to be
    compared); official tables print 100 times that. With a folder of prompt lists also one score a list,
    `hps_v2.1/photo`.

    Args:
        version: v2 or v2.1, of the checkpoint.
        checkpoint: a file; null: `hps/HPS_v2.1_compressed.pt` (of v2: `HPS_v2_compressed.pt`) of the assets.
        captions: a caption list (see `caption_lists`) or a folder of them; null: `hps/benchmark` of the assets.
        architecture: name in open_clip; null: an `open_clip_config.json` beside the checkpoint, else ViT-H-14.
        num_images: of each list, at most.
    """

    name = "hps_v2"
    needs_latents = True

    def __init__(
        self,
        version: str = "v2.1",
        checkpoint: str | None = None,
        captions: str | None = None,
        architecture: str | None = None,
        num_images: int = 800,
    ) -> None:
        if version not in CHECKPOINTS:
            raise ConfigError(f"{KEY}.version={version}: must be {' or '.join(CHECKPOINTS)}")
        at_least(KEY, 1, num_images=num_images)
        self.name = f"hps_{version}"  # type: ignore[misc]  # both versions may be configured
        self.version, self.checkpoint, self.captions = version, checkpoint, captions
        self.architecture, self.num_images = architecture, num_images

    def files(self) -> tuple[list[Path], ClipFiles]:
        """The caption lists, and the model.

        Raises:
            MissingAsset: one of them.
        """
        place = f"hps/{CHECKPOINTS[self.version]}"
        weights = asset(self.checkpoint, place, key=f"{KEY}.checkpoint", how=CHECKPOINT_FROM)
        captions = asset(self.captions, "hps/benchmark", key=f"{KEY}.captions", how=PROMPTS_FROM)
        lists = sorted(captions.glob("*.json")) if captions.is_dir() else [captions]
        if not lists:
            raise DataError(f"{captions}: no list of prompts (*.json) in it")
        return lists, clip_files(weights, self.architecture, "ViT-H-14")

    def protocol(self) -> dict[str, object]:
        lists, files = self.files()
        return {
            **files.protocol(),
            "version": self.version,
            "captions": {path.stem: content_hash(path) for path in lists},
            "images": {path.stem: available(path, self.num_images) for path in lists},
            "image_size": "of the run, longest side scaled, padded with black",
            "score": "mean cosine",
        }

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        lists, files = self.files()
        images, items = {}, []
        for path in lists:
            try:
                read, problems = read_caption_list(path)
            except DataError as error:
                if len(lists) == 1:
                    raise
                read, problems = [], [str(error)]
            context.problems += problems
            if not read:
                continue
            images[path.stem], chosen = drawn(model, context, path, read, self.num_images)
            items += [(path.stem, i, item) for i, item in enumerate(chosen)]
        clip = cache(lambda: load_clip(files, device_of(model), PREPROCESSING))

        def measure(some: Sequence[tuple[str, int, Captioned]]) -> list[Record]:
            cosines = clip().cosines([images[name][i] for name, i, _ in some], [item.caption for *_, item in some])
            rows = zip(some, cosines, strict=True)
            return [{"list": name, **cosine_record(item.id, item.caption, c)} for (name, _, item), c in rows]

        records = context.measured(self.name, items, measure)
        yield self.name, mean([record["cosine"] for record in records])
        for name in images if len(images) > 1 else ():
            yield f"{self.name}/{name}", mean([record["cosine"] for record in records if record["list"] == name])
