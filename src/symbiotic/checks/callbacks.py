"""Rules for the callbacks: what cannot be switched off, and what an alarm can act on.

Standard library only.
"""

from __future__ import annotations

from symbiotic.checks.rules import known, require
from symbiotic.checks.targets import check_source_types
from symbiotic.layout import shield_kinds
from symbiotic.schema import ALARM_ACTIONS, FINITE_POLICIES, Config, ConfigError
from symbiotic.training.phases import balance_weight


def check_callbacks(config: Config) -> None:
    """Raises ConfigError."""
    _arguments(config)
    _needed(config)
    _alarm(config)
    _ema(config)


def _arguments(config: Config) -> None:
    for name, node in config.callbacks.items():
        key = f"callbacks.{name}"
        check_source_types(node or {"_target_": ""}, key)
        every = (node or {}).get("every", 0)
        require(isinstance(every, int) and every >= 0, f"{key}.every", every, "must be a whole number, at least 0")
    check = config.callbacks.get("finite_check") or {}
    known("callbacks.finite_check.policy", [check.get("policy", "stop")], FINITE_POLICIES, "policy")
    limit = check.get("limit", 1)
    require(limit >= 1, "callbacks.finite_check.limit", limit, "must be at least 1")


def _needed(config: Config) -> None:
    """A callback that a setting needs cannot be switched off: rates and shield would silently stay as they are."""
    missing = [name for name, node in config.callbacks.items() if node is None]
    if "lr_phases" in missing:
        raise ConfigError("callbacks.lr_phases=null: rates and phases need it; must not be switched off")
    if "gradient_shielding" in missing and shield_kinds(config.system) and any(p.shield for p in config.phases.list):
        raise ConfigError("callbacks.gradient_shielding=null: the shield needs it; set system.shield.mode=none instead")
    if "balance_bias" in missing and config.objective.balance.bias_rate:
        raise ConfigError("callbacks.balance_bias=null: objective.balance.bias_rate needs it; set that to 0 instead")
    if "phase_transitions" in missing and any(phase.when for phase in config.phases.list):
        raise ConfigError("callbacks.phase_transitions=null: phases that end by a metric need it")
    if "evaluation" in missing and config.evaluation.every:
        raise ConfigError("callbacks.evaluation=null: evaluation.every needs it; set evaluation.every=0 instead")


def _alarm(config: Config) -> None:
    alarm = config.callbacks.get("collapse_alarm")
    if alarm is None:
        return
    if config.callbacks.get("routing_monitor") is None:
        raise ConfigError("callbacks.routing_monitor=null: callbacks.collapse_alarm reads its log; set both to null")
    monitor, wanted = config.callbacks["routing_monitor"] or {}, alarm.get("capacity_factor", 1.0)
    if not monitor.get("per_layer", True) or wanted not in monitor.get("factors", [1.0]):
        needs = f"needs routing_monitor.per_layer=true and {wanted:g} among routing_monitor.factors, or be set to null"
        raise ConfigError(f"callbacks.collapse_alarm: {needs}")
    key, action = "callbacks.collapse_alarm.action", str(alarm.get("action", "warn"))
    known(key, [action], ALARM_ACTIONS, "action")
    if action != "warn" and not config.system.pools:
        raise ConfigError(f"{key}={action}: has no effect: system={config.system.name} has no routed experts")
    weights = [balance_weight(config.objective, phase) for phase in config.phases.list]
    if action == "rebalance" and not any(weights) and not config.objective.balance.bias_rate:
        zero = "objective.balance_weight, every phase's balance and objective.balance.bias_rate are 0"
        raise ConfigError(f"{key}=rebalance: has nothing to raise: {zero}")


def _ema(config: Config) -> None:
    node = config.callbacks.get("ema") or {}
    decay, every = node.get("decay", 0.0), node.get("every", 0)
    number = isinstance(decay, (int, float)) and not isinstance(decay, bool)
    require(number and 0 <= decay < 1, "callbacks.ema.decay", decay, "must be at least 0 and below 1")
    require(isinstance(every, int) and every >= 0, "callbacks.ema.every", every, "must be a whole number, at least 0")
