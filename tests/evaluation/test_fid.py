"""FID and its company against torch-fidelity called directly and against the formula; what is missing or too little."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from assets import FEATURES, TINY, register_tiny, write_assets, write_inception
from factory import build
from symbiotic.data.errors import DataError
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.assets import ASSETS
from symbiotic.evaluation.benchmark import MissingAsset, Value, measuring
from symbiotic.evaluation.caption_lists import load_real, read_caption_list
from symbiotic.evaluation.clip_score import CLIPScore
from symbiotic.evaluation.context import Context, whole_lines
from symbiotic.evaluation.fid import FID, INCEPTION, INCEPTION_FILE
from symbiotic.evaluation.fidelity import Pixels, check_weights, read_statistics
from symbiotic.evaluation.frechet import fit, frechet_distance, frechet_interval
from symbiotic.evaluation.hps import HPSv2
from symbiotic.evaluation.images import image_facts
from symbiotic.evaluation.names import metric
from symbiotic.evaluation.suite import Suite
from symbiotic.schema import ConfigError, Objective, Sampler

IMAGES = 24
OBJECTIVE = Objective(sampler=Sampler(steps=1))
ALL = ["fid", "inception_score", "kid", "precision", "recall"]


@pytest.fixture(scope="session")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assets(tmp_path_factory.mktemp("fid") / "assets", IMAGES)


@pytest.fixture
def assets(untouched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ASSETS, str(tmp_path / "assets"))
    monkeypatch.delenv("SYMBIOTIC_CACHE", raising=False)
    return Path(shutil.copytree(untouched, tmp_path / "assets"))


@pytest.fixture
def here(corpus: Path, tmp_path: Path) -> Context:
    return Context(Tokenizer.load(corpus / "tokenizer.json"), OBJECTIVE, batch_size=7, folder=tmp_path / "out")


def tiny(**arguments: Any) -> FID:
    register_tiny()
    small = {"extractor": TINY, "kid_subsets": 5, "kid_subset_size": 8, "splits": 2, "reference_size": 16}
    return FID(**(small | {"resamples": 0} | arguments))


def measured(benchmark: FID, here: Context) -> dict[str, Value]:
    with measuring(build("symbiotic", vocab_size=512)) as model:
        found = dict(benchmark.run(model, here))
    network = "" if benchmark.extractor == INCEPTION else f"@{benchmark.extractor}"  # of which it is no FID
    assert all(name.endswith(network) for name in found)
    return {name.removesuffix(network): value for name, value in found.items()}


def pixels(images: list[np.ndarray]) -> Pixels:
    return Pixels(len(images), lambda i: images[i])


def generated_images(here: Context) -> list[np.ndarray]:
    assert here.folder is not None
    (folder,) = (here.folder / "images").iterdir()
    return [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]


def real_images(assets: Path, size: int | None = 16) -> list[np.ndarray]:
    items, _ = read_caption_list(assets / "coco" / "captions_val2014.json")
    return [load_real(item.image, size) for item in items if item.image is not None]


def features(assets: Path, images: list[np.ndarray]) -> np.ndarray:
    """What the small extractor computes, by hand: float32 [n, d]."""
    weight = torch.load(assets / "inception" / INCEPTION_FILE, weights_only=True)["weight"]
    rows = []
    for image in images:
        halves = [np.array_split(half, 2, axis=1) for half in np.array_split(image.astype(np.float64) / 128, 2, axis=0)]
        means = np.array([[quarter.mean((0, 1)) for quarter in half] for half in halves])  # [2, 2, 3]
        rows.append(means.transpose(2, 0, 1).reshape(-1))
    return (torch.tensor(np.array(rows), dtype=torch.float32) @ weight).numpy()


def directly(assets: Path, made: Pixels, real: Any, **more: Any) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    weights = str(assets / "inception" / INCEPTION_FILE)
    settings = {"kid_subsets": 5, "kid_subset_size": 8, "isc_splits": 2, "verbose": False, "cache": False}
    wanted = {"isc": True, "fid": True, "kid": True, "prc": True}
    call = {"cuda": False, "feature_extractor": register_tiny(), "feature_extractor_weights_path": weights}
    return calculate_metrics(input1=made, input2=real, **{**call, **settings, **wanted, "save_cpu_ram": True, **more})


def formula(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    c, e = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(c + e - 2 * scipy.linalg.sqrtm(c @ e).real))


def test_every_score_is_torch_fidelitys_and_fid_the_formula(assets: Path, here: Context) -> None:
    scores = measured(tiny(), here)
    made, real = generated_images(here), real_images(assets)
    assert made[0].shape == (20, 20, 3) != real[0].shape
    reference = directly(assets, pixels(made), pixels(real))
    assert scores["fid"].value == pytest.approx(reference["frechet_inception_distance"], rel=1e-6)
    by_hand = features(assets, made), features(assets, real)
    assert scores["fid"].value == pytest.approx(formula(*by_hand), rel=1e-6)
    assert scores["fid"].value == pytest.approx(frechet_distance(fit(by_hand[0]), fit(by_hand[1])), rel=1e-6)
    mean, spread = (reference[f"kernel_inception_distance_{part}"] for part in ("mean", "std"))
    assert tuple(scores["kid"]) == pytest.approx((mean, IMAGES, mean - 1.96 * spread, mean + 1.96 * spread), rel=1e-6)
    for name, key in {"inception_score": "inception_score_mean", "precision": "precision", "recall": "recall"}.items():
        assert scores[name] == Value(pytest.approx(reference[key], rel=1e-6), IMAGES)
    assert list(scores) == ALL
    assert scores["fid"].value > 1
    assert here.problems == []


def test_a_record_of_every_image_says_what_it_was_made_from(assets: Path, here: Context) -> None:
    measured(tiny(num_images=3), here)
    assert here.folder is not None
    records = list(whole_lines(here.folder / "fid.jsonl"))
    items, _ = read_caption_list(assets / "coco" / "captions_val2014.json")
    assert [(record["id"], record["caption"]) for record in records] == [(i.id, i.caption) for i in items[:3]]
    for record in records:
        facts = image_facts(here.folder / record["file"])
        assert (facts["prompt"], facts["seed"]) == (record["caption"], record["seed"])
    assert "fid.jsonl" in here.files


@pytest.mark.parametrize("layout", ["mu sigma", "ADM"])
def test_statistics_give_what_the_images_give(assets: Path, here: Context, layout: str) -> None:
    of_images = measured(tiny(), here)
    real = features(assets, real_images(assets))
    arrays: dict[str, Any] = {"mu": real.mean(0), "sigma": np.cov(real, rowvar=False)}
    if layout == "ADM":
        spatial = {"mu_s": np.zeros(9), "sigma_s": np.eye(9)}
        arrays = {"arr_0": np.zeros((2, 8, 8, 3), np.uint8), **arrays, **spatial}
        arrays["mu"] = arrays["mu"].astype(np.float64)
    (assets / "fid_reference").mkdir()
    np.savez(assets / "fid_reference" / "real.npz", **arrays)
    (assets / "coco" / "val2014").rename(assets / "moved")
    benchmark = tiny(resamples=10)
    scores = measured(benchmark, here)
    assert list(scores) == ["fid", "inception_score"]
    assert scores["fid"].value == pytest.approx(of_images["fid"].value, rel=1e-6)
    assert scores["inception_score"] == of_images["inception_score"]
    assert scores["fid"].low is not None
    assert benchmark.protocol()["reference"] == "real.npz: statistics"
    assert here.problems == []


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mean": np.zeros(6)}, r"x\.npz: needs the arrays mu and sigma; it holds mean"),
        ({"mu": np.zeros(6), "sigma": np.eye(5)}, r"x\.npz: mu \[6\] and sigma \[5, 5\]; must be \[d\] and \[d, d\]"),
        ({"mu": np.zeros((6, 1)), "sigma": np.eye(6)}, r"x\.npz: mu \[6, 1\]"),
        ({"mu": np.full(6, np.nan), "sigma": np.eye(6)}, r"x\.npz: mu or sigma is not finite"),
        ({"mu": np.array([{}] * 6), "sigma": np.eye(6)}, r"x\.npz: not a readable \.npz"),
        (b"PK\x03\x04 damaged", r"x\.npz: not a readable \.npz"),
    ],
)
def test_statistics_that_cannot_be_used(tmp_path: Path, arrays: Any, message: str) -> None:
    path = tmp_path / "x.npz"
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    else:
        np.savez(path, **arrays)
    with pytest.raises(DataError, match=message) as error:
        read_statistics(path)
    assert "\n" not in str(error.value)


def test_statistics_of_other_features_are_one_line(assets: Path, here: Context, tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", mu=np.zeros(9), sigma=np.eye(9))
    with pytest.raises(DataError, match=f"torch-fidelity with {TINY} of .*AssertionError"):
        measured(tiny(reference=str(tmp_path / "x.npz")), here)
    with pytest.raises(DataError, match=r"reference statistics of 9 features; inception-v3-compat has 2048"):
        measured(tiny(reference=str(tmp_path / "x.npz"), extractor="inception-v3-compat"), here)


def test_the_interval_of_fid_is_that_of_resampled_features(assets: Path, here: Context) -> None:
    scores = measured(tiny(resamples=20), here)
    made, real = features(assets, generated_images(here)), features(assets, real_images(assets))
    expected = frechet_interval(made, fit(real), scores["fid"].value, 20)
    assert (scores["fid"].low, scores["fid"].high) == pytest.approx(expected, rel=1e-4)
    assert scores["fid"].low < scores["fid"].value < scores["fid"].high  # type: ignore[operator]


def test_too_few_images_are_a_line_and_no_number(assets: Path, here: Context) -> None:
    scores = measured(tiny(num_images=5), here)
    assert [name for name, value in scores.items() if np.isnan(value.value)] == ["kid"]
    assert here.problems == ["fid: no kid of 5 generated images and 5 real ones; it needs 8 of each"]
    here.problems.clear()
    scores = measured(tiny(num_images=1), here)
    assert all(np.isnan(value.value) and value.n == 1 for value in scores.values())
    assert [line.split(" of ")[0] for line in here.problems] == [f"fid: no {name}" for name in scores]
    assert "fid: no inception_score of 1 generated images; it needs 2" in here.problems
    here.share = 0.1  # a quick look: 3 of 24 captions, all real images
    here.problems.clear()
    scores = measured(tiny(), here)
    assert [name for name, value in scores.items() if not np.isnan(value.value)] == ["fid", "inception_score"]
    assert scores["fid"].n == 3


def test_an_unreadable_real_image_is_named_and_its_caption_kept(assets: Path, here: Context) -> None:
    paths = sorted((assets / "coco" / "val2014").iterdir())
    paths[3].write_bytes(paths[3].read_bytes()[:60])
    paths[5].unlink()
    scores = measured(tiny(), here)
    assert sorted(line.split(": ")[0] for line in here.problems) == sorted([str(paths[3]), str(paths[5])])
    kept = [load_real(path, 16) for path in paths if path not in (paths[3], paths[5])]
    expected = formula(features(assets, generated_images(here)), features(assets, kept))
    assert scores["fid"] == Value(pytest.approx(expected, rel=1e-6), IMAGES)


def test_a_folder_of_real_images_may_be_of_any_size(assets: Path, here: Context) -> None:
    benchmark = tiny(reference=str(assets / "coco" / "val2014"), reference_size=None, num_images=9)
    scores = measured(benchmark, here)
    expected = formula(features(assets, generated_images(here)), features(assets, real_images(assets, None)))
    assert scores["fid"] == Value(pytest.approx(expected, rel=1e-6), 9)
    assert benchmark.protocol()["reference"] == "val2014: 24 images"


def test_features_of_real_images_are_kept_by_content_and_weights(assets: Path, here: Context, tmp_path: Path) -> None:
    cached = tiny(cache=str(tmp_path / "cache"), resamples=2)
    before = measured(cached, here)
    files = sorted((tmp_path / "cache").iterdir())
    kinds = ["features-features", "features-logits", "stat-fid-features"]
    assert [path.stem.partition(f"-{TINY}-")[2] for path in files] == kinds
    torch.save(torch.load(files[0], weights_only=True) + 1, files[0])
    files[2].unlink()
    again = measured(cached, here)
    assert again["fid"].value != before["fid"].value
    assert again["kid"].value != before["kid"].value
    assert measured(tiny(), here)["fid"].value == before["fid"].value
    state = torch.load(assets / "inception" / INCEPTION_FILE, weights_only=True)
    torch.save({"weight": 2 * state["weight"]}, assets / "inception" / INCEPTION_FILE)
    assert measured(cached, here)["fid"].value == pytest.approx(4 * before["fid"].value, rel=1e-5)
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_the_protocol_changes_with_files_and_counts(assets: Path) -> None:
    before = tiny().protocol()
    assert json.loads(json.dumps(before)) == before
    assert before["images"] == IMAGES
    assert before["torch-fidelity"] == importlib.metadata.version("torch-fidelity")
    assert before["reference"] == f"val2014: {IMAGES} images"
    assert tiny(num_images=7).protocol()["reference_hash"] != before["reference_hash"]
    image = next((assets / "coco" / "val2014").iterdir())
    Image.new("RGB", (40, 30)).save(image)
    assert tiny().protocol()["reference_hash"] != before["reference_hash"]
    torch.save({"weight": torch.zeros(12, FEATURES)}, assets / "inception" / INCEPTION_FILE)
    assert tiny().protocol()["weights"] != before["weights"]


def test_missing_assets_are_said(assets: Path, here: Context) -> None:
    (assets / "coco" / "val2014").rename(assets / "moved")
    with pytest.raises(
        MissingAsset, match=r"no real images \(.*val2014: no such folder\).*fid_reference/\*\.npz.*fid\.reference"
    ):
        tiny().protocol()
    assert tiny(images=str(assets / "moved")).protocol()["reference"] == f"moved: {IMAGES} images"
    (assets / "coco" / "captions.txt").write_text("red 7\n")
    with pytest.raises(MissingAsset, match=r"captions\.txt names none"):
        tiny(captions=str(assets / "coco" / "captions.txt")).protocol()
    (assets / "inception" / INCEPTION_FILE).unlink()
    with pytest.raises(MissingAsset, match=rf"\$SYMBIOTIC_ASSETS/inception/{INCEPTION_FILE}.*fid\.weights.*releases"):
        tiny().protocol()
    (assets / "coco" / "captions_val2014.json").unlink()
    with pytest.raises(MissingAsset, match=r"coco/captions_val2014\.json.*fid\.captions"):
        measured(tiny(), here)
    with pytest.raises(ConfigError, match=r"benchmarks\.fid\.kid_subset_size=1: must be a whole number, at least 2"):
        tiny(kid_subset_size=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"damaged", "not weights"),
        ([1, 2], "must hold a dictionary of tensors"),
        ({"weight": 3}, "must hold a dictionary of tensors"),
        ({"weight": Path("x").joinpath}, "not weights"),
    ],
)
def test_weights_that_are_none_or_would_run_code(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(DataError, match=rf"weights\.pth: {message}") as error:
        check_weights(path)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_one_line(assets: Path, here: Context) -> None:
    with pytest.raises(DataError, match=rf"inception-v3-compat of .*{INCEPTION_FILE}: RuntimeError.*Missing key"):
        measured(tiny(extractor="inception-v3-compat"), here)


def test_all_image_metrics_run_offline_and_share_their_images(assets: Path, corpus: Path, tmp_path: Path) -> None:
    """Also after an interruption: the files are the same, byte by byte, and so is every score."""
    tokenizer, model = Tokenizer.load(corpus / "tokenizer.json"), build("symbiotic", vocab_size=512)
    suite = Suite([tiny(), CLIPScore(num_images=9), HPSv2()], tokenizer, OBJECTIVE, batch_size=7)
    scores = suite.run(model, folder=tmp_path / "whole")
    features = [f"{name}@{TINY}" for name in ALL]  # a linear map is no Inception
    assert list(scores) == [*features, "clip_score", "clip_cosine", "hps_v2.1", "hps_v2.1/anime", "hps_v2.1/photo"]
    assert not scores.missing | scores.failed
    assert all(np.isfinite(score) for score in scores.values())
    assert all(metric(name).side == "generation" for name in scores)
    assert [name for name in scores if not metric(name).official] == features
    files = {path.relative_to(tmp_path / "whole"): path for path in (tmp_path / "whole").rglob("*.*")}
    assert len([name for name in files if name.suffix == ".png"]) == IMAGES + 5
    for name, path in files.items():
        if name.suffix != ".png" or name.stem < "00010":
            (tmp_path / "cut" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cut" / name).write_bytes(path.read_bytes())
    (tmp_path / "cut" / "clip_score.jsonl").write_bytes((tmp_path / "whole" / "clip_score.jsonl").read_bytes()[:-9])
    (tmp_path / "cut" / "hps_v2.1.jsonl").unlink()
    again = suite.run(model, folder=tmp_path / "cut")
    assert again == scores
    for name, path in files.items():
        assert (tmp_path / "cut" / name).read_bytes() == path.read_bytes(), name


def test_missing_assets_are_rows_and_the_rest_runs(assets: Path, corpus: Path) -> None:
    shutil.rmtree(assets / "inception")
    shutil.rmtree(assets / "hps")
    tokenizer, model = Tokenizer.load(corpus / "tokenizer.json"), build("symbiotic", vocab_size=512)
    scores = Suite([tiny(), HPSv2(), CLIPScore(num_images=2)], tokenizer, OBJECTIVE).run(model)
    assert list(scores) == ["clip_score", "clip_cosine"]
    assert list(scores.missing) == ["fid", "hps_v2.1"]
    assert INCEPTION_FILE in scores.missing["fid"]
    assert Suite([tiny()], tokenizer, OBJECTIVE).run(build("symbiotic", vocab_size=512, latents=False)) == {}


def test_the_official_network_takes_images_of_any_size(assets: Path, here: Context) -> None:
    """Random weights in the real shapes. Images of one colour have the same features whatever their size."""
    path = write_inception(assets / "inception" / INCEPTION_FILE)
    check_weights(path)
    benchmark = FID(num_images=4, kid_subsets=2, kid_subset_size=4, splits=2, reference_size=None)
    scores = measured(benchmark, here)
    assert all(np.isfinite(value.value) for value in scores.values())
    assert scores["kid"].value > 0
    colours = [np.full(3, value, np.uint8) for value in (0, 90, 180, 250)]
    small, large = (pixels([np.broadcast_to(c, (*size, 3)) for c in colours]) for size in ((20, 20), (48, 64)))
    one = {"feature_extractor": "inception-v3-compat", "fid": False, "isc": False, "prc": False, "kid_subset_size": 4}
    same, other = (directly(assets, small, images, **one) for images in (small, large))
    assert other == pytest.approx(same, rel=1e-4)
