"""Whole runs with an image tower inside the model: trained or frozen, opened again, from data to scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from symbiotic import arc
from symbiotic.callbacks.checkpoint import checkpoint_path
from symbiotic.config import compose
from symbiotic.runs import load_state, read_json
from symbiotic.schema import Config, EvalConfig
from symbiotic.studies.benchmarks import make_suite
from symbiotic.trained import open_run
from towers import TOWER, clip_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tower") / "clip"
    clip_folder(path, TOWER)
    return path


def run(shared: Path, runs: Path, folder: Path, *more: str) -> Config:
    paths = [f"paths.runs={runs}", f"paths.data={shared / 'data'}", f"paths.cache={shared / 'cache'}"]
    few = ["phases=none", "phases.steps=4", "evaluation.every=0", "logger.tensorboard=null"]
    config = compose(["experiment=smoke", "vision=tower", f"model.vision.path={folder}", *few, *paths, *more])
    arc.run(config)
    return config


def tower(config: Config, file: str) -> dict[str, Tensor]:
    state = load_state(Path(config.run_dir) / file)
    return {name: tensor for name, tensor in state.items() if name.startswith("vision.")}


def roles(config: Config) -> set[str]:
    path = checkpoint_path(Path(config.run_dir) / "checkpoints", 4)
    groups = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    return {group["role"] for group in groups}


def test_trained_it_moves_and_frozen_it_stays(shared_tmp: Path, tmp_path: Path, folder: Path) -> None:
    trained = run(shared_tmp, tmp_path, folder)
    frozen = run(shared_tmp, tmp_path, folder, "model.vision.trained=false")
    before, after = tower(trained, "init.safetensors"), tower(trained, "model.safetensors")
    assert before.keys() == after.keys() != set()
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    stayed = tower(frozen, "model.safetensors")
    assert all(torch.equal(before[name], stayed[name]) for name in before)
    assert (roles(trained) - roles(frozen), roles(frozen) - roles(trained)) == ({"vision"}, set())
    summaries = [read_json(Path(config.run_dir) / "summary.json") for config in (trained, frozen)]
    assert summaries[0]["parent"] == summaries[1]["parent"]  # stage 0 leaves the tower as it was published
    opened = open_run(trained.run_dir)
    suite = make_suite(EvalConfig(evaluation=trained.evaluation), opened)  # of src/eval.py: images by its preprocessing
    assert suite.run(opened.model, only=["reading"])["reading"] == summaries[0]["scores"]["reading"]
