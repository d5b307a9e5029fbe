"""From the plan to batches: the data set of micro-batches and its loader, with a length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from symbiotic.data.encoded import Encoded, Made
from symbiotic.data.errors import DataError
from symbiotic.data.formats import drop_caption, record_sample
from symbiotic.data.image_codes import ImageCodes
from symbiotic.data.packing import Array, Sample, collate, with_codes
from symbiotic.data.plan import DataPlan, MicroPlan
from symbiotic.data.shards import ShardReader
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.models.batch import Batch
from symbiotic.schema import ConfigError


class Reader(Protocol):
    """Reads samples of an index."""

    def read(self, sample: int) -> tuple[dict[str, Any], Array | None]:
        """The record and, if it has an image, its pixels, uint8 [H, W, 3]. Raises DataError."""
        ...


class MicroBatches(Dataset[Batch]):
    """Item i is the `Batch` of (step, micro) = divmod(i, plan.micro_batches).

    Args:
        folder: the corpus folder, with `tokenizer.json` and `shards/`.
        plan: which samples are in which micro-batch.
        cache_bytes: decoded samples are kept up to this size (per worker process); beyond it they are read again.
        codes: of the generated images, where images are codes. encoded: vectors of images, in the place of pixels; the
            plan's index has the lengths that the samples have with them.
        reader: what samples are read by; by default the shards of the corpus folder.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: DataPlan,
        cache_bytes: int = 256 * 2**20,
        codes: ImageCodes | None = None,
        encoded: Sequence[Encoded | Made] = (),
        reader: Reader | None = None,
    ) -> None:
        self.plan, self.codes, self.encoded = plan, codes, encoded
        self.tokenizer = Tokenizer.load(Path(folder) / "tokenizer.json")
        self.reader = reader or ShardReader(Path(folder) / "shards", plan.index)
        self._room = cache_bytes
        self._cache: dict[int, Sample] = {}

    def __getitem__(self, item: int) -> Batch:
        plan = self.plan.micro_batch(*divmod(item, self.plan.micro_batches))
        return self._collated(plan, range(len(plan.samples)), plan.rows)

    def alone(self, item: int) -> Iterator[tuple[str, Batch]]:
        """`shard: key` and a batch of its own of every sample of an item, as it is there: to find one that breaks."""
        plan = self.plan.micro_batch(*divmod(item, self.plan.micro_batches))
        for number, sample in enumerate(plan.samples):
            yield self.plan.index.name(int(sample)), self._collated(plan, [number], [[0]])

    def _collated(self, plan: MicroPlan, numbers: Sequence[int], rows: list[list[int]]) -> Batch:
        """numbers: of the plan's samples; rows: of the numbers."""
        drawn = ((self.sample(int(plan.samples[n])), plan.dropped[n]) for n in numbers)
        samples = [drop_caption(sample) if dropped else sample for sample, dropped in drawn]
        shapes = [sample.latents.shape for sample in samples]
        noises = [
            self.plan.noise(plan, n, shape) if shape[0] else np.zeros(shape, np.float32)
            for n, shape in zip(numbers, shapes, strict=True)
        ]
        ce_norm, flow_norm = self.plan.norms(plan.step)
        return collate(
            samples,
            self.plan.row_tokens,
            times=plan.times[list(numbers)].tolist(),
            noises=noises,
            ce_norm=ce_norm,
            flow_norm=flow_norm,
            rows=rows,
        )

    def sample(self, number: int) -> Sample:
        """One sample of the index, caption kept; do not write into its arrays.

        Raises:
            DataError: it cannot be read, or is not what the index says; the line names shard and key.
        """
        if number in self._cache:
            return self._cache[number]
        record, pixels = self.reader.read(number)
        index = self.plan.index
        try:
            sample = record_sample(index.keys[number].decode(), record, pixels, self.tokenizer)
        except DataError as error:
            raise DataError(f"{index.name(number)}: {error}") from error
        for vectors in self.encoded:
            sample = vectors.put(sample, number)
        if len(sample) != index.num_tokens[number]:
            expected = index.num_tokens[number]
            raise DataError(f"{index.name(number)}: {len(sample)} tokens where the index says {expected}")
        if self.codes is not None:
            sample = with_codes(sample, self.codes[number])
        if self._room >= sample.nbytes:
            self._room -= sample.nbytes
            self._cache[number] = sample
        return sample


class MicroBatchSampler(Sampler[int]):
    """The items of one rank from `start_step` on; its length is that of the whole run, also after a resume."""

    def __init__(self, steps: int, start_step: int, micro_batches: int, rank: int, world: int) -> None:
        if micro_batches % world:
            raise ConfigError(f"data.micro_batches={micro_batches}: must be a multiple of the {world} devices")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is not one of {world}")
        self.items = range(start_step * micro_batches + rank, steps * micro_batches, world)
        self.length = steps * micro_batches // world

    def __iter__(self) -> Iterator[int]:
        return iter(self.items)

    def __len__(self) -> int:
        return self.length


def train_loader(
    dataset: MicroBatches,
    steps: int,
    start_step: int = 0,
    micro_batches: int = 1,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
    worker_init: Callable[[int], None] | None = None,
) -> DataLoader[Batch]:
    """Loader of the micro-batches of this rank, one `Batch` an item, in the order of the steps.

    `len()` is `steps * micro_batches // world`, also when it starts at `start_step`. It draws nothing from torch's
    global generator.

    Raises:
        ConfigError: micro-batches that cannot be shared out evenly.
    """
    if micro_batches != dataset.plan.micro_batches:
        raise ValueError(f"the plan has {dataset.plan.micro_batches} micro-batches a step, not {micro_batches}")
    sampler = MicroBatchSampler(steps, start_step, micro_batches, rank, world)
    return DataLoader(dataset, **loader_options(sampler, num_workers, worker_init))


def loader_options(
    sampler: MicroBatchSampler, num_workers: int = 0, worker_init: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Arguments of a `DataLoader` whose items are micro-batches already."""
    return {
        "batch_size": None,
        "sampler": sampler,
        "num_workers": num_workers,
        "collate_fn": _unchanged,
        "worker_init_fn": worker_init,
        "persistent_workers": num_workers > 0,
        "generator": torch.Generator(),
    }


def _unchanged(batch: Any) -> Any:
    return batch
