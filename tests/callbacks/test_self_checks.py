"""Each self-check passes on what is right and trips on a planted fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch.distributed.device_mesh import init_device_mesh

from factory import SYSTEMS, build, load_system, random_batch, tiny_model
from isolated import in_a_process
from symbiotic.callbacks.checkpoint import StepCheckpoint, checkpoint_path
from symbiotic.callbacks.events import read_events
from symbiotic.callbacks.gradient_shielding import GradientShielding
from symbiotic.callbacks.log import logged_at
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.routing_monitor import RoutingMonitor
from symbiotic.callbacks.self_checks import SelfChecks, possible_terms, recount_balance, without_gradient
from symbiotic.models.balance import balance_loss
from symbiotic.models.batch import Batch
from symbiotic.models.routing import RoutingStats
from symbiotic.models.sharding import shard
from symbiotic.objectives import total
from symbiotic.objectives.flow import noised
from symbiotic.schema import Balance, ConfigError, Objective, Phase, Rates, Router

PROBE = random_batch(count=6, seed=100)
ALL = Objective(z_weight=0.001)


def checks(every: int = 1, probe: Batch | None = PROBE) -> SelfChecks:
    made = SelfChecks(every)
    made.probe = probe
    return made


def told(folder: Path) -> list[tuple[int, str]]:
    """(step, check) of every event; all of them are of self-checks."""
    events = read_events(folder)
    assert {event["kind"] for event in events} <= {"self_check"}
    return [(event["step"], event["check"]) for event in events]


BALANCES = [
    Balance(),
    Balance(scope="global"),
    Balance(reduction="sum"),
    Balance(kinds={"vae": 0.25, "text": 3.0}),
    Balance(scope="global", reduction="sum", kinds={"vit": 0.0, "prompt": 0.5}),
]


@pytest.mark.parametrize("balance", BALANCES)
def test_a_healthy_fit_tells_nothing(fit: Any, balance: Balance) -> None:
    objective = Objective(z_weight=0.001, balance=balance)
    fit([checks(), GradientShielding(), LRPhases()], steps=2, micro_batches=2, objective=objective)
    assert told(fit.run_dir) == []


@pytest.mark.parametrize("changes", [{"recompute": True}, {"devices": 2}, {"compile": "aot_eager"}])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of dynamo, hidden by itself
def test_recomputation_ranks_and_compilation_trip_nothing(fit: Any, changes: dict[str, Any]) -> None:
    fit([checks(), GradientShielding(), LRPhases()], steps=2, micro_batches=2, objective=ALL, **changes)
    assert told(fit.run_dir) == []


def test_a_dense_model_trips_nothing(fit: Any) -> None:
    system, rates = load_system("dense", tiny_model()), Rates({"all": ("",)}, lr=1e-3, optimizer={}, decay=0.0)
    fit([checks(), LRPhases()], steps=1, objective=ALL, system=system, rates=rates)
    assert told(fit.run_dir) == []


# --------------------------------------------------------------------------- the balance loss


@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize("tasks", [("lm", "mmu", "t2i"), ("lm",)])
def test_recount_equals_the_balance_loss(name: str, tasks: tuple[str, ...], balance: Balance) -> None:
    model = build(name, dense_layers=(1,), dense_hidden=16)
    stats = model(noised(random_batch(tasks=tasks))).routing.detach()
    loss = balance_loss(stats, model.routers_RM.float(), model.own_experts, balance)
    assert recount_balance(stats, model.cfg, model.system, balance) == pytest.approx(float(loss), rel=1e-6)


def test_recount_by_hand() -> None:
    """Two pools of two experts, one layer: text on one of its experts (n f P = 2 x 1 x .75), latents even (1)."""
    model = tiny_model(num_experts=4, router=Router(top_k=1))
    counts, probs = torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)
    counts[0, 0], counts[0, 3] = torch.tensor([8.0, 0, 0, 0]), torch.tensor([0, 0, 2.0, 2.0])
    probs[0, 0], probs[0, 3] = torch.tensor([6.0, 2.0, 0, 0]), torch.tensor([0, 0, 1.0, 3.0])
    stats, system = RoutingStats(counts, probs, torch.tensor([8.0, 0, 0, 4.0])), load_system("symbiotic", model)
    assert recount_balance(stats, model, system, Balance()) == pytest.approx((1.5 + 1.0) / 2)
    together = 4 * (8 / 12 * 6 / 12 + 2 / 12 * 1 / 12 + 2 / 12 * 3 / 12)
    assert recount_balance(stats, model, system, Balance(scope="global")) == pytest.approx(together)


class Spoil(Callback):
    """What the step returns as its balance loss, from micro-batch `first` on."""

    def __init__(self, factor: float, first: int = 0) -> None:
        self.factor, self.first = factor, first

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.first:
            outputs["balance"] = outputs["balance"] * self.factor


@pytest.mark.parametrize(("factor", "tripped"), [(1.0 + 1e-5, False), (1.001, True), (2.0, True), (float("nan"), True)])
def test_a_wrong_balance_loss_is_told_once(fit: Any, factor: float, tripped: bool) -> None:
    folder = fit.run_dir / "checkpoints"
    parts = [Spoil(factor, first=2), checks(every=2), LRPhases()]
    if not tripped:
        fit(parts, steps=6)
        assert told(fit.run_dir) == []
        return
    with pytest.warns(UserWarning, match="balance loss: the step returned") as caught:
        fit([*parts, StepCheckpoint(str(folder), every=4)], steps=8, stop=6)
    assert sum("balance loss" in str(warning.message) for warning in caught) == 1
    fit([Spoil(factor), checks(every=2), LRPhases()], steps=8, ckpt_path=checkpoint_path(folder, 4))
    assert told(fit.run_dir) == [(4, "balance")]


class SpoilRank(Spoil):
    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_rank == 1:
            super().on_train_batch_end(trainer, *args)


@pytest.mark.filterwarnings("ignore:balance loss")  # in the other processes
def test_a_fault_on_another_rank_is_told(fit: Any) -> None:
    fit([SpoilRank(1.5), checks(), LRPhases()], steps=1, micro_batches=2, devices=2)
    assert told(fit.run_dir) == [(1, "balance")]


# --------------------------------------------------------------------------- gradients of the terms


def detached(name: str) -> Any:
    """`loss_terms` with one term cut off from the model."""
    terms = total.loss_terms

    def cut(*args: Any) -> dict[str, torch.Tensor]:
        found = terms(*args)
        return {**found, name: found[name].detach()}

    return cut


@pytest.mark.parametrize("term", ["ce", "flow", "balance", "z"])
def test_a_term_without_gradient_is_told(fit: Any, monkeypatch: pytest.MonkeyPatch, term: str) -> None:
    monkeypatch.setattr(total, "loss_terms", detached(term))
    with pytest.warns(UserWarning, match=f"loss term {term} has weight .* no gradient on any parameter"):
        fit([checks(), LRPhases()], steps=1, objective=ALL)
    assert told(fit.run_dir) == [(0, f"gradient/{term}")]


def test_terms_without_weight_are_not_asked_for(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first phase: its balance weight replaces that of the objective."""
    monkeypatch.setattr(total, "loss_terms", detached("balance"))
    fit([checks(), LRPhases()], steps=1, phases=[Phase("free", 1, balance=0.0)])
    assert told(fit.run_dir) == []


