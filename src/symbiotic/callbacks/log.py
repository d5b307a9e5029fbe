"""Losses, gradient norms, rates and speed, written together every n optimiser steps.

`self.log` costs 0.6 ms a call (spec: performance.md section 4), so it is not used: tensors are summed where they are,
and one log event costs one transfer to the host and one call of each logger.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from symbiotic.callbacks.csv_log import CSVLog, read_rows
from symbiotic.callbacks.step import StepCallback, config_of, phase_of
from symbiotic.layout import shield_kinds
from symbiotic.schema import KINDS
from symbiotic.training.phases import balance_weight, phase_index
from symbiotic.training.sharded import group_norms

log = logging.getLogger(__name__)

LOSSES = ("loss", "ce", "flow", "image_ce", "balance", "z", "task")

_latest: WeakKeyDictionary[Trainer, dict[str, float]] = WeakKeyDictionary()
_logged: WeakKeyDictionary[Trainer, tuple[int, dict[str, float]]] = WeakKeyDictionary()


def log_metrics(trainer: Trainer, metrics: Mapping[str, Tensor | float], step: int) -> dict[str, float]:
    """Write metrics to every logger, on rank 0, as plain numbers. `step` counts finished optimiser steps.

    One transfer to the host for all tensors on a device. Returns the numbers, on every rank.
    """
    away = {name: value for name, value in metrics.items() if isinstance(value, Tensor) and not value.is_cpu}
    host = torch.stack([value.detach().double().reshape(()) for value in away.values()]).tolist() if away else []
    numbers = {name: float(value) for name, value in metrics.items() if name not in away}
    numbers |= dict(zip(away, host, strict=True))
    _latest.setdefault(trainer, {}).update(numbers)
    _logged[trainer] = (step, {**(logged_at(trainer, step)), **numbers})
    if trainer.is_global_zero and numbers:
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=step)
    return numbers


def latest_metrics(trainer: Trainer) -> dict[str, float]:
    """The newest value of everything that was logged in this fit, for display."""
    return _latest.get(trainer, {})


def logged_at(trainer: Trainer, step: int) -> dict[str, float]:
    """What was logged at exactly this step, on every rank; empty when nothing was."""
    last, numbers = _logged.get(trainer, (-1, {}))
    return numbers if last == step else {}


class Window:
    """Named sums of tensors since the last log, in float64, on their device, without host synchronisation.

    Under several ranks each holds its own sums; `total` adds them up. In a checkpoint the totals are saved and only
    rank 0 takes them back, so a resumed run logs what the uninterrupted one would have.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name].to(value.device) + value if name in self.sums else value

    def total(self, trainer: Trainer) -> dict[str, Tensor]:
        """The sums over all ranks, by one collective; every rank has to call it."""
        if trainer.world_size == 1 or not self.sums:
            return dict(self.sums)
        flat = torch.cat([value.reshape(-1) for value in self.sums.values()])
        flat = trainer.strategy.reduce(flat, reduce_op="sum")
        parts = flat.split([value.numel() for value in self.sums.values()])
        return {name: part.view_as(value) for part, (name, value) in zip(parts, self.sums.items(), strict=True)}

    def clear(self) -> None:
        self.sums = {}

    def save(self, trainer: Trainer, checkpoint: dict[str, Any], key: str) -> None:
        checkpoint[f"window/{key}"] = {name: value.cpu() for name, value in self.total(trainer).items()}

    def load(self, trainer: Trainer, checkpoint: Mapping[str, Any], key: str) -> None:
        self.sums = {}
        for name, value in checkpoint.get(f"window/{key}", {}).items():
            self.sums[name] = value.to(trainer.strategy.root_device) * float(trainer.is_global_zero)


def grad_norms(optimizer: Optimizer) -> dict[str, Tensor]:
    """Role -> [] norm of the gradients of its parameter groups, before clipping; 0 without gradients."""
    given: dict[str, list[Tensor]] = {}
    for group in optimizer.param_groups:
        given.setdefault(str(group["role"]), []).extend(p.grad for p in group["params"] if p.grad is not None)
    return dict(zip(given, group_norms(list(given.values())), strict=True))


