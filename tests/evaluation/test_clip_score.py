"""CLIP score against open_clip by hand, and files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from assets import clip_config, random_clip, write_assets, write_clip
from factory import build
from symbiotic.data.errors import DataError
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.assets import ASSETS
from symbiotic.evaluation.benchmark import MissingAsset, Value, measuring
from symbiotic.evaluation.clip_score import CLIPScore, clip_files, load_clip
from symbiotic.evaluation.context import Context
from symbiotic.schema import ConfigError, Objective, Sampler

CPU = torch.device("cpu")


@pytest.fixture
def here(corpus: Path, tmp_path: Path) -> Context:
    tokenizer, objective = Tokenizer.load(corpus / "tokenizer.json"), Objective(sampler=Sampler(steps=1))
    return Context(tokenizer, objective, batch_size=4, folder=tmp_path / "out")


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ASSETS, str(tmp_path / "assets"))
    return write_assets(tmp_path / "assets", images=6)


def measured(benchmark: CLIPScore, here: Context) -> dict[str, Value]:
    with measuring(build("symbiotic", vocab_size=512)) as model:
        return dict(benchmark.run(model, here))


def by_hand(folder: Path, images: list[Image.Image], captions: list[str]) -> np.ndarray:
    """What open_clip's own loader, preprocessing and tokenizer give."""
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    with torch.no_grad():
        x = model.eval().encode_image(torch.stack([preprocess(image) for image in images]))
        y = model.encode_text(tokens)
    return torch.nn.functional.cosine_similarity(x, y).numpy()


def test_it_is_open_clips_cosine(assets: Path, here: Context) -> None:
    scores = measured(CLIPScore(num_images=5), here)
    assert here.folder is not None
    (folder,) = (here.folder / "images").iterdir()
    images = [Image.open(path) for path in sorted(folder.iterdir())]
    assert [record["caption"] for record in here.records] == [str(image.info["prompt"]) for image in images]
    cosines = by_hand(assets / "clip", images, [record["caption"] for record in here.records])
    assert np.std(cosines) > 0.01
    assert [record["cosine"] for record in here.records] == pytest.approx(cosines, abs=1e-6)
    assert scores["clip_cosine"].value == pytest.approx(cosines.mean(), abs=1e-6)
    assert scores["clip_score"] == Value(100 * scores["clip_cosine"].value, 5)
    assert list(scores) == ["clip_score", "clip_cosine"]


def test_a_negative_score_is_not_clipped(assets: Path, here: Context) -> None:
    before = measured(CLIPScore(), here)["clip_cosine"].value
    state = load_file(assets / "clip" / "open_clip_model.safetensors")
    state["text_projection"] *= -1
    save_file(state, assets / "clip" / "open_clip_model.safetensors")
    here.folder, here.records = None, []
    assert measured(CLIPScore(), here)["clip_cosine"].value == pytest.approx(-before, abs=1e-6)
    assert before != 0


