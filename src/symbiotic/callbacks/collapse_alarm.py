"""Has the routing of some kind of tokens collapsed in some layer, and what is done about it?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from symbiotic.callbacks.checkpoint import StepCheckpoint
from symbiotic.callbacks.events import record_event
from symbiotic.callbacks.log import Window, log_metrics, logged_at
from symbiotic.callbacks.routing_monitor import RoutingMonitor
from symbiotic.callbacks.step import StepCallback, config_of, phase_of
from symbiotic.layout import router_of, visible_pools
from symbiotic.models.moe import MoE
from symbiotic.schema import ALARM_ACTIONS, KINDS, CollapseStop, Config, ConfigError, Phase
from symbiotic.training.collapse import (
    Place,
    Reading,
    Settings,
    State,
    acted,
    behind_pooled,
    collapse_floor,
    due,
    names,
    plain,
    readings,
    restored,
    update,
)
from symbiotic.training.phases import active_phases, balance_weight
from symbiotic.training.revive import choose_donors, not_revivable, pool_loads, revive_experts
from symbiotic.training.routing_metrics import GROUPS

KEY = "callbacks.collapse_alarm"
POOLED = {group: tuple(KINDS[m] for m in GROUPS[group]) for group in ("und", "all")}
HIDDEN = 0.56  # share of the random rate below which a kind is told of that a healthy pooled number hides


class CollapseAlarm(StepCallback):
    """Reads the capacity rates that a `RoutingMonitor`, listed before, logged at this step, per layer and kind.

    Their evenness is 0 at total collapse and 1 for random routing (`training.collapse`): an alarm is raised after
    `patience` logs in a row below `ratio`, cleared above `clear`. While one is raised, `action` is taken:

    - `warn`: nothing more than the event;
    - `rebalance`: the balance weight and the bias rate are multiplied by `factor`, up to `limit` times their config's
      value; again after `cooldown` logs. They stay so when the alarm is cleared;
    - `revive`: in the pools that the kind sees, experts with less than `dead` of the mean load become copies of busy
      ones, `spread` apart in the router (`training.revive`); again after `cooldown` logs. Pools of a frozen role are
      left alone, and an expert that other kinds use is not dead;
    - `stop`: training ends after this step, behind its checkpoint, with CollapseStop (exit status 3); so does every
      restart.

    A kind that stays below `HIDDEN` of the random rate while its layer looks even with several kinds taken together
    (`und`, `all`) is told of once, without an action: the pooled number hides it. Every change is an event of the run
    record. Logs `alarm/raised` (places whose alarm is raised) and `alarm/interventions` (so far). Rank 0's numbers
    decide. List it behind `BalanceBias`, before what evaluates.
    capacity_factor: whose capacity rate is read, one of the monitor's factors.

    Raises:
        ConfigError: a setting out of range, no monitor that logs what is needed, or an action that cannot act here.
        CollapseStop: the action is `stop`, and it was taken.
    """

    def __init__(
        self,
        ratio: float = 0.2,
        clear: float = 0.35,
        patience: int = 5,
        action: str = "warn",
        kinds: Sequence[str] = ("text", "vit", "vae"),
        factor: float = 4.0,
        limit: float = 64.0,
        cooldown: int = 5,
        dead: float = 0.1,
        spread: float = 0.5,
        capacity_factor: float = 1.0,
    ) -> None:
        _require(0 < ratio < 1, "ratio", ratio, "must be between 0 (total collapse) and 1 (random routing)")
        _require(clear >= ratio, "clear", clear, f"must be at least ratio={ratio}")
        _require(patience >= 1, "patience", patience, "must be at least 1 log")
        _require(action in ALARM_ACTIONS, "action", action, f"must be one of {', '.join(ALARM_ACTIONS)}")
        _require(bool(kinds) and set(kinds) <= set(KINDS), "kinds", list(kinds), f"must be among {', '.join(KINDS)}")
        _require(factor > 1, "factor", factor, "must be above 1")
        _require(limit >= factor, "limit", limit, f"must be at least factor={factor}")
        _require(cooldown >= 1, "cooldown", cooldown, "must be at least 1 log")
        _require(0 < dead <= 1, "dead", dead, "must be a share of the mean load in (0, 1]")
        _require(spread > 0, "spread", spread, "must be above 0, or copies of an expert stay one")
        self.settings, self.action, self.kinds = Settings(ratio, clear, patience), action, tuple(kinds)
        self.factor, self.limit, self.cooldown, self.dead, self.spread = factor, limit, cooldown, dead, spread
        self.capacity_factor, self.metric = capacity_factor, f"capacity@{capacity_factor:g}"
        self.state, self.window = State(), Window()
        self.hidden = {group: State() for group in POOLED}
        self.told: list[str] = []  # what is said once
        self.interventions, self.stopped = 0, ""

    # ------------------------------------------------------------------ before training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        before = cast(Any, trainer).callbacks[: cast(Any, trainer).callbacks.index(self)]
        monitors = [c for c in before if isinstance(c, RoutingMonitor) and c.per_layer]
        if not any(self.capacity_factor in monitor.factors for monitor in monitors):
            needs = f"per_layer=true and {self.capacity_factor:g} among its factors"
            raise ConfigError(f"{KEY}: needs callbacks.routing_monitor, listed before it, with {needs}")
        config = config_of(pl_module)
        if self.action == "rebalance" and not _balanced(config):
            zero = (
                "objective.balance_weight (or a phase's balance) is 0 in every phase, objective.balance.bias_rate too"
            )
            raise ConfigError(f"{KEY}.action=rebalance: has nothing to raise, {zero}; one of the two must be above 0")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end(trainer)
        model: Any = pl_module.model
        self.layers = [layer for layer in model.modules() if isinstance(layer, MoE) and layer.pools]
        seen_M, top_k = model.own_experts.sum(1).tolist(), router_of(model.cfg, model.system).top_k
        seen = {kind: seen_M[KINDS.index(kind)] for kind in self.kinds}
        self.floors = {kind: collapse_floor(top_k, e, self.capacity_factor) for kind, e in seen.items()}
        reason = not_revivable(self.layers, trainer.optimizers) if self.action == "revive" else None
        if reason:
            raise ConfigError(f"{KEY}.action=revive: cannot copy experts here, {reason}; choose another action")

    def end(self, trainer: Trainer) -> None:
        """A run that was stopped does not go on: it ends, or ends again."""
        if self.stopped and self.action == "stop":
            folders = [str(c.folder) for c in trainer.checkpoint_callbacks if isinstance(c, StepCheckpoint)]
            raise CollapseStop(f"{self.stopped}; checkpoint in {folders[0]}" if folders else self.stopped)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.end(trainer)

    # ------------------------------------------------------------------ the alarm

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if self.action == "revive":
            self.window.add({"counts": outputs["routing"].counts})

    def on_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        logged = logged_at(trainer, step)
        both = [readings(logged, self.metric, floors) for floors in (self.floors, dict.fromkeys(POOLED, 0.0))]
        if not both[0]:
            return
        found, pooled = trainer.strategy.broadcast(both)
        for kind in dict.fromkeys(kind for (_, kind), reading in found.items() if math.isnan(reading.evenness)):
            nothing = "they have no random baseline above total collapse to be compared with"
            self.tell(trainer, step, f"no collapse alarm for {kind} tokens: {nothing}")
        evenness = {place: r.evenness for place, r in found.items() if not math.isnan(r.evenness)}
        self.state, raised, cleared = update(self.state, evenness, self.settings)
        for place in (*raised, *cleared):
            self.report(trainer, step, place, found[place])
        self.unmask(trainer, step, found, pooled)
        present = [place for place in self.state.raised if place in evenness]
        if present and self.action != "warn":
            act = {"rebalance": self.rebalance, "revive": self.revive, "stop": self.stop}[self.action]
            act(trainer, pl_module, step, present)
        self.window.clear()
        counts = {"alarm/raised": float(len(self.state.raised)), "alarm/interventions": float(self.interventions)}
        log_metrics(trainer, counts, step)

    def unmask(self, trainer: Trainer, step: int, found: dict[Place, Reading], pooled: dict[Place, Reading]) -> None:
        settings = Settings(HIDDEN, HIDDEN, self.settings.patience)
        for group, kinds in POOLED.items():
            whole = {layer: reading for (layer, name), reading in pooled.items() if name == group}
            inside = {place: reading for place, reading in found.items() if place[1] in kinds}
            self.hidden[group], raised, _ = update(self.hidden[group], behind_pooled(inside, whole), settings)
            for layer, kind in raised:
                key, reading = f"hidden: {kind} in layer {layer}, {group}", found[layer, kind]
                if key not in self.told:
                    self.told.append(key)
                    pooled_rate = f"the pooled rate of {whole[layer].rate:.2f} ({group})"
                    text = f"uneven routing hides in {pooled_rate}: {names([(layer, kind)])}: {reading}"
                    where = {"layer": layer, "token_kind": kind, "pooled": group}
                    record_event(trainer, step, "hidden", text, capacity=reading.rate, random=reading.random, **where)

    def report(self, trainer: Trainer, step: int, place: Place, reading: Reading) -> None:
        raised = place in self.state.raised
        start, logs = ("routing collapse", self.settings.patience) if raised else ("routing collapse is over", 1)
        text = f"{start}: {names([place])}: {reading} ({logs} log{'s' * (logs > 1)})"
        numbers = {"capacity": reading.rate, "random": reading.random, "evenness": reading.evenness}
        record_event(trainer, step, "alarm", text, raised=raised, layer=place[0], token_kind=place[1], **numbers)

    def tell(self, trainer: Trainer, step: int, text: str) -> None:
        """Record what is worth saying once."""
        if text not in self.told:
            self.told.append(text)
            record_event(trainer, step, "alarm", text)

    # ------------------------------------------------------------------ the actions

    def intervene(self, trainer: Trainer, step: int, text: str, **data: Any) -> None:
        self.interventions += 1
        record_event(trainer, step, "intervention", text, action=self.action, **data)

    def rebalance(self, trainer: Trainer, pl_module: LightningModule, step: int, places: list[Place]) -> None:
        if not due(self.state, "balance", self.cooldown):
            return
        if not _balanced_in(config_of(pl_module), phase_of(pl_module, step)):
            self.tell(trainer, step, "rebalance: balance weight and bias rate are 0 in this phase, nothing is raised")
            return
        self.state = acted(self.state, "balance")
        module = cast(Any, pl_module)
        before = module.balance_scale
        after = max(before, min(self.limit, before * self.factor))
        if after == before:
            self.tell(trainer, step, f"balance weight and bias rate stay at their limit, {before:g} x the config's")
            return
        module.balance_scale = after
        text = f"balance weight and bias rate: now {after:g} x the config's, for {names(places)}"
        self.intervene(trainer, step, text, before=before, after=after)

    def revive(self, trainer: Trainer, pl_module: LightningModule, step: int, places: list[Place]) -> None:
        pools = visible_pools(config_of(pl_module).system)
        wanted = dict.fromkeys((layer, pool) for layer, kind in places for pool in pools[kind])
        targets = [t for t in wanted if due(self.state, _target(*t), self.cooldown)]
        if not targets:
            return
        counts_LME = self.window.total(trainer)["counts"].cpu()
        for layer, pool in targets:
            self.state = acted(self.state, _target(layer, pool))
            self.revive_pool(trainer, pl_module, step, layer, pool, counts_LME[layer])

    def revive_pool(
        self, trainer: Trainer, pl_module: LightningModule, step: int, layer: int, pool: str, counts_ME: Tensor
    ) -> None:
        config, moe, where = config_of(pl_module), self.layers[layer], _target(layer, pool)
        frozen = phase_of(pl_module, step).frozen
        groups = [g for optimizer in trainer.optimizers for g in optimizer.param_groups if g["role"] in frozen]
        if {id(p) for g in groups for p in g["params"]} & {id(p) for p in moe.pools[pool].parameters()}:
            self.tell(trainer, step, f"nothing revived in {where}: its role is frozen in this phase")
            return
        donors = choose_donors(pool_loads(moe, counts_ME)[pool], self.dead)
        if not donors:
            self.tell(trainer, step, f"nothing to revive in {where}: no expert below {self.dead:g} of the mean load")
            return
        revive_experts(moe, config.system, pool, donors, trainer.optimizers, (config.seed, step, layer), self.spread)
        pairs = ", ".join(f"{dead} from {donor}" for dead, donor in donors.items())
        text = f"{where}: dead experts re-initialised with optimiser state: {pairs}"
        self.intervene(trainer, step, text, layer=layer, pool=pool, donors=[list(p) for p in donors.items()])

    def stop(self, trainer: Trainer, pl_module: LightningModule, step: int, places: list[Place]) -> None:
        self.stopped = f"routing collapse at step {step}: {names(places)}; stopped by {KEY}.action=stop"
        self.intervene(trainer, step, self.stopped)
        trainer.should_stop = True

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        told, count, stopped = list(self.told), self.interventions, self.stopped
        states = {"state": plain(self.state), "hidden": {g: plain(state) for g, state in self.hidden.items()}}
        return states | {"told": told, "interventions": count, "stopped": stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.state = restored(state_dict["state"])
        self.hidden = {group: restored(state) for group, state in state_dict["hidden"].items()}
        self.told = list(state_dict["told"])
        self.interventions, self.stopped = int(state_dict["interventions"]), str(state_dict["stopped"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.save(trainer, checkpoint, "collapse_alarm")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.window.load(trainer, checkpoint, "collapse_alarm")


def _require(holds: bool, name: str, value: Any, right: str) -> None:
    if not holds:
        raise ConfigError(f"{KEY}.{name}={value}: {right}")


def _balanced(config: Config) -> bool:
    """Whether raising the balance weight or the bias rate changes anything, in some phase."""
    return any(_balanced_in(config, phase) for phase in active_phases(config.phases))


def _balanced_in(config: Config, phase: Phase) -> bool:
    return balance_weight(config.objective, phase) > 0 or config.objective.balance.bias_rate > 0


def _target(layer: int, pool: str) -> str:
    return f"pool {pool} of layer {layer}"
