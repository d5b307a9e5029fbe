"""What someone who watches sees: the progress line, the grid of samples, the scores of evaluations in the loop."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from symbiotic.callbacks import progress
from symbiotic.callbacks.in_loop_evaluation import InLoopEvaluation, read_scores, record_scores
from symbiotic.callbacks.log import StepLog
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.progress import Progress, describe, duration, seconds_left
from symbiotic.callbacks.routing_monitor import RoutingMonitor
from symbiotic.callbacks.sample_grid import SampleGrid
from symbiotic.evaluation.grid import draw_grid, save_png
from symbiotic.schema import Shield


def test_a_file_gets_one_line_every_n_steps_with_everything_in_it(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit([StepLog(every=4), LRPhases(), RoutingMonitor(every=4), Progress(every=4, label="joint")], steps=9)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["4/9", "8/9", "9/9"]
    for word in ("joint", "ce ", "flow ", "tok/s", "samples/s", "capacity und ", " gen ", "shield 0.9"):
        assert word in lines[1]
    assert "ETA" not in lines[0]  # only one step was timed
    assert "ETA" in lines[1]


def test_a_system_without_shield_targets_shows_a_dash(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    system = dataclasses.replace(fit.config().system, shield=Shield())
    fit([StepLog(every=2), LRPhases(), Progress(every=2)], steps=2, system=system)
    assert "shield –" in capsys.readouterr().out


def test_the_bar_of_a_terminal_ends_full_and_closed(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=160)
    monkeypatch.setattr(progress, "Console", lambda: console)
    callback = Progress(every=2)
    fit([StepLog(every=2), LRPhases(), RoutingMonitor(every=2), callback], steps=6)
    assert callback._bar is None
    last = file.getvalue().rsplit("joint", 1)[1]
    assert "6/6" in last
    assert "capacity und" in last


def test_the_bar_is_closed_after_an_error(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(LRPhases):
        def on_before_optimizer_step(self, *args: Any) -> None:
            raise ValueError("no")

    monkeypatch.setattr(progress, "Console", lambda: Console(file=io.StringIO(), force_terminal=True))
    callback = Progress()
    with pytest.raises(ValueError, match="no"):
        fit([callback, Stop()], steps=2)
    assert callback._bar is None


def test_time_left_waits_for_a_few_steps() -> None:
    assert seconds_left(10.0, 2, 100) is None
    assert seconds_left(10.0, 5, 100) == 200.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7630, "2 h 07 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_description_leaves_out_what_is_not_there() -> None:
    assert describe({}, None, None) == "shield –"
    text = describe({"train/ce": 1.5, "train/flow": 0.0, "tokens/vae": 0.0}, 1.0, 65.0)
    assert text == "ce 1.500  shield 1  ETA 1 min 05 s"


# --------------------------------------------------------------------------- samples


def pictures(n: int, side: int = 20) -> np.ndarray:
    return np.arange(n * side * side * 3, dtype=np.int64).reshape(n, side, side, 3).astype(np.uint8)


def test_grid_holds_every_image_pixel_by_pixel_and_all_captions() -> None:
    images = pictures(5)
    grid = np.asarray(draw_grid(images, ["red 7 on gray bar left"] * 5, columns=4, width=240))
    assert grid.shape[1] == 4 * 240
    assert grid.shape[0] % 2 == 0
    top, left, factor = 10, 240 + 10, 11  # the second cell; 220 pixels hold 20 x 11
    tile = grid[top : top + 220, left : left + 220]
    assert (tile[factor // 2 :: factor, factor // 2 :: factor] == images[1]).all()
    below = grid[top + 222 : grid.shape[0] // 2, left : left + 220]
    assert (below < 128).any()  # a caption stands there


def test_grid_wraps_long_captions_and_shrinks_large_images() -> None:
    short = draw_grid(pictures(1, 600), ["word"], width=120)
    long = draw_grid(pictures(1, 600), [" ".join(["word"] * 30)], width=120)
    assert short.width == long.width == 120
    assert long.height > short.height + 100
    with pytest.raises(ValueError, match="2 images but 1 captions"):
        draw_grid(pictures(2), ["one"])


def test_grids_are_written_on_time(fit: Any) -> None:
    seen = []

    def draw(model: Any, number: int) -> tuple[np.ndarray, list[str]]:
        seen.append(model)
        return pictures(number), [f"caption {i}" for i in range(number)]

    grid = SampleGrid(every=2, captions=3)
    with pytest.raises(RuntimeError, match="SampleGrid: set `draw`"):
        fit([grid, LRPhases()], steps=5)
    grid.draw = draw
    _, module = fit([grid, LRPhases()], steps=5)
    files = sorted((fit.run_dir / "samples").iterdir())
    assert [path.name for path in files] == [f"step={step:06d}.png" for step in (2, 4, 5)]
    assert all(model is module.model for model in seen)
    with Image.open(files[0]) as image:
        assert image.width == 3 * 240


def test_a_png_is_replaced_whole(tmp_path: Path) -> None:
    picture = draw_grid(pictures(1), ["x"])
    assert save_png(picture, tmp_path / "new" / "a.png") == tmp_path / "new" / "a.png"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


# --------------------------------------------------------------------------- scores


def test_evaluation_in_the_loop_logs_and_records(fit: Any, memory: Any) -> None:
    callback = InLoopEvaluation(every=2)
    with pytest.raises(RuntimeError, match="InLoopEvaluation: set `evaluate`"):
        fit([callback, LRPhases()], steps=4)
    callback.evaluate = lambda model: {"reading": 0.25, "clip": math.nan}
    fit([callback, LRPhases()], steps=4, loggers=[memory])
    assert memory.rows()[2]["eval/reading"] == 0.25
    assert read_scores(fit.run_dir / "scores.jsonl") == {2: {"reading": 0.25, "clip": None}}  # the last step is not its


def test_scores_are_replaced_merged_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    record_scores(path, 300, {"a": 0.3})
    record_scores(path, 0, {"a": 0.0})
    record_scores(path, 300, {"a": 0.31, "b": 1.0})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": 0, "scores": {"a": 0.0}}, {"step": 300, "scores": {"a": 0.31, "b": 1.0}}]
    assert [p.name for p in tmp_path.iterdir()] == ["scores.jsonl"]
