"""torch-fidelity's metrics of two sets of images, called with everything said that its defaults would choose.

Its traps: without a name the extractor of precision and recall is a downloaded VGG; `cuda` is on; a subset of KID has
1000 images; its cache names carry neither sample counts nor weights; it unpickles weights and cached files, so weights
are checked before, and the cache must be a folder of ours.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from symbiotic.data.errors import DataError, readable_errors
from symbiotic.evaluation.benchmark import Value
from symbiotic.evaluation.frechet import Gaussian, fit, frechet_interval

KEYS = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "inception_score": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}
SWITCHES = {"fid": "fid", "kid": "kid", "inception_score": "isc", "precision": "prc", "recall": "prc"}


class Pixels(Dataset[Tensor]):
    """Images as torch-fidelity takes them: uint8 [3, H, W]."""

    def __init__(self, count: int, image: Callable[[int], np.ndarray]) -> None:
        """image: of a number, uint8 [H, W, 3]."""
        self.count, self.image = count, image

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Tensor:
        return torch.from_numpy(np.array(self.image(i))).permute(2, 0, 1)


class Extractor(NamedTuple):
    """name: in torch-fidelity's registry."""

    name: str
    weights: Path
    device: torch.device
    batch_size: int


def compare(
    made: Pixels,
    real: Pixels | Gaussian,
    extractor: Extractor,
    scores: Collection[str],
    settings: dict[str, Any],
    *,
    name: str,
    cache: Path | None = None,
    resamples: int = 0,
) -> dict[str, Value]:
    """The scores asked for; of statistics, `fid` and `inception_score` only.

    FID has an interval where `resamples` > 0, see `frechet_interval`; that of KID is 1.96 standard deviations of
    its subsets (of their size, so it is wide for many images).

    Args:
        settings: `kid_subsets`, `kid_subset_size`, `isc_splits`, `prc_neighborhood`.
        name: of the real images or statistics; says what they hold, and with which weights features are made.
        cache: folder that keeps the features of the real images.

    Raises:
        DataError: torch-fidelity refuses.
    """
    switches = {SWITCHES[score] for score in scores}
    with TemporaryDirectory(prefix="fidelity-") as temporary:
        folder = Path(temporary)
        call = settings | {
            "input1": made,
            "input1_cache_name": "made" if resamples else None,
            "input2": real if isinstance(real, Pixels) else Pixels(0, np.zeros),  # never read: statistics are there
            "input2_cache_name": name,
            "cache_root": temporary,
        }
        if isinstance(real, Pixels):
            with _kept(folder, cache, name):
                found = _calculate(call, extractor, switches)
        else:
            write_statistics(folder, name, extractor.name, real)
            found = _calculate(call, extractor, switches & {"fid"})
            found |= _calculate(settings | {"input1": made, "cache": False}, extractor, switches & {"isc"})
        values = {score: Value(found[KEYS[score]], len(made)) for score in scores}
        if "kid" in values:
            mean, spread = values["kid"].value, 1.96 * found["kernel_inception_distance_std"]
            values["kid"] = Value(mean, len(made), mean - spread, mean + spread)
        if "fid" in values and resamples:
            target = real if isinstance(real, Gaussian) else fit(_features(folder, name, extractor.name))
            features = _features(folder, "made", extractor.name)
            interval = frechet_interval(features, target, values["fid"].value, resamples)
            values["fid"] = Value(values["fid"].value, len(made), *interval)
        return values


def _calculate(call: dict[str, Any], extractor: Extractor, switches: Collection[str]) -> dict[str, float]:
    if not switches:
        return {}
    from torch_fidelity import calculate_metrics

    cuda = extractor.device.type == "cuda"
    named = {
        "feature_extractor": extractor.name,
        "feature_extractor_weights_path": str(extractor.weights),
        "batch_size": extractor.batch_size,
        "cuda": cuda,
        "save_cpu_ram": True,  # no worker processes, and distances piece by piece
        "verbose": False,
    }
    try:
        with torch.cuda.device(extractor.device) if cuda else nullcontext():
            return calculate_metrics(**call, **named, **dict.fromkeys(switches, True))
    except DataError:
        raise
    except Exception as error:  # assertions, torch's and numpy's own errors
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(f"torch-fidelity with {extractor.name} of {extractor.weights}: {what}") from error


def fid_layer(extractor: str) -> str:
    from torch_fidelity.utils import resolve_feature_layer_for_metric

    return resolve_feature_layer_for_metric("fid", feature_extractor=extractor)


def _features(folder: Path, name: str, extractor: str) -> np.ndarray:
    path = folder / f"{name}-{extractor}-features-{fid_layer(extractor)}.pt"
    return torch.load(path, map_location="cpu", weights_only=True).numpy()


@contextmanager
def _kept(folder: Path, cache: Path | None, name: str) -> Iterator[None]:
    """What torch-fidelity caches under `name` comes from the cache, and goes there where it is new."""
    if cache is None:
        yield
        return
    with readable_errors("write features", cache):
        cache.mkdir(parents=True, exist_ok=True)
        for path in cache.glob(f"{name}-*.pt"):
            (folder / path.name).symlink_to(path.resolve())
    yield
    with readable_errors("write features", cache):
        for path in folder.glob(f"{name}-*.pt"):
            if not path.is_symlink():
                part = cache / f".{folder.name}-{path.name}"
                shutil.copyfile(path, part)
                part.replace(cache / path.name)


# --------------------------------------------------------------------------- files of users


def check_weights(path: Path) -> None:
    """Raises DataError: not a plain dictionary of tensors (torch-fidelity would execute what else it holds)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make torch raise what they like
        raise DataError(f"{path}: not weights ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise DataError(f"{path}: must hold a dictionary of tensors")


def read_statistics(path: Path) -> Gaussian:
    """Mean and covariance of reference features: `mu` [d], `sigma` [d, d] of an `.npz`.

    Files of pytorch-fid, TTUR and VAR hold nothing else; ADM's also the statistics of spatial features (`mu_s`,
    `sigma_s`, for sFID) and images (`arr_0`), which are not read.

    Raises:
        DataError: not such a file.
    """
    try:
        with path.open("rb") as file, np.load(file) as archive:
            held = ", ".join(archive.files)
            if not {"mu", "sigma"} <= set(archive.files):
                raise DataError(f"{path}: needs the arrays mu and sigma; it holds {held or 'nothing'}")
            mean, covariance = (np.asarray(archive[key], dtype=np.float64) for key in ("mu", "sigma"))
    except DataError:
        raise
    except Exception as error:  # damaged files make numpy and zipfile raise what they like
        raise DataError(f"{path}: not a readable .npz ({type(error).__name__}: {error})") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise DataError(f"{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)}; must be [d] and [d, d]")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise DataError(f"{path}: mu or sigma is not finite")
    return Gaussian(mean, covariance)


def write_statistics(folder: Path, name: str, extractor: str, statistics: Gaussian) -> Path:
    """Put statistics where torch-fidelity looks for those that it computed itself, in the types that it wants.

    Raises:
        DataError: they are of another number of features than the extractor's layer.
    """
    layer = fid_layer(extractor)
    if layer.isdigit() and int(layer) != len(statistics.mean):
        raise DataError(f"reference statistics of {len(statistics.mean)} features; {extractor} has {layer}")
    path = folder / f"{name}-{extractor}-stat-fid-{layer}.pt"
    torch.save({"mu": statistics.mean.astype(np.float32), "sigma": statistics.covariance}, path)
    return path
