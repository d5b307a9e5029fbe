"""From the command line to typed configs: compose, validate every member of a multirun before any starts, launch.

Nothing here imports torch: a wrong config costs one line on stderr, exit status 2, and no run folder. Hydra composes
and launches; its search for near misses, its tracebacks and its time-stamped folders are replaced.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from symbiotic.checks.effects import check_effects
from symbiotic.checks.evaluation import check_evaluation
from symbiotic.checks.targets import ALLOWED, check_arguments, check_targets, signature_arguments
from symbiotic.checks.values import check
from symbiotic.convert.families import nested, pretrained
from symbiotic.files import write_text
from symbiotic.hints import COMPOSE_ERRORS, explain
from symbiotic.ranks import started
from symbiotic.redact import redacted
from symbiotic.schema import Config, ConfigError, EvalConfig, near_miss, parse

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"

VOLATILE = (
    *("hydra", "run_dir", "name", "paths", "threads", "dry_run", "log_every", "save_every", "metric", "logger"),
    *("study", "parent_only", "allow_changes"),
)
"""Top-level keys that do not change what a run computes: they are left out of the run folder's hash. So are the seed,
which the folder's name shows, `data.num_workers`, and the keys of the trainer that only say where the run runs."""

PARENT_ONLY = "-parent"
"""End of the folder's name of a job that makes only a parent."""

LISTS = ("ablation", "callbacks", "logger")
"""Groups of which several options may be chosen at once: `ablation=[a,b]`."""

PATHS = ("run", "runs", "checkpoint", "report")
"""Keys of `src/eval.py` whose values are paths."""

INIT_FROM = "init_from"

UNSET = {
    "init": ("assignment_file",),
    "model": ("vit_dim", "vision", "projector_hidden"),
    "data": ("encoded", "autoencoder", "vision"),
}
"""Keys that are left out of the hash where nothing is set."""

VOLATILE_SOURCE = ("cache", "cache_gb", "retries", "wait", "timeout")
"""Keys of a source of data that only say how it is read."""

VOLATILE_TRAINER = ("accelerator", "devices", "num_nodes", "strategy", "expert_parallel", "profiler")

# --------------------------------------------------------------------------- the run folder


def run_name(raw: Mapping[str, Any]) -> str:
    """`<system>-<hash8>-seed<k>`: a function of the composed config, of its machine independent part only. A job that
    makes only the parent of such a run has `-parent` behind it: the run itself may begin beside it.

    raw: the composed config with its interpolations unresolved.
    """
    fixed: dict[str, Any] = {"run_dir": "", "name": "", "seed": 0, "log_every": 1, "save_every": 1}
    fixed["paths"] = {"runs": "runs", "data": "data", "cache": "cache"}
    plain = resolved({**{k: v for k, v in raw.items() if k != "hydra"}, **fixed})
    kept = {k: v for k, v in plain.items() if k not in (*VOLATILE, "seed", "ablation")}
    if _logs_steer(kept):
        kept["log_every"] = raw["log_every"]
    kept["trainer"] = {k: v for k, v in (kept.get("trainer") or {}).items() if k not in VOLATILE_TRAINER}
    kept["data"] = {k: v for k, v in kept["data"].items() if k != "num_workers"}
    for group, keys in UNSET.items():  # so that runs without them keep their names
        kept[group] = {k: v for k, v in kept[group].items() if k not in keys or v not in (None, [])}
    if isinstance(source := kept["data"].get("source"), dict):  # an address that is signed anew is the same
        kept["data"]["source"] = redacted({k: v for k, v in source.items() if k not in VOLATILE_SOURCE})
    kept["system"] = {**kept["system"], "pools": list(kept["system"].get("pools", {}).items())}  # their order counts
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]
    return f"{kept['system']['name']}-{digest}-seed{raw['seed']}{PARENT_ONLY if raw.get('parent_only') else ''}"


def _logs_steer(plain: Mapping[str, Any]) -> bool:
    """Whether training depends on what is logged: a phase that ends by a metric, an alarm that acts."""
    phases = plain["phases"].get("list") or ()
    alarm = plain["callbacks"].get("collapse_alarm") or {}
    by_metric = any(isinstance(phase, Mapping) and phase.get("when") for phase in phases)
    return by_metric or alarm.get("action", "warn") != "warn"


