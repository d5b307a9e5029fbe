"""Where a run runs: keys of the Trainer, ranks and who starts them, and what sharded parameters do not go with.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from symbiotic.checks.rules import plain, require
from symbiotic.layout import pool_sizes
from symbiotic.ranks import Ranks, started
from symbiotic.schema import Config, ConfigError, near_miss

_TRAINER = """
    accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs
    max_steps min_steps max_time limit_train_batches limit_val_batches limit_test_batches limit_predict_batches
    overfit_batches val_check_interval check_val_every_n_epoch num_sanity_val_steps log_every_n_steps
    enable_checkpointing enable_progress_bar enable_model_summary accumulate_grad_batches gradient_clip_val
    gradient_clip_algorithm deterministic benchmark inference_mode use_distributed_sampler profiler
    detect_anomaly barebones plugins sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir
    enable_autolog_hparams model_registry
"""
TRAINER_KEYS = frozenset(_TRAINER.split())
"""Arguments of lightning.Trainer; a test holds them against its signature."""

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps", "tpu")
PRECISIONS = (
    *("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true"),
    *("32", "16", "bf16", "64", "transformer-engine", "transformer-engine-float16"),
)
"""Words of lightning.Trainer; a test holds both against its source."""

_BY_RUN = ("plugins", "use_distributed_sampler", "num_sanity_val_steps", "limit_val_batches", "enable_model_summary",
           "enable_checkpointing", "reload_dataloaders_every_n_epochs", "barebones")  # fmt: skip
_LENGTH = (
    "max_epochs",
    "min_epochs",
    "min_steps",
    "max_time",
    "limit_train_batches",
    "overfit_batches",
    "fast_dev_run",
)
TRAINER_SET_BY = {
    "max_steps": "phases.steps",
    **dict.fromkeys(_LENGTH, "phases.steps"),
    "accumulate_grad_batches": "data.micro_batches and trainer.devices",
    "gradient_clip_val": "rates.clip",
    "callbacks": "the group callbacks",
    "logger": "the group logger",
    "default_root_dir": "paths.runs",
    "log_every_n_steps": "log_every",
    "enable_progress_bar": "callbacks.progress",
    **dict.fromkeys(_BY_RUN, "the way a run works"),
}
"""Arguments of lightning.Trainer that follow from other keys."""

SHARDED = "model_parallel"
"""The strategy under which parameters are sharded."""
_OWN = ("expert_parallel",)
_EXPERTS = "trainer.expert_parallel"


def num_ranks(trainer: Mapping[str, Any]) -> int:
    """Processes that train together."""
    counts = [trainer.get(name, 1) for name in ("devices", "num_nodes")]
    return counts[0] * counts[1] if all(isinstance(count, int) for count in counts) else 1


def check_trainer(config: Config) -> None:
    """Raises ConfigError."""
    trainer = config.trainer
    for name in trainer:
        if name not in TRAINER_KEYS and name not in _OWN:
            raise ConfigError(f"trainer.{name}: no argument of lightning.Trainer; {near_miss(name, TRAINER_KEYS)}")
    for name, owner in TRAINER_SET_BY.items():
        if name in trainer:
            raise ConfigError(f"trainer.{name}={plain(trainer[name])}: must not be set; it follows from {owner}")
    check_words(trainer)
    for name in ("devices", "num_nodes", *_OWN):
        count = trainer.get(name, 1)
        whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        require(whole, f"trainer.{name}", count, "must be a whole number, at least 1")
    ranks, sharded = num_ranks(trainer), trainer.get("strategy") == SHARDED
    _started(config, ranks, started())
    right = f"must be a multiple of the {ranks} devices that share a step; set data.micro_batches={ranks}"
    require(config.data.micro_batches % ranks == 0, "data.micro_batches", config.data.micro_batches, right)
    if sharded:
        _sharded(config)
    _experts(config, ranks, sharded)


def check_words(trainer: Mapping[str, Any]) -> None:
    """Raises ConfigError: an accelerator or a precision that Lightning does not know."""
    for name, words in (("accelerator", ACCELERATORS), ("precision", PRECISIONS)):
        value = trainer.get(name)
        if value is not None and not isinstance(value, Mapping) and str(value) not in words:
            raise ConfigError(f"trainer.{name}={plain(value)}: must be one of {', '.join(words)}")


def _started(config: Config, ranks: int, by: Ranks | None) -> None:
    """Several ranks are forked by this process, or started by torchrun or srun; just as many as are wanted."""
    name = str(config.trainer.get("strategy", "auto"))
    if by is not None:
        require(by.size % by.nodes == 0, f"{by.by}", by.size, f"must be as many processes on each of {by.nodes} nodes")
        if ranks != by.size:
            key = f"trainer.devices={plain(config.trainer.get('devices', 1))}"
            raise ConfigError(f"{key}: {by.by} started {by.size} processes; take trainer=fsdp or trainer=ddp")
        right = f"must be ddp, ddp_fork or {SHARDED} for the processes of {by.by}"
        require(name in ("ddp", "ddp_fork", SHARDED), "trainer.strategy", name, right)
    elif ranks > 1 and name == SHARDED:
        start = f"torchrun --nproc-per-node {ranks} src/train.py"
        raise ConfigError(
            f"trainer.devices={ranks}: sharded over processes that nothing started; must be run by {start}"
        )
    elif ranks > 1 and "fork" not in name:
        right = "must be ddp_fork with several devices: strategies that run the script again would start the arc twice"
        raise ConfigError(f"trainer.strategy={name}: {right}")


def _sharded(config: Config) -> None:
    precision = str(config.trainer.get("precision"))
    right = f"must be 32-true or bf16-mixed with trainer.strategy={SHARDED}"
    require(precision in ("32-true", "bf16-mixed"), "trainer.precision", precision, right)
    method = config.surgery.method
    require(
        method == "none", "surgery.method", method, "takes whole gradients, and trainer=fsdp shards them; must be none"
    )
    action = (config.callbacks.get("collapse_alarm") or {}).get("action")
    right = "copies experts, and trainer=fsdp shards them; must be another action"
    require(action != "revive", "callbacks.collapse_alarm.action", action, right)


def _experts(config: Config, ranks: int, sharded: bool) -> None:
    """Experts are shared out evenly, and cut evenly along their second axis over the other ranks."""
    size = config.trainer.get("expert_parallel", 1)
    if size == 1:
        return
    require(sharded, _EXPERTS, size, "needs trainer=fsdp")
    require(ranks % size == 0, _EXPERTS, size, f"must divide the {ranks} ranks")
    require(bool(config.system.pools), _EXPERTS, size, f"system={config.system.name} has no routed experts")
    for pool, experts in pool_sizes(config.model, config.system).items():
        right = f"must divide the experts of every pool, and {pool} has {experts}"
        require(experts % size == 0, _EXPERTS, size, right)
    cut = {"model.width": config.model.width, "lora.rank": config.lora.rank}
    for key, value in cut.items():
        right = f"must be a multiple of the {ranks // size} ranks that each expert is cut over"
        require(value % (ranks // size) == 0, key, value, right)
