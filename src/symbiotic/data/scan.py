"""One pass over a shard: good samples, bad ones, and what became of the rest; never an error, never a wrong pair.

Members that stand next to each other and have the same key are a sample, as webdataset has it. A sample ends at a
member of another key and never reaches past its shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from symbiotic.data.bad import BadSample, Refused, printable
from symbiotic.data.checks import Checks, Group, ShardSample
from symbiotic.data.tar import LocalSource, OpenSource, Source, read_members, split_name


@dataclass(frozen=True)
class ShardEnd:
    """A shard is done.

    size: its bytes. unread: those behind what could be read. bad: why there are any, or why it has no sample.
    """

    size: int
    unread: int = 0
    bad: BadSample | None = None


class Event(NamedTuple):
    """What a scan comes across. after: the offset in the shard to go on from; None when the shard is done."""

    shard: str
    after: int | None
    found: ShardSample | BadSample | ShardEnd


def read_shard(
    name: str, checks: Checks, start: int = 0, open_source: OpenSource = LocalSource, unique: bool = True
) -> Iterator[Event]:
    """Everything in a shard from the offset `start` on, which an event gave as `after`; at last a `ShardEnd`.

    unique: keys must not come back, for which the headers before `start` are read, too; else nothing before it is.
    """
    yield from opened(name, open_source, lambda file: _events(name, file, checks, start, unique))


def opened(name: str, open_source: OpenSource, events: Callable[[Source], Iterator[Event]]) -> Iterator[Event]:
    """What `events` makes of the open file; of one that cannot be opened, an end that says so."""
    try:
        source = open_source(name)
    except OSError as error:
        bad = BadSample(name, "", "unreadable_shard", printable(error.strerror or error))
        yield Event(name, None, ShardEnd(0, 0, bad))
        return
    with source as file:
        yield from events(file)


def _events(name: str, source: Source, checks: Checks, start: int, unique: bool) -> Iterator[Event]:
    group: Group | None = None
    seen: set[str] = set()
    stop, fault = start, None
    try:
        seen |= _keys_before(source, start) if unique else set()
        for member in read_members(source, start):
            key = split_name(member.name)[0]
            if group is not None and key != group.key:
                yield Event(name, member.start, group.judge(name))
            if group is None or key != group.key:
                twice = Refused("duplicate_key", f"{key} occurred before, or its members stand apart")
                group = Group(key, member.start, twice if unique and key in seen else None, checks)
                seen.add(key)
            group.add(member, source)
            stop = member.end
    except Refused as caught:
        stop, fault = caught.offset, caught
    if group is not None:
        found = group.judge(name)
        if fault is None or not _is_part_of_rest(group, found, fault):
            yield Event(name, stop, found)
        else:
            stop, fault.key = group.start, group.key
    yield Event(name, None, _end(name, source.size, stop, fault, bool(seen) or start > 0))


def _keys_before(source: Source, start: int) -> set[str]:
    """Keys of the samples before an offset, from their headers."""
    keys: set[str] = set()
    for member in read_members(source) if start else ():
        if member.start >= start:
            break
        keys.add(split_name(member.name)[0])
    return keys


def _is_part_of_rest(group: Group, found: ShardSample | BadSample, fault: Refused) -> bool:
    """Whether the last sample before the damage lacks what the damage took."""
    return fault.key == group.key or (isinstance(found, BadSample) and found.kind in ("missing_json", "missing_image"))


def _end(name: str, size: int, stop: int, fault: Refused | None, any_samples: bool) -> ShardEnd:
    if fault is not None:
        unread = max(0, size - stop)  # what ends inside the padding of its last member stops behind its end
        reason = printable(f"{fault.reason}; {unread} bytes from byte {stop} on are not read")
        return ShardEnd(size, unread, BadSample(name, printable(fault.key), fault.kind, reason))
    empty = BadSample(name, "", "empty_shard", f"no sample in {size} bytes")
    return ShardEnd(size, 0, None if any_samples else empty)
