"""The audit on run folders of plain files: what enters, what is refused, what is named."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from symbiotic.config import compose
from symbiotic.runs import read_json, write_json
from symbiotic.schema import ConfigError, RunError
from symbiotic.studies.audit import Audit, audit_runs
from symbiotic.studies.runs_of import AuditError
from symbiotic.studies.study import Study, study_of

MADE = {"code": "c0de", "commit": "abc", "torch": "2.15.0", "numpy": "2.4", "lightning": "2.6"}
TOKENS = {"t2i": 900, "lm": 300, "mmu": 400, "latents": 500, "places": 2000}
NONE = Study()
STANDARD = ("system=standard_moe",)


@functools.lru_cache
def config_text(overrides: tuple[str, ...]) -> str:
    return json.dumps(asdict(compose(["experiment=smoke", *overrides])))


def write_run(root: Path, arm: str, seed: int, *overrides: str, **changes: Any) -> Path:
    """A finished run; changes: of its summary."""
    folder = root / f"{arm}-seed{seed}"
    folder.mkdir(parents=True)
    config = json.loads(config_text(overrides)) | {"seed": seed, "run_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.dump(config, Dumper=yaml.CSafeDumper, sort_keys=False))
    tokens = TOKENS if not config["mix"]["drop"] else {**TOKENS, "t2i": 0, "latents": 0}
    summary = {
        "seed": seed, "steps": 20, "parent": f"stage 0 {seed}", "data": "da7a", "tokens": tokens,
        "scores": {"reading": 0.5 + seed / 10, "flow_error": 1.0}, "n": {"reading": 50, "flow_error": 20},
        "anchors": {"stage 0": {"reading": 0.9}, "iteration 0": {"reading": 0.4}},
        "routing": {"routing/capacity@1/vae": 0.8}, "events": {}, "seconds": {"joint": 10.0 + seed}, "provenance": MADE,
    }  # fmt: skip
    write_json(folder / "summary.json", summary | changes)
    split = {"before": 10, "after": 10, "added": 0, "latent_modules": 3}
    write_json(folder / "receipt.json", {"parameters": split})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two systems and the control of one, two seeds each."""
    root = tmp_path / "runs"
    for seed in (0, 1):
        write_run(root, "symbiotic", seed)
        write_run(root, "standard", seed, *STANDARD)
        write_run(root, "control", seed, "mix=und_only")
    return root


def declared(**changes: Any) -> Study:
    node = {
        "name": "small",
        "experiment": "smoke",
        "seeds": [0, 1],
        "reference": "standard",
        "factors": ["system", "mix"],
        "arms": {"symbiotic": [], "standard": list(STANDARD), "und": ["mix=und_only"]},
    }
    return study_of({"study": node | changes})


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], name: str = "summary.json") -> None:
    path = folder / name
    content = read_json(path) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    change(content)
    path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content, sort_keys=False))


