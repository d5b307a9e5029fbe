"""Runs that generate by image codes: they train, resume, keep what they draw with, and refuse what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from symbiotic import arc
from symbiotic.callbacks.csv_log import read_rows
from symbiotic.config import compose, compose_evaluation
from symbiotic.evaluation.benchmark import measuring
from symbiotic.evaluation.prompts import pictures
from symbiotic.runs import load_state
from symbiotic.schema import Config, ConfigError
from symbiotic.studies.benchmarks import make_suite
from symbiotic.studies.evaluate import open_session
from symbiotic.studies.generate import Request, generate
from symbiotic.trained import open_run

STEPS = ("phases.steps=8", "save_every=4", "log_every=2", "logger.tensorboard=null")
SMOKE = ("experiment=smoke", "objective=autoregressive_smoke", "evaluation.every=0", "evaluation.images=4", *STEPS)


def configured(shared: Path, runs: Path, *more: str) -> Config:
    paths = [f"paths.runs={runs}", f"paths.data={shared / 'data'}", f"paths.cache={shared / 'cache'}"]
    return compose([*SMOKE, *paths, *more])


@pytest.fixture(scope="module")
def run(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = configured(shared_tmp, tmp_path_factory.mktemp("codes"))
    arc.run(config)
    return config


def test_losses_and_scores_have_the_names_of_the_objective(run: Config) -> None:
    folder = Path(run.run_dir)
    rows = read_rows(folder / "metrics.csv")
    assert all(float(row["train/image_ce"]) > 0 for row in rows if row.get("train/image_ce"))
    assert not any("train/flow" in row for row in rows)
    scores = [json.loads(line)["scores"] for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [{"image_ce", "embedded_acc"} <= set(found) and "flow_error" not in found for found in scores] == [True] * 2
    assert scores[1]["image_ce"] < scores[0]["image_ce"], "eight steps teach how often codes occur"


def test_a_resumed_run_ends_with_the_same_bits(run: Config, tmp_path: Path) -> None:
    folder = Path(run.run_dir)
    kept = shutil.copytree(folder, tmp_path / "kept")
    for name in ("model.safetensors", "summary.json", "checkpoints/step=000008.ckpt"):
        (folder / name).unlink()
    arc.run(run)
    first, again = load_state(kept / "model.safetensors"), load_state(folder / "model.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (kept / "scores.jsonl").read_bytes() == (folder / "scores.jsonl").read_bytes()


def test_a_run_draws_without_corpus_and_cache(run: Config, tmp_path: Path) -> None:
    opened = open_run(run.run_dir)
    alone = shutil.copytree(run.run_dir, tmp_path / "alone")
    elsewhere = (alone / "config.yaml").read_text().replace(run.paths.data, str(tmp_path / "gone"))
    (alone / "config.yaml").write_text(elsewhere)
    drawn = []
    for trained in (opened, open_run(alone)):
        with measuring(trained.model):
            size = trained.size
            objective = trained.config.objective
            drawn.append(pictures(trained.model, ["red 7", "blue 1"], trained.tokenizer, objective, size=size, seed=3))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (2, *opened.size, 3)


def test_the_generate_command_takes_the_keys_of_codes_and_no_others(run: Config, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"run": run.run_dir, "prompt": "red 7", "n": 1}
    generate(Request(**asked, temperature=0.5, top_k=3, top_p=0.9, out=str(tmp_path / "drawn")))
    (row,) = (json.loads(line) for line in (tmp_path / "drawn" / "images.jsonl").read_text().splitlines())
    assert row["sampler"] == "code by code, temperature 0.5, top-k 3, top-p 0.9"
    with pytest.raises(ConfigError, match=r"^steps=4: has no effect: the run's objective is autoregressive$"):
        generate(Request(**asked, steps=4))


def test_an_evaluation_takes_the_keys_of_codes_and_no_others(run: Config) -> None:
    opened = open_run(run.run_dir)
    asked = compose_evaluation([f"run={run.run_dir}", "evaluation=smoke", "sampler.top_k=3"])
    assert make_suite(asked, opened).objective.sampler.top_k == 3
    session = open_session(asked, Path(run.run_dir), lambda line: None)
    assert opened.tokenizer.images is not None
    assert session.identity["image_tokenizer"] == opened.tokenizer.images.fingerprint  # which decides its scores
    asked = compose_evaluation([f"run={run.run_dir}", "evaluation=smoke", "sampler.steps=3"])
    with pytest.raises(ConfigError, match=r"^sampler.steps=3: has no effect: the run's objective is autoregressive$"):
        make_suite(asked, opened)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("objective.image_tokenizer._target_=os.system", r"objective.image_tokenizer._target_=os.system: not allowed"),
        ("objective.codebook_size=1", r"objective.codebook_size=1: must be at least 2, the codes of objective.image_t"),
        (
            "objective.image_tokenizer=null",
            r"objective.image_tokenizer=null: objective=autoregressive needs",
        ),
        ("+objective.flow_weight=2", r"objective.flow_weight=2: has no effect: objective=autoregressive has no flow"),
        ("objective.sampler.top_p=0", r"objective.sampler.top_p=0.0: must lie in \(0, 1\]"),
        (
            "+objective.sampler.steps=3",
            r"objective.sampler.steps=3: has no effect: objective=autoregressive has no",
        ),
    ],
)
def test_wrong_keys_are_one_line(shared_tmp: Path, tmp_path: Path, given: str, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        configured(shared_tmp, tmp_path, given)


def test_codes_without_their_objective_have_no_effect(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"objective.sampler.top_k=3: has no effect: objective=flow makes no image"):
        compose(["experiment=smoke", "+objective.sampler.top_k=3", f"paths.runs={tmp_path}"])


def test_a_tokenizer_with_other_codes_or_patches_is_refused(shared_tmp: Path, tmp_path: Path) -> None:
    other = configured(shared_tmp, tmp_path, "objective.image_tokenizer.codebook_size=24")
    with pytest.raises(ConfigError, match=r"^objective.codebook_size=16: must be 24, the codes of the image token"):
        arc.run(other)
    coarse = configured(shared_tmp, tmp_path, "+objective.image_tokenizer.patch=2")
    with pytest.raises(ConfigError, match=r"one code stands for 2 x 2 pixels, a patch of the corpus is 4 x 4$"):
        arc.run(coarse)


@pytest.mark.parametrize("system", ["utamoe", "bagel", "dense"])
def test_other_systems_train_on_codes(shared_tmp: Path, tmp_path: Path, system: str) -> None:
    config = configured(shared_tmp, tmp_path, f"system={system}", "phases=none", "phases.steps=2")
    arc.run(config)
    assert "image_ce" in json.loads((Path(config.run_dir) / "scores.jsonl").read_text().splitlines()[-1])["scores"]
