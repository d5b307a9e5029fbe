"""One Lightning fit that resumes: stage 0 and joint training both go through here."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from symbiotic.callbacks.checkpoint import (
    AtomicCheckpointIO,
    CheckpointError,
    StepCheckpoint,
    committed,
    newest_valid,
    step_of,
)
from symbiotic.callbacks.events import rewind_events
from symbiotic.callbacks.stop_at_step import StopAtStep
from symbiotic.callbacks.stream_state import StreamState
from symbiotic.checks.trainer import SHARDED, num_ranks
from symbiotic.claim import serve
from symbiotic.config import instantiate
from symbiotic.data.loader import MicroBatches, MicroBatchSampler, loader_options, train_loader
from symbiotic.data.stream_plan import StreamLoader, StreamPlan
from symbiotic.files import manifest_of, read_manifest, sweep
from symbiotic.module import SymbioticModule
from symbiotic.ranks import started
from symbiotic.schema import Config, ConfigError, RunError
from symbiotic.stop import Stopped, handled
from symbiotic.strategy import ShardedStrategy
from symbiotic.team import agree


def make_loader(
    config: Config, dataset: MicroBatches, rank: int, world: int, start_step: int
) -> DataLoader | StreamLoader:
    data = config.data
    if isinstance(dataset.plan, StreamPlan):
        sampler = MicroBatchSampler(config.phases.steps, start_step, data.micro_batches, rank, world)
        return StreamLoader(dataset, dataset.plan, loader_options(sampler, data.num_workers, serve))
    return train_loader(
        dataset,
        config.phases.steps,
        start_step,
        data.micro_batches,
        data.num_workers,
        rank=rank,
        world=world,
        worker_init=serve,
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
    ".*module(s) in eval mode at the start.*": "a vision tower stays in evaluation mode",
    ".*`srun` command is available.*": "who starts several processes, and how, is looked up by ourselves",
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


def make_trainer(
    config: Config,
    folder: Path,
    callbacks: list[Any],
    loggers: list[Any],
    about: Mapping[str, str] | None = None,
) -> Any:
    """A Lightning Trainer by steps: `config.trainer` says where it runs, the rest follows from the config.

    about: see `AtomicCheckpointIO`.

    Raises:
        ConfigError: this machine cannot run it, for one because it has no such accelerator.
    """
    import lightning
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    quieten(tables=bool(config.trainer.get("profiler")))
    ranks = num_ranks(config.trainer)
    saving = StepCheckpoint(str(folder / "checkpoints"), config.save_every)
    arguments: dict[str, Any] = {
        "default_root_dir": str(folder),
        "max_steps": config.phases.steps,
        "max_epochs": -1,
        "accumulate_grad_batches": max(1, config.data.micro_batches // max(1, ranks)),
        "callbacks": [*callbacks, saving],
        "logger": loggers or False,
        "plugins": [AtomicCheckpointIO(about), cluster()],
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 0,
    }
    chosen = {key: value for key, value in config.trainer.items() if key != "expert_parallel"}
    arguments["strategy"] = strategy(config.trainer, ranks)
    try:
        return lightning.Trainer(**(chosen | arguments))
    except (MisconfigurationException, ValueError) as error:
        keys = " ".join(f"trainer.{name}={chosen.get(name)}" for name in ("accelerator", "strategy", "precision"))
        raise ConfigError(f"{keys}: {str(error).splitlines()[0]} Another trainer: e.g. trainer=cpu") from error


def strategy(trainer: Mapping[str, Any], ranks: int) -> Any:
    """What the Trainer gets: ranks that something else started are not forked, and shard as `ShardedStrategy` does."""
    name = trainer.get("strategy", "auto")
    if name == SHARDED:
        return ShardedStrategy(ranks, trainer.get("expert_parallel", 1))
    return "ddp" if name == "ddp_fork" and started() is not None else name


def cluster() -> Any:
    """Who started the processes. Lightning would look itself, and take a script that SLURM runs for many of them."""
    from lightning.pytorch.plugins.environments import (
        LightningEnvironment,
        SLURMEnvironment,
        TorchElasticEnvironment,
    )

    ranks = started()
    if ranks is None:
        return LightningEnvironment()
    return TorchElasticEnvironment() if ranks.by == "torchrun" else SLURMEnvironment(auto_requeue=False)


def start_of(folder: Path, about: Mapping[str, str], earlier: Collection[str]) -> Path | None:
    """The checkpoint that a fit goes on from. Later ones are damaged: what says that they are complete is taken away.

    Raises:
        RunError: it is another run's, which was copied here.
    """
    found = newest_valid(folder)
    step = step_of(found) if found is not None else -1
    for damaged in (path for path in committed(folder) if step_of(path) > step):
        manifest_of(damaged).unlink(missing_ok=True)  # another rank may have done it
    manifest = read_manifest(found) if found is not None else {}
    for key in ("settings", "data"):
        has, wanted = manifest.get(key), about.get(key)
        if None not in (has, wanted) and has != wanted and has not in earlier:
            way = "remove it, to go on from the one before it"
            raise RunError(f"{found}: another run's checkpoint: its {key} are {has}, this run's {wanted}; {way}")
    return found


def fit(
    config: Config,
    folder: Path,
    dataset: MicroBatches,
    callbacks: list[Any],
    loggers: list[Any],
    state: Mapping[str, Tensor] | None = None,
    latents: bool = True,
    about: Mapping[str, str] | None = None,
    earlier: Collection[str] = (),
) -> SymbioticModule:
    """Train to the last step, from the newest valid checkpoint in `folder` or from `state`; returns the module.

    about: what the manifests of checkpoints say of the run: of its `settings` and `data`, by which its checkpoints are
        told from another run's. earlier: hashes of both from before changes that are on record.

    Raises:
        RunError: a checkpoint could not be written or read, or is another run's.
        Stopped: a signal ended it between two steps; the checkpoint of the last one is there for the next start.
    """
    module = make_module(config, dataset, state, latents)
    stop = StopAtStep()
    streams = [StreamState(dataset.plan, folder)] if isinstance(dataset.plan, StreamPlan) else []
    trainer = make_trainer(config, folder, [*callbacks, *streams, stop], loggers, about)
    resume = agree(lambda: beginning(folder, about or {}, earlier))
    if "fork" in str(config.trainer.get("strategy", "")):
        module.configure_model()  # the ranks end with their processes; Lightning brings their weights back into this

    def ask(number: int) -> None:
        again, launcher = bool(stop.number), trainer.strategy.launcher
        if launcher is not None:  # this process only waits for the ranks
            launcher.kill(signal.SIGKILL if again else number)
        stop.ask(number)

    try:
        with handled(ask):
            trainer.fit(module, ckpt_path=resume)
    except CheckpointError as error:
        raise RunError(str(error)) from error
    reached = max(map(step_of, committed(folder / "checkpoints")), default=0)
    if stop.number or reached < config.phases.steps:  # a rank may have been asked without this process
        raise Stopped(stop.number or signal.SIGTERM)
    return module


def beginning(folder: Path, about: Mapping[str, str], earlier: Collection[str]) -> str | None:
    """The checkpoint that a fit goes on from; what was half written, or happened behind it, is cleared away."""
    sweep(folder)
    resume = start_of(folder / "checkpoints", about, earlier)
    rewind_events(folder, step_of(resume) if resume else 0)
    return str(resume) if resume else None