def refused(root: Path, study: Study = NONE, **arguments: Any) -> str:
    with pytest.raises(AuditError) as caught:
        audit_runs(root, study, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def named(audit: Audit) -> dict[str, list[int]]:
    return {arm.name: [run.seed for run in arm.runs] for arm in audit.arms}


# --------------------------------------------------------------------------- arms


def test_declared_arms_are_matched_by_what_their_configs_hold(runs: Path) -> None:
    audit = audit_runs(runs, declared())
    assert named(audit) == {"symbiotic": [0, 1], "standard": [0, 1], "und": [0, 1]}
    assert (audit.seeds, audit.controls, audit.problems) == ((0, 1), {"symbiotic": "und"}, ())
    assert [arm.generates for arm in audit.arms] == [True, True, False]
    assert audit.made == {
        "code": "c0de",
        "data": "da7a",
        "torch": "2.15.0",
        "numpy": "2.4",
        "lightning": "2.6",
        "commits": "abc",
    }


def test_without_a_study_arms_are_found(runs: Path) -> None:
    audit = audit_runs(runs, NONE)
    assert named(audit) == {
        "standard_moe": [0, 1],
        "symbiotic": [0, 1],
        "symbiotic, without t2i+t2i_long": [0, 1],
    }
    assert (audit.study.reference, audit.study.seeds) == ("standard_moe", (0, 1))
    assert audit.controls == {"symbiotic": "symbiotic, without t2i+t2i_long"}


def test_numbers_of_an_arm(runs: Path) -> None:
    symbiotic, _, und = audit_runs(runs, declared()).arms
    assert symbiotic.values("reading") == {0: 0.5, 1: 0.6}
    assert symbiotic.values("routing/capacity@1/vae") == {0: 0.8, 1: 0.8}
    assert symbiotic.anchor("stage 0", "reading") == {0: 0.9, 1: 0.9}
    assert symbiotic.values("flow_error") == {0: 1.0, 1: 1.0}
    assert und.values("flow_error") == {}  # it was not trained to generate
    assert symbiotic.values("reading", 10) == {}


def test_answers_come_from_the_records(runs: Path) -> None:
    lines = [{"benchmark": "reading", "id": str(i), "correct": i == 1} for i in range(3)]
    lines += [{"benchmark": "generation", "id": "0", "held_out": True, "correct": True}]
    lines += [{"benchmark": "generation", "id": "1", "held_out": False, "correct": False}]
    lines += [{"benchmark": "mmlu", "id": f"{s}/1", "subject": s, "correct": True} for s in ("anatomy", "virology")]
    path = runs / "symbiotic-seed1" / "predictions" / "step=000020.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arm = audit_runs(runs, declared()).arms[0]
    assert arm.answers("reading") == {1: {"0": 0.0, "1": 1.0, "2": 0.0}}
    assert arm.answers("embedded_acc") == {1: {"0": 1.0, "1": 0.0}}
    assert arm.answers("embedded_acc_held_out") == {1: {"0": 1.0}}
    assert arm.answers("mmlu_share") == {1: {"anatomy/1": 1.0, "virology/1": 1.0}}
    assert arm.answers("mmlu_share/anatomy") == {1: {"anatomy/1": 1.0}}
    assert arm.answers("flow_error") == {}


# --------------------------------------------------------------------------- undeclared differences


def test_an_undeclared_rate_stops_the_report(runs: Path) -> None:
    write_run(runs, "faster", 0, "rates.lr=1e-2")
    line = refused(runs)
    assert line.startswith(f"{runs / 'faster-seed0'} (arm symbiotic, lr 0.01")
    assert "rates.lr is 0.01, in other runs 0.0003; no declared factor" in line
    assert line.endswith("declare it: factors=[system,mix,ablation,rates]")


@pytest.mark.parametrize("factor", ["rates", "rates.lr"])
def test_a_declared_rate_passes(runs: Path, factor: str) -> None:
    write_run(runs, "faster", 0, "rates.lr=1e-2")
    audit = audit_runs(runs, NONE, ["system", "mix", factor])
    row = next(row for row in audit.differences if row.key == "rates.lr")
    assert (row.group, row.factor) == ("optimisation", factor)
    assert set(row.values.values()) == {"0.01", "0.0003"}


def test_declared_arms_may_differ_in_factors_only(runs: Path) -> None:
    write_run(runs, "faster", 0, "rates.lr=1e-2")
    arms = {"symbiotic": [], "standard": list(STANDARD), "faster": ["rates.lr=1e-2"]}
    line = refused(runs, declared(arms=arms))
    assert "(arm faster): rates.lr is 0.01, in other runs 0.0003" in line
    assert line.endswith("or study.factors of small")
    audit_runs(runs, declared(arms=arms, factors=["system", "mix", "rates"]))


def test_a_changed_run_does_not_slip_into_its_arm(runs: Path) -> None:
    edit(runs / "standard-seed1", lambda config: config["rates"].update(lr=0.5), "config.yaml")
    line = refused(runs, declared(factors=["system", "mix", "rates"]))
    assert f"{runs / 'standard-seed1'}: of no arm; nearest is standard, but rates.lr is 0.5, not 0.0003" in line
    assert "there is no run of standard with seed 1" in line


def test_runs_of_no_arm_and_of_other_seeds_are_named(runs: Path) -> None:
    extra = write_run(runs, "extra", 0, *STANDARD, "rates.lr=1e-2")
    write_run(runs, "standard", 7, *STANDARD)
    assert audit_runs(runs, declared()).problems == (
        f"left out: {extra}: of no arm; nearest is standard, but rates.lr is 0.01, not 0.0003",
        "left out: 1 run of seed 7, which is none of the study's",
    )


def test_an_ablation_covers_what_it_sets_and_no_more(runs: Path) -> None:
    for seed in (0, 1):
        write_run(runs, "ablated", seed, "ablation=ratio_3_1")
    audit = audit_runs(runs, NONE)
    rows = {row.key: row.factor for row in audit.differences if "gen" in row.key.split(".")[-1]}
    assert rows["model.gen_fraction"] == "ablation=ratio_3_1"
    write_run(runs, "sneaky", 0, "model.gen_fraction=0.75")
    assert "model.gen_fraction is 0.75" in refused(runs)


PHASES = {
    "shield": "until: '${phases.shield_steps}', shield: 1.0",
    "joint": "until: '${phases.steps}', shield: '${complement:${phases.release_scale}}'",
}
FASTER = f"phases.list=[{','.join(f'{{name: {name}, {ends}, rate: {{gen: 10}}}}' for name, ends in PHASES.items())}]"
"""The shipped phases, and a rate that no dial gives."""


@pytest.mark.parametrize(
    ("dials", "factors"),
    [
        (["ablation=no_shielding"], ["ablation"]),
        (["ablation=no_shielding", "phases.steps=30"], ["ablation", "phases.steps"]),
        (["phases.steps=30", "phases.shield_steps=30"], ["phases.steps", "phases.shield_steps"]),
        (["phases=none", "phases.steps=20"], ["phases.shield_steps", "phases.release_scale"]),
        (["model.gen_fraction=0.75"], ["model.gen_fraction"]),
    ],
)
def test_what_follows_from_a_factor_is_no_difference_and_no_licence(
    runs: Path, dials: list[str], factors: list[str]
) -> None:
    declared = ["system", "mix", *factors]
    write_run(runs, "dialled", 0, *dials)
    found = {row.key for row in audit_runs(runs, NONE, declared).differences}
    assert not [key for key in found if key.startswith("phases.list.")]
    write_run(runs, "sneaky", 0, *dials, FASTER)
    line = refused(runs, NONE, factors=declared)
    assert line.startswith(f"{runs / 'sneaky-seed0'} ")
    assert ".rate.gen is 10, in other runs (no such key)" in line


def test_pools_of_another_size_do_not_follow_from_the_dial(runs: Path) -> None:
    apart = runs / "apart"
    for seed in (0, 1):
        write_run(apart, "symbiotic", seed)
    write_run(apart, "sneaky", 0, "system.pools={und: null, gen: 0.75}")
    assert "system.pools.gen is 0.75, in other runs" in refused(apart, factors=["system.name", "mix", "model"])


def test_instruments_make_no_arm(runs: Path) -> None:
    write_run(runs, "watched", 2, "callbacks.sample_grid=null", "log_every=1", "threads=2")
    assert named(audit_runs(runs, NONE))["symbiotic"] == [0, 1, 2]


def test_an_unknown_factor_is_one_line(runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"factors: 'rate' is no key of the config; its top-level keys: .*rates"):
        audit_runs(runs, NONE, ["rate"])


# --------------------------------------------------------------------------- what must be the same


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"provenance": MADE | {"code": "0dd"}}, "(0dd): other code than the other 5 runs (c0de)"),
        ({"provenance": MADE | {"torch": "2.14"}}, "(2.14): other torch version than the other 5 runs (2.15.0)"),
        ({"provenance": MADE | {"numpy": "1"}}, "(1): other numpy version"),
        ({"data": "0dd"}, "(0dd): other data than the other 5 runs (da7a)"),
        ({"parent": "stage 0 9"}, "(stage 0 9): other parent, though seed and stage 0 are the same,"),
        ({"n": {"reading": 10, "flow_error": 20}}, "(10): other number of samples behind reading"),
    ],
)
def test_what_does_not_mix_is_refused_by_name(runs: Path, change: dict[str, Any], line: str) -> None:
    odd = runs / "symbiotic-seed1"
    edit(odd, lambda summary: summary.update(change))
    said = refused(runs)
    assert said.startswith(f"{odd} ")
    assert line in said