def _register_resolvers() -> None:
    """At import, so that a launcher's worker process has them as soon as it unpickles `job`."""

    def name_of(*, _root_: DictConfig) -> str:
        return run_name(_as_dict(OmegaConf.to_container(_root_, resolve=False)))

    def from_file(name: str, *, _root_: DictConfig) -> Any:
        folder = OmegaConf.select(_root_, "init.folder")
        if folder is None:
            raise ConfigError("model=pretrained: its numbers are the file's; set init=pretrained init.folder=FOLDER")
        found: Any = nested(pretrained(folder).fields)
        for part in name.split("."):
            found = found[part]
        return list(found) if isinstance(found, tuple) else found

    OmegaConf.register_new_resolver("run_name", name_of, replace=True)
    OmegaConf.register_new_resolver("pretrained", from_file, replace=True)

    def started_with(name: str, alone: int = 1) -> int:
        ranks = started()
        return alone if ranks is None else int(getattr(ranks, name))

    OmegaConf.register_new_resolver("started", started_with, replace=True)
    OmegaConf.register_new_resolver("complement", lambda x: round(1.0 - float(x), 12), replace=True)
    OmegaConf.register_new_resolver("under_root", lambda name: str(ROOT / name), replace=True)


_register_resolvers()

# --------------------------------------------------------------------------- composed -> typed


def _as_dict(container: Any) -> dict[str, Any]:
    assert isinstance(container, dict)
    return container


