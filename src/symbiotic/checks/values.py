"""Rules that need several keys: whether a config that parses can also run, and whether all that was set matters.

Standard library only (the roles are pure text matching). `check` raises `ConfigError` with one line: key, value,
what would be right. Types, unknown and missing keys are `schema.parse`'s business.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from pathlib import Path

from symbiotic.checks.callbacks import check_callbacks
from symbiotic.checks.evaluation import check_benchmarks
from symbiotic.checks.lora import check_lora
from symbiotic.checks.optimizer import check_optimizer
from symbiotic.checks.phases import check_phases
from symbiotic.checks.pretrained import check_pretrained
from symbiotic.checks.rules import at_least, check_weights, known, positive, require, share, trained_tasks
from symbiotic.checks.surgery import check_surgery
from symbiotic.checks.system import check_layout
from symbiotic.checks.trainer import check_trainer
from symbiotic.convert.assignment import read_assignment
from symbiotic.evaluation.names import METRICS
from symbiotic.layout import shared_scopes, trained_names
from symbiotic.schema import KINDS, Config, ConfigError, Mix, Objective
from symbiotic.training.roles import assign_roles


def check(config: Config) -> None:
    """All rules on values, cheapest first.

    Raises:
        ConfigError: the first rule that is broken.
    """
    _run(config)
    if config.init.folder is not None:
        check_pretrained(config)
    check_layout(config.model, config.system)
    check_lora(config)
    check_callbacks(config)
    _rates(config)
    check_phases(config)
    _mix("mix", config.mix, config.data.sets)
    _tasks(config)
    check_surgery(config)
    _objective(config)
    _init(config)
    _data(config)
    check_trainer(config)


# --------------------------------------------------------------------------- the run


def _run(config: Config) -> None:
    at_least(config, "", 0, "seed")
    at_least(config, "", 1, "threads log_every save_every probe_samples")
    require(config.threads <= 1024, "threads", config.threads, "must be at most 1024")
    require(config.seed < 2**32, "seed", config.seed, "must be below 2**32")
    require(bool(config.run_dir), "run_dir", "''", "must name a folder")
    require(bool(re.fullmatch(r"(?!\.+$)[\w.-]+", config.name)), "name", config.name, "must be one plain folder name")
    known("metric", [config.metric] if config.metric else [], METRICS, "score")
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
    check_optimizer(rates.optimizer, "rates.optimizer")
    for role, patterns in rates.roles.items():
        for pattern in patterns:
            _compiles(f"rates.roles.{role}", pattern)
    assign_roles(trained_names(config), rates.roles)


def _compiles(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{key}={pattern}: no regular expression: {error}") from None


def _tasks(config: Config) -> None:
    tasks = trained_tasks(config)
    right = f"the mix trains {', '.join(tasks)} only, and it learns from both; must be false, or the mix another"
    require(len(tasks) > 1 or not config.system.task_router, "system.task_router", True, right)


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
    require(math.isfinite(objective.time_mean), "objective.time_mean", objective.time_mean, "must be a finite number")
    at_least(objective.sampler, "objective.sampler.", 1, "steps")
    at_least(objective.sampler, "objective.sampler.", 0, "guidance temperature top_k")
    top_p = objective.sampler.top_p
    require(0 < top_p <= 1, "objective.sampler.top_p", top_p, "must lie in (0, 1]")
    _codebook(objective)
    positive(objective.sampler, "objective.sampler.", "time_shift")
    _balance(config)
    check_benchmarks(config.evaluation)


def _tower(config: Config) -> None:
    """A vision tower inside the model takes pixels, and nothing else reads them."""
    model, data = config.model, config.data
    if model.vision is None:
        return
    right = "is known from model.vision; must be null"
    require(model.vit_dim is None, "model.vit_dim", model.vit_dim, right)
    right = "model.vision reads the images; must be null"
    require(data.vision is None, "data.vision", "{…}", right)


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
    if init.assignment == "file" and init.assignment_file is None:
        raise ConfigError("init.assignment=file: init.assignment_file is missing; must be the path of a receipt.json")
    if init.assignment_file is not None:
        effect = f"has no effect, as init.assignment is {init.assignment}; must be null, or set init.assignment=file"
        require(init.assignment == "file", "init.assignment_file", init.assignment_file, effect)
        read_assignment(init.assignment_file, config.model, config.system)
    if init.checkpoint is not None:
        require(Path(init.checkpoint).exists(), "init.checkpoint", init.checkpoint, "no such file")
    elif stage0 is None and init.folder is None:
        raise ConfigError("init.checkpoint=null: must be the path of a checkpoint, as init.stage0 is null")
    if stage0 is not None:
        at_least(stage0, "init.stage0.", 1, "max_steps samples")
        at_least(stage0, "init.stage0.", 0, "warmup balance_weight")
        positive(stage0, "init.stage0.", "lr")
        share(stage0, "init.stage0.", "decay")
        _mix("init.stage0.mix", stage0.mix, config.data.sets)


def _data(config: Config) -> None:
    data = config.data
    at_least(data, "data.", 1, "samples row_tokens micro_batches")
    at_least(data, "data.", 0, "num_workers repeat_steps")
    streamed = str(data.source.get("_target_")).endswith(".StreamData")
    _tower(config)
    if streamed and data.encoded:
        raise ConfigError(f"data.encoded={list(data.encoded)}: has no effect with data=stream, which reads pixels")
    if streamed and config.objective.name == "autoregressive":
        raise ConfigError(
            "objective=autoregressive: needs codes of all images in advance; must be flow with data=stream"
        )
