"""The tables that a run prints: what they count is right, and they read well as plain text."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from factory import SYSTEMS, build, load_system, tiny_model
from symbiotic.schema import Config, Data, Evaluation, Init, Mix, Objective, Paths, Phase, Phases, Rates, Shield
from symbiotic.studies import console
from symbiotic.studies.inventory import classify, inventory


def config(**changes: Any) -> Config:
    model = tiny_model()
    values: dict[str, Any] = {
        "name": "test", "seed": 0, "threads": 1, "dry_run": False, "log_every": 1, "save_every": 2,
        "system": load_system("symbiotic", model), "model": model,
        "rates": Rates(
            {"und": ("a",), "gen": ("b",), "latent": ("c",)}, 3e-4, {}, {"gen": 3e-3, "latent": 3e-3}, 30, 0.3
        ),
        "phases": Phases(
            450, 80, 0.1, (Phase("shield", 80, 1.0), Phase("joint", 450, 0.9, balance=0.05, frozen=("latent",)))
        ),
        "mix": Mix({"t2i": 1.0}), "objective": Objective(balance_weight=0.2), "init": Init(),
        "data": Data({}, ("t2i",), 6, 48), "evaluation": Evaluation(), "paths": Paths("", "", ""),
        "trainer": {}, "callbacks": {}, "logger": {}, "run_dir": "",
    }  # fmt: skip
    return Config(**(values | changes))


def lines(table: Any) -> list[str]:
    return console.render(table).splitlines()


def row(table: Any, first: str) -> list[str]:
    """The cells of the row that starts with `first`."""
    line = next(line for line in lines(table) if line.strip().startswith(first))
    return [cell.strip() for cell in line.strip().split("  ") if cell.strip()]


def test_phase_table_shows_steps_level_rates_and_balance() -> None:
    table = console.phase_table(config())
    assert row(table, "shield") == ["shield", "0–79", "1", "1.0e-05 → 3.0e-04", "1.0e-04 → 3.0e-03", "0.2", "–"]
    assert row(table, "joint") == ["joint", "80–449", "0.9", "3.0e-04 → 2.2e-06", "3.0e-03 → 2.2e-05", "0.05", "latent"]
    assert any("rate of gen, latent" in line for line in lines(table))


def test_a_system_without_shield_targets_has_a_dash_for_its_level() -> None:
    plain = config()
    table = console.phase_table(dataclasses.replace(plain, system=dataclasses.replace(plain.system, shield=Shield())))
    assert row(table, "shield")[2] == "–"


def test_a_peak_inside_a_phase_is_shown_and_empty_phases_are_not() -> None:
    one = Phases(450, 0, 0.1, (Phase("shield", 0, 1.0), Phase("joint", 450)))
    table = console.phase_table(config(phases=one), roles=["gen"])
    assert row(table, "joint")[3] == "1.0e-04 → 3.0e-03 → 2.2e-05"
    assert not any(line.strip().startswith("shield ") for line in lines(table))


@pytest.mark.parametrize("name", SYSTEMS)
def test_components_add_up_to_the_model(name: str) -> None:
    model = build(name)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    components = inventory(shapes, model.cfg, model.system)
    assert sum(c.total for c in components) == sum(p.numel() for p in model.parameters())
    assert all(c.active[kind] <= c.total for c in components for kind in c.active)
    assert str(f"{sum(c.total for c in components):,}") in row(console.parameter_table(components), "total")


def active(name: str, kind: str, word: str) -> float:
    model = build(name)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return sum(c.active[kind] for c in inventory(shapes, model.cfg, model.system) if c.name.startswith(word))


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "dense"])
@pytest.mark.parametrize("kind", ["text", "vit", "vae"])
def test_every_system_uses_k_experts_a_token_and_layer(name: str, kind: str) -> None:
    one_expert = 32 * 2 * 16 + 16 * 32  # width x (gate and up) + back
    assert active(name, kind, "routed") == pytest.approx(2 * one_expert * 3)


def test_shares_attention_and_routers_by_hand() -> None:
    shared = 3 * (32 * 2 * 24 + 24 * 32)
    assert active("symbiotic", "vae", "shared") == active("symbiotic", "text", "shared") == shared
    assert active("mot", "vae", "shared") == shared  # one of two
    assert active("bagel", "text", "attention") == active("symbiotic", "text", "attention")
    assert active("symbiotic", "vae", "routers") == 3 * 32 * 4
    assert active("standard_moe", "vae", "routers") == 3 * 32 * 8
    assert active("symbiotic", "text", "embeddings") == 32  # one row of the table
    assert active("symbiotic", "vae", "heads") == 32 * 48 + 48


def test_a_tied_head_is_used_whole_and_unknown_parameters_are_an_error() -> None:
    model = tiny_model(tied_head=True)
    system = load_system("symbiotic", model)
    assert classify("embed.weight", (64, 32), model, system)[1]["text"] == 64 * 32
    with pytest.raises((KeyError, IndexError)):
        classify("blocks.0.moe.pools.unknown.w_in", (4, 32, 32), model, system)


def test_tokens_by_task() -> None:
    table = console.token_table({"t2i": 600, "lm": 400}, latents=250, steps=10)
    assert row(table, "lm") == ["lm", "400", "40.0 %"]
    assert row(table, "total") == ["total", "1,000", "100.0 %"]
    assert any("25.0 % of all tokens are latents" in line for line in lines(table))


def test_split_receipt() -> None:
    gates = {"tokens_inside": 0.75, "max_gate_change": 2e-7, "factor": [1.0, 1.0], "choice_kept": 0.995}
    receipt = {
        "experts": [{"und": [0, 1, 2, 5], "gen": [3, 4, 6, 7]}, {"und": [4, 5, 6, 7], "gen": [0, 1, 2, 3]}],
        "parameters": {"before": 1000, "after": 1000, "added": 0, "latent_modules": 50},
        "gate_identity": [gates, gates | {"factor": [1.0, 1.5]}],
        "masks_off": {"max_logit_change": 3e-6},
    }
    table = console.split_table(receipt)
    assert row(table, "0") == ["0", "0–2 5", "3–4 6–7", "75.0 %", "99.5 %", "2.0e-07", "1"]
    assert row(table, "1")[-1] == "1–1.5"
    text = " ".join(console.render(table).split())
    for told in (
        "1,000 before, 1,000 after (+0)",
        "pool und (4)",
        "With the masks off, logits change by 3.0e-06 at most",
    ):
        assert told in text
    gates.pop("choice_kept")
    older = console.split_table({**receipt, "masks_off": None, "gate_identity": [gates, gates]})
    assert row(older, "0")[4] == "–"


def test_summary_shows_anchors_change_and_gaps() -> None:
    scores = {
        "stage 0": {"knowledge_unreplayed": (0.99, 96), "reading": (0.92, 200)},
        "iteration 0": {"knowledge_unreplayed": (0.92, 96), "reading": (0.9, 200), "embedded_clip": math.nan},
        "step 450": {"knowledge_unreplayed": (0.93, 96), "reading": 0.91, "embedded_clip": (0.31, 96)},
    }
    table = console.summary_table(scores)
    assert row(table, "knowledge_unreplayed") == ["knowledge_unreplayed", "96", "0.990", "0.920", "0.930", "+0.010"]
    assert row(table, "embedded_clip") == ["embedded_clip", "96", "–", "–", "0.310", "–"]
    assert any("change from iteration 0" in line for line in lines(table))


def test_paths_stand_one_a_line() -> None:
    text = console.path_list({"grid": "runs/a/samples/x.png", "checkpoint": "runs/a/c.ckpt"})
    assert text.splitlines() == ["grid        runs/a/samples/x.png", "checkpoint  runs/a/c.ckpt"]


def test_plain_text_has_no_colours_and_no_trailing_blanks() -> None:
    text = console.render(console.phase_table(config()), "below")
    assert "\x1b" not in text
    assert text.endswith("below\n")
    assert all(line == line.rstrip() for line in text.splitlines())
