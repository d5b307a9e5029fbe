"""What a `System` means on a `Model` of a given size: expert counts, columns, scopes, the stage-0 parent.

Standard library only. The model is built from these functions and the config is validated with them, so that a
layout that validates is a layout that builds. All of them are pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from symbiotic.schema import KINDS, PARENT, Config, ConfigError, Lora, Model, Router, Shield, System

_EPS = 1e-6
_ADAPTABLE = re.compile(r"\.(attention\.\w+\.[qkvo]\.weight|moe\.(pools|shared)\.\w+\.w_(in|out))$")


def pool_sizes(model: Model, system: System) -> dict[str, int]:
    """Routed experts per pool and layer, in the order of `system.pools`; they add up to `num_experts`. A share is
    rounded to whole experts.

    Raises:
        ConfigError: a share outside (0, 1], one that rounds to no expert, or shares that do not add up to one.
    """
    total = num_experts(model, system)
    if system.pools and total < 1:
        raise ConfigError(f"{_counted(model, system)}: must leave at least one expert")
    sizes = {
        name: _experts(name, share, total, _counted(model, system))
        for name, share in system.pools.items()
        if share is not None
    }
    open_pools = [name for name, share in system.pools.items() if share is None]
    left = total - sum(sizes.values())
    if left < 0 or (left > 0 and system.pools and not open_pools):
        shares = " + ".join(f"{system.pools[name]:g}" for name in sizes)
        raise ConfigError(f"system.pools={shares}: the shares of the pools must add up to 1")
    if open_pools and (left == 0 or left % len(open_pools)):
        names = ", ".join(open_pools)
        raise ConfigError(
            f"system.pools: {left} of {_counted(model, system)} are left for {names}: "
            f"must be a positive multiple of {len(open_pools)}"
        )
    return {name: sizes[name] if name in sizes else left // len(open_pools) for name in system.pools}


def _experts(name: str, share: float, total: int, counted: str) -> int:
    count = round(share * total)
    if not 0 < share <= 1 + _EPS or count < 1:
        raise ConfigError(
            f"system.pools.{name}={share:g}: must be a share of {counted} in (0, 1], "
            f"at least {1 / total:g} for one expert"
        )
    return count


def _counted(model: Model, system: System) -> str:
    """The routed experts by their keys, for a message."""
    merge = f" / system.merge={system.merge}" if system.merge > 1 else ""
    return f"model.num_experts={model.num_experts}{merge}"


def num_experts(model: Model, system: System) -> int:
    """Routed experts per layer: `model.num_experts`, of which `system.merge` make one expert (rounded down)."""
    return model.num_experts // system.merge


def router_of(model: Model, system: System) -> Router:
    """How tokens pick their experts: `model.router`, with what the system has of its own."""
    own = model.router.top_k if system.top_k is None else system.top_k
    normalize = model.router.normalize if system.gate == "router" else system.gate == "straight_through"
    return replace(model.router, top_k=own, normalize=normalize)


def router_pools(system: System) -> dict[str, str]:
    """Set of router columns -> the pool that it scores; one per pool, of the pool's name, unless stated."""
    return dict(system.routers) or {name: name for name in system.pools}


def shared_scopes(system: System) -> dict[str, tuple[str, ...]]:
    """Shared expert -> the kinds that pass through it; experts removed with `null` are left out."""
    return {name: tuple(kinds) for name, kinds in system.shared.items() if kinds is not None}


def stream_of(system: System) -> dict[str, str]:
    """Kind -> the stream (copy of attention and norms) that its tokens use."""
    return {kind: name for name, kinds in system.streams.items() for kind in kinds}


def visible_pools(system: System) -> dict[str, tuple[str, ...]]:
    """Kind -> the pools whose experts its tokens may use, in the order of the column sets they see."""
    pools = router_pools(system)
    return {kind: tuple(pools[name] for name in system.visible.get(kind, ())) for kind in KINDS}


