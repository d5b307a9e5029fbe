"""What a study declares, and what is wrong with one, in a line each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from symbiotic.config import CONF, compose
from symbiotic.schema import ConfigError
from symbiotic.studies.runs_of import config_keys, differing, plain, training_keys
from symbiotic.studies.study import covers, find_controls, read_study, set_by_ablations, study_of

NODE: dict[str, Any] = {
    "name": "small",
    "experiment": "smoke",
    "seeds": [0, 1],
    "reference": "standard",
    "factors": ["system", "mix", "rates"],
    "arms": {
        "standard": ["system=standard_moe"],
        "symbiotic": [],
        "control": ["mix=und_only"],
    },
    "hypotheses": [
        {"claim": "better", "metric": "reading", "arm": "symbiotic", "against": "control", "expect": "higher"},
    ],
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The study with one value set, at `a/b/0/c`."""
    node = copy.deepcopy(NODE)
    *above, last = path.split("/")
    inside: Any = node
    for key in above:
        inside = inside[int(key) if isinstance(inside, list) else key]
    inside[last] = value
    return {"study": node}


def test_it_is_read() -> None:
    study = study_of({"study": NODE})
    assert study.arms["standard"] == ("system=standard_moe",)
    assert study.hypotheses[0].margin == 0
    assert study.composed["standard"]["system"]["name"] == "standard_moe"


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("arm", {}, "study.arm: no such key; did you mean 'arms'?"),
        ("seeds", [], r"study.seeds=\[\]: must be different whole numbers, at least one"),
        ("seeds", [1, 1], r"study.seeds=\[1, 1\]: must be different"),
        (
            "reference",
            "standart",
            "study.reference=standart: must be one of the study's arms; did you mean 'standard'?",
        ),
        ("reference", None, "study.reference: missing"),
        ("factors", ["systems"], "study.factors: 'systems' is no key of the config; did you mean 'system'?"),
        ("controls", {"symbiotic": "nobody"}, "study.controls.symbiotic=nobody: must be one of the study's arms"),
        ("arms/symbiotic", ["rates.lr=fast"], "study.arms.symbiotic: rates.lr='fast': must be float"),
        ("arms/symbiotic", ["rate.lr=1"], "study.arms.symbiotic: rate.lr=1: no such key"),
        ("arms/symbiotic", ["seed=3"], "study.arms.symbiotic: seed=3: seeds are the study's"),
        ("arms/control", ["threads=2"], "study.arms.control: composes to the same run as symbiotic"),
        ("hypotheses/0/arm", "nobody", r"study.hypotheses\[0\].arm=nobody: must be one of the study's arms"),
        (
            "hypotheses/0/against",
            "stage 1",
            r"against=stage 1: must be one of the study's arms; did you mean 'stage 0'",
        ),
        ("hypotheses/0/against", "symbiotic", "must be another arm than"),
        (
            "hypotheses/0/metric",
            "readings",
            "metric=readings: no such score, nor routing/METRIC/KIND or leak/all; did you mean 'rea",
        ),
        ("hypotheses/0/metric", "routing/capacity@1/words", "no such score, nor routing/METRIC/KIND"),
        ("hypotheses/0/expect", "better", "expect='better': must be one of higher, lower, equal"),
        ("hypotheses/0/expect", "equal", r"margin=0: must be above 0"),
        ("hypotheses/0/margin", -0.1, r"margin=-0.1: must not be < 0"),
        (
            "arms/control",
            ["mix=und_only", "rates.lr=1e-5"],
            r"against=control: symbiotic has none: no arm is equal to it",
        ),
    ],
)
def test_what_is_wrong_is_one_line(path: str, value: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        study_of(changed(path, value))
    assert "\n" not in str(caught.value)


def test_hypotheses_need_arms() -> None:
    with pytest.raises(ConfigError, match=r"study\.arms: missing"):
        study_of({"study": {"hypotheses": NODE["hypotheses"]}})


def test_shipped_studies_are_right() -> None:
    names = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))
    assert {"main_job", "none"} <= set(names)
    for name in names:
        node = yaml.safe_load((CONF / "study" / f"{name}.yaml").read_text())
        assert set(node) <= {"study"}
        assert read_study(name).name == name
    assert read_study("none").arms == {}
    with pytest.raises(ConfigError, match="study=main_jobs: no such option; did you mean 'main_job'"):
        read_study("main_jobs")


def test_the_main_jobs_controls_are_found() -> None:
    study = read_study("main_job")
    assert find_controls(study.composed, {}) == {
        "symbiotic": "und_only",
        "standard_moe 7e-4": "und_only 7e-4",
        "standard_moe 2e-3": "und_only 2e-3",
    }
    assert find_controls(study.composed, {"mot": "und_only"})["mot"] == "und_only"


def test_a_run_is_a_member_of_a_study_without_being_another_run() -> None:
    alone, member = compose(["experiment=symbiotic"]), compose(["experiment=symbiotic", "study=main_job"])
    assert member.run_dir == alone.run_dir
    assert member.study["name"] == "main_job"
    assert not differing(config_keys(plain(alone)), config_keys(plain(member)))


# --------------------------------------------------------------------------- which keys count


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("seed=4", []),
        ("threads=2", []),
        ("log_every=7", []),
        ("callbacks.sample_grid=null", []),
        ("callbacks.collapse_alarm.ratio=0.1", []),
        ("data.num_workers=2", []),
        ("trainer.accelerator=auto", []),
        ("rates.lr=1e-5", ["rates.lr"]),
        ("callbacks.collapse_alarm.action=revive", ["callbacks.collapse_alarm"]),
        ("trainer.precision=bf16-mixed", ["trainer.precision"]),
        ("phases.release_scale=0.5", ["phases.release_scale", "phases.list.joint.shield"]),
        ("model.gen_fraction=0.25", ["system.pools.gen", "model.gen_fraction"]),
        ("evaluation.questions=10", ["evaluation.questions"]),
    ],
)
def test_keys_that_decide_a_result(override: str, keys: list[str]) -> None:
    one, other = (plain(compose(["experiment=smoke", *more])) for more in ([], [override]))
    assert differing(config_keys(one), config_keys(other)) == keys
    training = [key for key in keys if not key.startswith("evaluation.")]
    assert differing(training_keys(one), training_keys(other)) == training


def test_the_order_of_pools_counts() -> None:
    config = plain(compose(["experiment=smoke"]))
    swapped = {**config, "system": {**config["system"], "pools": dict(reversed(config["system"]["pools"].items()))}}
    assert differing(config_keys(config), config_keys(swapped)) == ["system.pools (order)"]


def test_factors_cover_what_stands_below() -> None:
    assert covers("rates", "rates.by_role.gen")
    assert covers("system.pools", "system.pools (order)")
    assert not covers("rates.lr", "rates")
    assert not covers("rate", "rates.lr")
    assert not covers("phases.steps", "phases.list.joint.until")
    assert set_by_ablations("model.gen_fraction", ["ratio_3_1"]) == "ablation=ratio_3_1"
    assert set_by_ablations("rates.lr", ["ratio_3_1"]) is None
