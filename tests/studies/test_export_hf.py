"""The export command on folders of runs: what is written is the run's model with its masks off, and what is refused.

That transformers loads it is shown in tests/peer.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from checkpoints import OLMOE, QWEN2, tensors, write
from split_runs import logits, masks_off, random_tokens, split_run
from symbiotic.convert.families import CONFIG, model_of_file
from symbiotic.convert.huggingface import parent_layout, read_parent
from symbiotic.models.unified import UnifiedModel
from symbiotic.runs import save_state, write_json
from symbiotic.studies.export_hf import main

MADE = {"symbiotic_bridge": OLMOE, "symbiotic": QWEN2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, UnifiedModel]]:
    made = {}
    for system, config in MADE.items():
        base = tmp_path_factory.mktemp(system)
        checkpoint = write(base / "checkpoint", config, tensors(config))
        made[system] = (base / "run", split_run(base / "run", checkpoint, f"system={system}")[1])
    return made


@pytest.mark.parametrize("system", MADE)
def test_what_is_exported_is_the_run_with_its_masks_off(
    system: str, runs: dict[str, tuple[Path, UnifiedModel]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, child = runs[system]
    assert main([f"run={run}", f"out={tmp_path / 'hf'}"]) == 0
    assert "in 1 file from" in capsys.readouterr().out
    model = model_of_file(tmp_path / "hf")
    whole = UnifiedModel(model, parent_layout(model), latents=False)
    whole.load_state_dict(read_parent(tmp_path / "hf", model, seed=0))
    tokens = random_tokens()
    want = logits(masks_off(child), tokens)
    assert want.std() > 0.1
    torch.testing.assert_close(logits(whole, tokens), want, rtol=0, atol=1e-5 * float(want.std()))
    written = json.loads((tmp_path / "hf" / CONFIG).read_text())
    assert written == {**MADE[system], "torch_dtype": "float32"}


def test_the_card_says_where_it_comes_from(runs: dict[str, tuple[Path, UnifiedModel]], tmp_path: Path) -> None:
    run, _ = runs["symbiotic_bridge"]
    assert main([f"run={run}", f"out={tmp_path / 'hf'}"]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in (
        *("system `symbiotic_bridge`, seed 0", "from `checkpoint`", "bridge 1, und 5, gen 2", "masks off"),
        *("latent_grid, latent_head, latent_in, time_in, vit_grid, vit_in", "largest change of a logit"),
        "No scores: these are not the weights that a finished run ended with.",
    ):
        assert part in card, part


def test_the_card_of_a_finished_run_has_its_scores(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", OLMOE, tensors(OLMOE))
    split_run(tmp_path / "run", checkpoint, "system=symbiotic_bridge")
    scores = {"scores": {"knowledge": [0.5, 8], "flow_error": 0.25}, "n": {"knowledge": 8}}
    write_json(tmp_path / "run" / "summary.json", {**scores, "anchors": {"stage 0": {"knowledge": 0.75}}})
    assert main([f"run={tmp_path / 'run'}"]) == 0
    card = (tmp_path / "run" / "hf" / "README.md").read_text()
    assert "| knowledge | 0.75 | 0.5 | 8 |" in card
    assert "| flow_error | – | 0.25 | – |" in card


REFUSED = {
    "family=qwen3_moe": r"family=qwen3_moe: .* started from OlmoeForCausalLM; leave family away",
    "family=gpt": r"family=gpt: no such family; ",
    "shard=0": r"shard=0: must be at least 1",
    "run=nowhere": r"run=nowhere: no such folder",
    "step=-1": r"step=-1: must be at least 0",
}


@pytest.mark.parametrize("override", REFUSED)
def test_a_wrong_request_is_one_line(
    override: str,
    runs: dict[str, tuple[Path, UnifiedModel]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = [] if override.startswith("run=") else [f"run={runs['symbiotic_bridge'][0]}"]
    assert main([*run, f"out={tmp_path / 'hf'}", override]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert re.search(REFUSED[override], line)
    assert not (tmp_path / "hf").exists()


def test_a_folder_that_is_not_empty_is_left_alone(
    runs: dict[str, tuple[Path, UnifiedModel]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main([f"run={runs['symbiotic'][0]}", f"out={tmp_path}"]) == 2
    assert "is there already; must be a new folder, or an empty one" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_systems_that_are_not_one_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write(tmp_path / "checkpoint", QWEN2, tensors(QWEN2))
    split_run(tmp_path / "run", checkpoint, "system=bagel")
    assert main([f"run={tmp_path / 'run'}"]) == 1
    assert "system=bagel: it has the shared expert twice, for und and gen; an exported model has one" in (
        capsys.readouterr().err
    )


def test_updates_that_are_not_merged_are_refused(
    runs: dict[str, tuple[Path, UnifiedModel]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, child = runs["symbiotic"]
    state = dict(child.state_dict()) | {"blocks.1.moe.lora.pools.und.w_in.a": torch.zeros(2, 2)}
    save_state(tmp_path / "lora.safetensors", state)
    arguments = [f"run={run}", f"checkpoint={tmp_path / 'lora.safetensors'}", f"out={tmp_path / 'hf'}"]
    assert main(arguments) == 1
    assert "low-rank updates are not added to their weights; src/merge_lora.py does that" in capsys.readouterr().err
