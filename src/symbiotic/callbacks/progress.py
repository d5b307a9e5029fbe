"""What someone who watches sees: a bar on a terminal, a line every n steps in a file."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Mapping

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from symbiotic.callbacks.log import latest_metrics
from symbiotic.callbacks.step import StepCallback, config_of, phase_of
from symbiotic.layout import shield_kinds
from symbiotic.schema import GENERATION_TERMS

SETTLED = 3  # steps before a time is estimated: the first ones allocate, compile and fill caches


class TwoLines(Bar):
    """A bar with a text below it, which wraps where the terminal is narrow."""

    text = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.text)


class Progress(StepCallback):
    """Shows step, both losses, throughput, capacity of understanding and generation, shield level and time left.

    Values are those logged last, so showing them costs no synchronisation. On a terminal a bar moves with every
    step; elsewhere one plain line per `every` steps. Put it behind the logging callbacks, and give the Trainer
    `enable_progress_bar=False`: this is no Lightning progress bar.
    Reads the config's phases and system. label: what is trained, the name before the bar.
    """

    def __init__(self, every: int = 10, label: str = "joint") -> None:
        self.every, self.label = every, label
        self._start = 0
        self._clock = 0.0
        self._bar: TwoLines | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start, self._clock = trainer.global_step, time.perf_counter()
        console = Console()
        if trainer.is_global_zero and console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn())
            self._bar = TwoLines(*columns, console=console, expand=True, refresh_per_second=4)
            self._bar.add_task(self.label, total=trainer.max_steps, completed=trainer.global_step)
            self._bar.start()

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if not trainer.is_global_zero:
            return
        if step == self._start + SETTLED:  # the clock of the estimate starts when the speed has settled
            self._clock = time.perf_counter()
        line_due = step % self.every == 0 or step == trainer.max_steps
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)
            if line_due or step == self._start + 2 * SETTLED:
                self._bar.text = self.text(trainer, pl_module)
        elif line_due:
            width = len(str(trainer.max_steps))
            print(f"{self.label} {step:{width}d}/{trainer.max_steps}  {self.text(trainer, pl_module)}", flush=True)

    def text(self, trainer: Trainer, pl_module: LightningModule) -> str:
        config = config_of(pl_module)
        level = phase_of(pl_module, trainer.global_step - 1).shield if shield_kinds(config.system) else None
        done = trainer.global_step - self._start - SETTLED
        left = seconds_left(time.perf_counter() - self._clock, done, trainer.max_steps - trainer.global_step)
        return describe(latest_metrics(trainer), level, left)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.close()
        sys.stdout.flush()


def seconds_left(elapsed: float, done: int, remaining: int) -> float | None:
    """Time for the remaining steps at the mean speed so far; None before a few steps were timed."""
    return elapsed / done * remaining if done >= SETTLED else None


def duration(seconds: float) -> str:
    """`45 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def describe(metrics: Mapping[str, float], shield: float | None, left: float | None) -> str:
    """The text behind the bar; what has not been logged (yet) is left out.

    capacity: rate at factor 1 of understanding / generation tokens. shield None: the system has no shield targets.
    """
    parts = []
    if "train/ce" in metrics:
        parts.append(f"ce {metrics['train/ce']:.3f}")
    if metrics.get("tokens/vae", 0.0) > 0:
        found = next((term for term in GENERATION_TERMS.values() if f"train/{term}" in metrics), "flow")
        parts.append(f"{found.replace('_', ' ')} {metrics.get(f'train/{found}', math.nan):.4f}")
    if "speed/tokens_per_s" in metrics:
        parts.append(f"{metrics['speed/tokens_per_s']:,.0f} tok/s")
        parts.append(f"{metrics['speed/samples_per_s']:,.0f} samples/s")
    sides = [f"{side} {metrics[key]:.2f}" for side, key in CAPACITY.items() if key in metrics]
    if sides:
        parts.append(f"capacity {' '.join(sides)}")
    parts.append(f"shield {'–' if shield is None else format(shield, 'g')}")
    if left is not None:
        parts.append(f"ETA {duration(left)}")
    return "  ".join(parts)


CAPACITY = {"und": "routing/capacity@1/und", "gen": "routing/capacity@1/vae"}
