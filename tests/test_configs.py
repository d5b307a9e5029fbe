"""Every shipped config composes, validates, and names classes that take its arguments; the run folder follows."""

from __future__ import annotations

import inspect
import json
import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from checkpoints import OLMOE, QWEN2, write
from symbiotic.checks.trainer import TRAINER_KEYS
from symbiotic.config import (
    CONF,
    UNSET,
    Composer,
    _ablated,
    _compose,
    _state,
    compose,
    instantiate,
    run_name,
    save_config,
)
from symbiotic.convert.split import assign, split_state
from symbiotic.launch import Failure, check_members, members, prepare_runs
from symbiotic.layout import (
    experts_seen,
    kinds_of,
    parameter_names,
    parent_system,
    pool_sizes,
    shield_kinds,
    trained_names,
)
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import KINDS, PARENT, Config, ConfigError, parse
from symbiotic.training.roles import assign_roles

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
SYSTEMS = sorted(path.stem for path in (CONF / "system").glob("*.yaml"))
FILES = sorted(path for path in CONF.rglob("*.yaml"))
SLOW = {"utamoe_stage1": pytest.mark.slow}  # the first part of utamoe
GLOBAL = ("experiment", "ablation", "vision", "study", "debug")  # groups whose files are deltas on the whole config
SETS = ("t2i", "t2i_long", "lm", "lm_unreplayed", "mmu")
SOURCES = f"data.source.sources={{{{{','.join(f'{name}:{{{{files:[x]}}}}' for name in SETS)}}}}}"
NEEDS = {  # options that mean nothing alone
    "rates=roles": None,  # what the other rates are built on
    "init=checkpoint": ["init.checkpoint={file}"],
    "data=shards": ["data.source.shards=[{file}]", "data.source.tokenizer={file}"],
    "data=sources": [SOURCES, "data.source.tokenizer={file}"],
    "data=stream": [SOURCES, "data.source.tokenizer={file}"],
    "init=pretrained": ["model=pretrained", "init.folder={folder}"],
    "model=pretrained": ["init=pretrained", "init.folder={folder}"],
    "trainer=ddp": ["data.micro_batches=2"],
    "phases=utamoe": ["lora=r16"],  # which its second stage trains
    "vision=tower": ["model.vision.path={folder}"],
    "ablation=two_experts": ["model.num_experts=16"],  # too few of the smoke model's
}
SHIELD = ("no_shielding", "release_0", "release_1", "shield_strict", "shield_vae_vit", "shield_weights")
UNFIT = {f"ablation={name}": "shield" for name in SHIELD}  # for utamoe, which has no shield,
UNFIT["ablation=router_only_split"] = "is seen by two"  # no expert that two of its groups share,
UNFIT["mix=und_only"] = r"system\.task_router=true: the mix trains understanding only"  # and tasks to tell apart
OPTIONS = [
    f"{path.parent.relative_to(CONF)}={path.stem}"
    for path in FILES
    if path.parent != CONF and path.parent.name != "experiment"
]


@pytest.fixture(scope="module")
def composer() -> Iterator[Composer]:
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        yield Composer()


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    """Full key -> value of a config."""
    value = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    if isinstance(value, dict):
        return {
            k: v for name, child in value.items() for k, v in _flat(child, f"{key}.{name}" if key else name).items()
        }
    if isinstance(value, list | tuple):
        return {k: v for i, child in enumerate(value) for k, v in _flat(child, f"{key}[{i}]").items()}
    return {key: value}


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("runs", "data", "cache"):
        monkeypatch.setenv(f"SYMBIOTIC_{name.upper()}", str(tmp_path / name))


# --------------------------------------------------------------------------- composition


