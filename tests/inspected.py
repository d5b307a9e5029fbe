"""A run folder as training leaves it, but with untrained weights: for tests of what looks at finished runs."""

from __future__ import annotations

from pathlib import Path

from symbiotic.callbacks.checkpoint import AtomicCheckpointIO
from symbiotic.config import compose, instantiate, save_config
from symbiotic.models.unified import UnifiedModel
from symbiotic.runs import save_state
from symbiotic.schema import Config


def run_folder(shared: Path, folder: Path, *overrides: str) -> Config:
    """config.yaml, init.safetensors, model.safetensors and a checkpoint of step 10, with the smoke corpus in `shared`.

    The initial weights are larger than a training's, so that the experts differ.
    """
    paths = [f"paths.runs={folder / 'runs'}", f"paths.data={shared / 'data'}", f"paths.cache={shared / 'cache'}"]
    config = compose(["experiment=smoke", "model.init_std=0.2", *paths, f"run_dir={folder}", *overrides])
    instantiate(config.data.source, "data.source").prepare()
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    states = [UnifiedModel(config.model, config.system).initialise(seed).state_dict() for seed in range(3)]
    save_state(folder / "init.safetensors", states[0])
    save_state(folder / "model.safetensors", states[1])
    half = {"state_dict": {f"model.{name}": value for name, value in states[2].items()}}
    AtomicCheckpointIO().save_checkpoint(half, folder / "checkpoints" / "step=000010.ckpt")
    return config
