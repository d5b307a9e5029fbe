"""HPSv2 by hand: its preprocessing, its cosine, its prompt lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image

from assets import PROMPTS, clip_config, random_clip, write_hps
from factory import build
from symbiotic.data.errors import DataError
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.assets import ASSETS
from symbiotic.evaluation.benchmark import MissingAsset, Value, measuring
from symbiotic.evaluation.context import Context
from symbiotic.evaluation.hps import HPSv2
from symbiotic.schema import ConfigError, Objective, Sampler

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ASSETS, str(tmp_path / "assets"))
    write_hps(tmp_path / "assets" / "hps")
    return tmp_path / "assets" / "hps"


def measured(
    benchmark: HPSv2, corpus: Path, folder: Path | None = None, **more: Any
) -> tuple[dict[str, Value], Context]:
    tokenizer, objective = Tokenizer.load(corpus / "tokenizer.json"), Objective(sampler=Sampler(steps=1))
    here = Context(tokenizer, objective, size=(12, 20), batch_size=2, folder=folder, **more)
    with measuring(build("symbiotic", vocab_size=512)) as model:
        return dict(benchmark.run(model, here)), here


def padded(image: Image.Image, side: int) -> torch.Tensor:
    """[3, side, side]: the longest side scaled, black on both sides of the other one, OpenAI's normalisation."""
    scale = side / max(image.size)
    small = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    pixels = torch.from_numpy(np.array(canvas)).float() / 255
    return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)


def test_by_hand(assets: Path, corpus: Path, tmp_path: Path) -> None:
    import open_clip

    scores, here = measured(HPSv2(), corpus, tmp_path / "out")
    model = CLIP(**clip_config()["model_cfg"]).eval()
    model.load_state_dict(random_clip(2))
    expected: dict[str, list[float]] = {}
    for name, prompts in PROMPTS.items():
        (folder,) = (tmp_path / "out" / "images").glob(f"{name}-*")
        pixels = torch.stack([padded(Image.open(path), 32) for path in sorted(folder.iterdir())])
        tokens = open_clip.tokenize(prompts, context_length=16)
        with torch.no_grad():
            cosines = torch.cosine_similarity(model.encode_image(pixels), model.encode_text(tokens))
        expected[name] = cosines.tolist()
    found = {name: [r["cosine"] for r in here.records if r["list"] == name] for name in PROMPTS}
    for name, cosines in expected.items():
        assert found[name] == pytest.approx(cosines, abs=2e-6)
        assert scores[f"hps_v2.1/{name}"] == Value(pytest.approx(np.mean(cosines), abs=2e-6), len(cosines))
    assert scores["hps_v2.1"] == Value(pytest.approx(np.mean(np.concatenate(list(expected.values()))), abs=2e-6), 5)
    assert list(scores) == ["hps_v2.1", "hps_v2.1/anime", "hps_v2.1/photo"]
    assert {record["benchmark"] for record in here.records} == {"hps_v2.1"}


def test_one_list_one_score_and_the_version_in_its_name(assets: Path, corpus: Path) -> None:
    prompts = str(assets / "benchmark" / "photo.json")
    checkpoint = str(assets / "HPS_v2.1_compressed.pt")
    scores, _ = measured(HPSv2("v2", checkpoint, prompts, num_images=2), corpus)
    assert list(scores) == ["hps_v2"]
    assert scores["hps_v2"].n == 2
    assert HPSv2("v2").name == "hps_v2"
    assert HPSv2().name == "hps_v2.1"
    with pytest.raises(ConfigError, match=r"hps_v2\.version=v3: must be v2 or v2\.1"):
        HPSv2("v3")


def test_a_cut_list_is_named_and_the_others_are_scored(assets: Path, corpus: Path) -> None:
    (assets / "benchmark" / "anime.json").write_text('["red 7", ')
    scores, here = measured(HPSv2(), corpus)
    assert scores["hps_v2.1"].n == 3
    assert [line for line in here.problems if "anime.json: not JSON" in line or "anime.json: not a JSON" in line]


def test_a_prompt_that_is_too_long_is_named_and_the_rest_scored(assets: Path, corpus: Path) -> None:
    scores, here = measured(HPSv2(), corpus, caption_tokens=3)
    assert scores["hps_v2.1"].n == 2  # of five, three with more than three words
    assert len(here.problems) == 3
    assert all(line.endswith("evaluation.caption_tokens=3") for line in here.problems)


def test_missing_and_damaged_files(assets: Path, corpus: Path) -> None:
    with pytest.raises(MissingAsset, match=r"hps/HPS_v2_compressed\.pt.*hps_v2\.checkpoint"):
        HPSv2("v2").protocol()
    torch.save(random_clip(0) | {"extra": torch.zeros(1)}, assets / "HPS_v2.1_compressed.pt")
    with pytest.raises(DataError, match=r"HPS_v2\.1_compressed\.pt: not weights of .*Unexpected key"):
        measured(HPSv2(), corpus)
    for path in (assets / "benchmark").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no list of prompts"):
        HPSv2().protocol()
    (assets / "benchmark").rmdir()
    with pytest.raises(MissingAsset, match=r"hps/benchmark.*hps_v2\.captions"):
        HPSv2().protocol()


def test_the_protocol_says_version_model_and_prompts(assets: Path) -> None:
    before = HPSv2().protocol()
    assert before["version"] == "v2.1"
    assert "open_clip_torch" in before
    assert before["images"] == {name: len(prompts) for name, prompts in PROMPTS.items()}
    assert set(before["captions"]) == set(PROMPTS)  # type: ignore[call-overload]
    assert HPSv2(architecture="ViT-H-14").protocol()["model"] == "ViT-H-14"
    torch.save({"state_dict": random_clip(7)}, assets / "HPS_v2.1_compressed.pt")
    assert HPSv2().protocol()["weights"] != before["weights"]
