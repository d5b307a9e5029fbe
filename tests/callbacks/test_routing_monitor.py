"""The routing that is logged is that of the training tokens, however a step is shared out, and its drift is right."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch._dynamo.utils import counters

from factory import build, load_system, random_batch, tiny_model
from symbiotic.callbacks.checkpoint import StepCheckpoint, checkpoint_path
from symbiotic.callbacks.csv_log import CSVLog
from symbiotic.callbacks.events import read_events
from symbiotic.callbacks.lr_phases import LRPhases
from symbiotic.callbacks.routing_monitor import RoutingMonitor, drifting_rows, num_tokens, probe_probabilities
from symbiotic.models.batch import IGNORE, Batch
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.flow import noised
from symbiotic.schema import KINDS, Rates
from symbiotic.training.routing_metrics import GROUPS, random_capacity_rate

PROBE = random_batch(count=6, seed=100)


def monitor(every: int = 1, probe: Batch | None = None, **arguments: Any) -> RoutingMonitor:
    made = RoutingMonitor(every, **arguments)
    made.probe = probe
    return made


def routing(rows: Mapping[int, Mapping[str, float]], step: int) -> dict[str, float]:
    return {name: value for name, value in rows[step].items() if name.startswith("routing/")}


class Spy(Callback):
    """Routing of every micro-batch, copied when it was made, before anyone else could touch it."""

    def __init__(self) -> None:
        self.counts: list[torch.Tensor] = []
        self.tokens: list[list[int]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.counts.append(outputs["routing"].counts.clone())
        valid = batch.segment >= 0
        self.tokens.append([int(((batch.kind == m) & valid).sum()) for m in range(len(KINDS))])


class Still(Callback):
    """Keeps the weights as they are, so that fits with different numbers of steps see the same model."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.0


# --------------------------------------------------------------------------- counts, capacity, baselines


def test_capacity_is_the_mean_over_micro_batches_and_its_baseline_that_of_the_same(fit: Any, memory: Any) -> None:
    spy = Spy()
    fit([spy, monitor(every=2), LRPhases()], steps=4, micro_batches=3, loggers=[memory])
    rows = memory.rows()
    assert list(rows) == [2, 4]
    sees = {"text": range(4), "prompt": range(4), "vit": range(4), "vae": range(4, 8), "und": range(4)}
    for step, part in ((2, range(6)), (4, range(6, 12))):
        for group, experts in sees.items():
            kinds = list(GROUPS[group])
            for layer in range(2):
                rates = []
                for i in part:
                    loads = spy.counts[i][layer, kinds].sum(0)[list(experts)].tolist()
                    limit = max(1, math.floor(sum(loads) / 4))
                    rates.append(sum(min(load, limit) for load in loads) / sum(loads))
                assert rows[step][f"routing/layer{layer}/capacity@1/{group}"] == pytest.approx(sum(rates) / 6)
            random = [random_capacity_rate(sum(spy.tokens[i][m] for m in kinds), 2, 4) for i in part]
            assert rows[step][f"routing/capacity@1/{group}/random"] == pytest.approx(sum(random) / 6, abs=1e-12)
        assert "routing/capacity@1/all/random" not in rows[step]  # two pools


