"""FID, KID, inception score, precision and recall of images generated from captions, by torch-fidelity.

In training the same class runs on a share of its captions (`Context.share`): one resize and one network for both
numbers, and the network lives only while it is measured. (Held by the LightningModule it would land in every checkpoint
and in `parameters()`; torchmetrics' version resizes with antialiasing and gives other values.)

torch-fidelity scales every image to the 299 x 299 of its Inception, bilinearly as TensorFlow 1 did, so generated and
real images may have different sizes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from symbiotic.evaluation.assets import asset, at_least, content_hash, package, versions
from symbiotic.evaluation.benchmark import Benchmark, MissingAsset, Record, Value, device_of
from symbiotic.evaluation.caption_lists import (
    CAPTIONS_FROM,
    Captioned,
    drawn,
    files_hash,
    image_files,
    images_beside,
    load_real,
    read_caption_list,
    readable_images,
)
from symbiotic.evaluation.context import Context, Gallery
from symbiotic.evaluation.fidelity import Extractor, Pixels, check_weights, compare, read_statistics

INCEPTION = "inception-v3-compat"
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_FROM = "torch-fidelity publishes it among its releases (v0.2.0)"
REFERENCE_FROM = "it may be a folder of images, or an .npz with mu and sigma"
KEY = "evaluation.benchmarks.fid"


class Reference(NamedTuple):
    """What generated images are compared with: files of images, or statistics of their features."""

    name: str
    files: Sequence[Path] = ()
    statistics: Path | None = None

    def hash(self) -> str:
        return files_hash(self.files) if self.statistics is None else content_hash(self.statistics)


def made(context: Context, gallery: Gallery, items: Sequence[Captioned], i: int) -> Record:
    """What an image was generated from, and its file in the folder of the evaluation."""
    file = str(gallery.path(i).relative_to(context.folder)) if context.folder else None
    return {"id": items[i].id, "caption": items[i].caption, "seed": f"{context.seed}/{i}", "file": file}


class FID(Benchmark):
    """`fid`, `kid`, `inception_score`, `precision`, `recall`; of another extractor `fid@EXTRACTOR` and so on.

    With reference statistics only `fid` and `inception_score`: the others need the real images. Precision and recall
    are those of FID's features (as in ADM's evaluation; their authors used a VGG).

    Args:
        captions: a caption list (see `caption_lists`); null: `coco/captions_val2014.json` of the assets.
        images: folder of the list's real images; null: beside it.
        reference: a folder of images, or an `.npz` of statistics; null: the real images of the chosen captions, and
            where there are none, the one `.npz` in `fid_reference/` of the assets.
        reference_size: real images are cropped and scaled to squares of this side; null: left as they are.
        weights: of the extractor; null: `inception/` of the assets. extractor: its name in torch-fidelity's registry.
        num_images: the first captions of the list, at most; FID depends on it. FID-30k: 30,000.
        kid_subsets, kid_subset_size: with fewer images than a subset has there is no KID.
        splits: of the inception score. neighborhood: k of precision and recall.
        resamples: for an interval of FID (0: none); each takes 10 to 20 s with 2048 features of 30,000 images.
        cache: folder for features of real images; null: `fidelity/` in the folder of SYMBIOTIC_CACHE, where it is set.
    """

    name = "fid"
    needs_latents = True

    def __init__(
        self,
        captions: str | None = None,
        images: str | None = None,
        reference: str | None = None,
        reference_size: int | None = 256,
        weights: str | None = None,
        extractor: str = INCEPTION,
        num_images: int = 30_000,
        kid_subsets: int = 100,
        kid_subset_size: int = 1000,
        splits: int = 10,
        neighborhood: int = 3,
        resamples: int = 20,
        cache: str | None = None,
    ) -> None:
        at_least(KEY, 1, num_images=num_images, kid_subsets=kid_subsets, splits=splits, neighborhood=neighborhood)
        at_least(KEY, 2, kid_subset_size=kid_subset_size)
        at_least(KEY, 0, resamples=resamples)
        if reference_size is not None:
            at_least(KEY, 1, reference_size=reference_size)
        self.captions, self.images, self.reference, self.weights = captions, images, reference, weights
        self.extractor, self.reference_size, self.num_images = extractor, reference_size, num_images
        self.resamples, self.cache = resamples, cache
        self.settings: dict[str, Any] = {
            "kid_subsets": kid_subsets,
            "kid_subset_size": kid_subset_size,
            "isc_splits": splits,
            "prc_neighborhood": neighborhood,
        }

    def files(self) -> tuple[Path, Path]:
        """Captions and weights. Raises MissingAsset."""
        package("torch_fidelity", "eval")
        captions = asset(self.captions, "coco/captions_val2014.json", key=f"{KEY}.captions", how=CAPTIONS_FROM)
        weights = asset(self.weights, f"inception/{INCEPTION_FILE}", key=f"{KEY}.weights", how=INCEPTION_FROM)
        return captions, weights

    def real(self, captions: Path, items: Sequence[Captioned]) -> Reference:
        """What to compare with. Raises MissingAsset: there are neither images nor statistics."""
        if self.reference is not None:
            path = asset(self.reference, key=f"{KEY}.reference", how=REFERENCE_FROM)
            return Reference(path.name, image_files(path)) if path.is_dir() else Reference(path.name, statistics=path)
        files = [item.image for item in items[: self.num_images] if item.image is not None]
        folder = Path(self.images) if self.images else images_beside(captions)
        if files and folder.is_dir():
            return Reference(folder.name, files)
        try:
            path = asset(None, "fid_reference/*.npz", key=f"{KEY}.reference", how=REFERENCE_FROM)
        except MissingAsset as error:
            reason = f"{folder}: no such folder" if files else f"{captions.name} names none"
            raise MissingAsset(f"no real images ({reason}), and {error}") from error
        return Reference(path.name, statistics=path)

    def protocol(self) -> dict[str, object]:
        captions, weights = self.files()
        items, _ = read_caption_list(captions, self.images)
        real = self.real(captions, items)
        count = f"{len(real.files)} images" if real.statistics is None else "statistics"
        return {
            **self.settings,
            "extractor": self.extractor,
            "weights": content_hash(weights),
            "captions": content_hash(captions),
            "images": min(self.num_images, len(items)),
            "image_size": "of the run",
            "reference": f"{real.name}: {count}",
            "reference_hash": real.hash(),
            "reference_size": self.reference_size if real.statistics is None else None,
            "resamples": self.resamples,
            **versions("torch-fidelity"),
        }

    def run(self, model: nn.Module, context: Context) -> Iterator[tuple[str, Value]]:
        captions, weights = self.files()
        check_weights(weights)
        items, problems = read_caption_list(captions, self.images)
        context.problems += problems
        reference = self.real(captions, items)
        statistics = None if reference.statistics is None else read_statistics(reference.statistics)
        usable: list[Path] = []
        if statistics is None:
            usable, problems = readable_images(reference.files, self.reference_size)
            context.problems += problems
        gallery, chosen = drawn(model, context, captions, items, self.num_images)
        context.measured(self.name, range(len(chosen)), lambda some: [made(context, gallery, chosen, i) for i in some])
        images = Pixels(len(usable), lambda i: load_real(usable[i], self.reference_size))
        possible = self.possible(len(gallery), None if statistics else len(usable), context.problems)
        found = compare(
            Pixels(len(gallery), lambda i: gallery[i]),
            statistics or images,
            Extractor(self.extractor, weights, device_of(model), context.batch_size),
            [score for score, enough in possible.items() if enough],
            self.settings,
            name=f"{reference.hash()}-{len(usable)}-{self.reference_size}-{content_hash(weights)}",
            cache=self.cache_folder(),
            resamples=self.resamples,
        )
        nothing = Value(float("nan"), len(gallery))
        yield from ((self.called(score), found.get(score, nothing)) for score in possible)

    def called(self, score: str) -> str:
        """`fid`; on features of another network than Inception `fid@NETWORK`, which is no FID."""
        return score if self.extractor == INCEPTION else f"{score}@{self.extractor}"

    def possible(self, made: int, real: int | None, problems: list[str]) -> dict[str, bool]:
        """Which scores so many images allow; the others get a line. real: None for statistics."""
        neighbours = self.settings["prc_neighborhood"] + 1
        least = {"fid": 2, "inception_score": self.settings["isc_splits"]}
        if real is not None:
            least |= {"kid": self.settings["kid_subset_size"], "precision": neighbours, "recall": neighbours}
        alone = {"inception_score"} if real is not None else set(least)
        there = {score: made if score in alone else min(made, real or 0) for score in least}
        for score, count in least.items():
            if there[score] < count:
                of = f"{made} generated images" + ("" if score in alone else f" and {real} real ones")
                problems.append(f"fid: no {score} of {of}; it needs {count}{'' if score in alone else ' of each'}")
        return {score: there[score] >= count for score, count in least.items()}

    def cache_folder(self) -> Path | None:
        root = os.environ.get("SYMBIOTIC_CACHE")
        if self.cache is not None:
            return Path(self.cache)
        return Path(root) / "fidelity" if root else None
