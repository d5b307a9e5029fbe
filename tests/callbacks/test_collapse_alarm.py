"""A collapse that is provoked trips the alarm in time, every action acts, and healthy routing trips nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.multiprocessing.spawn import ProcessRaisedException

from factory import load_system, tiny_model
from symbiotic.callbacks.checkpoint import StepCheckpoint, checkpoint_path, checkpoints, newest_valid
from symbiotic.callbacks.collapse_alarm import CollapseAlarm
from symbiotic.callbacks.events import read_events
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.routing_monitor import RoutingMonitor
from symbiotic.schema import KINDS, Balance, CollapseStop, ConfigError, Objective, Phase

PLACES = [(layer, kind) for layer in (0, 1) for kind in ("text", "vit", "vae")]


class Provoke(Callback):
    """Before the first step, everything that enters the model gets a common direction, and in every router the columns
    of two experts point there: all tokens choose these two."""

    @torch.no_grad()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 0:
            model = pl_module.model
            for tensor in (model.embed.weight, model.vit_in.bias, model.latent_in.bias):
                tensor += 0.5
            for block in model.blocks:
                for router in block.moe.routers.values():
                    router[:, :2] += 0.2


class Counts(Callback):
    """[L, M, E] assignments of every micro-batch, the factor on the balance weight, and the loss's parts."""

    def __init__(self) -> None:
        self.counts: list[torch.Tensor] = []
        self.scales: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        parts = outputs["ce"] + outputs["flow"]
        self.counts.append(outputs["routing"].counts)
        self.scales.append(float((outputs["loss"] - parts) / outputs["balance"]) / 0.01)


def parts(alarm: CollapseAlarm, *others: Callback, every: int = 1, provoke: bool = True) -> list[Callback]:
    return [*([Provoke()] if provoke else []), LRPhases(), RoutingMonitor(every=every), alarm, *others]


def alarms(folder: Path, raised: bool = True) -> list[tuple[int, int, str]]:
    """(step, layer, kind) of the places that were raised, or cleared."""
    events = [e for e in read_events(folder) if e.get("raised") is raised]
    return [(e["step"], e["layer"], e["token_kind"]) for e in events]


def interventions(folder: Path) -> list[dict[str, Any]]:
    return [e for e in read_events(folder) if e["kind"] == "intervention"]


# --------------------------------------------------------------------------- the alarm


def test_a_provoked_collapse_trips_the_alarm_after_patience_logs(fit: Any, memory: Any) -> None:
    """3 logs, 2 steps apart: after 6 steps, in every layer and for every kind."""
    fit(parts(CollapseAlarm(patience=3), every=2), steps=8, loggers=[memory])
    assert alarms(fit.run_dir) == [(6, layer, kind) for layer, kind in PLACES]
    text = read_events(fit.run_dir)[0]["text"]
    assert text.startswith("routing collapse: text in layer 0: capacity 0.5")
    assert text.endswith("expected by chance, 0.50 at total collapse (3 logs)")
    rows = memory.rows()
    assert [rows[step]["alarm/raised"] for step in (2, 4, 6, 8)] == [0, 0, 6, 6]
    assert [rows[step]["alarm/interventions"] for step in (2, 4, 6, 8)] == [0, 0, 0, 0]
    assert "alarm/raised" not in rows.get(3, {})


def test_a_warning_changes_nothing(fit: Any) -> None:
    _, module = fit(parts(CollapseAlarm(patience=1)), steps=4)
    assert alarms(fit.run_dir)
    _, plain = fit([Provoke(), LRPhases()], steps=4)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in module.state_dict().items())
    assert module.balance_scale == 1.0


@pytest.mark.parametrize("seed", range(5))
def test_healthy_routing_trips_nothing(fit: Any, seed: int) -> None:
    """One moderate rate for all roles: at ten times that, generation experts of so small a model do collapse."""
    rates = dataclasses.replace(fit.config().rates, by_role={})
    fit(parts(CollapseAlarm(patience=3), every=2, provoke=False), steps=24, seed=seed, rates=rates)
    assert read_events(fit.run_dir) == []


