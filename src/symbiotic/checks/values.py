"""Rules that need several keys: whether a config that parses can also run, and whether all that was set matters.

Standard library only (the roles are pure text matching). `check` raises `ConfigError` with one line: key, value,
what would be right. Types, unknown and missing keys are `schema.parse`'s business.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from symbiotic.checks.callbacks import check_callbacks
from symbiotic.checks.evaluation import check_benchmarks
from symbiotic.checks.lora import check_lora
from symbiotic.checks.phases import check_phases
from symbiotic.checks.rules import at_least, check_weights, known, plain, positive, require, share
from symbiotic.checks.surgery import check_surgery
from symbiotic.checks.system import check_layout
from symbiotic.evaluation.names import METRICS
from symbiotic.layout import shared_scopes, trained_names
from symbiotic.schema import KINDS, Config, ConfigError, Mix, Objective, near_miss
from symbiotic.training.roles import assign_roles

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

_BY_RUN = ("plugins", "use_distributed_sampler", "num_sanity_val_steps", "limit_val_batches", "enable_model_summary")
TRAINER_SET_BY = {
    "max_steps": "phases.steps",
    "max_epochs": "phases.steps",
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


def check(config: Config) -> None:
    """All rules on values, cheapest first.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _run(config)
    check_layout(config.model, config.system)
    check_lora(config)
    check_callbacks(config)
    _rates(config)
    check_phases(config)
    _mix("mix", config.mix, config.data.sets)
    check_surgery(config)
    _objective(config)
    _init(config)
    _data(config)


# --------------------------------------------------------------------------- the run


def _run(config: Config) -> None:
    at_least(config, "", 0, "seed")
    at_least(config, "", 1, "threads log_every save_every probe_samples")
    require(config.threads <= 1024, "threads", config.threads, "must be at most 1024")
    require(config.seed < 2**32, "seed", config.seed, "must be below 2**32")
    require(bool(re.fullmatch(r"[\w.-]+", config.name)), "name", config.name, "must be one plain folder name")
    known("metric", [config.metric], METRICS, "score")
    for name in ("runs", "data", "cache"):
        require(bool(getattr(config.paths, name)), f"paths.{name}", "''", "must name a folder")
    for name in ("data", "cache"):
        ancestor = _existing(Path(getattr(config.paths, name)))
        require(ancestor.is_dir(), f"paths.{name}", getattr(config.paths, name), f"{ancestor} is a file, not a folder")
    _writable(config)


