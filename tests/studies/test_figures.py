"""The figures of a run: drawn from its config and its logs, whatever was logged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from symbiotic.callbacks.csv_log import CSVLog
from symbiotic.config import compose
from symbiotic.schema import Config
from symbiotic.studies.console import phase_table, render
from symbiotic.studies.curves import PANELS, draw_instruments, read_series
from symbiotic.studies.timeline import draw_timeline

ROLES = ("und", "gen", "shared", "attention", "embeddings", "latent")
BY_METRIC = (
    "phases.list=[{name:warm,until:60,frozen:[und],mix:{t2i:3,lm:1}},"
    "{name:shield,until:200,shield:1.0,when:{metric:routing/capacity@1/vae,above:0.9,logs:2}},"
    "{name:joint,until:450,shield:0.9}]"
)


@pytest.fixture
def by_metric() -> Config:
    return compose(["experiment=symbiotic", "rates=per_role", BY_METRIC])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def colours(path: Path) -> int:
    return len(np.unique(pixels(path).reshape(-1, 3), axis=0))


@pytest.mark.parametrize("overrides", [[], ["system=standard_moe", "phases=none"], ["mix=und_only"]])
def test_the_timeline_of_any_plan_is_drawn(overrides: list[str], tmp_path: Path) -> None:
    path = draw_timeline(compose(["experiment=symbiotic", *overrides]), ROLES, tmp_path / "deep" / "phases.png")
    assert colours(path) > 20
    assert [p.name for p in path.parent.iterdir()] == ["phases.png"]


def test_another_plan_is_another_picture(by_metric: Config, tmp_path: Path) -> None:
    plain = draw_timeline(compose(["experiment=symbiotic"]), ROLES, tmp_path / "a.png").read_bytes()
    assert draw_timeline(by_metric, ROLES, tmp_path / "b.png").read_bytes() != plain


def test_the_table_names_the_condition_and_the_mix(by_metric: Config) -> None:
    text = render(phase_table(by_metric, ROLES), width=200)
    assert "60–199*" in text
    assert "shield: as soon as routing/capacity@1/vae > 0.9, 2 logs in a row" in " ".join(text.split())
    assert "t2i 3 : lm 1" in text
    assert "mix" not in render(phase_table(compose(["experiment=symbiotic"]), ROLES), width=200)


def logged(folder: Path, names: tuple[str, ...]) -> None:
    log = CSVLog(str(folder))
    for step in (10, 20, 30):
        log.log_metrics(dict.fromkeys(names, step / 100), step)


def test_instruments_show_what_was_logged_and_leave_out_what_was_not(tmp_path: Path) -> None:
    some, more = tmp_path / "some", tmp_path / "more"
    names = ("train/ce", "train/flow", "routing/capacity@1/vae", "routing/capacity@1/vae/random")
    logged(some, names)
    logged(more, (*names, "leak/layer0", "leak/all", "conflict/shared/cosine", "conflict/shared/ratio"))
    (more / "scores.jsonl").write_text(json.dumps({"step": 0, "scores": {"reading": 0.5, "embedded_acc": None}}) + "\n")
    (more / "events.jsonl").write_text(json.dumps({"step": 20, "kind": "alarm", "text": "a collapse"}) + "\n")
    small, large = (draw_instruments(f, f / "instruments.png") for f in (some, more))
    assert small is not None
    assert large is not None
    assert len(pixels(large)) > len(pixels(small))
    assert draw_instruments(tmp_path / "nothing", tmp_path / "nothing.png") is None


def test_panels_pick_their_metrics_by_name(tmp_path: Path) -> None:
    logged(tmp_path, ("conflict/und/cosine", "conflict/und/ratio", "routing/drift/text", "routing/layer0/drift/text"))
    series = read_series(tmp_path / "metrics.csv")
    assert series["conflict/und/cosine"] == ([10, 20, 30], [0.1, 0.2, 0.3])
    found = {title: set(pick(series)) for title, pick in PANELS.items() if pick(series)}
    assert found == {
        "drift of the router's probabilities on the probe": {"words"},
        "cosine of the tasks' gradients by role": {"und"},
        "norm of generation / understanding gradient by role": {"und"},
    }