class Halves(Callback):
    """Plants what the step returns: `first` kinds use the first half of the experts that they see, the others the
    second half, each evenly. Every other `every` steps only."""

    def __init__(self, first: tuple[str, ...], every: int = 0) -> None:
        self.first, self.every = first, every

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        stats, visible = outputs["routing"], pl_module.model.visible_experts
        on = not self.every or (trainer.global_step - 1) // self.every % 2 == 0
        stats.counts.zero_()
        for m, kind in enumerate(KINDS):
            seen = visible[m].nonzero().squeeze(-1)
            half = seen[: len(seen) // 2] if kind in self.first else seen[len(seen) // 2 :]
            chosen = half if on else seen
            stats.counts[:, m, chosen] = 2 * stats.tokens[m] / len(chosen)


def hidden(folder: Path) -> list[tuple[int, int, str, str]]:
    events = [e for e in read_events(folder) if e["kind"] == "hidden"]
    return [(e["step"], e["layer"], e["token_kind"], e["pooled"]) for e in events]


def test_routing_that_the_pooled_number_hides_is_told_of_once(fit: Any, memory: Any) -> None:
    """About .98 together and .50 for each kind, where all kinds see all experts; also when it comes and goes."""
    model = tiny_model(num_layers=2)
    shown = {"model": model, "system": load_system("standard_separable", model)}  # one softmax over two pools
    callbacks = [Halves(("text",), every=4), LRPhases(), RoutingMonitor(every=1), CollapseAlarm(patience=3)]
    fit(callbacks, steps=20, loggers=[memory], **shown)
    row = memory.rows()[3]
    assert row["routing/capacity@1/all"] > 0.9
    assert row["routing/capacity@1/vae"] == pytest.approx(0.5, abs=0.02)
    told = hidden(fit.run_dir)
    places = {(step, layer, kind) for step, layer, kind, group in told if group == "all"}
    assert places == {(3, 0, "text"), (3, 1, "text")}  # the other kinds have too few tokens here to expect much
    assert len(told) == len(set(told))
    assert "hides in the pooled rate of 0.9" in read_events(fit.run_dir)[0]["text"]


def test_in_a_partitioned_system_the_understanding_kinds_are_compared(fit: Any) -> None:
    """Words on one half of the understanding pool, prompts and read images on the other: `und` looks even."""
    fit([Halves(("text", "vae")), LRPhases(), RoutingMonitor(every=1), CollapseAlarm(patience=3)], steps=4)
    assert {(kind, group) for _, _, kind, group in hidden(fit.run_dir)} == {("text", "und")}


def test_a_collapse_that_the_pooled_number_shows_is_not_called_hidden(fit: Any) -> None:
    model = tiny_model(num_layers=2)
    fit(parts(CollapseAlarm(patience=2)), steps=4, model=model, system=load_system("standard_separable", model))
    assert alarms(fit.run_dir)
    assert hidden(fit.run_dir) == []


def test_only_the_kinds_that_are_watched_are(fit: Any) -> None:
    fit(parts(CollapseAlarm(patience=2, kinds=("vae",))), steps=3)
    assert alarms(fit.run_dir) == [(2, 0, "vae"), (2, 1, "vae")]


def test_a_kind_that_uses_all_experts_it_sees_is_told_of_once(fit: Any) -> None:
    model = tiny_model(num_layers=2, gen_fraction=0.25)  # top-2 of 2 experts
    fit(parts(CollapseAlarm(patience=2)), steps=4, model=model, system=load_system("symbiotic", model))
    texts = [e["text"] for e in read_events(fit.run_dir) if "raised" not in e]
    assert len(texts) == 1
    assert texts[0].startswith("no collapse alarm for vae tokens")
    assert {kind for _, _, kind in alarms(fit.run_dir)} == {"text", "vit"}


# --------------------------------------------------------------------------- rebalance


def test_rebalance_raises_the_balance_weight_to_its_limit_and_the_module_saves_it(fit: Any, memory: Any) -> None:
    counts, folder = Counts(), fit.run_dir / "checkpoints"
    alarm = CollapseAlarm(patience=2, action="rebalance", factor=4.0, limit=10.0, cooldown=3)
    callbacks = parts(alarm, counts, StepCheckpoint(str(folder), every=1, keep=20))
    fit(callbacks, steps=10, loggers=[memory])
    assert counts.scales == pytest.approx([1, 1, 4, 4, 4, 10, 10, 10, 10, 10], rel=1e-3)
    saved = [torch.load(path, weights_only=True)["progress"]["balance_scale"] for path in checkpoints(folder)]
    assert saved == [1, 4, 4, 4, 10, 10, 10, 10, 10, 10]
    events = interventions(fit.run_dir)
    assert [(e["step"], e["before"], e["after"]) for e in events] == [(2, 1, 4), (5, 4, 10)]
    where = "text in layers 0, 1; vae in layers 0, 1; vit in layers 0, 1"
    assert events[0]["text"] == f"balance weight and bias rate: now 4 x the config's, for {where}"
    assert [e["text"] for e in read_events(fit.run_dir) if "limit" in e["text"]] == [
        "balance weight and bias rate stay at their limit, 10 x the config's"
    ]
    assert memory.rows()[10]["alarm/interventions"] == 2


def test_rebalance_waits_while_a_phase_has_no_balance_weight(fit: Any) -> None:
    """Otherwise the factor would grow unseen, and all of it would come at once with the next phase."""
    phases = [Phase("without", 8, balance=0.0), Phase("with", 12, balance=0.01)]
    alarm = CollapseAlarm(patience=1, action="rebalance", cooldown=1, limit=64.0)
    _, module = fit(parts(alarm), steps=12, phases=phases)
    assert next(e["step"] for e in interventions(fit.run_dir)) == 8  # the first step of the phase that has one
    assert module.balance_scale <= 64.0
    texts = [e["text"] for e in read_events(fit.run_dir) if "0 in this phase" in e["text"]]
    assert len(texts) == 1


def test_rebalance_is_refused_where_there_is_nothing_to_raise(fit: Any) -> None:
    alarm = CollapseAlarm(action="rebalance")
    with pytest.raises(
        ConfigError, match=r"callbacks\.collapse_alarm\.action=rebalance: has nothing to raise"
    ) as error:
        fit(parts(alarm), steps=1, objective=Objective(balance_weight=0.0))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("by", ["bias", "phase"])
def test_a_bias_rate_or_the_weight_of_one_phase_is_enough(fit: Any, by: str) -> None:
    balance = Balance(bias_rate=1e-3 if by == "bias" else 0.0)
    phases = [Phase("a", 2), Phase("b", 4, balance=0.1 if by == "phase" else None)]
    objective = Objective(balance_weight=0.0, balance=balance)
    _, module = fit(parts(CollapseAlarm(patience=2, action="rebalance")), objective=objective, phases=phases, steps=4)
    assert module.balance_scale == 4.0


# --------------------------------------------------------------------------- revive


def test_revive_brings_dead_experts_back_into_use(fit: Any) -> None:
    counts, vae = Counts(), KINDS.index("vae")
    alarm = CollapseAlarm(patience=3, action="revive", cooldown=100)
    fit(parts(alarm, counts), steps=4)
    before, after = sum(counts.counts[:3]), counts.counts[3]
    assert float(before[:, :, [2, 3, 6, 7]].sum()) == 0  # the last two of both pools
    assert bool((after[:, vae, 4:] > 0).sum(-1).ge(3).all())
    assert bool((after[:, :3, :4].sum(1) > 0).sum(-1).ge(3).all())
    events = interventions(fit.run_dir)
    assert [(e["step"], e["layer"], e["pool"]) for e in events] == [(3, la, p) for la in (0, 1) for p in ("und", "gen")]
    assert all(sorted(dead for dead, _ in e["donors"]) == [2, 3] for e in events)
    assert events[0]["text"].startswith("pool und of layer 0: dead experts re-initialised with optimiser state: 2 from")
    assert alarms(fit.run_dir, raised=False)


class Revived(Callback):
    """Weights and first moments of the generation pool of layer 1, before and after the alarm of step 3."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            moe, state = pl_module.model.blocks[1].moe, trainer.optimizers[0].state
            w_in, router = moe.pools["gen"].w_in, moe.routers["gen"]
            tensors = {"w_in": w_in, "router": router}
            tensors |= {f"{m} {n}": state[p][m] for n, p in tensors.items() for m in ("exp_avg", "exp_avg_sq")}
            self.seen.append({name: tensor.detach().clone() for name, tensor in tensors.items()})


def test_revive_copies_weights_and_moments_of_the_donor(fit: Any) -> None:
    first, last = Revived(), Revived()
    alarm = CollapseAlarm(patience=3, action="revive")
    fit([Provoke(), LRPhases(), RoutingMonitor(every=1), first, alarm, last], steps=3)
    donors = next(e["donors"] for e in interventions(fit.run_dir) if (e["layer"], e["pool"]) == (1, "gen"))
    source = torch.arange(4)
    for dead, donor in donors:
        source[dead] = donor
    (before,), (after,) = first.seen, last.seen
    for name in before:
        if name == "router":
            families = [(source == donor).nonzero().squeeze(-1) for donor in {d for _, d in donors}]
            for family in families:
                middle = after[name][:, family].mean(1)
                torch.testing.assert_close(middle, before[name][:, source[family[0]]], rtol=1e-4, atol=1e-5)
        else:
            dim = 1 if name.endswith("router") else 0
            torch.testing.assert_close(after[name], before[name].index_select(dim, source), rtol=0, atol=0)


def test_an_expert_that_another_kind_uses_is_not_dead(fit: Any) -> None:
    """Standard MoE, 4 experts: words choose two of them, images the other two. Nothing is free to be revived."""

    class Apart(Callback):
        @torch.no_grad()
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            model, half = pl_module.model, torch.arange(32) < 16
            model.embed.weight += 0.5 * half
            model.vit_in.bias += 0.5 * ~half
            model.latent_in.bias += 0.5 * ~half
            for block in model.blocks:
                block.moe.routers["all"][:, :2] += 0.4 * half[:, None]
                block.moe.routers["all"][:, 2:] += 0.4 * ~half[:, None]

    model = tiny_model(num_layers=2, num_experts=4)
    callbacks = [Apart(), *parts(CollapseAlarm(patience=2, action="revive"), provoke=False)]
    fit(callbacks, steps=3, model=model, system=load_system("standard_moe", model))
    assert alarms(fit.run_dir) == [(2, layer, kind) for layer, kind in PLACES]
    assert interventions(fit.run_dir) == []
    told = [e["text"] for e in read_events(fit.run_dir) if "nothing to revive" in e["text"]]
    assert told == [f"nothing to revive in pool all of layer {i}: no expert below 0.1 of the mean load" for i in (0, 1)]


def test_a_frozen_pool_is_left_alone(fit: Any) -> None:
    phases = [Phase("still", 4, frozen=("und",))]
    fit(parts(CollapseAlarm(patience=2, action="revive")), steps=4, phases=phases)
    assert {e["pool"] for e in interventions(fit.run_dir)} == {"gen"}
    told = [e["text"] for e in read_events(fit.run_dir) if "frozen" in e["text"]]
    assert told == [f"nothing revived in pool und of layer {i}: its role is frozen in this phase" for i in (0, 1)]


# --------------------------------------------------------------------------- stop


@pytest.mark.parametrize("steps", [6, 3], ids=["in the middle", "at the last step"])
def test_stop_ends_behind_a_checkpoint_and_says_so_at_every_start(fit: Any, steps: int) -> None:
    folder, counts = fit.run_dir / "checkpoints", Counts()

    def callbacks() -> list[Callback]:
        return parts(CollapseAlarm(patience=3, action="stop"), counts, StepCheckpoint(str(folder), every=100))

    with pytest.raises(CollapseStop) as first:
        fit(callbacks(), steps=steps)
    where = "text in layers 0, 1; vae in layers 0, 1; vit in layers 0, 1"
    stopped = f"routing collapse at step 3: {where}; stopped by callbacks.collapse_alarm.action=stop"
    assert str(first.value) == f"{stopped}; checkpoint in {folder}"
    assert [e["text"] for e in interventions(fit.run_dir)] == [stopped]
    found = newest_valid(folder)
    assert found == checkpoint_path(folder, 3)
    with pytest.raises(CollapseStop) as again:
        fit(callbacks(), steps=steps, ckpt_path=found)
    assert str(again.value) == str(first.value)
    assert len(counts.counts) == 3  # micro-batches: none after the restart


def test_with_another_action_a_stopped_run_goes_on(fit: Any) -> None:
    folder = fit.run_dir / "checkpoints"
    with pytest.raises(CollapseStop):
        fit(parts(CollapseAlarm(patience=3, action="stop"), StepCheckpoint(str(folder), every=100)), steps=6)
    trainer, _ = fit(parts(CollapseAlarm(patience=3)), steps=6, ckpt_path=newest_valid(folder))
    assert trainer.global_step == 6


# --------------------------------------------------------------------------- resuming, several ranks


@pytest.mark.parametrize("action", ["warn", "rebalance", "revive"])
@pytest.mark.parametrize("stop", [3, 7], ids=["before the alarm", "behind it"])
def test_a_resume_in_the_middle_gives_the_same_alarms_and_weights(
    fit: Any, memory: Any, action: str, stop: int, tmp_path: Path
) -> None:
    """Logs at 2, 4, 6, 8, 10; the alarm at 4 or later; the checkpoint between two logs."""

    def run(name: str, **kwargs: Any) -> Any:
        fit.run_dir = tmp_path / name
        alarm = CollapseAlarm(patience=2, action=action, cooldown=2)
        return fit(parts(alarm, StepCheckpoint(str(fit.run_dir), every=stop), every=2), steps=10, **kwargs)

    _, whole = run("whole", loggers=[memory])
    run("split", stop=stop)
    rest = type(memory)()
    _, resumed = run("split", ckpt_path=newest_valid(tmp_path / "split"), loggers=[rest])
    assert read_events(tmp_path / "split") == read_events(tmp_path / "whole")
    assert rest.rows() == {step: row for step, row in memory.rows().items() if step > stop}
    assert resumed.balance_scale == whole.balance_scale
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    assert read_events(tmp_path / "whole")


class Keep(Callback):
    """Every rank's weights and moments at the end."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        moments = trainer.optimizers[0].state_dict()["state"]
        state = {"weights": pl_module.model.state_dict(), "moments": moments, "scale": pl_module.balance_scale}
        torch.save(state, Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt")


@pytest.mark.parametrize("action", ["rebalance", "revive"])
def test_two_ranks_decide_the_same_and_stay_equal(fit: Any, tmp_path: Path, action: str) -> None:
    for devices in (1, 2):
        fit.run_dir = tmp_path / str(devices)
        fit.run_dir.mkdir()
        alarm = CollapseAlarm(patience=2, action=action)
        fit(parts(alarm, Keep()), steps=4, micro_batches=2, devices=devices)
    one, two = (torch.load(tmp_path / "2" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    events = [[(e["step"], e["text"]) for e in read_events(tmp_path / str(n))] for n in (1, 2)]
    assert events[0] == events[1]
    assert interventions(tmp_path / "2")


def test_two_ranks_stop_together_behind_one_checkpoint(fit: Any) -> None:
    folder = fit.run_dir / "checkpoints"
    callbacks = parts(CollapseAlarm(patience=2, action="stop"), StepCheckpoint(str(folder), every=100))
    with pytest.raises(
        ProcessRaisedException, match=r"\nsymbiotic\.schema\.CollapseStop: routing collapse at step 2: text"
    ):
        fit(callbacks, steps=4, micro_batches=2, devices=2)
    assert [path.name for path in checkpoints(folder)] == ["step=000002.ckpt"]
    assert len(interventions(fit.run_dir)) == 1


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"ratio": 0.0}, r"ratio=0\.0: must be between 0"),
        ({"ratio": 0.5, "clear": 0.4}, r"clear=0\.4: must be at least ratio=0\.5"),
        ({"patience": 0}, "patience=0: must be at least 1 log"),
        ({"action": "restart"}, "action=restart: must be one of warn, rebalance, revive, stop"),
        ({"kinds": ("text", "vea")}, r"kinds=\['text', 'vea'\]: must be among text, prompt, vit, vae"),
        ({"kinds": ()}, r"kinds=\[\]: must be among"),
        ({"factor": 1.0}, r"factor=1\.0: must be above 1"),
        ({"limit": 2.0}, r"limit=2\.0: must be at least factor=4\.0"),
        ({"cooldown": 0}, "cooldown=0: must be at least 1 log"),
        ({"dead": 0.0}, r"dead=0\.0: must be a share"),
        ({"spread": 0.0}, r"spread=0\.0: must be above 0"),
    ],
)
def test_settings_out_of_range_are_one_line(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^callbacks\.collapse_alarm\.{message}"):
        CollapseAlarm(**setting)


@pytest.mark.parametrize(
    "before",
    [[], [RoutingMonitor(per_layer=False)], [RoutingMonitor(factors=(1.25,))]],
    ids=["no monitor", "no layers", "another factor"],
)
def test_a_monitor_that_logs_what_is_needed_has_to_come_before(fit: Any, before: list[Callback]) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.collapse_alarm: needs callbacks\.routing_monitor"):
        fit([*before, CollapseAlarm(), RoutingMonitor()], steps=1)


def test_a_model_without_experts_has_nothing_to_watch(fit: Any) -> None:
    model = tiny_model(num_layers=2)
    fit(parts(CollapseAlarm(patience=1), provoke=False), steps=2, model=model, system=load_system("dense", model))
    assert read_events(fit.run_dir) == []


def test_revive_is_refused_where_the_optimiser_holds_other_parameters(fit: Any) -> None:
    class Replace(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            pool = pl_module.model.blocks[0].moe.pools["gen"]
            pool.w_in = torch.nn.Parameter(pool.w_in.detach().clone())

    message = r"action=revive: cannot copy experts here, the optimiser holds gen\.w_in in another form"
    with pytest.raises(ConfigError, match=message):
        fit([Replace(), *parts(CollapseAlarm(action="revive"), provoke=False)], steps=1)