def test_commits_may_differ(runs: Path) -> None:
    edit(runs / "symbiotic-seed1", lambda summary: summary["provenance"].update(commit="abd"))
    assert audit_runs(runs, NONE).made["commits"] == "abc, abd"


def test_every_odd_run_is_counted(runs: Path) -> None:
    for seed in range(2, 9):
        write_run(runs, "symbiotic", seed, provenance=MADE | {"code": "new"})
    assert "standard-seed1 (c0de), " in refused(runs)
    assert " and 2 more: other code than the other 7 runs (new)" in refused(runs)


def test_two_runs_of_one_cell_are_refused(runs: Path) -> None:
    shutil.copytree(runs / "symbiotic-seed1", runs / "again")
    line = refused(runs)
    assert f"{runs / 'again'} and {runs / 'symbiotic-seed1'}: both are arm symbiotic, seed 1" in line


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s.pop("data"), "it does not say its data"),
        (lambda s: s["provenance"].pop("commit"), "it does not say its commit"),
        (lambda s: s.update(provenance={}), "it does not say its code, commit, torch, numpy, lightning"),
        (lambda s: s.pop("seed"), "it does not say its seed"),
    ],
)
def test_a_result_without_provenance_cannot_enter(runs: Path, change: Any, line: str) -> None:
    edit(runs / "symbiotic-seed1", change)
    audit = audit_runs(runs, declared())
    assert named(audit)["symbiotic"] == [0]
    assert f"left out: {runs / 'symbiotic-seed1'}: {line}; run it again" in audit.problems
    assert "missing: symbiotic, seed 1: no run" in audit.problems
    assert audit.seeds == (0,)