def groups(system: System) -> tuple[tuple[str, ...], ...]:
    """The distinct rows of `system.visible`, each one router; in the order of the kinds, columns in that of storage."""
    rows = (tuple(c for c in router_pools(system) if c in system.visible.get(kind, ())) for kind in KINDS)
    return tuple(dict.fromkeys(rows))


def kinds_by_pool(system: System) -> dict[str, tuple[str, ...]] | None:
    """Pool -> the kinds whose tokens use its experts; None unless every kind has exactly one pool whatever its tokens
    are, so that kinds tell how many tokens come to a pool."""
    pools = {kind: set(seen) for kind, seen in visible_pools(system).items()}
    if system.task_router or any(len(seen) != 1 for seen in pools.values()):
        return None
    return {name: tuple(kind for kind in KINDS if name in pools[kind]) for name in system.pools}


def experts_seen(model: Model, system: System) -> dict[str, int]:
    """Kind -> number of routed experts that its tokens choose among (with a task router: those of their task)."""
    sizes = pool_sizes(model, system)
    return {kind: sum(sizes[pool] for pool in pools) for kind, pools in visible_pools(system).items()}


def opened(system: System) -> System | None:
    """The system with every expert open to every kind, as in the parent; None where that is not defined: an expert
    that several routers score, experts that were merged, gates or mixes of the system's own."""
    pools = router_pools(system)
    scored_twice = len(set(pools.values())) < len(pools)
    if scored_twice or system.merge > 1 or system.top_k or system.gate != "router" or mixes(system):
        return None
    return replace(system, visible=dict.fromkeys(KINDS, tuple(pools)) if pools else {}, task_router=False)


def mixes(system: System) -> bool:
    """Whether routed and shared experts are mixed by a learned alpha: where a system has both, and a scale for it."""
    return system.alpha_scale is not None and bool(system.pools) and bool(shared_scopes(system))


def generates(kinds: tuple[str, ...]) -> bool:
    """Whether these are tokens of generation alone: latents, with or without the prompt of their image."""
    return "vae" in kinds and set(kinds) <= {"prompt", "vae"}


def components(system: System) -> tuple[str, ...]:
    """Names that a shield target may have: `shared.NAME` and `pools.NAME`."""
    return (*(f"shared.{name}" for name in shared_scopes(system)), *(f"pools.{name}" for name in system.pools))


def kinds_of(system: System, component: str) -> tuple[str, ...]:
    """Kinds whose tokens pass through `shared.NAME`, `pools.NAME`, `routers.NAME` or `streams.NAME`.

    Raises:
        KeyError: no such component.
    """
    group, _, name = component.partition(".")
    if group == "shared":
        return shared_scopes(system)[name]
    if group == "streams":
        return tuple(system.streams[name])
    if group == "routers":
        router_pools(system)[name]
        return tuple(kind for kind in KINDS if name in system.visible.get(kind, ()))
    if group == "pools":
        system.pools[name]
        return tuple(kind for kind, pools in visible_pools(system).items() if name in pools)
    raise KeyError(component)


def shield_kinds(system: System) -> dict[str, tuple[str, ...]]:
    """`shared.NAME` or `pools.NAME` -> the kinds whose tokens are shielded from it, `shared` spelt out and targets
    removed with `null` left out. Empty when the mode is `none`; kinds outside the component's scope are dropped."""
    if system.shield.mode == "none":
        return {}
    wanted: dict[str, set[str]] = {}
    for target, kinds in system.shield.targets.items():
        names = [f"shared.{name}" for name in shared_scopes(system)] if target == "shared" else [target]
        for name in names if kinds else ():
            wanted.setdefault(name, set()).update(kinds or ())
    scoped = {name: tuple(k for k in kinds_of(system, name) if k in wanted[name]) for name in wanted}
    return {name: kinds for name, kinds in scoped.items() if kinds}