def _existing(path: Path) -> Path:
    """The nearest ancestor that exists, `path` itself included."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def _writable(config: Config) -> None:
    ancestor = _existing(Path(config.run_dir))
    if not ancestor.is_dir():
        raise ConfigError(f"paths.runs={config.paths.runs}: no run folder can be made: {ancestor} is a file")
    try:
        Path(tempfile.mkdtemp(prefix=".probe-", dir=ancestor)).rmdir()
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"paths.runs={config.paths.runs}: cannot write a run folder in {ancestor}: {why}") from None


# --------------------------------------------------------------------------- optimisation


def _rates(config: Config) -> None:
    rates = config.rates
    positive(rates, "rates.", "lr")
    at_least(rates, "rates.", 0, "warmup clip")
    share(rates, "rates.", "decay")
    known("rates.schedules", rates.schedules, rates.roles, "role")
    for role, own in rates.schedules.items():
        key = f"rates.schedules.{role}."
        require(own.warmup is None or own.warmup >= 0, f"{key}warmup", own.warmup, "must not be negative")
        require(own.decay is None or 0 <= own.decay <= 1, f"{key}decay", own.decay, "must lie in [0, 1]")
    known("rates.by_role", rates.by_role, rates.roles, "role")
    for role, rate in rates.by_role.items():
        ok = rate is None or 0 < rate < float("inf")
        require(ok, f"rates.by_role.{role}", rate, "must be positive, or null for rates.lr")
    require("lr" not in rates.optimizer, "rates.optimizer.lr", rates.optimizer.get("lr"), "set rates.lr in its place")
    for role, patterns in rates.roles.items():
        for pattern in patterns:
            _compiles(f"rates.roles.{role}", pattern)
    assign_roles(trained_names(config), rates.roles)


def _compiles(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}={pattern}: no regular expression: {error}") from None


def _mix(key: str, mix: Mix, sets: tuple[str, ...]) -> None:
    known(f"{key}.drop", mix.drop, mix.weights, f"set in {key}.weights")
    everything = set(mix.drop) >= {name for name, weight in mix.weights.items() if weight > 0}
    right = f"nothing is left of {key}.weights; some set must have a weight"
    require(not mix.drop or not everything, f"{key}.drop", mix.drop, right)
    check_weights(f"{key}.weights", mix.weights, mix.drop, sets)


def _objective(config: Config) -> None:
    objective = config.objective
    weights = "ce_weight flow_weight image_ce_weight balance_weight z_weight task_weight"
    at_least(objective, "objective.", 0, f"{weights} time_std codebook_size")
    share(objective, "objective.", "caption_dropout")
    at_least(objective.sampler, "objective.sampler.", 1, "steps")
    at_least(objective.sampler, "objective.sampler.", 0, "guidance temperature top_k")
    top_p = objective.sampler.top_p
    require(0 < top_p <= 1, "objective.sampler.top_p", top_p, "must lie in (0, 1]")
    _codebook(objective)
    positive(objective.sampler, "objective.sampler.", "time_shift")
    _balance(config)
    check_benchmarks(config.evaluation)


def _codebook(objective: Objective) -> None:
    """Codes have a tokenizer and a number of codes; patches have neither."""
    size, codes = objective.codebook_size, objective.name == "autoregressive"
    right = "must be at least 2, the codes of objective.image_tokenizer" if codes else "objective=flow has no codes"
    require(size >= 2 if codes else size == 0, "objective.codebook_size", size, right)
    given, right = objective.image_tokenizer, "objective=autoregressive needs what makes codes of images"
    require(given is not None or not codes, "objective.image_tokenizer", given, right)


def _balance(config: Config) -> None:
    balance, bias = config.objective.balance, config.model.router.bias
    at_least(balance, "objective.balance.", 0, "bias_rate")
    known("objective.balance.kinds", balance.kinds, KINDS, "kind of token")
    for kind, weight in balance.kinds.items():
        right = "must be a finite number, at least 0"
        require(0 <= weight < float("inf"), f"objective.balance.kinds.{kind}", weight, right)
    right = "needs the biases that it changes; set model.router.bias=true"
    require(not balance.bias_rate or bias, "objective.balance.bias_rate", balance.bias_rate, right)


# --------------------------------------------------------------------------- start and data


def _init(config: Config) -> None:
    init, stage0 = config.init, config.init.stage0
    at_least(init, "init.", 1, "profile_micro_batches")
    without = shared_scopes(config.system) and init.parent_shared is False
    right = f"system={config.system.name} has a shared expert, which starts from the parent's; must be true or null"
    require(not without, "init.parent_shared", init.parent_shared, right)
    if init.checkpoint is not None:
        require(Path(init.checkpoint).is_file(), "init.checkpoint", init.checkpoint, "no such file")
    elif stage0 is None:
        raise ConfigError("init.checkpoint=null: must be the path of a checkpoint, as init.stage0 is null")
    if stage0 is not None:
        at_least(stage0, "init.stage0.", 1, "max_steps samples")
        at_least(stage0, "init.stage0.", 0, "warmup balance_weight")
        positive(stage0, "init.stage0.", "lr")
        share(stage0, "init.stage0.", "decay")
        _mix("init.stage0.mix", stage0.mix, config.data.sets)


def _data(config: Config) -> None:
    data, trainer = config.data, config.trainer
    at_least(data, "data.", 1, "samples row_tokens micro_batches")
    at_least(data, "data.", 0, "num_workers repeat_steps")
    for name in trainer:
        if name not in TRAINER_KEYS:
            raise ConfigError(f"trainer.{name}: no argument of lightning.Trainer; {near_miss(name, TRAINER_KEYS)}")
    for name, owner in TRAINER_SET_BY.items():
        if name in trainer:
            raise ConfigError(f"trainer.{name}={plain(trainer[name])}: must not be set; it follows from {owner}")
    ranks = 1
    for name in ("devices", "num_nodes"):
        count = trainer.get(name, 1)
        whole = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        require(whole, f"trainer.{name}", count, "must be a whole number, at least 1")
        ranks *= count
    strategy = str(trainer.get("strategy", "auto"))
    if ranks > 1 and "fork" not in strategy:
        right = "must be ddp_fork with several devices: strategies that run the script again would start the arc twice"
        raise ConfigError(f"trainer.strategy={strategy}: {right}")
    right = f"must be a multiple of the {ranks} devices that share a step; set data.micro_batches={ranks}"
    require(data.micro_batches % ranks == 0, "data.micro_batches", data.micro_batches, right)
