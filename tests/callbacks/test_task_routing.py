"""How training routes is the phase's; accuracy, shares and alpha are logged, also across a resume."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from factory import load_system, tiny_model
from symbiotic.callbacks.checkpoint import StepCheckpoint, checkpoint_path
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.routing_heatmap import RoutingHeatmap
from symbiotic.callbacks.routing_monitor import RoutingMonitor
from symbiotic.callbacks.self_checks import SelfChecks
from symbiotic.schema import Phase, Rates

ROLES = {
    "task": (r"\.moe\.(task_router\.|mix$)",),
    "pools": (r"\.moe\.(pools|routers)\.",),
    "rest": (r"^(?!blocks\.\d+\.moe\.(task_router|mix|pools|routers))",),
}
PHASES = [Phase("stage 1", 3, route_by="truth", frozen=("rest",)), Phase("stage 2", 6, frozen=("pools",))]


def callbacks() -> list[Any]:
    return [LRPhases(), RoutingMonitor(1), SelfChecks(1), RoutingHeatmap()]


def utamoe() -> dict[str, Any]:
    rates = Rates(ROLES, lr=3e-3, optimizer={}, warmup=0, decay=0.0)
    return {"system": load_system("utamoe", tiny_model(num_layers=2)), "rates": rates}


def test_the_phase_says_how_training_routes_and_the_monitor_what_came_of_it(fit: Any, memory: Any) -> None:
    _, module = fit(callbacks(), loggers=[memory], phases=PHASES, **utamoe())
    rows = memory.rows()
    for kind, group in (("text", "und"), ("vit", "und"), ("prompt", "gen"), ("vae", "gen")):
        by_truth = [rows[step][f"task/share/{kind}/{group}"] for step in (1, 2, 3)]
        predicted = [rows[step][f"task/share/{kind}/{group}"] for step in (4, 5, 6)]
        right = [rows[step][f"task/accuracy/{kind}"] for step in range(1, 7)]
        assert by_truth == [1.0] * 3
        assert predicted == right[3:]
        assert 0 <= min(right) <= max(right) <= 1
    assert min(rows[1][f"task/accuracy/{kind}"] for kind in ("text", "vit", "prompt", "vae")) < 1
    alphas = [torch.sigmoid(block.moe.mix).item() for block in module.model.blocks]
    assert [rows[6][f"task/layer{i}/alpha"] for i in (0, 1)] == pytest.approx(alphas)
    assert rows[6]["task/alpha"] == pytest.approx(sum(alphas) / 2)
    assert alphas[0] != 0.5
    assert rows[3]["routing/utilisation/text"] <= 1.0
    assert "routing/capacity@1/text/random" in rows[1]


def test_frozen_roles_stay_to_the_bit_in_their_stage_and_learn_in_the_other(fit: Any) -> None:
    states = []
    for stop in (1, 3, 6):  # the first step writes nothing down before the second
        _, module = fit([LRPhases()], phases=PHASES, stop=stop, **utamoe())
        states.append({name: value.clone() for name, value in module.model.state_dict().items()})
    start, middle, end = states
    for name in start:
        pool, task = ".moe.pools." in name or ".moe.routers." in name, ".task_router." in name or name.endswith(".mix")
        if not pool and not task:
            assert torch.equal(start[name], middle[name]), name
        if pool:
            assert torch.equal(middle[name], end[name]), name
    changed = {name for name in start if not torch.equal(middle[name], end[name])}
    assert {"blocks.0.attention.all.q.weight", "blocks.1.moe.mix", "blocks.1.moe.task_router.weight"} <= changed
    assert not torch.equal(start["blocks.0.moe.pools.gen.w_in"], middle["blocks.0.moe.pools.gen.w_in"])


@pytest.mark.parametrize("at", [2, 4])
def test_a_resume_inside_each_stage_is_bit_exact(fit: Any, memory: Any, at: int) -> None:
    _, whole = fit(callbacks(), loggers=[memory], phases=PHASES, **utamoe())
    folder = fit.run_dir / "checkpoints"
    fit([*callbacks(), StepCheckpoint(str(folder), every=at)], phases=PHASES, stop=at, **utamoe())
    again = type(memory)()
    path = checkpoint_path(folder, at)
    _, resumed = fit(callbacks(), loggers=[again], phases=PHASES, ckpt_path=path, **utamoe())
    assert again.rows() == {step: row for step, row in memory.rows().items() if step > at}
    a, b = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("devices", [2])
def test_two_ranks_count_what_one_does(fit: Any, memory: Any, devices: int) -> None:
    from symbiotic.callbacks.csv_log import CSVLog, read_rows

    for name, ranks in (("one", 1), ("two", devices)):
        folder = fit.run_dir / name
        folder.mkdir()
        log = CSVLog(str(folder))
        fit([LRPhases(), RoutingMonitor(2)], 2, 2, [log], phases=[Phase("p", 2)], devices=ranks, **utamoe())
    one, two = (read_rows(fit.run_dir / name / "metrics.csv")[-1] for name in ("one", "two"))
    names = [name for name in one if name.startswith("task/")]
    assert len(names) > 10
    for name in names:
        assert float(two[name]) == pytest.approx(float(one[name]), abs=1e-3)