@pytest.mark.parametrize("experiment", [pytest.param(name, marks=SLOW.get(name, ())) for name in EXPERIMENTS])
@pytest.mark.parametrize("option", [option for option in OPTIONS if NEEDS.get(option, ()) is not None])
def test_every_option_composes_and_validates(composer: Composer, experiment: str, option: str, tmp_path: Path) -> None:
    unfit = UNFIT | ({"lora=none": r"lora\.rank=0: a phase trains"} if experiment == "utamoe" else {})
    if experiment.startswith("utamoe") and option in unfit:
        with pytest.raises(ConfigError, match=unfit[option]):
            composer.config([f"experiment={experiment}", option])
        return
    file = tmp_path / "parent.safetensors"
    file.touch()
    folder = write(tmp_path / "hf", QWEN2 | {"num_experts": 16}, None)
    more = [o.format(file=file, folder=folder) for o in NEEDS.get(option) or ()]
    config = composer.config([f"experiment={experiment}", option, *more])
    assert config.name == experiment
    assert Path(config.run_dir).parent == tmp_path / "runs" / experiment


@pytest.mark.parametrize("mix", ["joint", "und_only"])
@pytest.mark.parametrize("rates", ["grouped", "uniform"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_axes_are_independent(composer: Composer, system: str, rates: str, mix: str) -> None:
    overrides = ["experiment=smoke", f"system={system}", f"rates={rates}", f"mix={mix}"]
    if system == "utamoe" and mix == "und_only":  # nothing for its task router to learn
        overrides.append("system.task_router=false")
    config = composer.config(overrides)
    assert config.system.name == system
    assert bool(config.mix.drop) == (mix == "und_only")


@pytest.mark.parametrize(
    ("overrides", "multirun"),
    [
        ([], False),
        (["experiment=smoke", "system=mot", "seed=3", "~callbacks.progress", "+callbacks.mine={a: 1}"], False),
        (["callbacks=[default,ema]", "rates.lr=1", "ablation=[ratio_3_1,no_shielding]", "++a.b='x y'"], False),
        (["mix={drop: [t2i]}", "study=main_job", "experiment=smoke", "paths.runs=${oc.env:HOME}"], False),
        (["experiment=smoke", "system=standard_moe,symbiotic", "seed=0,1", "phases.steps=7"], True),
    ],
)
def test_a_choice_of_options_that_is_known_composes_to_what_hydra_makes_of_it(
    composer: Composer, overrides: list[str], multirun: bool
) -> None:
    expected = _compose("train", overrides, multirun)
    for _ in range(2):
        found = composer.composed(overrides, multirun)
        assert found == expected
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
        assert OmegaConf.is_struct(found)
        found.seed = 99  # it is a copy


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.yaml").write_text("width: 3")
    first = _state(tmp_path)
    assert _state(tmp_path) == first
    (tmp_path / "model" / "a.yaml").write_text("width: 31")
    assert _state(tmp_path) != first


def test_shared_rates_are_no_option_of_their_own(composer: Composer) -> None:
    with pytest.raises(ConfigError, match=r"rates\.lr: missing"):
        composer.config(["rates=roles"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_hold_only_override_lines_and_run_level_keys(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    node = yaml.safe_load(text)
    run_level = set(yaml.safe_load((CONF / "run_level.yaml").read_text()))
    assert set(node) - {"defaults"} <= run_level
    assert all(next(iter(line)).startswith("override /") for line in node["defaults"])
    assert all(re.search(rf"^# {word} ", text, re.MULTILINE) for word in ("command", "cost", "result"))
    assert f"python src/train.py experiment={name}" in text


def test_ablations_never_touch_the_choice_of_a_system() -> None:
    for path in (CONF / "ablation").glob("*.yaml"):
        node = yaml.safe_load(path.read_text())
        assert "name" not in node.get("system", {}), path
        assert "system" not in str(node.get("defaults", "")), path


def test_only_deltas_are_global() -> None:
    for path in FILES:
        assert ("@package _global_" in path.read_text()) == (path.parent.name in GLOBAL), path


@pytest.mark.parametrize("ablation", [["ratio_3_1"], ["no_shielding"], ["ratio_3_1", "no_shielding"]])
def test_ablations_take_effect_alone_and_together(composer: Composer, ablation: list[str]) -> None:
    config = composer.config(["experiment=smoke", f"ablation=[{','.join(ablation)}]"])
    assert config.model.gen_fraction == (0.25 if "ratio_3_1" in ablation else 0.5)
    assert len(config.phases.list) == (1 if "no_shielding" in ablation else 2)
    assert config.ablation == ablation


ABLATIONS = sorted(path.stem for path in (CONF / "ablation").glob("*.yaml"))


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_is_one_delta_and_builds(composer: Composer, ablation: str) -> None:
    """Its keys hold, nothing else differs, and the model, its parent and the split of one into the other exist."""
    base = _flat(composer.config(["experiment=symbiotic"]))
    config = composer.config(["experiment=symbiotic", f"ablation={ablation}"])
    flat = _flat(config)
    changed = {key for key in base | flat if base.get(key) != flat.get(key)}
    changed = {key for key in changed if not key.startswith(("run_dir", "ablation", "logger"))}
    named = tuple(_ablated(ablation))
    made_of = {"phases.release_scale": "phases.list", "phases.shield_steps": "phases.list"}
    made_of |= {"model.gen_fraction": "system.pools"}
    allowed = (*named, *(made_of[key] for key in named if key in made_of))
    assert all(key.startswith(allowed) for key in changed), changed
    so_anyway = ("none", "ratio_1_1", "no_task_router", "prompt_und")  # in the embedded model, in symbiotic
    assert changed or ablation in so_anyway
    model = UnifiedModel(config.model, config.system)
    assign_roles((name for name, _ in model.named_parameters()), config.rates.roles)
    parent = parent_system(config.system, config.init.parent_shared)
    state = UnifiedModel(config.model, parent, latents=False).initialise(0).state_dict()
    counts = torch.rand(config.model.num_layers, len(KINDS), config.model.num_experts)
    assignment = assign(counts, config.model, config.system, config.init.assignment, 0)
    model.load_state_dict(split_state(state, model, assignment, 0, config.init))


def test_all_ablations_that_do_not_exclude_each_other_compose_together(composer: Composer) -> None:
    chosen = "shield_strict,release_1,single_lr,random_split,fresh_router,random_gen_experts,global_aux,ratio_3_1"
    config = composer.config(["experiment=symbiotic", f"ablation=[{chosen}]"])
    assert config.ablation == chosen.split(",")
    assert (config.system.shield.mode, config.init.router, config.model.gen_fraction) == ("strict", "fresh", 0.25)


def test_what_logs_steer_is_part_of_the_run_folder(composer: Composer) -> None:
    def folder(*overrides: str) -> str:
        return composer.config(["experiment=symbiotic", *overrides]).run_dir

    phases = "phases.list=[{name:a,until:99,when:{metric:train/ce,below:1.0}},{name:b,until:450}]"
    assert folder("log_every=5") == folder("log_every=10")
    assert folder("log_every=5", phases) != folder("log_every=10", phases)
    acts = "callbacks.collapse_alarm.action=revive"
    assert folder("log_every=5", acts) != folder("log_every=10", acts)


def test_keys_without_a_value_leave_the_name_of_a_run_alone(composer: Composer) -> None:
    """Those that came later: a run that does not use them keeps its folder."""
    raw = OmegaConf.to_container(composer.composed(["experiment=smoke"]), resolve=False)
    older = {**raw, **{group: {k: v for k, v in raw[group].items() if k not in keys} for group, keys in UNSET.items()}}
    assert run_name(older) == run_name(raw)
    raw["data"]["encoded"] = ["/some"]
    assert run_name(older) != run_name(raw)


# --------------------------------------------------------------------------- pretrained models


def test_the_numbers_of_a_pretrained_model_are_its_files(composer: Composer, tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", QWEN2, None)
    config = compose_from(folder)
    assert (config.model.width, config.model.shared_hidden, config.model.attention.qkv_bias) == (32, 24, True)
    assert (config.model.gen_fraction, config.init.stage0) == (0.25, None)
    long = [f"init.folder={folder}", "init=pretrained", "model=pretrained"]
    assert composer.config(["experiment=smoke", *long]).run_dir == config.run_dir
    assert compose_from(write(tmp_path / "hf", QWEN2 | {"hidden_size": 48}, None)).run_dir != config.run_dir


REFUSED = {
    "model.width=64": r"model\.width=64: must be 32, the hidden_size of .*config\.json; model=pretrained takes it",
    "model=smoke": r"model\.vocab_size=512: must be 96, the vocab_size of",
    "system=dense": r"system=dense: it has no routed experts",
    "init.parent_shared=false": r"init\.parent_shared=false: system=symbiotic has a shared expert",
    "init.checkpoint=none": r"init\.checkpoint is another start; must be null",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_a_pretrained_model_cannot_be_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[override]) as error:
        compose_from(write(tmp_path / "hf", QWEN2, None), override)
    assert "\n" not in str(error.value)


def test_a_model_without_a_shared_expert_names_the_systems_that_work(tmp_path: Path) -> None:
    folder = write(tmp_path / "hf", OLMOE, None)
    with pytest.raises(ConfigError, match=r"system=symbiotic: it has a shared expert, and OlmoeForCausalLM has none"):
        compose_from(folder)
    for works in ("ablation=no_shared_ever", "system=symbiotic_bridge"):
        assert compose_from(folder, works).model.shared_hidden == 0
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"init\.folder=.*: no config\.json in it"):
        compose_from(folder)


def compose_from(folder: Path, *overrides: str) -> Config:
    return compose(["experiment=smoke", f"init_from={folder}", *overrides])


# --------------------------------------------------------------------------- what the values mean


def test_the_stages_of_utamoe_refer_to_their_numbers(composer: Composer) -> None:
    phases = composer.config(["experiment=utamoe", "phases.steps=20", "phases.stage1_steps=8"]).phases
    assert [(p.name, p.until, p.route_by) for p in phases.list] == [("stage1", 8, "truth"), ("stage2", 20, "predicted")]
    only = {n: composer.config(["experiment=utamoe", f"phases.stage1_steps={n}"]).phases.list for n in (0, 450)}
    assert {n: [p.name for p in listed] for n, listed in only.items()} == {0: ["stage2"], 450: ["stage1"]}


def test_the_ablations_of_task_routing(composer: Composer) -> None:
    """Lookup by task, lookup by modality, and symbiotic's pools by task: one delta each, which combine."""
    lookup = composer.config(["experiment=utamoe", "ablation=no_task_router"]).system
    assert (lookup.task_router, lookup.visible["prompt"], lookup.top_k) == (False, ("gen",), 1)
    modality = composer.config(["experiment=utamoe", "ablation=[no_task_router,prompt_und]"]).system
    assert (modality.task_router, modality.visible["prompt"]) == (False, ("und",))
    assert composer.config(["ablation=prompt_gen"]).system.visible["prompt"] == ("gen",)
    two = composer.config(["experiment=utamoe", "ablation=two_experts"])
    assert pool_sizes(two.model, two.system) == {"und": 2, "gen": 2}


def test_phases_refer_to_their_three_numbers(composer: Composer) -> None:
    phases = composer.config(["phases.steps=200", "phases.shield_steps=50", "phases.release_scale=0.25"]).phases
    assert [(p.name, p.until, p.shield) for p in phases.list] == [("shield", 50, 1.0), ("joint", 200, 0.75)]


def test_a_phase_without_a_step_is_left_out(composer: Composer) -> None:
    assert [p.name for p in composer.config(["phases.shield_steps=0"]).phases.list] == ["joint"]
    assert [p.name for p in composer.config(["phases.shield_steps=450"]).phases.list] == ["shield"]


def test_a_role_set_to_null_has_the_common_rate(composer: Composer) -> None:
    high = dict.fromkeys(("gen", "latent", "task", "lora"), 3e-3)
    assert composer.config([]).rates.by_role == high
    assert composer.config(["rates=uniform"]).rates.by_role == {}
    without = {role: rate for role, rate in high.items() if role != "gen"}
    assert composer.config(["rates.by_role.gen=null"]).rates.by_role == without


def test_a_checkpoint_replaces_stage_0(composer: Composer, tmp_path: Path) -> None:
    file = tmp_path / "parent.safetensors"
    file.touch()
    assert composer.config([f"init.checkpoint={file}"]).init.stage0 is None


def test_a_saved_config_reads_back_as_itself(composer: Composer, tmp_path: Path) -> None:
    config = composer.config(["experiment=smoke", "system=bagel"])
    save_config(config, tmp_path / "config.yaml")
    assert parse(Config, yaml.safe_load((tmp_path / "config.yaml").read_text())) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


# --------------------------------------------------------------------------- layout


@pytest.mark.parametrize("system", SYSTEMS)
def test_parameter_names_and_roles_are_those_of_the_model(composer: Composer, system: str) -> None:
    dials = ["model.attention.qkv_bias=true", "model.tied_head=true"]
    dials += ["model.gated_shared=true"] if system != "symbiotic_bridge" else []  # which has no shared expert
    dense = ["model.dense_layers=[0]", "model.dense_hidden=16"]
    more = ["model.attention.qk_norm=none", "model.projector_hidden=24"]
    for overrides in ([], [*dials, *dense, "lora=r16"], more):
        config = composer.config(["experiment=smoke", f"system={system}", *overrides])
        for layout, latents in ((config.system, True), (parent_system(config.system), False)):
            names = [name for name, _ in UnifiedModel(config.model, layout, latents).named_parameters()]
            assert sorted(parameter_names(config.model, layout, latents)) == sorted(names)
            assert set(assign_roles(names, config.rates.roles)) == set(names)
        adapted = UnifiedModel(config.model, config.system).adapt(config.lora, 0)
        names = [name for name, _ in adapted.named_parameters()]
        assert sorted(trained_names(config)) == sorted(names)
        roles = assign_roles(names, config.rates.roles)
        assert ("lora" in roles.values()) == ("lora=r16" in overrides)


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_expert_is_seen_and_the_parent_has_one_of_each(composer: Composer, system: str) -> None:
    config = composer.config([f"system={system}"])
    sizes = pool_sizes(config.model, config.system)
    assert sum(sizes.values()) * config.system.merge == (config.model.num_experts if sizes else 0)
    assert all(kinds_of(config.system, f"pools.{pool}") for pool in sizes)
    parent = parent_system(config.system)
    assert pool_sizes(config.model, parent) == ({PARENT: 16} if sizes else {})
    assert set(experts_seen(config.model, parent).values()) == {16 if sizes else 0}
    assert shield_kinds(parent) == {}


def test_shields_spell_out_the_shared_experts(composer: Composer) -> None:
    assert shield_kinds(composer.config([]).system) == {"shared.all": ("vae",)}
    assert shield_kinds(composer.config(["system.shield.mode=none"]).system) == {}
    both = composer.config(["++system.shield.targets={shared: [vae, vit], pools.und: [text]}"]).system
    assert shield_kinds(both) == {"shared.all": ("vit", "vae"), "pools.und": ("text",)}
    assert set(KINDS) == set(kinds_of(both, "shared.all"))


# --------------------------------------------------------------------------- the run folder


def test_the_run_folder_follows_from_what_matters(composer: Composer, tmp_path: Path) -> None:
    def folder(*overrides: str) -> str:
        return str(Path(composer.config(["experiment=smoke", *overrides]).run_dir).relative_to(tmp_path / "runs"))

    usual = folder()
    assert re.fullmatch(r"smoke/symbiotic-[0-9a-f]{8}-seed0", usual)
    unchanged = ["threads=2", "dry_run=true", "log_every=7", "save_every=3", "logger=none", "data.num_workers=2"]
    assert {folder(o) for o in [*unchanged, "trainer=ddp", f"paths.data={tmp_path}/other", "metric=reading"]} == {usual}
    changed = ["rates.lr=1e-4", "phases.steps=21", "mix=und_only", "data.samples=8", "trainer.precision=64-true"]
    changed += ["evaluation.images=4", "init.stage0.max_steps=5", "callbacks.sample_grid=null"]
    assert len({usual, *(folder(o) for o in changed)}) == len(changed) + 1
    assert folder("seed=3") == usual.replace("seed0", "seed3")
    assert folder("name=other") == usual.replace("smoke/", "other/")
    # a study makes a parent beside the first run that needs it: two processes cannot be at work in one folder
    assert folder("parent_only=true") == f"{usual}-parent"


def test_pools_in_another_order_are_another_layout(composer: Composer) -> None:
    raw: Any = OmegaConf.to_container(composer.composed([]), resolve=False)
    swapped = {**raw["system"], "pools": dict(reversed(raw["system"]["pools"].items()))}
    assert run_name(raw) != run_name({**raw, "system": swapped})
    assert run_name(raw) == run_name(dict(reversed(raw.items())))


def test_members_of_a_multirun_have_the_folders_of_single_runs(composer: Composer) -> None:
    master = composer.composed(["experiment=smoke", "system=standard_moe,symbiotic", "seed=0,1"], multirun=True)
    configs = check_members(composer, master, [])
    assert [(c.system.name, c.seed) for c in configs] == [(s, n) for s in ("standard_moe", "symbiotic") for n in (0, 1)]
    single = composer.config(["experiment=smoke", "system=symbiotic", "seed=1"])
    assert configs[-1].run_dir == single.run_dir
    subdir = composer.composed(members(master)[-1])["hydra"]
    assert f"{subdir.sweep.dir}/{subdir.sweep.subdir}" == single.run_dir == subdir.run.dir


def test_a_study_can_ask_for_a_multirun(composer: Composer, tmp_path: Path) -> None:
    study = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n"
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "seeds.yaml").write_text(study)
    overrides = [f"hydra.searchpath=['file://{tmp_path}']", "study=seeds"]
    assert members(composer.composed(overrides, multirun=True)) == [
        ["seed=0", "study=seeds"],
        ["seed=1", "study=seeds"],
    ]
    assert prepare_runs(composer, composer.composed(overrides, multirun=True), overrides, multirun=False) is True
    assert prepare_runs(composer, composer.composed([], multirun=True), [], multirun=False) is False


def test_a_failure_crosses_processes() -> None:
    failure = pickle.loads(pickle.dumps(Failure(status=2)))
    assert math.isnan(failure)
    assert failure.status == 2


# --------------------------------------------------------------------------- building


def targets(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_target_takes_its_arguments(composer: Composer, experiment: str) -> None:
    from hydra.utils import get_class

    config = composer.config([f"experiment={experiment}"])
    nodes = list(targets(json.loads(json.dumps(asdict(config)))))
    assert len(nodes) >= 10
    for node in nodes:
        given = {name: value for name, value in node.items() if name != "_target_"}
        signature = inspect.signature(get_class(node["_target_"]))
        if node["_target_"].startswith("symbiotic."):
            assert all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values())
        signature.bind_partial(**given)
        if node["_target_"].startswith("torch.optim"):
            given["params"] = []
        signature.bind(**given)


@pytest.mark.parametrize("trainer", ["cpu", "gpu", "ddp", "fsdp"])
def test_trainers_name_arguments_of_lightning(composer: Composer, trainer: str) -> None:
    config = composer.config(["experiment=smoke", f"trainer={trainer}", "debug=overfit"])
    given = {name: value for name, value in config.trainer.items() if name != "expert_parallel"}
    assert set(inspect.signature(lightning.Trainer).bind(**given).arguments) == set(given)


def test_the_known_arguments_are_those_of_lightning() -> None:
    assert set(inspect.signature(lightning.Trainer).parameters) >= TRAINER_KEYS


def test_instantiate_builds_what_is_allowed(composer: Composer) -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    groups = [{"params": [weight], "lr": 0.5, "role": "gen"}]
    optimizer = instantiate(composer.config([]).rates.optimizer, "rates.optimizer", params=groups)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.param_groups[0]["params"][0] is weight
    assert optimizer.param_groups[0]["role"] == "gen"
    assert tuple(optimizer.defaults["betas"]) == (0.9, 0.95)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "subprocess.Popen", "args": "true"},
        {"_target_": "torch.optim.adamw.torch.load", "f": "x"},
        {"_target_": "lightning.pytorch.loggers.csv_logs.os.system", "command": "true"},
        {"_target_": "symbiotic.config.os.system", "command": "true"},
        {"_target_": "symbiotic.config.instantiate", "node": {}},
        {"_target_": "torch.optim.AdamW", "_args_": [1]},
        {"_target_": "torch.optim.AdamW", "_partial_": True},
        {"_target_": "torch.optim.AdamW", "lr": {"_target_": "os.getcwd"}},
        {"_target_": "torch.optim.AdamW", "learning_rate": 1},
        {"lr": 1},
    ],
)
def test_instantiate_refuses_the_rest(node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^key"):
        instantiate(node, "key")


@pytest.mark.parametrize(
    ("target", "argument", "line"),
    [
        ("mmlu_benchmark.MMLU", {"shots": 2.5}, "key.shots=2.5: must be int, not float"),
        ("mmlu_benchmark.MMLU", {"folder": 3}, "key.folder=3: must be str, not int"),
        ("ocrbench_benchmark.OCRBench", {"resize": "maybe"}, "key.resize='maybe': must be bool, not str"),
        ("fid.FID", {"kid_subsets": None}, "key.kid_subsets=None: must be int"),
    ],
)
def test_arguments_of_our_classes_have_their_types(target: str, argument: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(line)):
        instantiate({"_target_": f"symbiotic.evaluation.{target}", **argument}, "key")
    instantiate({"_target_": "symbiotic.evaluation.mmlu_benchmark.MMLU", "folder": None, "max_tokens": 9}, "key")


def test_the_words_of_the_trainer_are_those_of_lightning() -> None:
    """Checked without importing it, and held against it here."""
    from typing import get_args

    from lightning.fabric.connector import _PRECISION_INPUT_STR, _PRECISION_INPUT_STR_ALIAS
    from lightning.pytorch.accelerators import AcceleratorRegistry

    from symbiotic.checks.trainer import ACCELERATORS, PRECISIONS

    assert set(get_args(_PRECISION_INPUT_STR)) | set(get_args(_PRECISION_INPUT_STR_ALIAS)) == set(PRECISIONS)
    assert set(AcceleratorRegistry) | {"auto", "gpu"} == set(ACCELERATORS)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "NAdam", "Adafactor", "SparseAdam"])
def test_an_optimiser_of_torch_takes_its_own_arguments(name: str) -> None:
    import inspect

    import torch

    from symbiotic.checks.optimizer import check_optimizer

    known = [key for key in inspect.signature(getattr(torch.optim, name)).parameters if key not in ("params", "lr")]
    signature = inspect.signature(getattr(torch.optim, name)).parameters
    node = {key: signature[key].default for key in known if not key.startswith("beta2")}
    check_optimizer({"_target_": f"torch.optim.{name}", **node}, "rates.optimizer")
    with pytest.raises(ConfigError, match=rf"rates\.optimizer\.speed: no such argument of torch\.optim\.{name}"):
        check_optimizer({"_target_": f"torch.optim.{name}", "speed": 1}, "rates.optimizer")