def test_a_run_without_a_config_cannot_enter(runs: Path) -> None:
    (runs / "symbiotic-seed1" / "config.yaml").unlink()
    (runs / "standard-seed1" / "config.yaml").write_text("{}")
    problems = audit_runs(runs, declared()).problems
    assert any("symbiotic-seed1/config.yaml: no such file" in line for line in problems)
    assert any("standard-seed1/config.yaml: not the config of a run of this code" in line for line in problems)


# --------------------------------------------------------------------------- what is absent


def test_missing_unfinished_and_stopped_runs_are_named(runs: Path) -> None:
    for name in ("symbiotic-seed1", "standard-seed1"):
        (runs / name / "summary.json").unlink()
    event = {"step": 5, "kind": "intervention", "text": "routing collapse at step 5", "action": "stop"}
    (runs / "standard-seed1" / "events.jsonl").write_text(json.dumps(event) + "\n")
    shutil.rmtree(runs / "control-seed0")
    audit = audit_runs(runs, declared())
    assert audit.problems[:3] == (
        f"missing: symbiotic, seed 1: {runs / 'symbiotic-seed1'}: unfinished",
        f"missing: standard, seed 1: {runs / 'standard-seed1'}: stopped by its alarm (routing collapse at step 5)",
        "missing: und, seed 0: no run",
    )
    assert "arms have different seeds (symbiotic: 0; standard: 0; und: 1)" in audit.problems[3]
    assert audit.seeds == ()


