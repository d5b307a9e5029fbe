"""UTAMoE's two stages as an experiment: they train, freeze what they say, and end in weights that can be merged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from symbiotic import arc
from symbiotic.callbacks.csv_log import read_rows
from symbiotic.config import compose
from symbiotic.data.packing import Text, build_sample
from symbiotic.evaluation.prompts import one_a_row
from symbiotic.models.lora import is_lora
from symbiotic.runs import load_state, read_json
from symbiotic.schema import Config, ConfigError
from symbiotic.studies.merge_lora import main
from symbiotic.trained import load_model, open_run
from symbiotic.training.roles import assign_roles

SMOKE = ("model=smoke", "data=embedded_smoke", "init=smoke", "evaluation=smoke", "phases.steps=8", "threads=1")
FEW = ("evaluation.every=0", "evaluation.images=2", "logger.tensorboard=null", "log_every=1", "save_every=4")


def run(shared: Path, runs: Path, experiment: str, *more: str) -> Config:
    paths = [f"paths.runs={runs}", f"paths.data={shared / 'data'}", f"paths.cache={shared / 'cache'}"]
    config = compose([f"experiment={experiment}", *SMOKE, *FEW, *paths, *more])
    arc.run(config)
    return config


@pytest.fixture(scope="module")
def both(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return run(shared_tmp, tmp_path_factory.mktemp("runs"), "utamoe", "phases.stage1_steps=4")


def changed(config: Config, first: str, second: str) -> set[str]:
    """Roles of the parameters that differ between two files of a run; what one lacks counts as zero updates."""
    a, b = (load_state(Path(config.run_dir) / name) for name in (first, second))
    names = [name for name in b if name not in a or not torch.equal(a[name], b[name])]
    return set(assign_roles(names, config.rates.roles).values())


def test_each_stage_trains_its_roles_and_no_other(both: Config) -> None:
    middle, end = "checkpoints/step=000004.ckpt", "model.safetensors"
    assert (Path(both.run_dir) / middle).is_file()
    state = load_state(Path(both.run_dir) / middle)
    assert all(not value.any() for name, value in state.items() if is_lora(name) and name.endswith(".b"))
    assert changed(both, "init.safetensors", middle) == {"und", "gen", "task", "latent", "lora"}  # lora: new, B is 0
    assert changed(both, middle, end) == {"task", "latent", "lora"}


def test_the_log_tells_how_tokens_were_routed(both: Config) -> None:
    rows = read_rows(Path(both.run_dir) / "metrics.csv")
    own = [float(row["task/share/vae/gen"]) for row in rows if row.get("task/share/vae/gen")]
    right = [float(row["task/accuracy/vae"]) for row in rows if row.get("task/accuracy/vae")]
    assert own[:4] == [1.0] * 4
    assert own[4:] == right[4:]
    assert all(float(row["train/task"]) > 0 for row in rows if row.get("train/task"))
    assert "task/accuracy/text" in read_json(Path(both.run_dir) / "summary.json")["routing"]  # type: ignore[index]


def test_updates_are_saved_apart_and_merge_into_plain_weights(
    both: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = Path(both.run_dir), tmp_path / "merged.safetensors"
    apart, whole = load_state(folder / "lora.safetensors"), load_state(folder / "model.safetensors")
    assert set(apart) == {name for name in whole if is_lora(name)}
    assert all(torch.equal(apart[name], whole[name]) for name in apart)
    assert main([f"run={folder}", f"out={out}"]) == 0
    assert f"{len(apart) // 2} low-rank updates" in capsys.readouterr().out
    assert not any(map(is_lora, load_state(out)))
    opened, merged = open_run(folder), open_run(folder, checkpoint=str(out))
    words = torch.randint(8, 64, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = one_a_row([build_sample("words", "lm", [Text(words, False)])])
    everywhere = torch.ones_like(batch.kind, dtype=torch.bool)
    with torch.no_grad():
        a, b = (found.model(batch, logits_at=everywhere).logits for found in (opened, merged))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert load_model(both, folder / "init.safetensors", "cpu") is not None  # older than the updates


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["out={run}/model.safetensors"], "these are the weights that are merged"),
        (["out={run}/merged.ckpt"], r"must be a \.safetensors file"),
        (["step=0"], "no low-rank updates in it; only runs with lora=r16"),
        (["outt=x"], "outt=x: no such key; did you mean 'out'"),
    ],
)
def test_wrong_requests_are_one_line(
    arguments: list[str], line: str, both: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([f"run={both.run_dir}", *(a.format(run=both.run_dir) for a in arguments)]) in (1, 2)
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert re.search(line, errors[0])


def test_the_first_stage_alone_goes_by_the_truth_to_the_end(shared_tmp: Path, tmp_path: Path) -> None:
    config = run(shared_tmp, tmp_path, "utamoe_stage1", "phases.steps=3")
    assert [phase.name for phase in config.phases.list] == ["stage1"]
    assert changed(config, "init.safetensors", "model.safetensors") == {"und", "gen", "task", "latent"}
    assert not (Path(config.run_dir) / "lora.safetensors").exists()


def test_other_systems_go_through_the_same_phases(shared_tmp: Path, tmp_path: Path) -> None:
    config = run(shared_tmp, tmp_path, "utamoe", "system=symbiotic", "phases.stage1_steps=2", "phases.steps=4")
    assert changed(config, "init.safetensors", "model.safetensors") == {"und", "gen", "latent", "lora"}


def test_a_target_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora\.targets: 'attention\.all\.p\.weight' is no weight .*did you mean"):
        compose(["experiment=utamoe", "lora.targets=['attention.all.p.weight']", f"paths.runs={tmp_path}"])
