"""Which experts do the tokens of each kind use, as a picture: layers by experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from symbiotic.callbacks.log import Window
from symbiotic.callbacks.step import StepCallback, config_of
from symbiotic.evaluation.grid import save_png
from symbiotic.files import commit
from symbiotic.layout import pool_sizes
from symbiotic.schema import KINDS, ConfigError
from symbiotic.training.routing_metrics import loads

TOP = 4.0  # end of the colour scale: so many times an even share; fixed, so that figures can be compared


class RoutingHeatmap(StepCallback):
    """Writes `routing/step=NNNNNN.png` in the run folder, every `every` steps (0: never), at the last one, and when
    training stops early.

    Colour: an expert's share of the assignments of a kind, times the number of experts that the kind may use, since the
    figure before, over all ranks; 1 is balance. Beside it `step=NNNNNN.npz` with counts [L, M, E], tokens [M], the
    names of the kinds, and `steps` [first, last]. A TensorBoard logger gets the picture too.
    Reads outputs["routing"], pl_module.model.visible_experts and trainer.default_root_dir; nothing without MoE layers.
    """

    def __init__(self, every: int = 0) -> None:
        if every < 0:
            raise ConfigError(f"callbacks.routing_heatmap.every={every}: must be at least 0 (0: only at the end)")
        self.every, self.since, self.window = every, 0, Window()

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        stats = outputs["routing"]
        if stats.counts.numel():
            self.window.add({"counts": stats.counts, "tokens": stats.tokens})

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        due = step == trainer.max_steps or (self.every > 0 and step % self.every == 0)
        if self.window.sums and (due or trainer.should_stop):
            self.write(trainer, pl_module, step)
        if due:  # what a run that stops early shows goes on being summed when it is resumed
            self.window.clear()
            self.since = step

    def write(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        sums = {name: value.cpu().numpy() for name, value in self.window.total(trainer).items()}
        if not trainer.is_global_zero:
            return
        model, config = pl_module.model, config_of(pl_module)
        visible = model.visible_experts.cpu().numpy()  # type: ignore[union-attr, operator]
        title = f"{config.system.name}: routing in steps {self.since + 1} to {step}"
        picture = draw_heatmap(**sums, visible=visible, pools=pool_sizes(config.model, config.system), title=title)
        path = Path(trainer.default_root_dir) / "routing" / f"step={step:06d}.png"
        save_png(Image.fromarray(picture), path)
        save_counts(path.with_suffix(".npz"), **sums, kinds=np.array(KINDS), steps=np.array([self.since + 1, step]))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("routing", picture, step, dataformats="HWC")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.save(trainer, checkpoint, "routing_heatmap")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.load(trainer, checkpoint, "routing_heatmap")

    def state_dict(self) -> dict[str, Any]:
        return {"since": self.since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.since = int(state_dict["since"])


def save_counts(path: Path, **arrays: np.ndarray) -> Path:
    """The file appears whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # of a path, numpy would change the ending
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    return commit(path, write)


# --------------------------------------------------------------------------- the picture, in inches


LEFT, RIGHT, HEAD, GAP, FOOT = 0.75, 1.1, 0.85, 0.35, 0.55


def draw_heatmap(
    counts: np.ndarray, tokens: np.ndarray, visible: np.ndarray, pools: Mapping[str, int], title: str
) -> np.ndarray:
    """One panel for each kind that had tokens, below each other, on one scale; returns [H, W, 3] uint8.

    counts [L, M, E], tokens [M], visible [M, E] bool; pools: name -> number of experts, in the order of the columns.
    Experts that a kind may not use are hatched.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kinds = [m for m in range(len(KINDS)) if tokens[m] > 0]
    num_layers, _, num_experts = counts.shape
    width, gaps = min(max(0.36 * num_experts, 5.0), 14.0), (len(kinds) - 1) * GAP
    height = max(min(max(0.26 * num_layers, 0.5), 4.0), (2.4 - gaps) / len(kinds))
    across, stack = LEFT + width + RIGHT, len(kinds) * height + gaps
    total = HEAD + stack + FOOT
    figure = Figure(figsize=(across, total), dpi=110)
    canvas = FigureCanvasAgg(figure)
    relative = loads(torch.from_numpy(counts), torch.from_numpy(visible)).numpy() * visible.sum(-1)[:, None]
    for i, m in enumerate(kinds):
        bottom = FOOT + stack - (i + 1) * height - i * GAP
        axis = figure.add_axes((LEFT / across, bottom / total, width / across, height / total))
        image = _panel(axis, relative[:, m], visible[m], pools)
        axis.set_title(f"{KINDS[m]}, {tokens[m]:,.0f} tokens", loc="left", fontsize=9, y=1.0, pad=3)
        axis.set_xticks([])  # ticks are most of the time that a figure takes
        if not i:
            _name_pools(axis, pools)
    axis.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axis.set_xlabel("expert (hatched: not for this kind)")
    bar_axis = figure.add_axes(((LEFT + width + 0.2) / across, FOOT / total, 0.16 / across, stack / total))
    bar = figure.colorbar(image, cax=bar_axis, extend="max", extendfrac=0.03)
    bar.set_ticks([0, 0.5, 1, 2, 3, TOP], labels=["0", "0.5", "1", "2", "3", f"{TOP:g}"])
    bar.set_label("load / even share (1: balanced)")
    figure.text(LEFT / across, 1 - 0.12 / total, title, va="top", fontsize=11)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _panel(axis: Any, relative: np.ndarray, visible: np.ndarray, pools: Mapping[str, int]) -> Any:
    """The picture of one kind, relative loads [L, E], with borders of pools and hatches over experts out of sight."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=TOP)
    image = axis.imshow(relative, norm=norm, cmap="RdBu_r", aspect="auto", interpolation="nearest")
    for first, last in _runs(~visible):
        place = (first - 0.5, -0.5), last - first, len(relative)
        axis.add_patch(Rectangle(*place, facecolor="0.93", edgecolor="0.75", linewidth=0.0, hatch="///"))
    for border in np.cumsum(list(pools.values()))[:-1]:
        axis.axvline(border - 0.5, color="black", linewidth=1.2)
    axis.set_ylabel("MoE layer")
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    return image


def _name_pools(axis: Any, pools: Mapping[str, int]) -> None:
    """A row above the title of the first panel."""
    ends = np.cumsum(list(pools.values()))
    middles = [end - size / 2 - 0.5 for end, size in zip(ends, pools.values(), strict=True)]
    style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 9, "color": "0.35"}
    for name, middle in zip(pools, middles, strict=True):
        axis.annotate(name, (middle, 1.0), (0, 18), ha="center", va="bottom", **style)
    axis.annotate("pools:", (-0.5, 1.0), (-6, 18), ha="right", va="bottom", **style)


def _runs(wanted: np.ndarray) -> Iterator[tuple[int, int]]:
    """The stretches of True in a [E] bool array: (first, one behind the last)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(int)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
