"""One Lightning fit that resumes: stage 0 and joint training both go through here."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from symbiotic.callbacks.checkpoint import (
    AtomicCheckpointIO,
    CheckpointError,
    StepCheckpoint,
    newest_valid,
    step_of,
)
from symbiotic.callbacks.events import rewind_events
from symbiotic.config import instantiate
from symbiotic.data.loader import MicroBatches, train_loader
from symbiotic.module import SymbioticModule
from symbiotic.schema import Config, ConfigError, RunError


def make_loader(config: Config, dataset: MicroBatches, rank: int, world: int, start_step: int) -> DataLoader:
    data = config.data
    return train_loader(
        dataset, config.phases.steps, start_step, data.micro_batches, data.num_workers, rank=rank, world=world
    )


def make_module(
    config: Config, dataset: MicroBatches, state: Mapping[str, Tensor] | None, latents: bool
) -> SymbioticModule:
    """The module of a fit; on the CPU it is built here, so that forked ranks share its memory."""

    def optimizer(groups: list[dict[str, Any]]) -> Any:
        return instantiate(config.rates.optimizer, "rates.optimizer", params=groups)

    loader = partial(make_loader, config, dataset)
    return SymbioticModule(config, optimizer, loader, state, latents)


NOISE = {
    ".*treespec, LeafSpec.*": "inside Lightning, of torch's own pytree",
    ".*does not have many workers.*": "decoded samples are cached in memory",
    ".*Cannot dispatch to fused implementation.*": "norms keep float32 weights under mixed precision",
    ".*ended before the epoch ended.*": "training is by steps, and the sampler starts at the step of the checkpoint",
}
"""Warnings of Lightning that say nothing about a run of ours, and why."""


def quieten(tables: bool) -> None:
    """Leave Lightning's advice on hardware, cloud logging and epochs away; its other warnings stay.

    tables: keep what it logs, for the table of a profiler is among it.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.INFO if tables else logging.WARNING)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


def make_trainer(config: Config, folder: Path, callbacks: list[Any], loggers: list[Any]) -> Any:
    """A Lightning Trainer by steps: `config.trainer` says where it runs, the rest follows from the config.

    Raises:
        ConfigError: this machine cannot run it, for one because it has no such accelerator.
    """
    import lightning
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    quieten(tables=bool(config.trainer.get("profiler")))
    devices = config.trainer.get("devices", 1)
    ranks = (devices if isinstance(devices, int) else 1) * config.trainer.get("num_nodes", 1)
    checkpoints = StepCheckpoint(str(folder / "checkpoints"), config.save_every)
    arguments = {
        "default_root_dir": str(folder),
        "max_steps": config.phases.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": max(1, config.data.micro_batches // max(1, ranks)),
        "callbacks": [*callbacks, checkpoints],
        "logger": loggers or False,
        "plugins": [AtomicCheckpointIO()],
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 0,
    }
    try:
        return lightning.Trainer(**config.trainer, **arguments)
    except (MisconfigurationException, ValueError) as error:
        chosen = " ".join(
            f"trainer.{name}={config.trainer.get(name)}" for name in ("accelerator", "strategy", "precision")
        )
        raise ConfigError(f"{chosen}: {str(error).splitlines()[0]} Another trainer: e.g. trainer=cpu") from error


def fit(
    config: Config,
    folder: Path,
    dataset: MicroBatches,
    callbacks: list[Any],
    loggers: list[Any],
    state: Mapping[str, Tensor] | None = None,
    latents: bool = True,
) -> SymbioticModule:
    """Train to the last step, from the newest valid checkpoint in `folder` or from `state`; returns the module.

    Raises:
        RunError: a checkpoint could not be written or read.
        KeyboardInterrupt: Ctrl-C; what was saved is there for the next start.
    """
    module = make_module(config, dataset, state, latents)
    trainer = make_trainer(config, folder, callbacks, loggers)
    resume = newest_valid(folder / "checkpoints")
    rewind_events(folder, step_of(resume) if resume else 0)
    if "fork" in str(config.trainer.get("strategy", "")):
        module.configure_model()  # the ranks end with their processes; Lightning brings their weights back into this
    try:
        trainer.fit(module, ckpt_path=str(resume) if resume else None)
    except CheckpointError as error:
        raise RunError(str(error)) from error
    except SystemExit as error:  # what Lightning makes of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    return module
