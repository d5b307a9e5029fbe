"""Which samples make up which micro-batch: a pure function of (seed, step, number of the micro-batch).

The micro-batch is the atom (spec: reliability §1.4). Devices, accumulation and worker processes only share
atoms out; nothing here knows of them, so resuming at a step or changing the world size changes no content.
Random numbers come from Philox, keyed by seed and purpose and counted by step, micro-batch and position.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from symbiotic.data.errors import DataError
from symbiotic.data.packing import Array, pack
from symbiotic.data.shards import ShardIndex
from symbiotic.objectives.flow import logit_normal
from symbiotic.schema import TASKS, ConfigError, Data, Mix, Objective, near_miss

PERIOD = 60
"""Micro-batches after which the rounding of the proportions repeats; over a period they are exact to one sample."""

_ORDER, _CAPTION, _TIME, _NOISE = range(4)
_REMEMBERED = 64  # micro-batches


@dataclass(frozen=True)
class MicroPlan:
    """One micro-batch: n samples.

    `position` is the place in the full draw, of which the samples of dropped sets are left out; the flow's noise
    depends on it, so the remaining samples stay exactly those of the full mix.
    """

    step: int
    micro: int
    position: Array  # [n] int64
    samples: Array  # [n] int64: sample numbers in the index
    dropped: Array  # [n] bool: caption dropped
    times: Array  # [n] float64: flow time
    lengths: Array  # [n] int64: tokens
    rows: list[list[int]]  # packed: numbers into the n samples


def philox(seed: int, purpose: int, *counter: int) -> np.random.Generator:
    """An independent stream for every key and every counter of up to three numbers."""
    places = [0, *reversed(counter)]  # the first word counts inside the stream
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=[*places, *[0] * (4 - len(places))]))


class _Stretch(NamedTuple):
    """Micro-batches with the same proportions."""

    first: int  # its first micro-batch
    start: Array  # [sets] samples of each set drawn before it
    slots: Array  # [PERIOD, samples] set number of every place
    before: Array  # [PERIOD + 1, sets] samples of each set in its first micro-batches


class DataPlan:
    """Stratified plan: every micro-batch holds the sets in the proportions of the mix.

    Args:
        index: the samples.
        mix: weights of the sets, and the sets that are drawn but left out.
        data: `samples`, `micro_batches` and `row_tokens`.
        objective: distribution of the flow times and caption dropout; None (stage 0): time 0, none dropped.
        schedule: first step and weights of every stretch with other weights (`training.phases.mix_schedule`); by
            default those of the mix, all along.

    Raises:
        ConfigError: an unknown or an empty set, weights that sum to nothing, samples longer than a row, or so few
            samples that a micro-batch is empty.
    """

    def __init__(
        self,
        index: ShardIndex,
        mix: Mix,
        data: Data,
        seed: int,
        objective: Objective | None,
        schedule: Sequence[tuple[int, Mapping[str, float]]] = (),
    ) -> None:
        stretches = list(schedule) or [(0, mix.weights)]
        for _, weights in stretches:
            drop = tuple(name for name in mix.drop if name in weights or not schedule)
            _check(index, Mix(dict(weights), drop), data, seed)
        self.index, self.seed, self.objective = index, seed, objective
        self.samples, self.micro_batches, self.row_tokens = data.samples, data.micro_batches, data.row_tokens
        self.repeat_steps = data.repeat_steps
        used = {name for _, weights in stretches for name, weight in weights.items() if weight > 0}
        self.sets = [name for name in dict.fromkeys(n for _, weights in stretches for n in weights) if name in used]
        self.kept = np.array([name not in mix.drop for name in self.sets])
        self._members = [index.members_of(name) for name in self.sets]
        self._stretches: list[_Stretch] = []
        for first, weights in stretches:
            start = self._counts_before(first * self.micro_batches)
            slots = _slots([weights.get(name, 0.0) for name in self.sets], data.samples)
            before = _cumulated(slots, len(self.sets))
            self._stretches.append(_Stretch(first * self.micro_batches, start, slots, before))
        self._permutations: OrderedDict[tuple[int, int], Array] = OrderedDict()
        self._drawn: OrderedDict[tuple[int, int], MicroPlan] = OrderedDict()
        _check_rows(self, data)

    def micro_batch(self, step: int, micro: int) -> MicroPlan:
        """The content of micro-batch `micro` of optimiser step `step`, both from 0."""
        if step < 0 or not 0 <= micro < self.micro_batches:
            raise DataError(f"no micro-batch {micro} in step {step}: a step has {self.micro_batches}, from 0")
        step = step % self.repeat_steps if self.repeat_steps else step
        key = (step, micro)
        if key not in self._drawn:
            self._drawn[key] = self._draw(step, micro)
            if len(self._drawn) > max(_REMEMBERED, 2 * self.micro_batches):
                self._drawn.popitem(last=False)
        return self._drawn[key]

    def norms(self, step: int) -> tuple[float, float]:
        """(targets, latents) of the whole step, each at least 1, divided by the number of its micro-batches.

        A loss summed over a micro-batch and divided by its norm, averaged over the micro-batches of the step, is
        the mean over the step: whatever the world size and the accumulation.
        """
        plans = [self.micro_batch(step, micro) for micro in range(self.micro_batches)]
        ce = sum(int(self._counts("num_ce", "dropped_ce", p.samples, p.dropped).sum()) for p in plans)
        latents = sum(int(self.index.num_latents[p.samples].sum()) for p in plans)
        return max(1, ce) / self.micro_batches, max(1, latents) / self.micro_batches

    def tokens_by_task(self, steps: int) -> dict[str, int]:
        """Tokens of each task over `steps` optimiser steps: exact up to 2,000 of them, then estimated from so many.

        Two more keys: `latents`, the part of all these tokens that is generated, and `places`, tokens and padding.
        """
        looked = np.unique(np.linspace(0, max(0, steps - 1), min(steps, 2000)).astype(int)).tolist()
        total = dict.fromkeys((*TASKS, "latents", "places"), 0)
        for plan in (self.micro_batch(step, micro) for step in looked for micro in range(self.micro_batches)):
            tasks = np.bincount(self.index.task[plan.samples], weights=plan.lengths, minlength=len(TASKS))
            for task, tokens in zip(TASKS, tasks, strict=True):
                total[task] += int(tokens)
            total["latents"] += int(self.index.num_latents[plan.samples].sum())
            total["places"] += len(plan.rows) * self.row_tokens
        return {name: round(count * steps / len(looked)) for name, count in total.items()}

    def noise(self, plan: MicroPlan, number: int, shape: tuple[int, ...]) -> Array:
        """The noise end of the flow for sample `number` of a micro-batch, float32."""
        position = int(plan.position[number])
        return philox(self.seed, _NOISE, plan.step, plan.micro, position).standard_normal(shape, dtype=np.float32)

    def _draw(self, step: int, micro: int) -> MicroPlan:
        count = step * self.micro_batches + micro
        stretch = self._stretch(count)
        slots = stretch.slots[(count - stretch.first) % PERIOD]
        position = np.flatnonzero(self.kept[slots])
        samples = self._walk(count, slots)[position]
        dropped, times = self._captions(step, micro)[position], self._times(step, micro)[position]
        dropped &= self.index.num_latents[samples] > 0
        times = np.where(self.index.num_latents[samples] > 0, times, 0.0)
        lengths = self._counts("num_tokens", "dropped_tokens", samples, dropped)
        rows = pack(lengths.tolist(), self.row_tokens)
        return MicroPlan(step, micro, position, samples, dropped, times, lengths, rows)

    def _walk(self, count: int, slots: Array) -> Array:
        """Sample numbers at the slots: each set is walked permutation by permutation, none twice before all once."""
        samples = np.empty(len(slots), dtype=np.int64)
        start = self._counts_before(count)
        for number, members in enumerate(self._members):
            places = np.flatnonzero(slots == number)
            epochs, offsets = np.divmod(int(start[number]) + np.arange(len(places)), len(members))
            for epoch in np.unique(epochs).tolist():
                now = epochs == epoch
                samples[places[now]] = members[self._permutation(number, epoch)[offsets[now]]]
        return samples

    def _stretch(self, count: int) -> _Stretch:
        return next(s for s in reversed(self._stretches) if s.first <= count)

    def _counts_before(self, count: int) -> Array:
        """[sets] samples of each set in all micro-batches before number `count`."""
        stretch = next((s for s in reversed(self._stretches) if s.first < count), None)
        if stretch is None:
            return np.zeros(len(self.sets), dtype=np.int64)
        periods, inside = divmod(count - stretch.first, PERIOD)
        return stretch.start + periods * stretch.before[-1] + stretch.before[inside]

    def _permutation(self, number: int, epoch: int) -> Array:
        key = (number, epoch)
        if key not in self._permutations:
            name = zlib.crc32(self.sets[number].encode())  # by name: another set in the mix changes nothing
            self._permutations[key] = philox(self.seed, _ORDER, name, epoch).permutation(len(self._members[number]))
            if len(self._permutations) > 4 * len(self.sets):
                self._permutations.popitem(last=False)
        return self._permutations[key]

    def _captions(self, step: int, micro: int) -> Array:
        if self.objective is None:
            return np.zeros(self.samples, dtype=bool)
        return philox(self.seed, _CAPTION, step, micro).random(self.samples) < self.objective.caption_dropout

    def _times(self, step: int, micro: int) -> Array:
        """Flow times of the samples (`objectives.flow.logit_normal`)."""
        if self.objective is None:
            return np.zeros(self.samples)
        normal = philox(self.seed, _TIME, step, micro).standard_normal(self.samples)
        return logit_normal(torch.from_numpy(normal), self.objective.time_mean, self.objective.time_std).numpy()

    def _counts(self, full: str, reduced: str, samples: Array, dropped: Array) -> Array:
        return np.where(dropped, getattr(self.index, reduced)[samples], getattr(self.index, full)[samples])


def _cumulated(slots: Array, num_sets: int) -> Array:
    counts = np.stack([(slots == i).sum(1) for i in range(num_sets)], axis=1)
    return np.concatenate([np.zeros((1, num_sets), dtype=np.int64), counts.cumsum(0)])


def _slots(weights: list[float], samples: int) -> Array:
    """[PERIOD, samples] set number of every place: systematic sampling with a rotating offset.

    Place i of a micro-batch with offset o looks up (i + o) / samples in the cumulated weights, so each set gets its
    share rounded down or up, and over a period its share of all places.
    """
    edges = np.cumsum(weights) / np.sum(weights)
    offsets = ((np.arange(PERIOD) * 37) % PERIOD + 0.5) / PERIOD  # 37: coprime, so that neighbours differ
    points = (np.arange(samples)[None, :] + offsets[:, None]) / samples
    return np.minimum(np.searchsorted(edges, points, side="right"), len(weights) - 1)


def _check(index: ShardIndex, mix: Mix, data: Data, seed: int) -> None:
    for name, value in (("samples", data.samples), ("micro_batches", data.micro_batches)):
        if value < 1:
            raise ConfigError(f"data.{name}={value}: must be at least 1")
    if seed < 0:
        raise ConfigError(f"seed={seed}: must not be negative")
    for name, weight in mix.weights.items():
        if name not in index.sets:
            raise ConfigError(f"mix.weights.{name}: no such data set; {near_miss(name, index.sets.tolist())}")
        if weight < 0:
            raise ConfigError(f"mix.weights.{name}={weight}: must not be negative")
    for name in mix.drop:
        if name not in mix.weights:
            raise ConfigError(f"mix.drop: {name!r} is not in mix.weights; {near_miss(name, mix.weights)}")
    if not any(weight > 0 for name, weight in mix.weights.items() if name not in mix.drop):
        raise ConfigError("mix.weights: at least one set that is not dropped needs a weight above 0")


def _check_rows(plan: DataPlan, data: Data) -> None:
    for name, members, kept in zip(plan.sets, plan._members, plan.kept, strict=True):
        if not len(members):
            raise ConfigError(f"mix.weights.{name}: the data set has no samples")
        longest = int(plan.index.num_tokens[members].max())
        if kept and longest > data.row_tokens:
            raise ConfigError(
                f"data.row_tokens={data.row_tokens}: must be at least {longest}, the longest sample of {name}"
            )
    if not all(plan.kept[stretch.slots].any(axis=1).all() for stretch in plan._stretches):
        raise ConfigError(f"data.samples={data.samples}: too few for this mix, some micro-batches would be empty")