def test_a_caption_that_is_too_long_is_named_and_the_rest_scored(assets: Path, here: Context, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("red 7\n" + "red " * (here.caption_tokens + 1) + "\nblue 1\n")
    assert measured(CLIPScore(str(path)), here)["clip_score"].n == 2
    assert [(record["id"], record["caption"]) for record in here.records] == [("1", "red 7"), ("3", "blue 1")]
    tokens = f"{here.caption_tokens + 1} tokens; evaluation.caption_tokens={here.caption_tokens}"
    assert here.problems == [f"some.txt: item 2: a caption of {tokens}"]


def test_the_protocol_names_the_model_and_changes_with_every_file(assets: Path) -> None:
    before = CLIPScore().protocol()
    assert str(before["model"]).startswith("open_clip_config.json ")
    assert {"open_clip_torch", "torchvision"} <= set(before)
    assert (before["images"], CLIPScore(num_images=4).protocol()["images"]) == (6, 4)
    config = clip_config()
    config["model_cfg"]["quick_gelu"] = False
    (assets / "clip" / "open_clip_config.json").write_text(json.dumps(config))
    assert CLIPScore().protocol()["model"] != before["model"]
    save_file(random_clip(5), assets / "clip" / "open_clip_model.safetensors")
    assert CLIPScore().protocol()["weights"] != before["weights"]
    (assets / "coco" / "captions_val2014.json").write_text('["x"]')
    assert CLIPScore().protocol()["captions"] != before["captions"]
    (assets / "clip" / "open_clip_config.json").unlink()
    assert CLIPScore().protocol()["model"] == "ViT-B-32-quickgelu"
    assert CLIPScore(architecture="ViT-B-16").protocol()["model"] == "ViT-B-16"


def test_a_missing_file_is_said(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (assets / "clip" / "open_clip_model.safetensors").unlink()
    with pytest.raises(
        MissingAsset, match=r"\$SYMBIOTIC_ASSETS/clip/open_clip_model\.safetensors.*clip_score\.weights"
    ):
        CLIPScore().protocol()
    monkeypatch.delenv(ASSETS)
    with pytest.raises(
        MissingAsset, match=r"captions_val2014\.json.*SYMBIOTIC_ASSETS is not set.*clip_score\.captions"
    ):
        CLIPScore().protocol()
    with pytest.raises(ConfigError, match=r"benchmarks\.clip_score\.num_images=0: must be a whole number, at least 1"):
        CLIPScore(num_images=0)


def test_a_folder_or_a_file_with_a_name(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", 0)
    file = folder / "open_clip_model.safetensors"
    assert clip_files(folder, None, "x") == clip_files(file, None, "x") == (f"local-dir:{folder}", file)
    assert clip_files(folder, "ViT-B-32", "x") == ("ViT-B-32", file)
    (folder / "open_clip_config.json").unlink()
    assert clip_files(folder, None, "x") == ("x", file)
    file.unlink()
    with pytest.raises(DataError, match=r"clip: no open_clip_model\.safetensors or"):
        clip_files(folder, None, "x")
    with pytest.raises(DataError, match="must be a name in open_clip"):
        clip_files(folder, "hf-hub:some/model", "x")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("bytes", r"open_clip_model\.safetensors: not weights of local-dir:"),
        ("another", r"open_clip_model\.safetensors: not weights of local-dir:.*Missing key"),
        ("shape", r"open_clip_model\.safetensors: not weights of local-dir:.*size mismatch"),
        ("config", "local-dir:.*: not a model that open_clip builds offline"),
        ("download", "local-dir:.*: not a model that open_clip builds offline"),
    ],
)
def test_files_that_are_not_of_the_model(tmp_path: Path, damage: str, message: str) -> None:
    folder = write_clip(tmp_path / "clip", 0)
    file, config = folder / "open_clip_model.safetensors", clip_config()
    if damage == "bytes":
        file.write_bytes(b"\x00" * 50)
    elif damage == "another":
        save_file({"weight": torch.zeros(2)}, file)
    elif damage == "shape":
        config["model_cfg"]["embed_dim"] = 16
    elif damage == "download":
        config["model_cfg"]["text_cfg"] = {"hf_model_name": "some/model", "hf_tokenizer_name": "some/model"}
    (folder / "open_clip_config.json").write_text("{" if damage == "config" else json.dumps(config))
    with pytest.raises(DataError, match=message) as error:
        load_clip(clip_files(folder, None, "x"), CPU)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_weights_that_would_run_code_or_must_be_converted_are_refused(tmp_path: Path) -> None:
    folder = write_clip(tmp_path / "clip", 0)
    torch.save({"state_dict": random_clip(0), "run": tmp_path.joinpath}, tmp_path / "code.pt")
    with pytest.raises(DataError, match=r"code\.pt: not weights of local-dir"):
        load_clip(clip_files(tmp_path / "code.pt", None, f"local-dir:{folder}"), CPU)
    traced = torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
    traced.save(tmp_path / "ViT-B-32.pt")
    with pytest.raises(DataError, match="a TorchScript archive must be saved as safetensors first"):
        load_clip(clip_files(tmp_path / "ViT-B-32.pt", None, f"local-dir:{folder}"), CPU)


def test_a_long_caption_is_cut(tmp_path: Path) -> None:
    clip = load_clip(clip_files(write_clip(tmp_path / "clip", 0), None, "x"), CPU)
    image = np.zeros((20, 20, 3), np.uint8)
    words = [f"word{i}" for i in range(60)]
    long, cut = clip.cosines([image, image], [" ".join(words), " ".join(words[:40])])
    assert long == pytest.approx(cut, abs=1e-6)
