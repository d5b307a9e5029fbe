"""The scorers: cached, trained by one process at a time, and by another one when that one dies."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from symbiotic.data.errors import DataError
from symbiotic.evaluation import scorers
from symbiotic.evaluation.scorer_networks import CONTEXT, VALUES, clip_text
from symbiotic.evaluation.scorer_training import augment, render_corpus
from symbiotic.evaluation.scorers import Cache, Scorers, launch_scorers, load_scorers, main


@pytest.fixture
def fresh(corpus: Path, tmp_path: Path) -> Path:
    """The corpus folder, as far as the scorers read it, without a cache."""
    for name in ("recipe.json", "tokenizer.json"):
        shutil.copy(corpus / name, tmp_path / name)
    return tmp_path


def fill(cache: Cache, corpus: Path) -> None:
    shutil.copytree(Cache(corpus, "tiny").weights.parent, cache.weights.parent)


def test_the_judges_of_one_corpus(tiny_scorers: Scorers) -> None:
    images = render_corpus(1, 5).images[0]
    with torch.no_grad():
        seen = tiny_scorers.attributes(images)
        features = tiny_scorers.features(images)
        cosines = tiny_scorers.cosines(images[:7], ["red 7 on gray bar left"] * 7)
        alone = tiny_scorers.features(images[3:4])
    assert all(value in VALUES[i] for row in seen for i, value in enumerate(row))
    assert features.shape == (960, 32)
    assert abs(features[3] - alone[0]).max() < 1e-5, "a picture is judged by its batch"
    assert len(cosines) == 7
    assert all(-1 <= c <= 1 for c in cosines)
    assert set(tiny_scorers.accuracy) >= {"classifier", "clip_retrieval", "seconds"}
    assert not any(p.requires_grad for p in tiny_scorers.clip.parameters())


def test_a_second_load_reads_the_cache(corpus: Path, tiny_scorers: Scorers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(scorers, "train")
    again = load_scorers(corpus, "tiny")
    assert again.accuracy == tiny_scorers.accuracy
    for one, other in ((again.classifier, tiny_scorers.classifier), (again.clip, tiny_scorers.clip)):
        for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert launch_scorers(corpus, "tiny") is None


def test_damaged_weights_are_not_loaded(fresh: Path, corpus: Path, tiny_scorers: Scorers) -> None:
    cache = Cache(fresh, "tiny")
    fill(cache, corpus)
    assert cache.load() is not None
    content = bytearray(cache.weights.read_bytes())
    content[-5] ^= 1
    cache.weights.write_bytes(content)
    assert cache.load() is None
    cache.facts.write_text("{}")
    assert cache.load() is None
    cache.facts.unlink()
    assert cache.load() is None


def test_the_preset_and_the_recipe_are_in_the_key(fresh: Path) -> None:
    tiny, default = Cache(fresh, "tiny").weights, Cache(fresh, "default").weights
    recipe = json.loads((fresh / "recipe.json").read_text())
    (fresh / "recipe.json").write_text(json.dumps({**recipe, "seed": 9}))
    assert len({tiny, default, Cache(fresh, "tiny").weights}) == 3
    with pytest.raises(DataError, match="preset 'big' is none of default, tiny"):
        Cache(fresh, "big")


def test_a_live_owner_is_named_when_it_takes_too_long(fresh: Path) -> None:
    cache = Cache(fresh, "tiny")
    cache.weights.parent.mkdir()
    with (
        scorers._locked(cache.lock, 0),
        pytest.raises(DataError, match=f"process {os.getpid()} on .* over 0 s"),
    ):
        load_scorers(fresh, "tiny", timeout=0.2)


def test_a_killed_trainer_is_replaced_at_once(fresh: Path) -> None:
    cache = Cache(fresh, "tiny")
    process = launch_scorers(fresh, "tiny")
    assert process is not None
    end = time.monotonic() + 60
    while not (cache.lock.is_file() and cache.lock.stat().st_size) and process.poll() is None:
        assert time.monotonic() < end, "no training within a minute"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, cache.log.read_text()
    assert not cache.is_there(), "the process was done before it was killed"
    assert load_scorers(fresh, "tiny", timeout=1).accuracy["seconds"] > 0


def test_two_processes_train_once(fresh: Path) -> None:
    one = launch_scorers(fresh, "tiny")
    assert one is not None
    mine = load_scorers(fresh, "tiny")  # waits for the other one, or is faster and lets it wait
    assert one.wait(120) == 0, Cache(fresh, "tiny").log.read_text()
    assert json.loads(Cache(fresh, "tiny").log.read_text()) == mine.accuracy
    assert sorted(p.suffix for p in Cache(fresh, "tiny").weights.parent.iterdir()) == [
        ".json",
        ".lock",
        ".log",
        ".safetensors",
    ]


def test_training_leaves_the_random_state(fresh: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        load_scorers(fresh, "tiny")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_without_a_corpus_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none")]) == 2
    message = capsys.readouterr().err
    assert "recipe.json" in message
    assert message.count("\n") == 1


def test_augmentation_is_mild_and_by_seed() -> None:
    x = torch.rand(64, 3, 20, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a, b = (augment(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.abs().max() <= 1
    assert 0.05 < (a - x).abs().mean() < 0.5


def test_clip_text_ends_with_the_end_token(tiny_scorers: Scorers) -> None:
    rows = clip_text(["red 7", " ".join(["red"] * 50)], tiny_scorers.tokenizer)
    assert rows[0].tolist() == [1, *tiny_scorers.tokenizer.encode("red 7"), 2, *[0] * (CONTEXT - 4)]
    assert rows[1, -1] == 2
    assert rows.shape == (2, CONTEXT)


@pytest.mark.slow
def test_the_default_scorers_are_good(fresh: Path) -> None:
    accuracy = load_scorers(fresh).accuracy
    assert accuracy["classifier"] > 0.98
    assert accuracy["classifier_augmented"] > 0.97
    assert accuracy["clip_retrieval"] > 0.9
    assert accuracy["clip_cosine_right"] > accuracy["clip_cosine_wrong"] + 0.4
