"""Options that were set on purpose and would change nothing: refused by name, not ignored.

Only what the user set counts (the command line, an ablation): a default without effect is no mistake, or
`system=standard_moe` could not run under the same experiment as `system=symbiotic`. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from symbiotic.checks.lora import unmatched
from symbiotic.checks.rules import trained_tasks
from symbiotic.checks.trainer import SHARDED
from symbiotic.layout import generates, kinds_of, shared_scopes, shield_kinds, trained_names
from symbiotic.schema import Config, ConfigError
from symbiotic.training.phases import balance_weight
from symbiotic.training.roles import assign_roles


@dataclass(frozen=True)
class Setting:
    """What the rules look at: the typed config, and the composed one with its interpolations unresolved."""

    config: Config
    raw: Mapping[str, Any]

    def refers(self, group: str, key: str) -> bool:
        """Whether the values of `group` are made of `key`."""
        node: Any = self.raw
        for part in group.split("."):
            node = node[part]
        return key in str(node)


Rule = Callable[[Setting, str], str | None]
"""Setting, full key -> why the key has no effect, or None if it has one."""


def _shield_level(s: Setting, key: str) -> str | None:
    if not shield_kinds(s.config.system):
        return f"system={s.config.system.name} has no shield targets, or system.shield.mode is none"
    return (None if s.refers("phases.list", key) else "no entry of phases.list refers to it") or _generation(s, key)


def _shield_mode(s: Setting, key: str) -> str | None:
    levels = any(phase.shield for phase in s.config.phases.list)
    return None if levels or s.config.system.shield.mode == "none" else "no phase has a shield level above 0"


def _balance(s: Setting, key: str) -> str | None:
    weights = any(balance_weight(s.config.objective, phase) for phase in s.config.phases.list)
    bias = key.endswith("bias_rate")
    return _routed(s, key) or (None if weights or bias else "the balance loss has weight 0 in every phase")


def _shield_targets(s: Setting, key: str) -> str | None:
    off = s.config.system.shield.mode == "none"
    return "system.shield.mode is none; set it to output, weights or strict" if off else None


def _gen_fraction(s: Setting, key: str) -> str | None:
    return None if s.refers("system.pools", key) else f"no pool of system={s.config.system.name} is sized by it"


def _routed(s: Setting, key: str) -> str | None:
    return None if s.config.system.pools else f"system={s.config.system.name} has no routed experts"


def _routers(s: Setting, key: str) -> str | None:
    views = {seen for seen in s.config.system.visible.values() if seen}
    only = f"system={s.config.system.name} has one router: both are the same"
    return _routed(s, key) or (only if len(views) < 2 else None)


def _gen_pool(s: Setting, key: str) -> str | None:
    alone = any(generates(kinds_of(s.config.system, f"pools.{pool}")) for pool in s.config.system.pools)
    return None if alone else f"system={s.config.system.name} has no pool that only generation sees"


def _bias(s: Setting, key: str) -> str | None:
    if s.config.init.folder is not None:
        return None  # those of the pretrained model
    off = "objective.balance.bias_rate is 0: the biases stay 0"
    return _routed(s, key) or (None if s.config.objective.balance.bias_rate else off)


def _surgery(s: Setting, key: str) -> str | None:
    method, wanted = s.config.surgery.method, "cagrad" if key.endswith("cagrad_c") else None
    if method == "none" or (wanted and method != wanted):
        return f"surgery.method is {method}"
    return None


def _parent_shared(s: Setting, key: str) -> str | None:
    if s.config.init.folder is not None:
        has = s.config.model.shared_hidden > 0
        wrong = s.config.init.parent_shared not in (None, has)
        return f"the pretrained model has {'a' if has else 'no'} shared expert" if wrong else None
    return "the system has a shared expert, so its parent has one" if shared_scopes(s.config.system) else None


def _split(s: Setting, key: str) -> str | None:
    if len(s.config.system.pools) > 1:
        return None
    return f"system={s.config.system.name} has no pools to split experts into"


def _shared(s: Setting, key: str) -> str | None:
    return None if shared_scopes(s.config.system) else f"system={s.config.system.name} has no shared expert"


def _dense(s: Setting, key: str) -> str | None:
    return None if s.config.model.dense_layers else "model.dense_layers is empty"


def _stage0(s: Setting, key: str) -> str | None:
    return "no stage 0 is trained, as init.checkpoint is given" if s.config.init.checkpoint is not None else None


def _generation(s: Setting, key: str) -> str | None:
    return None if "generation" in trained_tasks(s.config) else "the mix trains no generation samples"


def _task_router(s: Setting, key: str) -> str | None:
    return None if s.config.system.task_router else f"system={s.config.system.name} has no task router"


def _phase_list(s: Setting, key: str) -> str | None:
    by_truth = [phase.name for phase in s.config.phases.list if phase.route_by == "truth"]
    if not by_truth or s.config.system.task_router:
        return None
    return f"the phase {by_truth[0]} has route_by: truth, and system={s.config.system.name} has no task router"


def _stage1(s: Setting, key: str) -> str | None:
    return None if s.refers("phases.list", key) else "no entry of phases.list refers to it"


def _lora(s: Setting, key: str) -> str | None:
    return None if s.config.lora.rank else "lora.rank is 0; set lora=r16"


def _lora_targets(s: Setting, key: str) -> str | None:
    return _lora(s, key) or unmatched(s.config)


def _flow(s: Setting, key: str) -> str | None:
    name = s.config.objective.name
    return _generation(s, key) or (None if name == "flow" else f"objective={name} has no flow")


def _codes(s: Setting, key: str) -> str | None:
    name = s.config.objective.name
    return _generation(s, key) or (None if name == "autoregressive" else f"objective={name} makes no image codes")


def _role(s: Setting, key: str) -> str | None:
    role = key.split(".")[2]
    names = trained_names(s.config)
    if key.startswith("rates.by_role") and role not in s.config.rates.by_role:
        return None  # set to null: the rate `lr`
    assigned = assign_roles(names, s.config.rates.roles)
    return None if role in assigned.values() else f"system={s.config.system.name} has no parameter of the role {role}"


def _whole_gradients(s: Setting, key: str) -> str | None:
    sharded = s.config.trainer.get("strategy") == SHARDED and s.config.callbacks.get("gradient_conflict") is not None
    return "it takes whole gradients, and trainer=fsdp shards them" if sharded else None


RULES: dict[str, Rule] = {
    "callbacks.gradient_conflict*": _whole_gradients,
    "phases.shield_steps": _shield_level,
    "phases.release_scale": _shield_level,
    "system.shield.targets*": _shield_targets,
    "model.gen_fraction": _gen_fraction,
    "model.num_experts": _routed,
    "model.router.normalize": _routed,
    "model.router.score": _routed,
    "model.router.scale": _routed,
    "objective.balance_weight": _routed,
    "objective.z_weight": _routed,
    "init.stage0.balance_weight": _routed,
    "model.router.bias": _bias,
    "system.shield.mode": _shield_mode,
    "system.merge": _routed,
    "system.top_k": _routed,
    "system.gate": _routed,
    "system.alpha_scale": _routed,
    "objective.task_weight": _task_router,
    "phases.list": _phase_list,
    "lora.alpha": _lora,
    "lora.targets": _lora_targets,
    "phases.stage1_steps": _stage1,
    "objective.balance.*": _balance,
    "objective.balance.scope": _routers,
    "surgery.roles": _surgery,
    "surgery.cagrad_c": _surgery,
    "init.router": _routed,
    "init.gen_experts": _gen_pool,
    "init.parent_shared": _parent_shared,
    "init.assignment": _split,
    "init.assignment_file": _split,
    "init.profile_micro_batches": _split,
    "model.shared_hidden": _shared,
    "model.gated_shared": _shared,
    "model.dense_hidden": _dense,
    "init.stage0*": _stage0,
    "objective.flow_weight": _flow,
    "objective.prediction": _flow,
    "objective.time_*": _flow,
    "objective.sampler.steps": _flow,
    "objective.sampler.time_shift": _flow,
    "objective.image_ce_weight": _codes,
    "objective.codebook_size": _codes,
    "objective.image_tokenizer*": _codes,
    "objective.sampler.temperature": _codes,
    "objective.sampler.top_*": _codes,
    "objective.caption_dropout": _generation,
    "rates.by_role.*": _role,
    "rates.schedules.*": _role,
}
"""Pattern of full keys -> rule."""


def check_effects(config: Config, raw: Mapping[str, Any], explicit: Mapping[str, str]) -> None:
    """explicit: full key -> how it was set, as the user wrote it (`phases.shield_steps=100`, `ablation=ratio_3_1`).

    Raises:
        ConfigError: one of them has no effect; the message names it and says why.
    """
    setting = Setting(config, raw)
    for key, written in explicit.items():
        for pattern, rule in RULES.items():
            why = rule(setting, key) if fnmatchcase(key, pattern) else None
            if why:
                through = f" (through {key})" if not written.lstrip("+").startswith(key) else ""
                raise ConfigError(f"{written}: has no effect{through}: {why}")