def test_an_arm_without_runs_is_missing(runs: Path) -> None:
    arms = {"symbiotic": [], "standard": list(STANDARD), "mot": ["system=mot"]}
    shutil.rmtree(runs / "control-seed0")
    shutil.rmtree(runs / "control-seed1")
    audit = audit_runs(runs, declared(arms=arms))
    assert list(named(audit)) == ["symbiotic", "standard"]
    assert audit.problems == ("missing: mot, seed 0: no run", "missing: mot, seed 1: no run")


def test_the_reference_must_be_there(runs: Path) -> None:
    for seed in (0, 1):
        shutil.rmtree(runs / f"standard-seed{seed}")
    assert refused(runs, declared()) == "study.reference=standard: no finished run of it; the other arms need it"


def test_a_folder_without_runs_is_one_line(tmp_path: Path) -> None:
    assert refused(tmp_path) == f"{tmp_path}: no finished run (a folder with summary.json) in here"


def test_an_alarm_that_intervened_is_marked(runs: Path) -> None:
    edit(runs / "symbiotic-seed1", lambda summary: summary.update(events={"intervention": 2}))
    audit = audit_runs(runs, declared())
    assert [arm.intervened for arm in audit.arms] == [[1], [], []]
    assert audit.problems == ("the collapse alarm changed the training of symbiotic, seed 1",)


def test_a_control_sees_the_same_understanding_tokens(runs: Path) -> None:
    edit(runs / "control-seed1", lambda summary: summary["tokens"].update(lm=299))
    problems = audit_runs(runs, declared()).problems
    assert problems == ("und is no control of symbiotic at matched tokens: seed 1, lm: 299 tokens, not 300",)


# --------------------------------------------------------------------------- budgets


def test_budgets(runs: Path) -> None:
    audit = audit_runs(runs, declared())
    made = audit.budgets["symbiotic"]
    assert (made.steps, made.seconds, made.tokens["lm"]) == (20, 10.5, (300, 300))
    assert made.split == {"before": 10, "after": 10, "added": 0, "latent_modules": 3}
    assert set(audit.overheads) == {"symbiotic", "und"}
    assert set(audit.overheads["symbiotic"].values()) == {0}
    edit(runs / "symbiotic-seed1", lambda summary: summary.pop("tokens"))
    edit(runs / "symbiotic-seed1", lambda receipt: receipt["parameters"].update(added=1), "receipt.json")
    made = audit_runs(runs, declared()).budgets["symbiotic"]
    assert (made.tokens, made.split) == ({}, {})


# --------------------------------------------------------------------------- evaluations


def write_results(folder: Path, **changes: Any) -> None:
    seed = read_json(folder / "summary.json")["seed"]
    score = {"value": 0.75, "n": 8, "low": None, "high": None, "benchmark": "reading"}
    results = {
        "step": 20, "ema": False, "as_trained": True, "seed": seed, "sampler": {"steps": 4}, "size": [8, 8],
        "data": "corpus",
        "evaluation_code": "e7a1", "versions": {"torch": "2"}, "protocol": {"reading": {"shots": 0, "files": "f1"}},
        "scores": {"reading": score},
    }  # fmt: skip
    write_json(folder / "evaluation" / "made" / "results.json", results | changes)


def evaluation(folder: Path) -> Path | None:
    return folder / "evaluation" / "made" if (folder / "evaluation").is_dir() else None


def evaluate_all(runs: Path, leave: Sequence[str] = ()) -> None:
    for path in sorted(runs.iterdir()):
        if path.name not in leave:
            write_results(path)


def test_evaluated_scores_stand_for_those_of_the_training(runs: Path) -> None:
    evaluate_all(runs)
    assert audit_runs(runs, declared()).arms[0].values("reading") == {0: 0.5, 1: 0.6}
    arm = audit_runs(runs, declared(), evaluated=evaluation).arms[0]
    assert arm.values("reading") == {0: 0.75, 1: 0.75}
    assert arm.values("reading", 20) == {0: 0.75, 1: 0.75}
    assert arm.values("flow_error") == {0: 1.0, 1: 1.0}


