"""Gradient surgery in a whole fit: what the optimiser gets, under accumulation, resume, shielding and frozen roles."""

from __future__ import annotations

import dataclasses
import functools
from importlib.util import find_spec
from typing import Any

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from factory import load_system, random_batch, samples, tiny_model
from symbiotic.callbacks.checkpoint import StepCheckpoint, newest_valid
from symbiotic.callbacks.gradient_shielding import GradientShielding
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.data.packing import collate
from symbiotic.models.batch import Batch
from symbiotic.objectives.flow import noised
from symbiotic.objectives.total import loss_terms, term_weights
from symbiotic.schema import Objective, Phase, Rates, Surgery
from symbiotic.training.surgery import task_weighting

JOINT = [
    pytest.param(method, marks=pytest.mark.skipif(find_spec("torchjd") is None, reason="needs symbiotic[surgery]"))
    for method in ("pcgrad", "cagrad", "upgrad")
]
METHODS = ["maop", *JOINT]
State = dict[str, Tensor]


class Gradients(Callback):
    """Of every step and parameter: Adam's first moment and the gradient before surgery, and what the optimiser got."""

    def __init__(self) -> None:
        self.momentum: list[State] = []
        self.before: list[State] = []
        self.after: list[State] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = dict(pl_module.model.named_parameters())
        self.before.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
        moments = {n: optimizer.state.get(p, {}).get("exp_avg") for n, p in named.items()}
        self.momentum.append({n: m.clone() for n, m in moments.items() if m is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        named = dict(pl_module.model.named_parameters())
        self.after.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})


def state(module: Any) -> State:
    return dict(module.model.state_dict())


def same(first: State, second: State) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def unclipped(fit: Any) -> Rates:
    return dataclasses.replace(fit.config().rates, clip=0.0)


def by_hand(fit: Any, batch: Batch) -> tuple[Any, dict[str, State]]:
    """A fresh module, and the gradient of each term of the loss on its parameters."""
    _, module = fit([], steps=1, rates=dataclasses.replace(fit.config().rates, lr=0.0, by_role={}))
    model = module.model
    parameters, objective = dict(model.named_parameters()), Objective()
    terms = loss_terms(model, model(noised(batch), shield=torch.zeros(())), batch, objective)
    weights, found = term_weights(objective), {}
    for name, term in terms.items():
        loss, wanted = weights[name] * term, list(parameters.values())
        grads = torch.autograd.grad(loss, wanted, retain_graph=True, materialize_grads=True)
        found[name] = dict(zip(parameters, grads, strict=True))
    return module, found


# --------------------------------------------------------------------------- the tasks' gradients


@pytest.mark.parametrize("method", JOINT)
def test_the_optimiser_gets_the_combination_plus_the_rest(fit: Any, method: Any) -> None:
    """All parameters of two roles make one vector of each task; the third role gets the sum."""
    seen = Gradients()
    surgery = Surgery(method, ("und", "rest"))
    fit([seen], steps=1, surgery=surgery, rates=unclipped(fit))
    module, terms = by_hand(fit, random_batch(count=6, seed=0))
    gen = {p for g in module.trainer.optimizers[0].param_groups if g["role"] == "gen" for p in g["params"]}
    treated = [n for n, p in module.model.named_parameters() if p not in gen]
    rows = torch.stack([torch.cat([terms[task][n].flatten() for n in treated]) for task in ("ce", "flow")]).double()
    weights = task_weighting(surgery)(rows @ rows.T / rows.square().sum())
    assert 0 < len(treated) < len(terms["ce"])
    for name, found in seen.after[0].items():
        w = weights.float() if name in treated else torch.ones(2)
        expected = w[0] * terms["ce"][name] + w[1] * terms["flow"][name] + terms["balance"][name]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("method", JOINT)