def test_the_same_routing_is_logged_on_one_rank_and_on_two(fit: Any) -> None:
    found = []
    for devices in (1, 2):
        log = CSVLog(str(fit.run_dir / f"{devices}"))
        fit([monitor(probe=PROBE), LRPhases()], steps=1, micro_batches=4, devices=devices, loggers=[log])
        with (fit.run_dir / f"{devices}" / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        found.append(
            [{k: v for k, v in row.items() if not k.startswith("routing/drift") and "/drift" not in k} for row in rows]
        )
    assert found[0] == found[1]
    assert len(found[0]) == 1
    assert sum(name.startswith("routing/") for name in found[0][0]) > 60


def test_accumulation_changes_nothing(fit: Any, memory: Any) -> None:
    """Four micro-batches: as one step, and as four."""
    fit([Still(), monitor(every=1)], steps=1, micro_batches=4, loggers=[memory])
    fit([Still(), monitor(every=4)], steps=4, loggers=[memory])
    rows = memory.rows()
    assert routing(rows, 1) == routing(rows, 4)
    assert len(routing(rows, 1)) > 60


def test_recomputed_blocks_are_not_counted_twice(fit: Any, memory: Any) -> None:
    rows = []
    for recompute in (False, True):
        fit([monitor(every=1), LRPhases()], steps=2, micro_batches=2, loggers=[memory], recompute=recompute)
        rows.append(memory.rows())
        memory.calls.clear()
    assert rows[0] == rows[1]
    assert read_events(fit.run_dir) == []


def test_forwards_of_an_evaluation_are_not_counted(fit: Any, memory: Any) -> None:
    class Evaluate(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            pl_module.model.eval()
            with torch.no_grad():
                pl_module.model(noised(random_batch(count=9, seed=7)))
            pl_module.model.train()
            pl_module.model(noised(batch), trace=True)

    rows = []
    for others in ([], [Evaluate()]):
        fit([*others, monitor(every=2), LRPhases()], steps=4, loggers=[memory])
        rows.append(memory.rows())
        memory.calls.clear()
    assert rows[0] == rows[1]


def padded(batch: Batch, width: int) -> Batch:
    """The same samples in longer rows."""
    fill = {"segment": -1, "span": -1, "target": IGNORE, "task": -1}
    names = ("tokens", "kind", "position", "segment", "span", "causal", "target", "task")
    longer = {
        name: torch.nn.functional.pad(getattr(batch, name), (0, width), value=fill.get(name, 0)) for name in names
    }
    return dataclasses.replace(batch, **longer)


def stacked(parts: Sequence[Batch]) -> Batch:
    """The rows of several batches in one."""
    fields = [field.name for field in dataclasses.fields(Batch) if not field.name.endswith("_norm")]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}
    return dataclasses.replace(parts[0], **joined)


def test_padding_is_not_counted() -> None:
    model = build("symbiotic")
    sums = []
    for batch in (random_batch(), padded(random_batch(), 13)):
        made = monitor()
        outputs = {"routing": model(noised(batch)).routing.detach()}
        made.on_micro_batch(None, SimpleNamespace(model=model), outputs, batch)  # type: ignore[arg-type]
        made.add_baselines(model)
        sums.append(made.window.sums)
    assert sums[0].keys() == {"counts", "tokens", "capacity", "micro_batches", "random"}
    torch.testing.assert_close(sums[0], sums[1], rtol=0, atol=0, equal_nan=True)
    batch = random_batch()
    valid = batch.segment >= 0
    assert num_tokens(padded(batch, 5)).tolist() == [int(((batch.kind == m) & valid).sum()) for m in range(4)]


def test_a_resumed_run_logs_the_same_numbers(fit: Any, memory: Any) -> None:
    folder = fit.run_dir / "checkpoints"
    fit([monitor(every=4, probe=PROBE), LRPhases()], steps=8, micro_batches=2, loggers=[memory])
    whole = memory.rows()
    memory.calls.clear()
    saving = StepCheckpoint(str(folder), every=3)
    fit([monitor(4, PROBE), LRPhases(), saving], steps=8, micro_batches=2, stop=6, loggers=[memory])
    resumed = checkpoint_path(folder, 3)  # inside the first window
    memory.calls.clear()
    fit([monitor(4, PROBE), LRPhases()], steps=8, micro_batches=2, loggers=[memory], ckpt_path=resumed)
    assert memory.rows() == whole
    assert whole[8]["routing/drift/text"] > 0
    state = torch.load(resumed, weights_only=True)
    assert state["window/routing_monitor"]["random"].shape == (2, len(GROUPS))
    reference = state["routing_monitor"]["reference"]
    assert {kind: (value.dtype, value.shape[0]) for kind, value in reference.items()} == {
        "text": (torch.float32, 2), "vit": (torch.float32, 2)
    }  # fmt: skip


def test_a_dense_model_has_nothing_to_log(fit: Any, memory: Any) -> None:
    model = tiny_model(num_layers=2)
    rates = Rates({"all": ("",)}, lr=1e-3, optimizer={}, decay=0.0)
    fit([monitor(probe=PROBE), LRPhases()], steps=2, loggers=[memory], system=load_system("dense", model), rates=rates)
    assert memory.calls == []
    assert read_events(fit.run_dir) == []


def test_layers_can_be_left_out(fit: Any, memory: Any) -> None:
    fit([monitor(probe=PROBE, per_layer=False), LRPhases()], steps=1, loggers=[memory])
    names = routing(memory.rows(), 1)
    assert {"routing/capacity@1/text", "routing/drift/text"} <= set(names)
    assert not any("/layer" in name for name in names)


# --------------------------------------------------------------------------- drift


class Snapshots(Callback):
    """The parameters before the first step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = {name: value.clone() for name, value in pl_module.model.state_dict().items()}


def by_hand(old: UnifiedModel, new: UnifiedModel, kind: str, layer: int) -> float:
    """Mean over the probe's tokens of the mean of two Kullback-Leibler divergences, token by token."""
    tables = [model(noised(PROBE), trace=True).trace[layer].probs_NE.tolist() for model in (old, new)]
    values = []
    for n, (place, segment) in enumerate(
        zip(PROBE.kind.flatten().tolist(), PROBE.segment.flatten().tolist(), strict=True)
    ):
        if place == KINDS.index(kind) and segment >= 0:
            p, q = tables[0][n], tables[1][n]
            middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
            parts = (sum(a * math.log2(a / m) for a, m in zip(side, middle, strict=True) if a > 0) for side in (p, q))
            values.append(sum(parts) / 2)
    return sum(values) / len(values)


def test_drift_is_zero_while_the_weights_stay(fit: Any, memory: Any) -> None:
    fit([Still(), monitor(probe=PROBE)], steps=2, loggers=[memory])
    values = {name: value for name, value in memory.rows()[2].items() if "/drift/" in name}
    assert set(values) == {
        f"routing/{where}drift/{kind}" for where in ("", "layer0/", "layer1/") for kind in ("text", "vit")
    }
    assert set(values.values()) == {0.0}


def test_drift_is_that_since_the_start_by_hand(fit: Any, memory: Any) -> None:
    snapshots = Snapshots()
    _, module = fit([snapshots, monitor(every=3, probe=PROBE), LRPhases()], steps=3, loggers=[memory])
    old = UnifiedModel(module.config.model, module.config.system)
    old.load_state_dict(snapshots.before)
    row = memory.rows()[3]
    for kind in ("text", "vit"):
        layers = [by_hand(old, module.model, kind, layer) for layer in range(2)]
        assert min(layers) > 1e-5
        assert [row[f"routing/layer{i}/drift/{kind}"] for i in range(2)] == pytest.approx(layers, rel=1e-3)
        assert row[f"routing/drift/{kind}"] == pytest.approx(sum(layers) / 2, rel=1e-3)


def test_without_a_probe_there_is_no_drift(fit: Any, memory: Any) -> None:
    fit([monitor(), LRPhases()], steps=1, loggers=[memory])
    assert not any("drift" in name for name in memory.rows()[1])


def test_a_probe_of_text_alone_has_no_drift_of_read_patches() -> None:
    found = probe_probabilities(build("symbiotic"), random_batch(tasks=("lm",)))
    assert set(found) == {"text"}
    torch.testing.assert_close(found["text"].sum(-1), torch.ones(found["text"].shape[:2]))


def test_rows_without_text_and_read_patches_are_left_out_of_the_probe() -> None:
    """And the probabilities of the others are those in the whole probe."""
    parts = [random_batch(3, (task,), seed) for seed, task in enumerate(("latents", "mmu", "latents", "lm"))]
    whole = stacked(parts)
    rows, model = drifting_rows(whole), build("symbiotic")
    assert 0 < len(rows.kind) == len(parts[1].kind) + len(parts[3].kind) < len(whole.kind)
    assert len(rows.latents) == 0
    assert torch.equal(rows.vit_patches, parts[1].vit_patches)
    both = random_batch(2, ("t2i", "mmu"), 9)  # one row
    assert torch.equal(drifting_rows(stacked([parts[0], both])).latents, both.latents)
    torch.testing.assert_close(probe_probabilities(model, rows), probe_probabilities(model, whole))


def test_a_probe_of_latents_alone_has_no_drift(fit: Any, memory: Any) -> None:
    fit([monitor(probe=random_batch(3, ("latents",))), LRPhases()], steps=1, loggers=[memory])
    assert not any("drift" in name for name in memory.rows()[1])


# --------------------------------------------------------------------------- what a monitor leaves alone


class Lives(Callback):
    """What a probe might touch, before and after it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def state(self, pl_module: Any) -> list[Any]:
        grads = [None if p.grad is None else p.grad.clone() for p in pl_module.model.parameters()]
        return [grads, torch.get_rng_state(), [m.training for m in pl_module.model.modules()]]

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(self.state(pl_module))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_probe_leaves_gradients_random_state_mode_and_weights_alone(fit: Any, recompute: bool) -> None:
    before, after = Lives(), Lives()
    parts = [before, monitor(every=1, probe=PROBE), after, LRPhases()]
    _, module = fit(parts, steps=3, micro_batches=2, recompute=recompute)
    torch.testing.assert_close(before.seen, after.seen, rtol=0, atol=0)
    assert len(before.seen) == 6
    _, bare = fit([LRPhases()], steps=3, micro_batches=2, recompute=recompute)
    expected = bare.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of dynamo, hidden by itself
def test_a_probe_compiles_no_block_again(fit: Any, memory: Any) -> None:
    graphs = []
    for probe in (None, PROBE):
        torch._dynamo.reset()
        counters.clear()
        fit([monitor(probe=probe), LRPhases()], steps=2, loggers=[memory], compile="aot_eager")
        graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert graphs[0] == graphs[1] > 0
    assert memory.rows()[2]["routing/drift/text"] > 0


# --------------------------------------------------------------------------- the self-check on counts


class Double(Callback):
    """Counts every micro-batch twice, as recomputed blocks that are counted would."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        outputs["routing"].counts *= 2
        outputs["routing"].tokens *= 2


def test_counts_that_do_not_fit_the_batch_are_told_once(fit: Any) -> None:
    """Not even where the number of tokens that the model returned is wrong in the same way."""
    folder = fit.run_dir / "checkpoints"
    with pytest.warns(UserWarning, match="routing counts") as caught:
        fit([Double(), monitor(), LRPhases(), StepCheckpoint(str(folder), every=2)], steps=4, stop=2)
    fit([Double(), monitor(), LRPhases()], steps=4, ckpt_path=checkpoint_path(folder, 2))
    assert sum("routing counts" in str(warning.message) for warning in caught) == 1
    (event,) = read_events(Path(fit.run_dir))
    assert (event["step"], event["kind"], event["check"]) == (1, "self_check", "counts")
    assert "layer 0" in event["text"]