def test_anchors_are_those_measured_like_the_end(runs: Path) -> None:
    evaluate_all(runs)
    arm = audit_runs(runs, declared(), evaluated=evaluation).arms[0]
    assert arm.anchor("stage 0", "reading") == {0: 0.9, 1: 0.9}
    for path in runs.iterdir():
        write_results(path, as_trained=False)
        start = {"reading": {"value": 0.25, "n": 8, "benchmark": "reading"}}
        write_json(path / "evaluation" / "made" / "anchors.json", {"benchmarks": ["reading"], "iteration 0": start})
    arm = audit_runs(runs, declared(), evaluated=evaluation).arms[0]
    assert arm.anchor("iteration 0", "reading") == {0: 0.25, 1: 0.25}
    assert arm.anchor("stage 0", "reading") == {}  # its parent is gone: of other questions there is none
    assert arm.anchor("stage 0", "reading", 10) == {0: 0.9, 1: 0.9}  # values at earlier steps are the training's
    assert arm.runs[0].anchor("iteration 0", "reading")["n"] == 8
    assert arm.runs[0].anchor("iteration 0", "reading", 10)["n"] == 50


def test_a_seed_of_all_images_is_as_good_as_each_runs_own(runs: Path) -> None:
    for path in runs.iterdir():
        write_results(path, seed=5)
    audit_runs(runs, declared(), evaluated=evaluation)
    write_results(runs / "symbiotic-seed1")
    assert "other seed of the images" in refused(runs, declared(), evaluated=evaluation)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"evaluation_code": "0dd"}, "(0dd): other evaluation code than the other 5 runs (e7a1)"),
        ({"versions": {"torch": "1"}}, "(torch 1): other versions in the evaluation than the other 5 runs (torch 2)"),
        ({"protocol": {"reading": {"shots": 0, "files": "f2"}}}, "(files f2): other protocol of reading"),
        ({"scores": {"reading": {"value": 1, "n": 7}}}, "(7): other number of samples behind reading"),
        ({"device": "cuda"}, "(cuda): other kind of device than the other 5 runs"),
    ],
)
def test_evaluations_that_do_not_mix_are_refused(runs: Path, change: dict[str, Any], line: str) -> None:
    evaluate_all(runs)
    write_results(runs / "symbiotic-seed1", **change)
    said = refused(runs, declared(), evaluated=evaluation)
    assert said.startswith(f"{runs / 'symbiotic-seed1'} ")
    assert line in said


def test_what_one_evaluation_lacks_is_not_filled_up_from_the_training(runs: Path) -> None:
    """Of other samples than the others' score: a benchmark failed in this run alone."""
    evaluate_all(runs)
    write_results(runs / "symbiotic-seed1", scores={}, protocol={})
    audit = audit_runs(runs, declared(), evaluated=evaluation)
    assert audit.arms[0].values("reading") == {0: 0.75}
    assert audit.arms[0].values("flow_error") == {0: 1.0, 1: 1.0}  # which no evaluation measured
    assert any("reading" in line and "seed 1" in line for line in audit.problems)


def test_all_runs_are_evaluated_or_none(runs: Path) -> None:
    audit_runs(runs, declared(), evaluated=evaluation)
    evaluate_all(runs, leave=["symbiotic-seed1"])
    line = "not evaluated, while 5 other runs are: symbiotic-seed1; src/eval.py runs=FOLDER evaluates all of them"
    assert refused(runs, declared(), evaluated=evaluation) == line
    (runs / "symbiotic-seed1" / "evaluation" / "made").mkdir(parents=True)
    with pytest.raises(RunError, match="no such results"):
        audit_runs(runs, declared(), evaluated=evaluation)


def test_an_audit_changes_nothing(runs: Path) -> None:
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    one, other = audit_runs(runs, declared()), audit_runs(runs, declared())
    assert {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()} == before
    assert replace(one, arms=(), study=NONE) == replace(other, arms=(), study=NONE)
