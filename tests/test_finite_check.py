"""A sample whose loss or gradient is not finite: its step is not taken, it is named with its shard, no weight is lost.

The model is an honest one, but what it reads in the place of one word is infinite: what has that word has no loss.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException

from symbiotic.arc import Arc
from symbiotic.callbacks.checkpoint import newest_valid
from symbiotic.callbacks.csv_log import CSVLog, read_rows
from symbiotic.callbacks.events import read_events
from symbiotic.config import compose
from symbiotic.data.loader import MicroBatches
from symbiotic.fit import fit
from symbiotic.launch import one_line
from symbiotic.models.unified import model_of
from symbiotic.schema import ConfigError, RunError

STEPS = 8


def prepared(shared: Path, folder: Path, *more: str) -> tuple[Arc, MicroBatches]:
    paths = [f"paths.runs={folder}", f"paths.data={shared / 'data'}", f"paths.cache={shared / 'cache'}"]
    plain = ["callbacks.gradient_conflict=null", "evaluation.every=0", f"phases.steps={STEPS}", "log_every=1"]
    plain += ["logger.tensorboard=null"]
    arc = Arc(compose(["experiment=smoke", "save_every=1", "data.micro_batches=1", *plain, *paths, *more]))
    arc.prepare_data()
    if arc.scorers is not None:
        arc.scorers.wait()
    return arc, arc.dataset(arc.config, True)


class Poison(Callback):
    """One word is read as infinite; the weights are as finite as ever."""

    def __init__(self, word: int) -> None:
        self.word = word

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.model.embed.register_forward_hook(self.spoil)

    def spoil(self, module: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out.masked_fill((args[0] == self.word)[..., None], torch.inf)


def start(arc: Arc, word: int | None) -> dict[str, Tensor]:
    if word is not None:
        arc.made["poison"] = Poison(word)
    return model_of(arc.config).initialise(0).state_dict()


def tokens(dataset: MicroBatches, item: int) -> dict[str, set[int]]:
    return {name: set(batch.tokens[batch.segment >= 0].tolist()) for name, batch in dataset.alone(item)}


def rare_word(dataset: MicroBatches, items: range) -> tuple[int, int, list[str]]:
    """A word, the only item among these that has it (not the first), and the names of the samples that do."""
    seen = {item: tokens(dataset, item) for item in items}
    for item in items[2:-2]:
        for word in sorted(set().union(*seen[item].values()), reverse=True):
            if not any(word in words for other in items if other != item for words in seen[other].values()):
                return word, item, [name for name, words in seen[item].items() if word in words]
    raise AssertionError("no word is in one item only")


def train(arc: Arc, dataset: MicroBatches, state: dict[str, Tensor]) -> Any:
    arc.folder.mkdir(exist_ok=True, parents=True)
    return fit(arc.config, arc.folder, dataset, arc.callbacks(), [CSVLog(str(arc.folder))], state).model.state_dict()


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_run_stops_before_the_step_and_names_the_sample(
    shared_tmp: Path, tmp_path: Path, micro_batches: int
) -> None:
    arc, dataset = prepared(shared_tmp, tmp_path, f"data.micro_batches={micro_batches}")
    word, item, names = rare_word(dataset, range(STEPS * micro_batches))
    step = item // micro_batches
    with pytest.raises(RunError, match=rf"step {step + 1}: the loss is not finite at ") as caught:
        train(arc, dataset, start(arc, word))
    assert set(re.findall(r"[\w-]+\.tar: [\w-]+", str(caught.value))) == set(names[:5])
    assert "\n" not in str(caught.value)
    saved = newest_valid(arc.folder / "checkpoints")
    assert saved is not None
    assert saved.name == f"step={step:06d}.ckpt"
    weights = torch.load(saved, weights_only=True)["state_dict"]
    assert all(value.isfinite().all() for value in weights.values())


def test_a_step_that_is_skipped_changes_nothing(shared_tmp: Path, tmp_path: Path) -> None:
    """Weights and moments before and after it are the same, the log leaves it out, and the event names the samples."""
    more = ("callbacks.finite_check.policy=skip", "model.router.bias=true", "objective.balance.bias_rate=.001")
    arc, dataset = prepared(shared_tmp, tmp_path, *more)
    word, step, names = rare_word(dataset, range(STEPS))
    seen: dict[int, dict[str, Any]] = {}

    class Look(type(arc.made["progress"])):  # type: ignore[misc]
        def on_step(self, trainer: Any, pl_module: Any, step: int) -> None:
            states = trainer.optimizers[0].state.values()
            moments = [value.clone() for state in states for value in state.values()]
            seen[step] = {"weights": [v.clone() for v in pl_module.state_dict().values()], "moments": moments}

    arc.made["look"] = Look()
    end = train(arc, dataset, start(arc, word))
    for part in ("weights", "moments"):
        before, during, after = (seen[number][part] for number in (step, step + 1, step + 2))
        assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(during, after, strict=True))
    assert all(value.isfinite().all() for value in end.values())
    (event,) = [event for event in read_events(arc.folder) if event["kind"] == "skipped"]
    assert event["step"] == step + 1
    assert event["samples"] == names
    losses = {int(row["step"]): row.get("train/loss") for row in read_rows(arc.folder / "metrics.csv")}
    assert losses.pop(step + 1) == "nan", "a window of this one step has no mean"
    assert all(value not in ("nan", "inf") for value in losses.values())
    saved = torch.load(arc.folder / "checkpoints" / f"step={STEPS:06d}.ckpt", weights_only=True)
    assert [state["skipped"] for name, state in saved["callbacks"].items() if name.startswith("FiniteCheck")] == [1]


def test_too_many_skipped_steps_end_the_run(shared_tmp: Path, tmp_path: Path) -> None:
    more = ("callbacks.finite_check.policy=skip", "callbacks.finite_check.limit=2")
    arc, dataset = prepared(shared_tmp, tmp_path, *more)
    word = next(iter(set.intersection(*tokens(dataset, 0).values())))  # in every sample
    with pytest.raises(RunError, match=r"step 3: .* and \d+ more\. It was not taken: .*limit=2 allows no more"):
        train(arc, dataset, start(arc, word))
    assert [e["step"] for e in read_events(arc.folder) if e["kind"] == "skipped"] == [1, 2]


def test_a_gradient_that_is_not_finite_counts_too(shared_tmp: Path, tmp_path: Path) -> None:
    """A loss of 1e38 is finite; its gradient, scaled on the way back, is not."""
    arc, dataset = prepared(shared_tmp, tmp_path, "objective.flow_weight=1e38", "rates.clip=0")
    with pytest.raises(RunError, match=r"step 1: the loss is finite, its gradient is not at t2i") as caught:
        train(arc, dataset, start(arc, None))
    assert "lm-" not in str(caught.value), "text alone has no such gradient"


def test_every_rank_leaves_out_the_step_that_one_of_them_cannot_take(shared_tmp: Path, tmp_path: Path) -> None:
    """Two ranks, one micro-batch each: the sample is on one of them, named on both, and nothing of the step is left."""
    more = ("trainer=ddp", "data.micro_batches=2", "callbacks.finite_check.policy=skip")
    arc, dataset = prepared(shared_tmp, tmp_path, *more)
    word, item, names = rare_word(dataset, range(2 * STEPS))
    end = train(arc, dataset, start(arc, word))
    (event,) = [event for event in read_events(arc.folder) if event["kind"] == "skipped"]
    assert (event["step"], event["samples"]) == (item // 2 + 1, names)
    assert all(value.isfinite().all() for value in end.values())
    arc, dataset = prepared(shared_tmp, tmp_path / "stop", *more[:2])
    with pytest.raises(ProcessRaisedException) as caught:
        train(arc, dataset, start(arc, word))
    assert re.match(rf"step {item // 2 + 1}: the loss is not finite at {names[0]}", str(one_line(caught.value)))


def test_weights_that_are_not_finite_are_never_saved_without_the_check_either(shared_tmp: Path, tmp_path: Path) -> None:
    """The parameter is named, and what was saved before is what there is."""
    arc, dataset = prepared(shared_tmp, tmp_path, "callbacks.finite_check=null", "callbacks.self_checks=null")
    word, step, _ = rare_word(dataset, range(STEPS))
    with pytest.raises(RunError, match=rf"step={step + 1:06d}\.ckpt: .* not written: model\.\S+ is not finite; "):
        train(arc, dataset, start(arc, word))
    saved = newest_valid(arc.folder / "checkpoints")
    assert saved is not None
    assert saved.name == f"step={step:06d}.ckpt"
    assert not (arc.folder / "checkpoints" / f"step={step + 1:06d}.ckpt").exists()


def test_wrong_settings_are_one_line() -> None:
    from symbiotic.callbacks.finite_check import FiniteCheck

    with pytest.raises(ConfigError, match=r"finite_check\.policy=ignore: must be one of stop, skip"):
        FiniteCheck("ignore")
    with pytest.raises(ConfigError, match=r"finite_check\.limit=0: must be at least 1"):
        FiniteCheck("skip", 0)


def test_the_state_survives_a_resume() -> None:
    from symbiotic.callbacks.finite_check import FiniteCheck

    one, other = FiniteCheck("skip"), FiniteCheck("skip")
    one.skipped = 3
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.skipped == 3