def test_gradients_are_checked_at_the_start_of_a_run_only(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = fit.run_dir / "checkpoints"
    fit([checks(), LRPhases(), StepCheckpoint(str(folder), every=1)], steps=2, stop=1)
    monkeypatch.setattr(total, "loss_terms", detached("ce"))
    fit([checks(), LRPhases()], steps=2, ckpt_path=checkpoint_path(folder, 1))
    assert told(fit.run_dir) == []


def test_without_gradient_by_hand() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    fixed = torch.ones(2)
    terms = {"a": a.sum(), "both": (a * b).sum(), "zero": (0.0 * a).sum(), "cut": (a.detach() * b.detach()).sum()}
    assert without_gradient(terms, [a, b, fixed]) == ["zero", "cut"]
    assert without_gradient({"a": a.sum()}, [b]) == ["a"]
    assert a.grad is None
    assert b.grad is None


@pytest.mark.parametrize(
    ("tasks", "name", "changes", "expected"),
    [
        (("lm", "t2i"), "symbiotic", {}, {"ce", "flow", "balance", "z"}),
        (("lm", "mmu"), "symbiotic", {}, {"ce", "balance", "z"}),
        (("latents",), "symbiotic", {}, {"flow", "balance", "z"}),
        (("lm", "t2i"), "dense", {}, {"ce", "flow"}),
        (("lm", "t2i"), "symbiotic", {"dense_layers": (0, 1, 2), "dense_hidden": 8}, {"ce", "flow"}),
        (("lm",), "symbiotic", {"gen_fraction": 0.75}, {"ce", "z"}),  # two experts to choose two from
    ],
)
def test_terms_that_can_have_a_gradient(
    tasks: tuple[str, ...], name: str, changes: dict[str, Any], expected: set[str]
) -> None:
    """Those that are expected have one, those that are not have none: what is possible is not a matter of opinion."""
    model, batch = build(name, **changes), random_batch(tasks=tasks)
    possible = possible_terms(batch, model.cfg, model.system, Balance())
    assert set(possible) == expected
    terms = total.training_terms(model, batch, ALL)[1]
    assert without_gradient({name: terms[name] for name in possible}, list(model.parameters())) == []


def test_a_kind_without_weight_makes_no_balance_loss() -> None:
    model = tiny_model()
    system, batch = load_system("symbiotic", model), random_batch(tasks=("lm",))
    assert "balance" not in possible_terms(batch, model, system, Balance(kinds={"text": 0.0}))
    assert "balance" in possible_terms(batch, model, system, Balance(kinds={"vae": 0.0}))


# --------------------------------------------------------------------------- what a check leaves alone


class Lives(Callback):
    """What the check might touch, seen when it is over."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.grads = [p.grad for p in pl_module.model.parameters()]
        self.random = torch.get_rng_state()
        self.training = {module.training for module in pl_module.model.modules()}


@pytest.mark.parametrize("devices", [1, 2])
def test_checks_leave_training_alone(fit: Any, devices: int) -> None:
    ends = []
    for name, parts in (("without", []), ("with", [checks()])):
        folder = fit.run_dir / name
        fit([*parts, LRPhases(), StepCheckpoint(str(folder), every=0)], 3, 2, devices=devices, objective=ALL)
        saved = torch.load(checkpoint_path(folder, 3), weights_only=True)
        ends.append((saved["state_dict"], saved["optimizer_states"][0]["state"]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)
    assert len(ends[0][0]) > 20


def test_checks_leave_gradients_random_state_and_mode_alone(fit: Any) -> None:
    seen = []
    for parts in ([], [checks()]):
        lives = Lives()
        torch.manual_seed(3)
        fit([*parts, lives, LRPhases()], steps=1, objective=ALL)
        seen.append(lives)
    assert set(seen[1].grads) == {None}
    assert torch.equal(seen[0].random, seen[1].random)
    assert seen[0].training == seen[1].training == {True}


class Shard(Callback):
    """FSDP2 over a mesh of one process."""

    def __init__(self, mesh: Any) -> None:
        self.mesh = mesh

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.configure_model()
        shard(pl_module.model, self.mesh)


@in_a_process
def test_sharded_parameters_are_not_asked_for_gradients(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = init_device_mesh("cpu", (1,))
    monkeypatch.setattr(total, "loss_terms", detached("z"))  # would be told
    monitor = RoutingMonitor(1)
    monitor.probe = PROBE
    trainer, _ = fit([Shard(mesh), monitor, checks(), LRPhases()], steps=2, objective=ALL)
    assert told(fit.run_dir) == []
    assert logged_at(trainer, 2)["routing/drift/text"] > 0


def test_a_useless_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"callbacks.self_checks.every=0: must be at least 1"):
        SelfChecks(0)
