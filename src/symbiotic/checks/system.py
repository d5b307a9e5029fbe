"""Whether a system fits a model: every kind sees enough experts, every name refers to something."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from symbiotic.checks.rules import at_least, known, plain, positive, require, share
from symbiotic.layout import components, experts_seen, groups, router_of, router_pools, shared_scopes
from symbiotic.schema import KINDS, ConfigError, Model, System, near_miss

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_LARGEST = 1 << 20
"""Of any size of the model; beyond it a typing error is likelier than a model."""


def check_layout(model: Model, system: System) -> None:
    """Raises ConfigError."""
    _model(model)
    at_least(model, "model.", 1 if shared_scopes(system) and system.pools else 0, "shared_hidden")
    _system(model, system)
    _shield(system)


def _model(model: Model) -> None:
    sizes = "width num_layers vocab_size expert_hidden patch_dim max_grid"
    at_least(model, "model.", 1, sizes + (" num_experts" if model.num_experts else ""))
    for name in (*sizes.split(), "num_experts"):
        require(
            getattr(model, name) <= _LARGEST, f"model.{name}", getattr(model, name), f"must be at most {_LARGEST:,}"
        )
    at_least(model, "model.", 0, "num_experts dense_hidden init_std")
    at_least(model, "model.", 1, "projector_hidden" if model.projector_hidden is not None else "")
    positive(model, "model.", "norm_eps")
    share(model, "model.", "gen_fraction")
    attention = model.attention
    at_least(attention, "model.attention.", 1, "num_heads num_kv_heads head_dim")
    positive(attention, "model.attention.", "rope_theta")
    heads, kv_heads, head_dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    right = f"must divide model.attention.num_heads={heads}"
    require(heads % kv_heads == 0, "model.attention.num_kv_heads", kv_heads, right)
    require(head_dim % 2 == 0, "model.attention.head_dim", head_dim, "must be even, for the rotary embedding")
    at_least(model.router, "model.router.", 1, "top_k")
    positive(model.router, "model.router.", "scale")
    for layer in model.dense_layers:
        right = f"model.num_layers={model.num_layers} layers count from 0"
        require(0 <= layer < model.num_layers, "model.dense_layers", model.dense_layers, right)
    right = f"must be positive, as model.dense_layers={plain(model.dense_layers)} are dense"
    require(not model.dense_layers or model.dense_hidden > 0, "model.dense_hidden", model.dense_hidden, right)


def _system(model: Model, system: System) -> None:
    for group in ("pools", "routers", "shared", "streams"):
        for name in getattr(system, group):
            right = "a name must be lower-case letters, digits and underscores"
            require(bool(_NAME.fullmatch(name)), f"system.{group}", name, right)
    columns = router_pools(system)
    for name, pool in system.routers.items():
        known(f"system.routers.{name}", [pool], system.pools, "pool in system.pools")
    for pool in system.pools:
        require(pool in columns.values(), "system.routers", ",".join(columns), f"no column set scores the pool {pool}")
    _kinds("system.visible", system.visible)
    _visible(system, columns)
    for group in ("shared", "streams"):
        for name, kinds in getattr(system, group).items():
            known(f"system.{group}.{name}", kinds or (), KINDS, "kind of token")
    _streams(system)
    _merge(model, system)
    if system.pools:
        _top_k(model, system)
        _task_router(system)
        _mix(system)
    else:
        require(bool(shared_scopes(system)), "system.pools", "{}", "without pools, system.shared must name an expert")


def _kinds(key: str, mapping: Mapping[str, Any]) -> None:
    for kind in mapping:
        if kind not in KINDS:
            raise ConfigError(f"{key}.{kind}: no such kind of token; {near_miss(kind, KINDS)}")


def _visible(system: System, columns: Mapping[str, str]) -> None:
    for kind in KINDS:
        key, seen = f"system.visible.{kind}", system.visible.get(kind, ())
        known(key, seen, columns, "router")
        require(bool(seen) == bool(system.pools), key, seen, "every kind must see a router, if there are pools")
        twice = [pool for pool, times in Counter(columns[name] for name in seen).items() if times > 1]
        require(not twice, key, seen, f"sees two column sets of the pool {', '.join(twice)}; must be one")


def _streams(system: System) -> None:
    covered = Counter(kind for kinds in system.streams.values() for kind in kinds)
    for kind in KINDS:
        right = f"the kind {kind} must be in exactly one stream, not in {covered[kind]}"
        require(covered[kind] == 1, "system.streams", "{" + ", ".join(system.streams) + "}", right)


def _merge(model: Model, system: System) -> None:
    right = f"must divide model.num_experts={model.num_experts}"
    require(system.merge >= 1 and model.num_experts % system.merge == 0, "system.merge", system.merge, right)


def _top_k(model: Model, system: System) -> None:
    key, top_k = "model.router.top_k" if system.top_k is None else "system.top_k", router_of(model, system).top_k
    require(top_k >= 1, key, top_k, "must be at least 1")
    for kind, seen in experts_seen(model, system).items():
        right = f"tokens of kind {kind} see only {seen} experts in system={system.name}; must be at most {seen}"
        require(top_k <= seen, key, top_k, right)
    right = f"is for one expert per token, and {key}={top_k}; must be router or probability"
    require(system.gate != "straight_through" or top_k == 1, "system.gate", system.gate, right)


def _task_router(system: System) -> None:
    if not system.task_router:
        return
    key, rows = "system.task_router", groups(system)
    right = f"all kinds see {', '.join(rows[0])}: one group leaves nothing to choose; must be false"
    require(len(rows) > 1, key, True, right)
    pools = router_pools(system)
    seen = Counter(pool for row in rows for pool in {pools[name] for name in row})
    twice = [pool for pool, times in seen.items() if times > 1]
    right = f"sends a token to the experts of one task, and the pool {', '.join(twice)} is seen by two; must be false"
    require(not twice, key, True, right)


def _mix(system: System) -> None:
    if system.alpha_scale is None:
        return
    positive(system, "system.", "alpha_scale")
    if not shared_scopes(system):  # nothing is mixed
        return
    covered = {kind for kinds in shared_scopes(system).values() for kind in kinds}
    alone = [kind for kind in KINDS if kind not in covered]
    right = f"tokens of kind {', '.join(alone)} pass through no shared expert that it could mix in; must be null"
    require(not alone, "system.alpha_scale", system.alpha_scale, right)


def _shield(system: System) -> None:
    shield, names = system.shield, ("shared", *components(system))
    for target, kinds in shield.targets.items():
        key = f"system.shield.targets.{target}"
        if target not in names:
            raise ConfigError(f"{key}: no such component of system={system.name}; {near_miss(target, names)}")
        known(key, kinds or (), KINDS, "kind of token")
    right = f"system={system.name} has no shield targets; must be none, or name targets in system.shield.targets"
    require(shield.mode == "none" or any(shield.targets.values()), "system.shield.mode", shield.mode, right)
