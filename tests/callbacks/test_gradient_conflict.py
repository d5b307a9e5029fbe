"""What the probe logs is right, and nothing of the training notices it."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from torch import Tensor, nn

from factory import load_system, random_batch, tiny_model
from isolated import in_a_process
from symbiotic.callbacks.balance_bias import BalanceBias
from symbiotic.callbacks.checkpoint import StepCheckpoint, newest_valid
from symbiotic.callbacks.csv_log import CSVLog, last_values
from symbiotic.callbacks.gradient_conflict import GradientConflict
from symbiotic.callbacks.gradient_shielding import GradientShielding
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.models.batch import Batch
from symbiotic.objectives.flow import noised
from symbiotic.objectives.total import loss_terms
from symbiotic.schema import Balance, ConfigError, Objective, Phase, Router

PROBE = random_batch(count=6, seed=77)
LEAKS = {"leak/all", "leak/layer0", "leak/layer1"}
REACHED = {
    f"conflict/{role}/{name}" for role in ("und", "rest") for name in ("und", "gen", "ratio", "cosine", "opposed")
}
LOGGED = REACHED | {"conflict/gen/und", "conflict/gen/gen"} | LEAKS


def monitor(every: int = 2, probe: Batch | None = PROBE, cls: type[GradientConflict] = GradientConflict) -> Any:
    callback = cls(every)
    callback.probe = probe
    return callback


def parts(*callbacks: Callback) -> list[Callback]:
    return [GradientShielding(), LRPhases(), BalanceBias(), *callbacks]


def rows(memory: Any) -> dict[int, dict[str, float]]:
    """Step -> metrics without speeds; the logger is emptied."""
    found = memory.rows()
    memory.calls.clear()
    return found


# --------------------------------------------------------------------------- what is logged


def test_names_and_steps(fit: Any, memory: Any) -> None:
    fit(parts(monitor()), steps=5, micro_batches=2, loggers=[memory])
    assert [step for step, _ in memory.calls] == [1, 2, 4]
    assert all(set(metrics) == LOGGED | {"speed/gradient_conflict"} for _, metrics in memory.calls)


def test_values_are_those_of_plain_backward_passes(fit: Any, memory: Any) -> None:
    """Recomputed from `.grad` of a copy, with the weights of the objective."""
    objective = Objective(ce_weight=2.0, flow_weight=0.5)
    _, module = fit(parts(monitor()), steps=1, loggers=[memory], objective=objective)
    found, model = rows(memory)[1], copy.deepcopy(module.model)
    grads: dict[str, dict[str, Tensor]] = {}
    for task, shield in (("ce", 1.0), ("flow", 1.0), ("free", 0.0)):
        model.zero_grad()
        out = model(noised(PROBE), shield=torch.tensor(shield))
        terms = loss_terms(model, out, PROBE, objective)
        (2.0 * terms["ce"] if task == "ce" else 0.5 * terms["flow"]).backward()
        grads[task] = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    und = [n for n in grads["ce"] if ".moe." in n and ".gen" not in n]
    first, second = (torch.cat([grads[task][n].flatten() for n in und]) for task in ("ce", "flow"))
    assert found["conflict/und/und"] == pytest.approx(float(first.norm()), rel=1e-4)
    assert found["conflict/und/gen"] == pytest.approx(float(second.norm()), rel=1e-4)
    assert found["conflict/und/ratio"] == pytest.approx(float(second.norm() / first.norm()), rel=1e-4)
    cosine = float(nn.functional.cosine_similarity(first, second, dim=0))
    assert found["conflict/und/cosine"] == pytest.approx(cosine, rel=1e-3, abs=1e-6)
    dots = [float((grads["ce"][n] * grads["flow"][n]).sum()) for n in und if bool(grads["flow"][n].any())]
    assert found["conflict/und/opposed"] == pytest.approx(sum(d < 0 for d in dots) / len(dots))
    shared = [n for n in und if ".shared." in n]
    norms = [torch.cat([grads[task][n].flatten() for n in shared]).norm() for task in ("flow", "free")]
    assert found["leak/all"] == pytest.approx(float(norms[0] / norms[1]), rel=1e-4)


@pytest.mark.parametrize(("mode", "lower"), [("output", True), ("weights", True), ("strict", False)])
def test_the_leak_follows_the_level(fit: Any, memory: Any, mode: str, lower: bool) -> None:
    model = tiny_model(num_layers=2)
    system = load_system("symbiotic", model, shield={"mode": mode, "targets": {"shared": ["vae"]}})
    phases = [Phase("full", 2, shield=1.0), Phase("part", 4, shield=0.9), Phase("none", 6)]
    fit(parts(monitor()), steps=6, loggers=[memory], phases=phases, system=system)
    found = rows(memory)
    for step in (1, 2):
        assert found[step]["leak/layer1"] == 0.0
        assert (found[step]["leak/layer0"] > 0.0) == (found[step]["leak/all"] > 0.0) == lower
    assert found[4]["leak/layer1"] == pytest.approx(0.1, rel=1e-3)
    assert {found[6][name] for name in LEAKS} == {1.0}


@pytest.mark.parametrize("name", ["standard_moe", "dense"])
def test_a_system_without_a_shield_has_no_leak(fit: Any, memory: Any, name: str) -> None:
    fit(parts(monitor()), steps=1, loggers=[memory], system=load_system(name, tiny_model(num_layers=2)))
    logged = set(rows(memory)[1])
    assert "conflict/und/cosine" in logged
    assert not logged & LEAKS


def test_without_latents_nothing_is_logged(fit: Any, memory: Any, capsys: Any) -> None:
    fit(parts(monitor(probe=random_batch(4, ("lm", "mmu")))), steps=4, loggers=[memory])
    assert memory.calls == []
    assert "gradient conflict" not in capsys.readouterr().out


def test_the_cost_is_said_once(fit: Any, capsys: Any) -> None:
    fit(parts(monitor()), steps=6)
    lines = [line for line in capsys.readouterr().out.splitlines() if "gradient conflict" in line]
    assert len(lines) == 1
    assert re.fullmatch(r"gradient conflict: [\d.e-]+ s a probe every 2 steps, [\d.]+% of the step time", lines[0])


def test_a_resumed_run_logs_what_the_whole_one_does(fit: Any, memory: Any) -> None:
    fit(parts(monitor()), steps=6, loggers=[memory])
    whole, folder = rows(memory), fit.run_dir / "checkpoints"
    fit(parts(monitor(), StepCheckpoint(str(folder), every=3)), steps=6, stop=3)
    fit(parts(monitor()), steps=6, loggers=[memory], ckpt_path=newest_valid(folder))
    assert rows(memory) == {step: whole[step] for step in (4, 6)}


class Agree(GradientConflict):
    """Fails in its process where the ranks did not measure the same."""

    def measure(self, trainer: Any, pl_module: Any, level: float) -> dict[str, float]:
        metrics = super().measure(trainer, pl_module, level)
        found: list[Any] = [None, None]
        dist.all_gather_object(found, metrics)
        assert set(metrics) == LOGGED
        assert found == [metrics, metrics]
        return metrics


def test_two_ranks_agree(fit: Any) -> None:
    """And what they log is what one process logs, up to the rounding of one step."""
    found = []
    for devices, cls in ((1, GradientConflict), (2, Agree)):
        folder = fit.run_dir / str(devices)
        options = {"micro_batches": 2, "devices": devices, "loggers": [CSVLog(str(folder))]}
        fit(parts(monitor(cls=cls)), steps=1, **options)
        found.append(last_values(folder / "metrics.csv"))
    assert set(found[0]) == set(found[1]) >= LOGGED
    assert {n: found[1][n] for n in LOGGED} == pytest.approx({n: found[0][n] for n in LOGGED}, rel=1e-2)


# --------------------------------------------------------------------------- nothing of the training is touched


class Untouched(GradientConflict):
    """Compares everything that a probe could change before and after it."""

    probes = 0

    def on_step(self, trainer: Any, pl_module: Any, step: int) -> None:
        before = self.everything(trainer, pl_module)
        super().on_step(trainer, pl_module, step)
        after = self.everything(trainer, pl_module)
        assert list(before) == list(after)
        for name, value in before.items():
            assert torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name], name
        self.probes += 1

    def everything(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        found: dict[str, Any] = {f"grad {n}": p.grad for n, p in pl_module.named_parameters()}
        found |= {f"buffer {n}": b for n, b in pl_module.named_buffers()} | pl_module.state_dict()
        for i, moments in enumerate(trainer.optimizers[0].state.values()):
            found |= {f"optimiser {i} {name}": value for name, value in moments.items()}
        found["modes"] = [
            (m.training, m.recompute) if hasattr(m, "recompute") else m.training for m in pl_module.modules()
        ]
        found["generator"], found["enabled"] = torch.get_rng_state(), torch.is_grad_enabled()
        return {n: v.clone() if isinstance(v, Tensor) else v for n, v in found.items()}


def biased() -> dict[str, Any]:
    model = tiny_model(num_layers=2, router=Router(top_k=2, bias=True))
    objective = Objective(balance=Balance(bias_rate=0.01))
    return {"model": model, "system": load_system("symbiotic", model), "objective": objective}


def test_a_probe_touches_nothing(fit: Any) -> None:
    callback = monitor(every=1, cls=Untouched)
    _, module = fit(parts(callback), steps=3, micro_batches=2, **biased())
    assert callback.probes == 3
    assert any(bool(b.any()) for n, b in module.named_buffers() if n.endswith("moe.bias"))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # inside torch.compile
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"compile": "aot_eager"}], ids=["plain", "rec", "comp"])
def test_training_is_bit_for_bit_what_it_is_without(fit: Any, memory: Any, options: dict[str, Any]) -> None:
    """And the probe measures the same whether blocks are recomputed, compiled or neither."""
    fit(parts(monitor()), steps=1, loggers=[memory], **biased())
    plain, ends = rows(memory)[1], []
    for callbacks in (parts(), parts(monitor())):
        torch.manual_seed(3)
        torch.compiler.reset()
        _, module = fit(callbacks, steps=4, loggers=[memory], **biased(), **options)
        ends.append({**module.model.state_dict(), "generator": torch.get_rng_state()})
    torch.compiler.reset()
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert rows(memory)[1] == pytest.approx(plain, rel=0.0 if options != {"compile": "aot_eager"} else 1e-3)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # norms keep float32 weights
def test_mixed_precision(fit: Any, memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning, "Trainer", functools.partial(lightning.Trainer, precision="bf16-mixed"))
    fit(parts(monitor()), steps=2, loggers=[memory])
    low = rows(memory)
    monkeypatch.undo()
    fit(parts(monitor()), steps=2, loggers=[memory])
    assert low[1] != rows(memory)[1]
    assert set(low[1]) == LOGGED
    assert low[2]["leak/layer1"] == 0.0


# --------------------------------------------------------------------------- refusals


@in_a_process
def test_wrong_settings_are_refused(fit: Any) -> None:
    with pytest.raises(ConfigError, match=r"callbacks\.gradient_conflict\.every=0: must be at least 1"):
        GradientConflict(0)
    with pytest.raises(RuntimeError, match="probe was not set"):
        fit(parts(monitor(probe=None)), steps=1)
