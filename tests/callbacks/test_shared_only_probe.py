"""The probe on shared experts alone: when it runs, what it runs on, and that training notices nothing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from factory import SYSTEMS, load_system, random_batch, tiny_model
from symbiotic.callbacks.checkpoint import StepCheckpoint, checkpoint_path
from symbiotic.callbacks.in_loop_evaluation import read_scores
from symbiotic.callbacks.log import StepLog
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.shared_only_probe import SHARED_ONLY, SharedOnlyProbe, missing
from symbiotic.callbacks.step import StepCallback
from symbiotic.config import compose
from symbiotic.evaluation.embedded import EmbeddedEvaluation
from symbiotic.models.moe import MoE, shared_only
from symbiotic.schema import ConfigError, Evaluation, Objective


def routed_norm(model: nn.Module) -> dict[str, float]:
    """What the routed experts added to the residual stream, over all layers: 0 with them off. Reckless: it draws
    random numbers, asks for gradients and leaves the model in another mode, as no evaluation should."""
    out = model(random_batch(count=3, tasks=("lm",)), trace=True)
    model.train()
    torch.rand(3)
    return {"routed": float(sum(layer.routed_ND.norm() for layer in out.trace)), "logits": float(out.logits.sum())}


def make(every: int = 0) -> SharedOnlyProbe:
    probe = SharedOnlyProbe(every)
    probe.evaluate = routed_norm
    return probe


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 6]), (2, [0, 2, 4, 6]), (4, [0, 4, 6])])
def test_runs_at_the_start_on_time_and_at_the_end(every: int, steps: list[int], fit: Any, memory: Any) -> None:
    fit([make(every), LRPhases()], loggers=[memory])
    found = read_scores(fit.run_dir / SHARED_ONLY)
    assert list(found) == steps
    assert all(scores["routed"] == 0 for scores in found.values())
    logged = {step: row for step, row in memory.rows().items() if "shared_only/logits" in row}
    assert {step: row["shared_only/logits"] for step, row in logged.items()} == {
        step: scores["logits"] for step, scores in found.items()
    }


def test_it_measures_the_model_of_that_step_without_routed_experts(fit: Any) -> None:
    _, module = fit([make(), LRPhases()])
    with torch.no_grad(), shared_only(module.model):
        want = routed_norm(module.model)["logits"]
    found = read_scores(fit.run_dir / SHARED_ONLY)
    assert found[6]["logits"] == pytest.approx(want, rel=1e-6)
    assert found[0]["logits"] != pytest.approx(want, rel=1e-3)
    assert not any(layer.routed_off for layer in module.model.modules() if isinstance(layer, MoE))


class Watch(StepCallback):
    """Keeps what training itself did: the losses and counts of every micro-batch, and the mode it ran in."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_micro_batch(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any) -> None:
        modes = [part.training for part in pl_module.modules()]
        self.seen.append((float(outputs["loss"]), outputs["routing"].counts.tolist(), modes))


def test_training_notices_nothing(fit: Any, memory: Any) -> None:
    """The same losses, gradients, counts and parameters, bit for bit; the random state goes on as before."""
    watched, logs, states, draws = [], [], [], []
    for probes in ([], [make(1)]):
        torch.manual_seed(3)
        memory.calls.clear()
        watch = Watch()
        _, module = fit([*probes, watch, StepLog(every=1), LRPhases()], loggers=[memory])
        logs.append([{k: v for k, v in memory.rows()[s].items() if "shared_only" not in k} for s in range(1, 7)])
        states.append({name: value.clone() for name, value in module.state_dict().items()})
        watched.append(watch.seen)
        draws.append(torch.rand(2).tolist())
    assert watched[0] == watched[1]
    assert logs[0] == logs[1]
    assert {"train/loss", "grad_norm/gen", "tokens/vae"} <= set(logs[0][0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert draws[0] == draws[1]


def test_gradients_of_an_accumulation_survive_a_probe(fit: Any) -> None:
    plain = fit([LRPhases()], micro_batches=2)[1].state_dict()
    probed = fit([make(1), LRPhases()], micro_batches=2)[1].state_dict()
    assert all(torch.equal(plain[name], probed[name]) for name in plain)


def test_a_resumed_run_records_what_the_whole_one_did(fit: Any) -> None:
    fit([make(2), LRPhases(), StepCheckpoint(str(fit.run_dir / "checkpoints"), every=3, keep=9)])
    path = fit.run_dir / SHARED_ONLY
    whole = path.read_text()
    lines = whole.splitlines(keepends=True)
    path.write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
    fit([make(2), LRPhases()], ckpt_path=checkpoint_path(fit.run_dir / "checkpoints", 3))
    assert path.read_text() == whole


def test_two_ranks_write_once(fit: Any) -> None:
    fit([make(3), LRPhases()], micro_batches=2)
    one = read_scores(fit.run_dir / SHARED_ONLY)
    (fit.run_dir / SHARED_ONLY).unlink()
    fit([make(3), LRPhases()], micro_batches=2, devices=2)
    two = read_scores(fit.run_dir / SHARED_ONLY)
    assert list(one) == list(two) == [0, 3, 6]
    assert all(two[step]["logits"] == pytest.approx(one[step]["logits"], rel=1e-4) for step in one)


def test_a_system_that_has_nothing_to_probe_is_told_so_once(fit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(num_layers=2)
    bare = dataclasses.replace(load_system("standard_moe", model), shared={})
    for system, line in ((load_system("dense", model), "no routed experts"), (bare, "no shared expert")):
        fit([make(2), LRPhases()], steps=4, system=system)
        assert capsys.readouterr().out.count(line) == 1
    assert not (fit.run_dir / SHARED_ONLY).exists()


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_shipped_system_with_shared_experts_is_probed(name: str) -> None:
    assert (missing(load_system(name, tiny_model())) is None) == (name not in ("dense", "symbiotic_bridge"))


def test_shared_experts_of_latents_alone_do_not_count() -> None:
    mot = load_system("mot", tiny_model())
    only_gen = {name: kinds for name, kinds in mot.shared.items() if kinds == ("vae",)}
    assert "no shared expert that understands" in str(missing(dataclasses.replace(mot, shared=only_gen)))


def test_wrong_use_is_refused(fit: Any) -> None:
    with pytest.raises(RuntimeError, match="SharedOnlyProbe: set `evaluate`"):
        fit([SharedOnlyProbe(), LRPhases()], steps=1)
    with pytest.raises(ConfigError, match=r"every=-1: must be at least 0"):
        SharedOnlyProbe(every=-1)


def test_with_the_understanding_benchmarks(fit: Any, shared_tmp: Path) -> None:
    """As a run wires it: knowledge and reading of a corpus, under names of their own."""
    from symbiotic.data.embedded import EmbeddedData

    sizes = {"lm": 8, "lm_unreplayed": 8, "mmu": 8, "t2i": 8, "t2i_long": 8}
    corpus = EmbeddedData(str(shared_tmp / "eval_corpus"), questions=1, readings=12, captions=12, **sizes).prepare()
    evaluation = EmbeddedEvaluation(corpus, Evaluation(questions=8, readings=4), Objective(), "tiny")
    probe = SharedOnlyProbe()
    probe.evaluate = lambda model: evaluation.run(model, 0, only=("knowledge", "reading"))
    config = compose(["experiment=smoke"])
    fit([probe, LRPhases()], steps=1, model=config.model, system=config.system)
    found = read_scores(fit.run_dir / SHARED_ONLY)
    assert list(found) == [0, 1]
    assert set(found[1]) == {"knowledge_replayed", "knowledge_unreplayed", "reading"}
