"""The moving average of the weights: its formula, exact resume, ranks, and the training that it leaves alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from factory import load_system, tiny_model
from symbiotic.callbacks.balance_bias import BalanceBias
from symbiotic.callbacks.checkpoint import StepCheckpoint, newest_valid
from symbiotic.callbacks.ema import EMA, averaged, decay_at
from symbiotic.callbacks.in_loop_evaluation import SCORES, InLoopEvaluation, read_scores
from symbiotic.config import compose
from symbiotic.runs import load_state, save_state
from symbiotic.schema import Balance, ConfigError, Objective, Router

State = Mapping[str, Tensor]


def ema(path: Path, decay: float = 0.5, every: int = 0, evaluate: Any = None) -> EMA:
    callback = EMA(decay, every)
    callback.save = lambda state: save_state(path, state)
    callback.evaluate = evaluate
    return callback


class Weights(Callback):
    """Copies of the model after every micro-batch that ended a step."""

    def __init__(self) -> None:
        self.start: State = {}
        self.seen: list[State] = []

    def copy(self, module: Any) -> State:
        return {name: value.clone() for name, value in module.model.state_dict().items()}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = self.copy(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.seen):
            self.seen.append(self.copy(pl_module))


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def biased() -> dict[str, Any]:
    """A model with buffers that training changes."""
    model = tiny_model(num_layers=2, router=Router(top_k=2, bias=True))
    objective = Objective(balance=Balance(bias_rate=0.01))
    return {"model": model, "system": load_system("symbiotic", model), "objective": objective}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_average_follows_its_formula_step_by_step(fit: Any, tmp_path: Path, micro_batches: int) -> None:
    weights, path = Weights(), tmp_path / "ema.safetensors"
    fit([BalanceBias(), weights, ema(path)], steps=5, micro_batches=micro_batches, **biased())
    assert len(weights.seen) == 5
    saved = load_state(path)
    assert saved.keys() == weights.start.keys()
    for name, value in weights.start.items():
        expected = value.double()
        for step, now in enumerate(weights.seen, 1):
            decay = min(0.5, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * now[name].double()
        assert torch.allclose(saved[name].double(), expected, rtol=1e-5, atol=1e-7), name
    moved = [name for name in saved if not torch.equal(saved[name], weights.seen[-1][name])]
    assert any(name.endswith("moe.bias") for name in moved)
    assert len(moved) > len(saved) / 2


def test_decay_rises_to_its_value() -> None:
    assert decay_at(1, 0.99) == pytest.approx(2 / 11)
    assert decay_at(10_000, 0.99) == 0.99
    rising = [decay_at(step, 0.999) for step in range(1, 100)]
    assert rising == sorted(rising)
    assert decay_at(1, 0.0) == 0.0


def test_training_is_what_it_is_without(fit: Any, tmp_path: Path) -> None:
    _, plain = fit([], steps=4)
    _, beside = fit([ema(tmp_path / "a.safetensors", every=2, evaluate=lambda model: {"x": 1.0})], steps=4)
    assert same(plain.model.state_dict(), beside.model.state_dict())


def test_a_resume_gives_the_same_average_bit_by_bit(fit: Any, tmp_path: Path) -> None:
    """Checkpoints keep the training's own weights; the average is beside them."""
    whole, split, folder = tmp_path / "whole.safetensors", tmp_path / "split.safetensors", tmp_path / "checkpoints"
    fit([BalanceBias(), ema(whole)], steps=6, **biased())
    weights = Weights()
    fit([BalanceBias(), weights, ema(split), StepCheckpoint(str(folder), every=3)], steps=6, stop=3, **biased())
    checkpoint = newest_valid(folder)
    assert same(load_state(checkpoint), weights.seen[2])
    split.unlink(missing_ok=True)
    fit([BalanceBias(), ema(split)], steps=6, ckpt_path=checkpoint, **biased())
    assert same(load_state(whole), load_state(split))


def test_a_finished_fit_writes_its_average_again(fit: Any, tmp_path: Path) -> None:
    """A kill may come between the last checkpoint and the file."""
    path, folder = tmp_path / "ema.safetensors", tmp_path / "checkpoints"
    fit([ema(path), StepCheckpoint(str(folder), every=4)], steps=4)
    first = load_state(path)
    path.unlink()
    fit([ema(path)], steps=4, ckpt_path=newest_valid(folder))
    assert same(load_state(path), first)


