"""Streams as the data of a run: which samples make up which micro-batch, when nobody has seen them all.

A micro-batch is still a function of (seed, step, number of the micro-batch), whatever the devices, the workers and the
restarts: every process reads the same streams in the same order, and decodes the images of its own micro-batches only.
The state at the beginning of a step is a shortcut to it, kept in checkpoints; without one the streams are read from the
start again, and give the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from symbiotic.data.adapters import Origin
from symbiotic.data.bad import Refused
from symbiotic.data.cursor import Cursor, Item
from symbiotic.data.errors import DataError
from symbiotic.data.loader import MicroBatches
from symbiotic.data.packing import Array
from symbiotic.data.plan import DataPlan, MicroPlan
from symbiotic.data.shards import ShardIndex
from symbiotic.models.batch import Batch
from symbiotic.schema import TASKS, Data, Mix, Objective

State = dict[str, dict[str, Any]]
"""Name of a source -> the state of its `Cursor`; plain containers."""
_KNOWN = 16  # steps whose states are kept


class StreamPlan(DataPlan):
    """As `DataPlan`, of streams.

    Args:
        cursors: name of a data set -> its stream. origins: what each is made of.
        head: an index of the beginning of every stream, which checks and estimates go by.
        others: as those of `DataPlan`.

    Raises:
        ConfigError: as `DataPlan`, of the head.
    """

    def __init__(
        self,
        cursors: Mapping[str, Cursor],
        origins: Mapping[str, Origin],
        head: ShardIndex,
        mix: Mix,
        data: Data,
        seed: int,
        objective: Objective | None,
        schedule: Sequence[tuple[int, Mapping[str, float]]] = (),
    ) -> None:
        super().__init__(head, mix, data, seed, objective, schedule)
        self._head = DataPlan(head, mix, data, seed, objective, schedule)
        self.cursors = {name: cursors[name] for name in self.sets}
        self.max_bad = max(cursor.max_bad for cursor in self.cursors.values())
        self._origins = [origins[name] for name in self.sets]
        self._ring: list[Item | None] = [None] * ((2 * self.micro_batches + 1) * self.samples)
        self._shards = {shard: n for n, shard in enumerate(dict.fromkeys(f for c in cursors.values() for f in c.files))}
        self.index = _empty_index(self.sets, list(self._shards), len(self._ring))
        self._used = self._next = 0
        self._states: dict[int, State] = {0: self.state()}

    # ----------------------------------------------------------------------- the plan

    def micro_batch(self, step: int, micro: int) -> MicroPlan:
        """The content of micro-batch `micro` of optimiser step `step`; cheap for steps that follow each other.

        Raises:
            DataError: of the streams.
        """
        if step < 0 or not 0 <= micro < self.micro_batches:
            return super().micro_batch(step, micro)  # which refuses it
        step = step % self.repeat_steps if self.repeat_steps else step
        if (step, micro) not in self._drawn:
            self._seek(step, micro)
            while (step, micro) not in self._drawn:
                self._advance()
        return self._drawn[step, micro]

    def tokens_by_task(self, steps: int) -> dict[str, int]:
        """As `DataPlan`, estimated from the beginning of the streams."""
        return self._head.tokens_by_task(steps)

    def _seek(self, step: int, micro: int) -> None:
        """Go to the latest state that is known at or before a step, unless reading on is nearer."""
        known = max(at for at in self._states if at <= step)
        if step * self.micro_batches + micro < self._next or known * self.micro_batches > self._next:
            for name, cursor in self.cursors.items():
                cursor.restore(self._states[known][name])
            self._next = known * self.micro_batches
            self._drawn.clear()

    def _advance(self) -> None:
        step, micro = divmod(self._next, self.micro_batches)
        if micro == 0:
            self.know(step, self.state())
        self._drawn[step, micro] = self._draw(step, micro)
        self._next += 1
        while len(self._drawn) > 2 * self.micro_batches:  # older ones are written over in the ring
            self._drawn.popitem(last=False)

    def _walk(self, count: int, slots: Array) -> Array:
        """Numbers in the ring of the samples at the slots, taken from the streams."""
        samples = np.empty(len(slots), dtype=np.int64)
        for number, cursor in enumerate(self.cursors.values()):
            for place in np.flatnonzero(slots == number):
                samples[place] = self._put(number, cursor.take())
        return samples

    def _put(self, number: int, item: Item) -> int:
        at, index = self._used % len(self._ring), self.index
        self._used += 1
        self._ring[at] = item
        index.keys[at], index.shard[at], index.set[at] = item.key.encode(), self._shards[item.shard], number
        index.task[at] = TASKS.index(item.record["task"])
        for name, value in zip(("num_tokens", "num_ce", "num_latents", "dropped_tokens", "dropped_ce"), item.counts,
                               strict=True):  # fmt: skip
            getattr(index, name)[at] = value
        return at

    def read(self, sample: int) -> tuple[dict[str, Any], Array | None]:
        """Record and pixels of a sample of the micro-batches drawn last; as `ShardReader.read`.

        Raises:
            DataError: an image that turns out to be damaged only now.
        """
        item = self._ring[sample]
        assert item is not None
        try:
            return item.record, item.pixels(self._origins[int(self.index.set[sample])])
        except Refused as fault:
            way = "data.source.decode=true leaves such samples out"
            raise DataError(f"{self.index.name(sample)}: not a readable image ({fault}); {way}") from fault

    # ----------------------------------------------------------------------- going on later

    def state(self) -> State:
        """Of all streams, now."""
        return {name: cursor.state() for name, cursor in self.cursors.items()}

    def state_at(self, step: int) -> State:
        """At the beginning of a step; reads what lies before it, if that was not read yet."""
        if step not in self._states and step > 0:
            self.micro_batch(step - 1, self.micro_batches - 1)
            if self._next == step * self.micro_batches:
                return self.state()
        return self._states[step]

    def know(self, step: int, state: State) -> None:
        """Take a state of the beginning of a step, of a checkpoint or of another process."""
        self._states[step] = state
        for old in sorted(self._states)[1:-_KNOWN]:  # the first is the start
            del self._states[old]


def _empty_index(sets: list[str], shards: list[str], size: int) -> ShardIndex:
    """Of the samples in a ring, which are written over."""
    zeros = {name: np.zeros(size, np.int32) for name in ("shard", "num_tokens", "num_ce", "num_latents",
                                                         "dropped_tokens", "dropped_ce")}  # fmt: skip
    return ShardIndex(
        sets=np.array(sets),
        shards=np.array(shards),
        shard_bytes=np.zeros(len(shards), np.int64),
        keys=np.full(size, b"", dtype=object),
        set=np.zeros(size, np.int16),
        task=np.zeros(size, np.int8),
        json=np.zeros((size, 3), np.int64),
        png=np.zeros((size, 3), np.int64),
        **zeros,
    )


# --------------------------------------------------------------------------- loading


class Stated(NamedTuple):
    """A batch, and the state of the streams at the beginning of the step behind it."""

    batch: Batch
    step: int
    state: State


class _WithState(Dataset[Stated]):
    def __init__(self, dataset: MicroBatches, plan: StreamPlan) -> None:
        self.dataset, self.plan = dataset, plan

    def __getitem__(self, item: int) -> Stated:
        batch, step = self.dataset[item], item // self.plan.micro_batches + 1
        return Stated(batch, step, self.plan.state_at(step if not self.plan.repeat_steps else 0))


class StreamLoader:
    """The micro-batches of one rank, as those of `loader.train_loader`; the plan of this process learns the states that
    worker processes reach.

    Args:
        dataset: of `plan`. options: of the loader, see `loader.loader_options`.
    """

    def __init__(self, dataset: MicroBatches, plan: StreamPlan, options: Mapping[str, Any]) -> None:
        self.dataset, self.plan = dataset, plan
        self.loader: DataLoader[Stated] = DataLoader(_WithState(dataset, plan), **options)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for stated in self.loader:
            if not self.plan.repeat_steps:
                self.plan.know(stated.step, stated.state)
            yield stated.batch