def parent_system(system: System, shared: bool | None = None) -> System:
    """The layout of stage 0, before anything is split: one pool, one router, one shared expert, one stream.

    A system without pools (dense) has a parent without pools; one without shared experts has a parent without, unless
    `shared` says otherwise (`init.parent_shared`), except that a dense one always has its FFN there. Systems with equal
    parents share the cached stage 0.
    """
    has_shared = (bool(shared_scopes(system)) if shared is None else shared) or not system.pools
    return System(
        name=PARENT,
        pools={PARENT: 1.0} if system.pools else {},
        visible=dict.fromkeys(KINDS, (PARENT,)) if system.pools else {},
        shared={PARENT: KINDS} if has_shared else {},
        streams={PARENT: KINDS},
        shield=Shield(),
    )


def parameter_names(model: Model, system: System, latents: bool = True, codebook: int = 0) -> list[str]:
    """The names of all parameters of `UnifiedModel(model, system, latents, codebook)`, known without building it.

    A test holds this list against the model's own. It is what roles are checked with before torch is imported. One name
    stands for all of a vision tower that is trained.
    """
    projector = [""] if model.projector_hidden is None else ["0.", "2."]
    names = ["embed.weight", *(f"vit_in.{part}{leaf}" for part in projector for leaf in ("weight", "bias"))]
    names += ["vit_grid.row.weight", "vit_grid.column.weight", *_tower_names(model)]
    for layer in range(model.num_layers):
        names += [f"blocks.{layer}.{name}" for name in _block_names(model, system, dense=layer in model.dense_layers)]
    names += [f"norm.{stream}.weight" for stream in system.streams]
    names += [] if model.tied_head else ["text_head.weight"]
    patches = not codebook
    latent = ["latent_in.weight", *["latent_in.bias"] * patches, "latent_grid.row.weight", "latent_grid.column.weight"]
    latent += [f"time_in.{side}.{leaf}" for side in ("w_in", "w_out") for leaf in ("weight", "bias")] * patches
    return names + (latent + ["latent_head.weight", "latent_head.bias"] if latents else [])


def _tower_names(model: Model) -> list[str]:
    return ["vision.tower"] if model.vision is not None and model.vision.trained else []


def adapted(names: Iterable[str], lora: Lora) -> list[str]:
    """The parameters that get a low-rank update: those that a target matches, of the kind that can have one."""
    targets = [re.compile(target) for target in lora.targets] if lora.rank else []
    return [name for name in names if _ADAPTABLE.search(name) and any(t.search(name) for t in targets)]


def lora_place(name: str) -> tuple[str, str]:
    """The module that holds the update of a weight, and the weight's name there."""
    head, _, leaf = name.removesuffix(".weight").rpartition(".")
    return head, leaf


def trained_names(config: Config) -> list[str]:
    """The names of all parameters of joint training: the model's, and those of its low-rank updates."""
    names = parameter_names(config.model, config.system, codebook=config.objective.codebook_size)
    places = (lora_place(name) for name in adapted(names, config.lora))
    return names + [f"{head}.lora.{leaf}.{side}" for head, leaf in places for side in "ab"]


def _block_names(model: Model, system: System, dense: bool) -> list[str]:
    leaves = ["norm.weight", "q.weight", "k.weight", "v.weight", "o.weight"]
    leaves += [f"{side}.bias" for side in "qkv"] if model.attention.qkv_bias else []
    leaves += ["q_norm.weight", "k_norm.weight"] if model.attention.qk_norm != "none" else []
    names = [f"attention.{stream}.{leaf}" for stream in system.streams for leaf in leaves]
    names += [f"moe_norm.{stream}.weight" for stream in system.streams]
    if not dense:
        names += ["moe.mix"] if mixes(system) else []
        names += [f"moe.pools.{pool}.{leaf}" for pool in system.pools for leaf in ("w_in", "w_out")]
        names += [f"moe.routers.{router}" for router in router_pools(system)]
    scopes = ["dense"] if dense else list(shared_scopes(system))
    gate = ["gate"] if model.gated_shared and not dense else []
    names += [f"moe.shared.{scope}.{leaf}" for scope in scopes for leaf in ("w_in", "w_out", *gate)]
    return names + (
        [f"moe.task_router.{leaf}" for leaf in ("weight", "bias")] if system.task_router and not dense else []
    )