def test_an_unfinished_fit_writes_none(fit: Any, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 2

    fit([ema(tmp_path / "ema.safetensors"), Stop()], steps=6)
    assert not (tmp_path / "ema.safetensors").exists()


def test_two_ranks_average_what_one_does(fit: Any, tmp_path: Path) -> None:
    files = [tmp_path / f"{devices}.safetensors" for devices in (1, 2)]
    for devices, path in enumerate(files, 1):
        fit([ema(path)], steps=3, micro_batches=2, devices=devices)
    one, two = map(load_state, files)
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


def test_ranks_resume_the_average(fit: Any, tmp_path: Path) -> None:
    whole, split, folder = tmp_path / "whole.safetensors", tmp_path / "split.safetensors", tmp_path / "checkpoints"
    settings = {"steps": 4, "micro_batches": 2, "devices": 2}
    fit([ema(whole)], **settings)
    fit([ema(split), StepCheckpoint(str(folder), every=2)], stop=2, **settings)
    fit([ema(split)], ckpt_path=newest_valid(folder), **settings)
    assert same(load_state(whole), load_state(split))


def test_in_loop_scores_are_of_the_average_under_their_own_names(fit: Any, memory: Any, tmp_path: Path) -> None:
    weights = Weights()
    norms: list[float] = []

    def norm(values: Iterable[Tensor]) -> float:
        return float(sum(value.double().square().sum() for value in values))

    def evaluate(model: Any) -> dict[str, float]:
        norms.append(norm(model.state_dict().values()))
        return {"reading": norms[-1]}

    own = InLoopEvaluation(every=2)
    own.evaluate = evaluate
    callback = ema(tmp_path / "ema.safetensors", every=2, evaluate=evaluate)
    copies: list[State] = []

    class Average(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            copies.append({name: value.clone() for name, value in callback.average.items()})

    fit([own, callback, Average(), weights], steps=5, loggers=[memory])
    scores = read_scores(tmp_path / SCORES)
    assert list(scores) == [2, 4]
    for step in (2, 4):
        assert scores[step] == {
            "reading": pytest.approx(norm(weights.seen[step - 1].values())),
            "ema/reading": pytest.approx(norm(copies[step - 1].values())),
        }
        assert memory.rows()[step]["eval/ema/reading"] == scores[step]["ema/reading"]
        assert scores[step]["reading"] != scores[step]["ema/reading"]


def test_a_models_own_weights_are_back_after_an_error() -> None:
    model = torch.nn.Linear(2, 2)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    inside = []
    with pytest.raises(ZeroDivisionError), averaged(model, {name: value + 1 for name, value in own.items()}):
        inside.append(1 / int(model.weight.equal(own["weight"])))
    assert inside == []
    assert same(model.state_dict(), own)


def test_half_precision_is_averaged_in_float32(fit: Any, tmp_path: Path) -> None:
    module = type("Module", (), {"model": torch.nn.Linear(3, 3).bfloat16(), "device": "cpu"})()
    module.parameters = module.model.parameters
    callback = ema(tmp_path / "x", decay=0.9999)
    callback.on_train_start(None, module)  # type: ignore[arg-type]
    assert {value.dtype for value in callback.average.values()} == {torch.float32}
    before = callback.average["weight"].clone()
    with torch.no_grad():
        module.model.weight += 1.0
    trainer = type("Trainer", (), {"max_steps": 10**6})()
    callback.on_step(trainer, module, 10**5)
    assert 0 < (callback.average["weight"] - before).abs().max() < 1e-3
    with averaged(module.model, callback.average):
        assert module.model.weight.dtype == torch.bfloat16


def test_what_must_be_set_before_the_fit(fit: Any) -> None:
    with pytest.raises(RuntimeError, match="EMA: set `save`"):
        fit([EMA()], steps=1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("callbacks.ema.decay=1", r"callbacks\.ema\.decay=1: must be at least 0 and below 1"),
        ("callbacks.ema.decay=soon", r"callbacks\.ema\.decay='soon': must be"),
        ("callbacks.ema.every=-1", r"callbacks\.ema\.every=-1: must be a whole number"),
        ("callbacks.ema.dekay=1", r"did you mean 'callbacks\.ema\.decay'"),
    ],
)
def test_wrong_settings_are_refused_while_composing(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["experiment=smoke", "callbacks=[default,ema]", override])


def test_it_is_off_by_default_and_behind_the_others_when_on() -> None:
    assert "ema" not in compose(["experiment=smoke"]).callbacks
    assert list(compose(["experiment=smoke", "callbacks=[default,ema]"]).callbacks)[-1] == "ema"
