"""The heat maps show the routing of the training tokens: each place its colour, each file its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib import colormaps
from matplotlib.text import Text
from PIL import Image

from factory import load_system, random_batch, tiny_model
from symbiotic.callbacks import routing_heatmap
from symbiotic.callbacks.checkpoint import StepCheckpoint, checkpoint_path
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.routing_heatmap import RoutingHeatmap, draw_heatmap
from symbiotic.objectives.flow import noised
from symbiotic.schema import KINDS, ConfigError, Rates


class Spy(Callback):
    def __init__(self) -> None:
        self.counts: list[np.ndarray] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counts.append(outputs["routing"].counts.double().numpy())
        with torch.no_grad():  # an evaluation, which nobody may count
            pl_module.model(noised(random_batch(count=3, seed=50)))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "routing").iterdir())


def counts(folder: Path, step: int) -> dict[str, np.ndarray]:
    with np.load(folder / "routing" / f"step={step:06d}.npz") as arrays:
        return dict(arrays)


def test_a_figure_shows_the_counts_since_the_one_before(fit: Any) -> None:
    spy = Spy()
    fit([spy, RoutingHeatmap(every=2), LRPhases()], steps=5, micro_batches=2)
    assert files(fit.run_dir) == [f"step={step:06d}.{end}" for step in (2, 4, 5) for end in ("npz", "png")]
    for step, part, steps in ((2, range(4), [1, 2]), (4, range(4, 8), [3, 4]), (5, range(8, 10), [5, 5])):
        arrays = counts(fit.run_dir, step)
        assert set(arrays) == {"counts", "tokens", "kinds", "steps"}
        np.testing.assert_array_equal(arrays["counts"], sum(spy.counts[i] for i in part))
        np.testing.assert_array_equal(arrays["counts"].sum(-1), np.tile(2 * arrays["tokens"], (2, 1)))
        assert arrays["steps"].tolist() == steps
        assert arrays["kinds"].tolist() == list(KINDS)
    with Image.open(fit.run_dir / "routing" / "step=000005.png") as image:
        assert image.width > 600


def test_only_at_the_end_by_default(fit: Any) -> None:
    fit([RoutingHeatmap(), LRPhases()], steps=3)
    assert files(fit.run_dir) == ["step=000003.npz", "step=000003.png"]
    assert counts(fit.run_dir, 3)["steps"].tolist() == [1, 3]


def test_two_ranks_count_what_one_does(fit: Any) -> None:
    found = []
    for devices in (1, 2):
        fit([RoutingHeatmap(), LRPhases()], steps=1, micro_batches=4, devices=devices)
        found.append(counts(fit.run_dir, 1))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
    assert found[0]["tokens"].min() > 0


def test_a_resumed_run_shows_the_same(fit: Any) -> None:
    folder = fit.run_dir / "checkpoints"
    fit([RoutingHeatmap(every=4), LRPhases()], steps=9)
    whole = {step: counts(fit.run_dir, step) for step in (4, 8, 9)}
    fit([RoutingHeatmap(every=4), LRPhases(), StepCheckpoint(str(folder), every=6)], steps=9, stop=7)
    for path in (fit.run_dir / "routing").iterdir():
        path.unlink()
    fit([RoutingHeatmap(every=4), LRPhases()], steps=9, ckpt_path=checkpoint_path(folder, 6))
    assert whole[8]["steps"].tolist() == [5, 8]
    for step in (8, 9):
        again = counts(fit.run_dir, step)
        assert all(np.array_equal(again[name], value) for name, value in whole[step].items())


class Stop(Callback):
    """Stops training like an alarm or a signal would, after step 3."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.should_stop = trainer.global_step == 3


def test_a_run_that_is_stopped_shows_its_last_steps_and_goes_on_summing_when_resumed(fit: Any) -> None:
    folder = fit.run_dir / "checkpoints"
    fit([RoutingHeatmap(every=5), LRPhases()], steps=5)
    whole = counts(fit.run_dir, 5)
    saving = StepCheckpoint(str(folder), every=0)
    fit([Stop(), RoutingHeatmap(every=5), LRPhases(), saving], steps=5)
    assert counts(fit.run_dir, 3)["steps"].tolist() == [1, 3]
    fit([RoutingHeatmap(every=5), LRPhases()], steps=5, ckpt_path=checkpoint_path(folder, 3))
    again = counts(fit.run_dir, 5)
    assert all(np.array_equal(again[name], value) for name, value in whole.items())


