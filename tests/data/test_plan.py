"""The plan: proportions, no repetition, counts, and nothing but (seed, step, micro-batch) to depend on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from symbiotic.data.plan import PERIOD, DataPlan, philox
from symbiotic.data.shards import DataError, ShardIndex
from symbiotic.schema import ConfigError, Data, Mix, Objective

JOINT = Mix({"t2i": 3.0, "t2i_long": 3.0, "lm": 2.0, "mmu": 2.0})
OBJECTIVE = Objective(time_mean=0.8, caption_dropout=0.2)


def sets_of(index: ShardIndex, samples: Any) -> Counter[str]:
    return Counter(str(index.sets[s]) for s in index.set[samples])


def test_every_micro_batch_has_the_proportions_and_a_period_has_them_exactly(index: ShardIndex, data: Data) -> None:
    data = replace(data, samples=48)
    plan = DataPlan(index, JOINT, data, 0, OBJECTIVE)
    total: Counter[str] = Counter()
    for count in range(PERIOD):
        found = sets_of(index, plan.micro_batch(*divmod(count, data.micro_batches)).samples)
        assert {found["t2i"], found["t2i_long"]} <= {14, 15}
        assert {found["lm"], found["mmu"]} <= {9, 10}
        total += found
    assert total == {"t2i": 864, "t2i_long": 864, "lm": 576, "mmu": 576}


def test_no_sample_comes_twice_before_all_came_once(index: ShardIndex, data: Data) -> None:
    plan = DataPlan(index, JOINT, data, 0, OBJECTIVE)
    seen: dict[str, list[int]] = {name: [] for name in JOINT.weights}
    for count in range(200):
        for sample in plan.micro_batch(*divmod(count, data.micro_batches)).samples.tolist():
            seen[str(index.sets[index.set[sample]])].append(sample)
    for name, samples in seen.items():
        size = len(index.members_of(name))
        assert len(samples) > 1.5 * size
        first, second = samples[:size], samples[size : 2 * size]
        assert len(set(first)) == size
        assert len(set(second)) == len(second)
        assert first[: len(second)] != second  # another order in the next round


def test_a_micro_batch_does_not_depend_on_what_was_asked_before(index: ShardIndex, data: Data) -> None:
    walked = DataPlan(index, JOINT, data, 5, OBJECTIVE)
    for step in range(120):
        for micro in range(data.micro_batches):
            walked.micro_batch(step, micro)
    fresh = DataPlan(index, JOINT, data, 5, OBJECTIVE)
    for step in (119, 3, 57):
        for name, value in vars(walked.micro_batch(step, 2)).items():
            again = getattr(fresh.micro_batch(step, 2), name)
            assert again == value if name == "rows" else np.array_equal(again, value), name
        assert walked.norms(step) == fresh.norms(step)


def test_another_seed_is_another_order(index: ShardIndex, data: Data) -> None:
    one, two = (DataPlan(index, JOINT, data, seed, OBJECTIVE).micro_batch(0, 0) for seed in (0, 1))
    assert set(one.samples.tolist()) != set(two.samples.tolist())
    assert not np.array_equal(one.times, two.times)


def test_dropping_sets_leaves_all_other_samples_as_they_are(index: ShardIndex, data: Data) -> None:
    full = DataPlan(index, JOINT, data, 0, OBJECTIVE)
    und = DataPlan(index, replace(JOINT, drop=("t2i", "t2i_long")), data, 0, OBJECTIVE)
    one = DataPlan(index, replace(JOINT, drop=("t2i",)), data, 0, OBJECTIVE)
    for step in range(30):
        for micro in range(data.micro_batches):
            whole = full.micro_batch(step, micro)
            names = np.array([str(index.sets[s]) for s in index.set[whole.samples]])
            for plan, dropped in ((und, ["t2i", "t2i_long"]), (one, ["t2i"])):
                part, kept = plan.micro_batch(step, micro), ~np.isin(names, dropped)
                for field in ("position", "samples", "dropped", "times", "lengths"):
                    assert np.array_equal(getattr(part, field), getattr(whole, field)[kept]), field
            rest = one.micro_batch(step, micro)
            for number in np.flatnonzero(index.num_latents[rest.samples])[:2].tolist():
                again = whole.samples.tolist().index(int(rest.samples[number]))
                assert np.array_equal(one.noise(rest, number, (25, 48)), full.noise(whole, again, (25, 48)))


def test_norms_are_the_counts_of_the_step_shared_by_its_micro_batches(index: ShardIndex, data: Data) -> None:
    plan = DataPlan(index, JOINT, data, 0, OBJECTIVE)
    ce = latents = 0
    for micro in range(data.micro_batches):
        part = plan.micro_batch(7, micro)
        ce += sum(0 if drop else int(index.num_ce[s]) for s, drop in zip(part.samples, part.dropped, strict=True))
        latents += int(index.num_latents[part.samples].sum())
    assert plan.norms(7) == (ce / 4, latents / 4)
    text = DataPlan(index, Mix({"lm": 1.0}), data, 0, None)
    assert text.norms(0)[1] == 1 / 4


def test_times_and_dropped_captions_follow_the_objective(index: ShardIndex, data: Data) -> None:
    plan = DataPlan(index, Mix({"t2i": 1.0}), replace(data, samples=100), 0, OBJECTIVE)
    parts = [plan.micro_batch(step, 0) for step in range(60)]
    times = np.concatenate([part.times for part in parts])
    normal = np.log(times / (1 - times))
    assert abs(normal.mean() - 0.8) < 0.05
    assert abs(normal.std() - 1.0) < 0.05
    assert abs(np.concatenate([part.dropped for part in parts]).mean() - 0.2) < 0.02
    stage0 = DataPlan(index, Mix({"t2i": 1.0, "lm": 1.0}), data, 0, None).micro_batch(0, 0)
    assert not stage0.dropped.any()
    assert not stage0.times.any()
    text = DataPlan(index, Mix({"lm": 1.0}), data, 0, OBJECTIVE).micro_batch(0, 0)
    assert not text.dropped.any()


def test_tokens_by_task_are_the_true_counts(index: ShardIndex, data: Data) -> None:
    plan = DataPlan(index, JOINT, data, 0, OBJECTIVE)
    estimate = plan.tokens_by_task(40)
    true, latents = 0, 0
    for step in range(40):
        for micro in range(data.micro_batches):
            part = plan.micro_batch(step, micro)
            true += int(part.lengths.sum())
            latents += int(index.num_latents[part.samples].sum())
    tokens = sum(estimate[task] for task in ("t2i", "t2i_long", "lm", "mmu"))
    assert tokens == true
    assert estimate["latents"] == latents
    assert true < estimate["places"] < 1.4 * true


def test_random_streams_differ_by_every_number() -> None:
    counters = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 0, 0), (0, 2, 0)]
    values = [philox(seed, purpose, *c).random() for seed in (0, 1) for purpose in (0, 1) for c in counters]
    assert len(set(values)) == len(values)


@pytest.mark.parametrize(
    ("mix", "change", "message"),
    [
        (Mix({"t2l": 1.0}), {}, r"mix\.weights\.t2l: no such data set; did you mean 't2i'\?"),
        (Mix({"lm": -1.0}), {}, r"mix\.weights\.lm=-1\.0: must not be negative"),
        (Mix({"lm": 1.0}, ("mmu",)), {}, r"mix\.drop: 'mmu' is not in mix\.weights"),
        (Mix({"lm": 1.0}, ("lm",)), {}, r"mix\.weights: at least one set that is not dropped"),
        (Mix({"lm": 0.0}), {}, r"mix\.weights: at least one set"),
        (Mix({"lm": 1.0}), {"samples": 0}, r"data\.samples=0: must be at least 1"),
        (Mix({"lm": 1.0}), {"micro_batches": 0}, r"data\.micro_batches=0: must be at least 1"),
        (
            Mix({"t2i": 1.0}),
            {"row_tokens": 20},
            r"data\.row_tokens=20: must be at least \d+, the longest sample of t2i",
        ),
        (Mix({"lm": 1.0, "t2i": 9.0}, ("t2i",)), {"samples": 4}, r"data\.samples=4: too few for this mix"),
    ],
)
def test_plans_that_cannot_be_are_refused(
    index: ShardIndex, data: Data, mix: Mix, change: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        DataPlan(index, mix, replace(data, **change), 0, None)  # type: ignore[arg-type]


def test_there_is_no_such_micro_batch(index: ShardIndex, data: Data) -> None:
    with pytest.raises(DataError, match="no micro-batch 4 in step 0: a step has 4"):
        DataPlan(index, JOINT, data, 0, None).micro_batch(0, 4)


def test_another_mix_from_a_step_on(index: ShardIndex, data: Data) -> None:
    """Proportions change at the step and nothing before it; each set is still walked to its end before it repeats."""
    data = replace(data, samples=48)
    late = {"t2i": 1.0, "lm": 3.0}
    schedule = [(0, JOINT.weights), (7, late)]
    plan, plain = (DataPlan(index, JOINT, data, 0, OBJECTIVE, s) for s in (schedule, ()))
    seen: list[int] = []
    for step in range(20):
        for micro in range(data.micro_batches):
            samples = plan.micro_batch(step, micro).samples
            found = sets_of(index, samples)
            if step < 7:
                assert np.array_equal(samples, plain.micro_batch(step, micro).samples)
            else:
                assert (found["t2i"], found["lm"]) == (12, 36)
                assert set(found) == {"t2i", "lm"}
            seen += [s for s in samples.tolist() if str(index.sets[index.set[s]]) == "lm"]
    size = len(index.members_of("lm"))
    assert len(seen) > size
    assert len(set(seen[:size])) == size
    fresh = DataPlan(index, JOINT, data, 0, OBJECTIVE, schedule)  # a resumed run asks for a late step first
    assert np.array_equal(fresh.micro_batch(15, 1).samples, plan.micro_batch(15, 1).samples)
    assert fresh.norms(15) == plan.norms(15)


def test_a_mix_with_itself_from_a_step_on_changes_proportions_nowhere(index: ShardIndex, data: Data) -> None:
    data = replace(data, samples=48)
    plan = DataPlan(index, JOINT, data, 0, OBJECTIVE, [(0, JOINT.weights), (3, JOINT.weights)])
    for step in range(6):
        found = sets_of(index, plan.micro_batch(step, 0).samples)
        assert {found["t2i"], found["t2i_long"]} <= {14, 15}


def test_a_set_that_is_not_there_is_refused_in_a_late_mix_too(index: ShardIndex, data: Data) -> None:
    with pytest.raises(ConfigError, match=r"mix\.weights\.ml: no such data set"):
        DataPlan(index, JOINT, data, 0, OBJECTIVE, [(0, JOINT.weights), (3, {"ml": 1.0})])