class StepLog(StepCallback):
    """Logs, every `every` optimiser steps, under these names:

    `train/{loss,ce,flow or image_ce,balance,z}` and, with a task router, `train/task` (means over the micro-batches
    of finite loss since the last log, and over ranks), `grad_norm/ROLE` (of that step, before clipping, frozen roles
    included), `lr/ROLE`, `phase/{shield,index,balance_weight}`, `tokens/KIND` (of an optimiser step, all ranks),
    `speed/{tokens_per_s,samples_per_s,seconds_per_step}` (all ranks), `speed/tflops_per_s` where `flops` is set: of the
    model alone, recomputed blocks not counted, so that its share of what the devices can do is the MFU (PaLM, arXiv
    2204.02311, appendix B), and on a GPU `memory/peak_gb`, of the first rank, since the last log.

    Reads outputs["loss", ..., "tokens"], the config's phases, and the roles of the optimiser's parameter groups.
    List it before `LRPhases`, which drops the gradients of frozen roles.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = every
        self.window = Window()
        self.flops: Mapping[str, float] = {}  # kind -> operations of one token, forward and back
        self.rows = 0  # that were logged since the run began
        self._norms: dict[str, Tensor] = {}
        self._steps = 0
        self._clock: float | None = None  # None: starts with the next micro-batch, behind what others do at a log

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock, self._steps = None, trainer.global_step
        if trainer.is_global_zero:
            for table in (logger for logger in trainer.loggers if isinstance(logger, CSVLog)):
                self.tell_lost(table.path, trainer.global_step)

    def tell_lost(self, path: Path, step: int) -> None:
        """Warn of rows up to a step that a metrics.csv had and has no more."""
        have = sum(bool(row.get("train/loss")) for row in read_rows(path) if int(row["step"]) <= step)
        if have < self.rows:
            log.warning("%s: %d of %d rows are lost, cut off or damaged", path, self.rows - have, self.rows)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._clock = time.perf_counter() if self._clock is None else self._clock

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % self.every == 0:
            self._norms = grad_norms(optimizer)

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        values = {name: outputs[name] for name in LOSSES if name in outputs}
        values["loss"] = outputs["loss"] * trainer.accumulate_grad_batches  # Lightning hands it on divided by that
        finite = outputs["loss"].isfinite()  # a step that was skipped is not in the means
        values = {name: torch.where(finite, value, 0.0) for name, value in values.items()}
        counted = {"samples": num_samples(batch), "micro_batches": finite.float()}
        self.window.add({**values, "tokens": outputs["tokens"], **counted})

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if step % self.every == 0:
            log_metrics(trainer, self.metrics(trainer, pl_module), step)
            self.window.clear()
            self.rows += 1
            self._clock, self._steps = None, step

    def metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Tensor | float]:
        sums = self.window.total(trainer)
        micro_batches, tokens = sums["micro_batches"], sums["tokens"]
        steps = max(1, trainer.global_step - self._steps)
        seconds = max(time.perf_counter() - (self._clock or 0.0), 1e-9)
        out: dict[str, Tensor | float] = {f"train/{n}": sums[n] / micro_batches for n in LOSSES if n in sums}
        out |= {f"grad_norm/{role}": norm for role, norm in self._norms.items()}
        out |= {f"lr/{group['role']}": group["lr"] for group in trainer.optimizers[0].param_groups}
        out |= phase_metrics(pl_module, trainer.global_step - 1)
        out |= {f"tokens/{kind}": tokens[m] / self.every for m, kind in enumerate(KINDS)}
        # sums that a resume brought back cover more steps than the clock: scale them to the steps it has seen
        share = steps / self.every
        out["speed/tokens_per_s"] = tokens.sum() * share / seconds
        out["speed/samples_per_s"] = sums["samples"] * share / seconds
        out["speed/seconds_per_step"] = seconds / steps
        if self.flops:
            work = sum(tokens[KINDS.index(kind)] * count for kind, count in self.flops.items())
            out["speed/tflops_per_s"] = work * share / seconds / 1e12
        if tokens.is_cuda:
            out["memory/peak_gb"] = torch.cuda.max_memory_allocated(tokens.device) / 1e9
            torch.cuda.reset_peak_memory_stats(tokens.device)
        return out

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.save(trainer, checkpoint, "step_log")
        checkpoint["rows/step_log"] = self.rows

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.load(trainer, checkpoint, "step_log")
        self.rows = checkpoint.get("rows/step_log", 0)


def phase_metrics(pl_module: LightningModule, step: int) -> dict[str, Tensor | float]:
    """What held at optimiser step `step` (from 0); no shield level where the system has no shield targets."""
    config, module, phase = config_of(pl_module), cast(Any, pl_module), phase_of(pl_module, step)
    level: dict[str, Tensor | float] = {"phase/shield": phase.shield} if shield_kinds(config.system) else {}
    return level | {
        "phase/index": float(phase_index(config.phases, step, module.transitions)),
        "phase/balance_weight": balance_weight(config.objective, phase) * module.balance_scale,
    }


def num_samples(batch: Any) -> Tensor:
    """[] float: samples in a packed batch: the numbers of samples per row, `segment` counting from 0 in each."""
    return (batch.segment.amax(1) + 1).sum().float()