def test_where_nothing_conflicts_it_is_plain_training(fit: Any, method: Any) -> None:
    """No text of these batches reads a latent: understanding does not reach the generation pool."""
    _, plain = fit([], steps=3)
    _, treated = fit([], steps=3, surgery=Surgery(method, ("gen",)))
    assert same(state(plain), state(treated))
    _, other = fit([], steps=3, surgery=Surgery(method))
    assert not same(state(plain), state(other))


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_of_a_step_are_one_batch(fit: Any, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six samples at once, or three and three: the same up to rounding. (Without the balance loss, which is not a sum
    over samples.)"""
    whole = {i: random_batch(count=6, seed=i) for i in range(3)}
    halves = [half for i in range(3) for half in split(i)]
    options = {"steps": 3, "surgery": Surgery(method), "objective": Objective(balance_weight=0.0)}
    one, two = Gradients(), Gradients()
    namespace = type(fit).__call__.__globals__
    monkeypatch.setitem(namespace, "batch_of", whole.__getitem__)
    fit([one], **options)
    monkeypatch.setitem(namespace, "batch_of", halves.__getitem__)
    fit([two], micro_batches=2, **options)
    for step, found in enumerate(one.after):
        for name, again in two.after[2 * step + 1].items():
            assert float((again - found[name]).norm()) <= 1e-3 * float(found[name].norm()) + 1e-6, (step, name)


def split(seed: int) -> list[Batch]:
    """The samples of `random_batch(6, seed)` in two micro-batches, normalised as one step."""
    chosen, rng = samples(6, seed=seed), np.random.default_rng(seed + 1)
    times = list(rng.uniform(0.1, 0.9, 6))
    noises = [rng.standard_normal(s.latents.shape, dtype=np.float32) for s in chosen]
    whole = random_batch(count=6, seed=seed)
    parts = [collate(chosen[i : i + 3], 48, times=times[i : i + 3], noises=noises[i : i + 3]) for i in (0, 3)]
    return [dataclasses.replace(p, ce_norm=whole.ce_norm / 2, flow_norm=whole.flow_norm / 2) for p in parts]


# --------------------------------------------------------------------------- MAOP


def test_maop_projects_what_opposes_the_momentum_after_the_clip(fit: Any) -> None:
    seen = Gradients()
    fit([seen], steps=5, phases=[Phase("joint", 5)], surgery=Surgery("maop", ("und",)))
    clip, opposed = 1.0, 0
    assert all(torch.equal(seen.after[0][n], g * clip_factor(seen.before[0], clip)) for n, g in seen.before[0].items())
    for before, momentum, after in list(zip(seen.before, seen.momentum, seen.after, strict=True))[1:]:
        factor = clip_factor(before, clip)
        for name, grad in before.items():
            g, m = grad * factor, momentum[name]
            treated = ".pools.und." in name or name.endswith(".routers.und") or ".shared." in name
            if treated and float((g * m).sum()) < 0:
                g, opposed = g - (g * m).sum() / m.square().sum() * m, opposed + 1
            torch.testing.assert_close(after[name], g, atol=1e-6, rtol=1e-5)
    assert opposed > 0


def clip_factor(grads: State, clip: float) -> Tensor:
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads.values()]))
    return (clip / (norm + 1e-6)).clamp(max=1.0)


def test_maop_rests_while_shielding(fit: Any) -> None:
    def trained(level: float, method: Any, **changes: Any) -> State:
        parts = [GradientShielding()]
        return state(fit(parts, steps=5, phases=[Phase("all", 5, shield=level)], surgery=Surgery(method), **changes)[1])

    assert same(trained(1.0, "maop"), trained(1.0, "none"))
    assert not same(trained(0.9, "maop"), trained(0.9, "none"))
    model = tiny_model(num_layers=2)
    bare = {"system": load_system("symbiotic", model, shield={"mode": "none", "targets": {}})}
    assert not same(trained(1.0, "maop", **bare), trained(1.0, "none", **bare))  # nothing there to shield


# --------------------------------------------------------------------------- every method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_resumed_run_ends_where_the_whole_one_does(fit: Any, method: Any, micro_batches: int) -> None:
    options = {"steps": 5, "micro_batches": micro_batches, "surgery": Surgery(method)}
    _, whole = fit([GradientShielding(), LRPhases()], **options)
    folder = fit.run_dir / "checkpoints"
    fit([GradientShielding(), LRPhases(), StepCheckpoint(str(folder), every=3)], stop=3, **options)
    _, resumed = fit([GradientShielding(), LRPhases()], ckpt_path=newest_valid(folder), **options)
    assert same(state(whole), state(resumed))


@pytest.mark.parametrize("method", METHODS)
def test_the_generator_of_the_training_is_left_alone(fit: Any, method: Any) -> None:
    ends = []
    for chosen in ("none", method):
        torch.manual_seed(5)
        fit([], steps=2, surgery=Surgery(chosen))
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)


@pytest.mark.parametrize("method", METHODS)
def test_frozen_roles_stay_frozen_and_take_no_part(fit: Any, method: Any) -> None:
    phases = [Phase("still", 3, frozen=("und", "rest")), Phase("end", 4)]
    seen = Gradients()
    _, module = fit([LRPhases(), seen], steps=3, phases=phases, surgery=Surgery(method))
    _, plain = fit([LRPhases()], steps=3, phases=phases)
    start, end = by_hand(fit, random_batch(count=6, seed=0))[0].model.state_dict(), state(module)
    still = [name for name in start if name not in seen.after[0]]
    assert still
    assert all(torch.equal(start[name], end[name]) for name in still)
    assert same(state(plain), end) == (method != "maop")  # understanding does not reach what is left


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # inside torch.compile
@pytest.mark.parametrize(
    "method", ["upgrad", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS if m != "upgrad")]
)
def test_recomputed_and_compiled_blocks_change_nothing(fit: Any, method: Any) -> None:
    options = {"steps": 3, "phases": [Phase("joint", 3)], "surgery": Surgery(method)}
    _, plain = fit([], **options)
    _, recomputed = fit([], recompute=True, **options)
    assert same(state(plain), state(recomputed))
    _, compiled = fit([], compile="aot_eager", **options)
    torch.compiler.reset()
    for name, value in state(plain).items():
        torch.testing.assert_close(state(compiled)[name], value, atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # norms keep float32 weights
@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_gives_gradients_of_the_parameters_type(
    fit: Any, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lightning, "Trainer", functools.partial(lightning.Trainer, precision="bf16-mixed"))
    seen = Gradients()
    _, module = fit([seen], steps=3, phases=[Phase("joint", 3)], surgery=Surgery(method))
    assert {g.dtype for g in seen.after[-1].values()} == {torch.float32}
    assert all(bool(value.isfinite().all()) for value in state(module).values())
    treated = [n for n, g in seen.before[-1].items() if not torch.equal(seen.after[-1][n], g)]
    assert treated
