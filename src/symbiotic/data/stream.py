"""Stream mode: shards read one after the other, by worker processes or without, and gone on with where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from symbiotic.data.account import Account
from symbiotic.data.checks import Checks, ShardSample
from symbiotic.data.scan import Event, read_shard
from symbiotic.data.tar import LocalSource, OpenSource, check_local


class ShardStream(IterableDataset[Event]):
    """The events of shards: good samples, bad ones and ends. Each shard is read by one worker, from first to last.

    Args:
        shards: names that `open_source` opens; paths of local files by default.
        positions: shard -> offset to go on from, None where it is done (`Account.positions`).

    Raises:
        DataError: a name that is a command or an address, where shards are local files.
    """

    def __init__(
        self,
        shards: Sequence[str],
        checks: Checks,
        positions: Mapping[str, int | None] | None = None,
        open_source: OpenSource = LocalSource,
    ) -> None:
        self.shards = [check_local(shard) if open_source is LocalSource else shard for shard in shards]
        self.checks, self.positions, self.open_source = checks, dict(positions or {}), open_source

    def __iter__(self) -> Iterator[Event]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for shard in self.shards[first::step]:
            start = self.positions.get(shard, 0)
            if start is not None:
                yield from read_shard(shard, self.checks, start, self.open_source)


def read_stream(
    stream: ShardStream, account: Account, num_workers: int = 0, timeout: float = 0
) -> Iterator[ShardSample]:
    """The good samples; all others are counted. Draws nothing from torch's global generator.

    Without workers the order is that of the shards; with several, their shards take turns. What `account.state()` says
    between two samples is exactly what was handed over: a stream of the `positions` of an account with this state goes
    on with the next ones.

    Args:
        timeout: seconds to wait for a worker.

    Raises:
        DataError: more bad samples than the account bears, or no good one.
    """
    loader: DataLoader[Event] = DataLoader(
        stream,
        batch_size=None,
        num_workers=num_workers,
        collate_fn=_unchanged,
        timeout=timeout if num_workers else 0,
        generator=torch.Generator(),
    )
    for event in loader:
        account.add(event)
        if isinstance(event.found, ShardSample):
            yield event.found
    account.finish()


def _unchanged(event: Any) -> Any:
    return event