def test_tensorboard_gets_the_picture(fit: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoardLogger(str(fit.run_dir), name="tensorboard", version="")
    fit([RoutingHeatmap(every=1), LRPhases()], steps=2, loggers=[board])
    events = EventAccumulator(str(fit.run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("routing")] == [1, 2]


def test_a_dense_model_has_no_figure(fit: Any) -> None:
    rates = Rates({"all": ("",)}, lr=1e-3, optimizer={}, decay=0.0)
    fit([RoutingHeatmap(every=1), LRPhases()], steps=1, system=load_system("dense", tiny_model()), rates=rates)
    assert not (fit.run_dir / "routing").exists()


def test_a_useless_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"callbacks.routing_heatmap.every=-1: must be at least 0"):
        RoutingHeatmap(-1)


# --------------------------------------------------------------------------- the picture


def drawn_texts(monkeypatch: pytest.MonkeyPatch) -> list[Text]:
    """Fills with every text that is drawn, once."""
    texts: list[Text] = []
    draw = Text.draw

    def keep(text: Text, *args: Any, **kwargs: Any) -> None:
        if text.get_visible() and text.get_text() and text not in texts:
            texts.append(text)
        draw(text, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", keep)
    return texts


class Drawn:
    """A figure of 2 layers and pools of 3 and 2 experts: what text and latents use, and what was drawn of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        texts = drawn_texts(monkeypatch)
        counts, tokens = np.zeros((2, 4, 5)), np.array([12.0, 0.0, 0.0, 6.0])
        counts[0, 0, :3], counts[1, 0, :3] = [8, 8, 8], [24, 0, 0]
        counts[0, 3, 3:], counts[1, 3, 3:] = [6, 6], [9, 3]
        visible = np.array([[True] * 3 + [False] * 2] * 3 + [[False] * 3 + [True] * 2])
        self.picture = draw_heatmap(counts, tokens, visible, {"und": 3, "gen": 2}, "some title")
        self.figure: Any = texts[0].get_figure()
        self.panels, self.bar = self.figure.axes[:-1], self.figure.axes[-1]

    def colour(self, panel: int, layer: int, expert: int) -> tuple[int, ...]:
        """Of the pixel at a place, away from hatches' lines and borders."""
        x, y = self.panels[panel].transData.transform((expert + 0.21, layer + 0.13))
        return tuple(self.picture[self.picture.shape[0] - 1 - round(y), round(x)].tolist())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    return Drawn(monkeypatch)


def shade(relative: float) -> tuple[int, ...]:
    """The colour of a load relative to an even share: half of the scale below 1, half of it from 1 to 4."""
    place = relative / 2 if relative < 1 else 0.5 + (relative - 1) / 6
    return tuple(round(255 * value) for value in colormaps["RdBu_r"](place)[:3])


@pytest.mark.parametrize(
    ("panel", "layer", "expert", "relative"),
    [(0, 0, 1, 1.0), (0, 1, 0, 3.0), (0, 1, 2, 0.0), (1, 0, 3, 1.0), (1, 1, 3, 1.5), (1, 1, 4, 0.5)],
)
def test_every_place_has_the_colour_of_its_load(
    drawn: Drawn, panel: int, layer: int, expert: int, relative: float
) -> None:
    assert drawn.colour(panel, layer, expert) == pytest.approx(shade(relative), abs=2)


def test_experts_out_of_sight_are_grey_and_hatched(drawn: Drawn) -> None:
    for panel, hidden in ((0, (3, 5)), (1, (0, 3))):
        (patch,) = drawn.panels[panel].patches
        assert (patch.get_x() + 0.5, patch.get_x() + 0.5 + patch.get_width()) == hidden
        assert (patch.get_y(), patch.get_height()) == (-0.5, 2)
        assert patch.get_hatch()
        red, green, blue = drawn.colour(panel, 0, hidden[0])
        assert red == green == blue < 245


def test_panels_pools_and_scale_are_named(drawn: Drawn) -> None:
    assert [panel.get_title(loc="left") for panel in drawn.panels] == ["text, 12 tokens", "vae, 6 tokens"]
    assert [text.get_text() for text in drawn.panels[0].texts] == ["und", "gen", "pools:"]
    assert [text.get_text() for text in drawn.figure.texts] == ["some title"]
    assert [line.get_xdata()[0] for panel in drawn.panels for line in panel.lines] == [2.5, 2.5]
    assert drawn.bar.get_ylabel() == "load / even share (1: balanced)"
    assert {image.norm.vmax for panel in drawn.panels for image in panel.images} == {routing_heatmap.TOP}


@pytest.mark.parametrize(
    ("layers", "pools", "kinds"),
    [
        (4, {"und": 8, "gen": 8}, 4),
        (1, {"all": 4}, 1),
        (47, {"und": 96, "gen": 32}, 4),
        (2, {"a": 1, "b": 1, "c": 6}, 2),
    ],
)
def test_no_text_overlaps_another_or_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, layers: int, pools: dict[str, int], kinds: int
) -> None:
    texts, total = drawn_texts(monkeypatch), sum(pools.values())
    tokens = np.array([1_234_567.0] * kinds + [0.0] * (4 - kinds))
    picture = draw_heatmap(np.ones((layers, 4, total)), tokens, np.ones((4, total), bool), pools, "title of the figure")
    boxes = [text.get_window_extent() for text in texts]
    height, width, _ = picture.shape
    assert len(boxes) > 12
    for i, box in enumerate(boxes):
        assert box.x0 >= 0
        assert box.y0 >= 0
        assert box.x1 <= width
        assert box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