def resolved(raw: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Interpolations replaced, and what a config may leave open closed: roles set to null have the common rate,
    phases without a step and a stage 0 that a checkpoint replaces are left out."""
    tree = raw if isinstance(raw, DictConfig) else OmegaConf.create(dict(raw))
    plain = _as_dict(OmegaConf.to_container(tree, resolve=True))
    rates, phases, init = (plain.get(group) for group in ("rates", "phases", "init"))
    if isinstance(rates, dict) and isinstance(rates.get("by_role"), dict):
        rates["by_role"] = {role: rate for role, rate in rates["by_role"].items() if rate is not None}
    if isinstance(phases, dict) and isinstance(phases.get("list"), list):
        phases["list"] = _lasting(phases)
    if isinstance(init, dict) and init.get("checkpoint") is not None:
        init["stage0"] = None
    return plain


def _lasting(phases: Mapping[str, Any]) -> list[Any]:
    listed = [p for p in phases["list"] if not (isinstance(p, dict) and p.get("until") == 0)]
    to_the_end = phases.get("steps") in (phases.get("shield_steps"), phases.get("stage1_steps"))
    if to_the_end and len(listed) > 1 and listed[-2].get("until") == listed[-1].get("until"):
        listed.pop()
    return listed


def load(raw: Mapping[str, Any], choices: Mapping[str, Any], overrides: Sequence[str]) -> Config:
    """The typed, validated config of one run.

    raw: composed and unresolved, without Hydra's own node. choices: option of each group. overrides: as typed.

    Raises:
        ConfigError: anything that is wrong with it.
    """
    for name, node in raw.items():
        if (CONF / name).is_dir() and not isinstance(node, Mapping):
            raise ConfigError(f"{name}={node}: must be a mapping with the keys of the group {name}")
    ablated = ablations(choices, overrides)
    extra = {"ablation": ablated}
    tree = OmegaConf.create({**raw, "run_dir": ""})  # made once: that takes longer than all the rest
    parse(Config, resolved(tree) | extra)  # first without the folder, whose name is made of the rest
    tree["run_dir"] = raw.get("run_dir", "???")
    tree["run_dir"] = tree["run_dir"]  # now the text that it resolves to
    plain = resolved(tree) | extra
    config = parse(Config, plain)
    built = {f"{group}.{name}": node for group in ("callbacks", "logger") for name, node in plain[group].items()}
    built |= {f"evaluation.benchmarks.{name}": node for name, node in config.evaluation.benchmarks.items()}
    built |= {"data.source": config.data.source, "rates.optimizer": config.rates.optimizer}
    built |= {"objective.image_tokenizer": config.objective.image_tokenizer}
    built |= {"data.autoencoder": config.data.autoencoder, "data.vision": config.data.vision}
    for key, node in built.items():
        if node is not None:
            check_targets(node, key)
    for group in ("callbacks", "logger"):
        for name in (name for name, node in plain[group].items() if node is None and name not in shipped(group)):
            near = near_miss(name, shipped(group))
            raise ConfigError(f"{group}.{name}=null: has no effect: none has this name; {near}")
    check(config)
    check_effects(config, raw, explicit_keys(ablated, overrides))
    return config


@functools.cache
def shipped(group: str) -> frozenset[str]:
    """Names of what the options of a group hold: those of the callbacks, say."""
    return frozenset(str(name) for path in (CONF / group).glob("*.yaml") for name in read_yaml(path) or ())


def explicit_keys(ablated: Sequence[str], overrides: Sequence[str]) -> dict[str, str]:
    """Full key -> how the user set it: on the command line (or as a sweep's parameter), or through an ablation."""
    keys = {key: f"ablation={name}" for name in ablated for key in _ablated(name)}
    for key, value, written in _assignments(overrides):
        is_group = (CONF / key).is_dir()
        if is_group and isinstance(value, list) and key not in LISTS:
            raise ConfigError(f"{written}: {key} takes one option; only {' and '.join(LISTS)} take lists")
        if not (is_group and isinstance(value, (str, list))):
            keys.update(dict.fromkeys(_leaves(key, value), written))
    return keys


def _assignments(overrides: Sequence[str]) -> Iterator[tuple[str, Any, str]]:
    """Key, value and text of every override that sets something."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if not override.is_delete():
            yield override.key_or_group, override.value(), override.input_line or override.key_or_group


def ablations(choices: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """The ablations chosen; Hydra's table of choices lacks a group of which a list was chosen."""
    typed = [value for key, value, _ in _assignments(overrides) if key == "ablation"]
    chosen = typed[-1] if typed else choices.get("ablation") or "none"
    return [str(name) for name in ([chosen] if isinstance(chosen, str) else chosen) if name != "none"]


def set_by(line: str, names: Sequence[str]) -> str:
    """` (set by ablation=NAME)` where a message is about a key that an ablation set, else nothing."""
    setters = [name for name in names if any(line.startswith((f"{key}=", f"{key}:")) for key in _ablated(name))]
    return f" (set by ablation={setters[0]})" if setters else ""


def _ablated(name: str) -> dict[str, Any]:
    path = CONF / "ablation" / f"{name}.yaml"
    node = yaml.safe_load(path.read_text()) if path.is_file() else None
    return {k: v for top, value in (node or {}).items() if top != "defaults" for k, v in _leaves(top, value).items()}


def _leaves(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    return {k: v for name, child in value.items() for k, v in _leaves(f"{key}.{name}", child).items()}


# --------------------------------------------------------------------------- composing


def _compose(config_name: str, overrides: list[str], multirun: bool) -> DictConfig:
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    mode = RunMode.MULTIRUN if multirun else RunMode.RUN
    return hydra.compose_config(config_name, overrides, mode, validate_sweep_overrides=not multirun)


@functools.lru_cache(maxsize=256)
def _options(config_name: str, overrides: tuple[str, ...], multirun: bool, state: Any) -> DictConfig:
    """The config of chosen options; to be copied, not changed. state: of the files that it is read from."""
    return _compose(config_name, list(overrides), multirun)


def _state(folder: str | Path) -> tuple[Any, ...]:
    """Of the files of a folder: another after any of them was changed."""
    with os.scandir(folder) as entries:
        listed = sorted(entries, key=lambda entry: entry.name)
    return tuple(_state(e.path) if e.is_dir() else (e.path, e.stat().st_mtime_ns, e.stat().st_size) for e in listed)


OWN_FOLDER = "command-line"


def search_too(folder: Path) -> None:
    """Configs are looked for in this folder too, behind those that are shipped: `--config-dir`, as Hydra has it. Use
    inside `hydra.initialize_config_dir`.

    Raises:
        ConfigError: no such folder.
    """
    from hydra._internal.config_repository import ConfigRepository
    from hydra.core.global_hydra import GlobalHydra

    if not folder.is_dir():
        raise ConfigError(f"--config-dir {folder}: no such folder")
    loader: Any = GlobalHydra.instance().hydra.config_loader  # type: ignore[union-attr]
    loader.config_search_path.prepend(OWN_FOLDER, f"file://{folder.absolute()}", "schema")  # which has to be last
    loader.repository = ConfigRepository(loader.config_search_path)


class Composer:
    """Hydra's own composition with errors as one line. Use inside `hydra.initialize_config_dir`."""

    def __init__(self, config_name: str = "train") -> None:
        from hydra.core.global_hydra import GlobalHydra

        self.hydra, self.config_name = GlobalHydra.instance().hydra, config_name
        assert self.hydra is not None
        folders = self.hydra.config_loader.get_search_path().get_path()
        paths, providers = ([getattr(one, name) for one in folders] for name in ("path", "provider"))
        self.shipped = str(CONF) in paths and OWN_FOLDER not in providers

    def composed(self, overrides: Sequence[str], multirun: bool = False) -> DictConfig:
        """Raises ConfigError."""
        try:
            return self._quickly(list(overrides), multirun)
        except Exception as error:  # OmegaConf also raises AttributeError, AssertionError, …
            raise ConfigError(explain(error, overrides, self.known, CONF)) from error

    def _quickly(self, overrides: list[str], multirun: bool) -> DictConfig:
        """What Hydra composes. Putting the chosen options together takes it half a second: that is done once for each
        choice, and the values are set on a copy."""
        from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
        from hydra.core.override_parser.overrides_parser import OverridesParser

        parsed = OverridesParser.create().parse_overrides(overrides)
        about_hydra = any(o.key_or_group.startswith("hydra") or o.package is not None for o in parsed)
        if about_hydra or not self.shipped or (not multirun and any(o.is_sweep_override() for o in parsed)):
            return _compose(self.config_name, overrides, multirun)
        plain = [o for o in parsed if not o.is_sweep_override()]
        values = [o for o in plain if not (CONF / o.key_or_group).is_dir() or isinstance(o.value(), dict)]
        options = tuple(str(o.input_line) for o in plain if o not in values)
        cfg = copy.deepcopy(_options(self.config_name, options, multirun, _state(CONF)))
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        names = cfg.hydra.job.config.override_dirname
        folder = get_overrides_dirname(parsed, names.exclude_keys, names.item_sep, names.kv_sep)
        cfg.hydra.overrides.task, cfg.hydra.job.override_dirname = overrides, folder
        cfg.hydra.runtime.cwd = str(Path.cwd())
        return cfg

    def known(self, overrides: Sequence[str] = ()) -> dict[str, Any]:
        """Keys that may be set, and the groups, where only those of `overrides` hold that choose an option."""
        chosen = self.composed([]).hydra.runtime.choices
        groups = {path.name: None for path in CONF.iterdir() if path.name in chosen}
        try:
            plain = [o for o in overrides if "," not in o or "=[" in o]
            cfg = self.composed([o for o in plain if o.split("=")[0] in groups])
        except ConfigError:
            cfg = self.composed([])
        return {**groups, **_as_dict(OmegaConf.to_container(cfg, resolve=False))}

    def config(self, overrides: Sequence[str]) -> Config:
        """The validated config of one run; raises ConfigError."""
        cfg = self.composed(overrides)
        raw = _as_dict(OmegaConf.to_container(cfg, resolve=False))
        hydra = raw.pop("hydra")
        choices, task = hydra["runtime"]["choices"], hydra["overrides"]["task"]
        try:
            config = load(raw, choices, task)
        except COMPOSE_ERRORS as error:  # interpolations resolve late
            own = raised_inside(error)
            line = str(own) if own is not None else explain(error, task, self.known, CONF)
            raise ConfigError(line + set_by(line, ablations(choices, task))) from error
        self.check_ablations(ablations(choices, task), raw)
        return config

    def check_ablations(self, names: Sequence[str], raw: Mapping[str, Any]) -> None:
        """Nothing may have changed an ablation back. (One that sets what is so anyway gives the same run folder.)"""
        for name in names:
            for key, value in _ablated(name).items():
                now = OmegaConf.select(OmegaConf.create(dict(raw)), key)
                if now != value and not str(value).startswith("${"):
                    raise ConfigError(f"ablation={name}: its {key}={value} is overridden by {key}={now}")


def raised_inside(error: BaseException | None) -> ConfigError | None:
    """Our own error, which an interpolation that raised it wraps."""
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def spelled_out(overrides: Sequence[str]) -> list[str]:
    """`init_from=FOLDER`, short for the three choices that a start from a pretrained model is."""
    short = [o for o in overrides if o.startswith(f"{INIT_FROM}=")]
    folders = [o.partition("=")[2] for o in short]
    full = [f"init=pretrained model=pretrained {quoted_path(f'init.folder={folder}')}" for folder in folders]
    others = [o for o in overrides if o not in short]
    return [*full[-1].split(" ", 2), *others] if full else others


def compose(overrides: Sequence[str] = (), config_name: str = "train") -> Config:
    """The validated config that `python src/train.py OVERRIDES` would run; for studies, tests and notebooks.

    Raises:
        ConfigError: anything that is wrong with it, in one line.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():  # by the command line, whose folders of configs then count too
        return Composer(config_name).config(spelled_out(overrides))
    with initialize_config_dir(str(CONF), version_base="1.3", job_name="train"):
        return Composer(config_name).config(spelled_out(overrides))


def compose_evaluation(overrides: Sequence[str]) -> EvalConfig:
    """The validated config that `python src/eval.py OVERRIDES` runs.

    Raises:
        ConfigError: anything that is wrong with it, in one line.
    """
    from hydra import initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3", job_name="eval"):
        composer = Composer("eval")
        folders, others = split_data(overrides)
        raw = _as_dict(OmegaConf.to_container(composer.composed([*map(quoted_path, others)]), resolve=False))
        raw["data"] = folders[-1] if folders else None
        hydra = raw.pop("hydra")
        task = hydra["overrides"]["task"]
        try:
            return load_evaluation(raw, hydra["runtime"]["choices"], task)
        except COMPOSE_ERRORS as error:
            line = str(error) if isinstance(error, ConfigError) else explain(error, task, composer.known, CONF)
            raise ConfigError(line) from error


def split_data(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Folders given by `data=`, which Hydra would take for the group of that name, and the other overrides."""
    given = [override for override in overrides if override.startswith("data=")]
    folders = [override.removeprefix("data=") for override in given]
    return [f for f in folders if f != "null"], [o for o in overrides if o not in given]


def quoted_path(override: str) -> str:
    """An override whose value is a path, quoted: Hydra's grammar has no `=`, `~` or letters beyond ASCII in it."""
    key, _, value = override.partition("=")
    is_path = value != "null" and (key in PATHS or "/" in value)
    if not is_path or value[:1] in ("'", '"', "[", "{", ""):
        return override
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def load_evaluation(raw: Mapping[str, Any], choices: Mapping[str, Any], overrides: Sequence[str]) -> EvalConfig:
    """The typed, validated config of an evaluation; arguments as those of `load`.

    Raises:
        ConfigError: anything that is wrong with it.
    """
    own = OmegaConf.create({key: value for key, value in raw.items() if key != "study"})  # the study is read elsewhere
    plain = _as_dict(OmegaConf.to_container(own, resolve=True))
    if isinstance(plain.get("only"), str):
        plain["only"] = [plain["only"]]
    config = parse(EvalConfig, {**plain, "study": choices["study"]})
    for name, node in config.evaluation.benchmarks.items():
        if node is not None:
            check_targets(node, f"evaluation.benchmarks.{name}")
    check_evaluation(config, explicit_keys((), overrides))
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config as YAML, without secrets."""
    plain = redacted(json.loads(json.dumps(asdict(config))))
    write_text(path, yaml.safe_dump(plain, sort_keys=False, width=120))


def read_yaml(path: Path) -> Any:
    """By libyaml where there is one, in an eighth of the time. Raises OSError, UnicodeDecodeError, YAMLError."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(path.read_text(encoding="utf-8"))
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


# --------------------------------------------------------------------------- building objects


PLAIN = (str, int, float, bool)


def check_types(cls: type, node: Mapping[str, Any], key: str) -> None:
    """Raises ConfigError: an argument of one of our classes that is of another type than it says, where it says text,
    number or flag, or null beside one of them."""
    if not cls.__module__.startswith("symbiotic."):
        return
    try:
        hints = typing.get_type_hints(cls.__init__)  # type: ignore[misc]
    except NameError:  # types that are imported for checkers only
        return
    for name, value in node.items():
        hint = hints.get(name)
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = [one for one in (typing.get_args(hint) if union else (hint,)) if one is not types.NoneType]
        if len(options) == 1 and options[0] in PLAIN:
            parse(hint, value, f"{key}.{name}")  # type: ignore[arg-type]


def instantiate(node: Mapping[str, Any], key: str, **arguments: Any) -> Any:
    """Build what `_target_` names, with the node's arguments and `arguments`. The only such place in the project.

    key: where the node stands in the config, for messages.

    Raises:
        ConfigError: a target outside the allow-list, no class, or one that does not take these arguments.
    """
    import hydra.utils

    check_targets(node, key)
    target = node["_target_"]
    try:
        cls = hydra.utils.get_class(target)
    except Exception as error:
        raise ConfigError(f"{key}._target_={target}: {' '.join(str(error).split())}") from error
    if not cls.__module__.startswith(ALLOWED) and not f"{cls.__module__}.".startswith(ALLOWED):
        raise ConfigError(f"{key}._target_={target}: not allowed; it is defined in {cls.__module__}")
    check_arguments(key, target, node, signature_arguments(cls))
    check_types(cls, node, key)
    return hydra.utils.instantiate({**node, "_partial_": True, "_convert_": "all"})(**arguments)
