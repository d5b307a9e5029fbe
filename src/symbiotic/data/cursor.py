"""One source read as an endless stream, whose place is a few numbers: what a checkpoint keeps of it.

Files come in an order that is drawn anew for every epoch and are read from first to last; the samples of a window are
shuffled. A window begins at (epoch, file, offset), so a stream goes on by reading its window again and leaving out what
was handed over: nothing before it is read.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from symbiotic.data.adapters import Origin, pieces
from symbiotic.data.bad import BadSample, Refused
from symbiotic.data.checks import PATCH, Checks, ShardSample
from symbiotic.data.errors import DataError
from symbiotic.data.fit import Fit, boxes_of, strip
from symbiotic.data.formats import Counts, measure
from symbiotic.data.image_files import decode_image
from symbiotic.data.packing import Array
from symbiotic.data.plan import philox
from symbiotic.data.record_files import read_file
from symbiotic.data.scan import Event, ShardEnd
from symbiotic.data.tar import LocalSource, OpenSource

_FILES, _WINDOW = 4, 5  # purposes of random numbers, behind those of `plan`
EXAMPLES = 20
"""Bad samples of a source that are named; all are counted."""
_AT_LEAST = 500  # samples after which their share is looked at


class Item(NamedTuple):
    """A sample that is handed over. bodies: its image files."""

    shard: str
    key: str
    record: dict[str, Any]
    bodies: tuple[bytes, ...]
    counts: Counts

    def pixels(self, origin: Origin) -> Array | None:
        """Its images, decoded and fitted: uint8 [H, W, 3]. Raises Refused: they cannot be."""
        if not self.bodies:
            return None
        if origin.adapter is None:
            return decode_image(self.bodies[0])
        fit = Fit(origin.fit, origin.side)
        return strip(self.bodies, boxes_of(self.bodies, fit), fit)


@dataclass
class Place:
    """Where a window begins, and what was counted before it. Samples are counted in the first epoch only.

    file: number in the order of the epoch. offset: in the file. window: how many came before.
    """

    epoch: int = 0
    file: int = 0
    offset: int = 0
    window: int = 0
    good: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)

    @property
    def bad(self) -> int:
        return sum(self.kinds.values())


class Cursor:
    """
    Args:
        name: of the source. files: what `open_source` opens.
        checks: with a tokenizer, and `keep`.
        window: samples that are shuffled together; 1: none.
        max_bad: share of bad samples that is borne.
        extra: tokens that a record has beyond its counts, with which it must fit in `row_tokens`; see `encoded.Made`.
    """

    def __init__(
        self,
        name: str,
        files: Sequence[str],
        checks: Checks,
        seed: int,
        window: int = 256,
        max_bad: float = 0.01,
        open_source: OpenSource = LocalSource,
        extra: Callable[[Mapping[str, Any]], int] | None = None,
        row_tokens: int = 1 << 62,
    ) -> None:
        self.extra, self.row_tokens = extra, row_tokens
        self.name, self.files, self.checks, self.seed = name, list(files), checks, seed
        self.window, self.max_bad, self.open_source = window, max_bad, open_source
        self.restore({**asdict(Place()), "taken": 0})

    def state(self) -> dict[str, Any]:
        """Plain containers: what `restore` takes."""
        return {**asdict(self._begin), "taken": self._taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken; nothing is read yet."""
        self._begin = Place(**{key: value for key, value in state.items() if key != "taken"})
        self._end, self._taken = self._begin, int(state["taken"])
        self._items: list[Item] | None = None
        self._events: Iterator[tuple[Event | None, Place]] | None = None

    @property
    def begun_again(self) -> bool:
        """Whether the sample that was handed over last is not of the first epoch."""
        return self._begin.epoch > 0

    def take(self) -> Item:
        """The next sample.

        Raises:
            DataError: no sample is good, too many are bad, or a store that cannot be read.
        """
        if self._items is None:
            self._items = self._read_window()
        while self._taken >= len(self._items):
            self._begin, self._taken = self._end, 0
            self._items = self._read_window()
        self._taken += 1
        return self._items[self._taken - 1]

    def _read_window(self) -> list[Item]:
        """The samples of the window at `_begin`, shuffled; `_end` is where the next one begins."""
        begin, items, documents = self._begin, [], 0
        now = replace(begin, window=begin.window + 1, kinds=dict(begin.kinds), examples=list(begin.examples))
        self._events = self._events or self._read(begin)
        for event, after in self._events:
            if event is not None:
                event, found = self._items_of(event)
                self._count(now, event, counted=now.epoch == 0)
                documents += isinstance(event.found, ShardSample)
                items += found
            else:
                self._check(now, at_end=True)
            now.epoch, now.file, now.offset = after.epoch, after.file, after.offset
            if event is None or documents >= self.window:
                break
        self._end = now
        order = philox(self.seed, _WINDOW, zlib.crc32(self.name.encode()), begin.window).permutation(len(items))
        return [items[number] for number in order] if self.window > 1 else items

    def _read(self, place: Place) -> Iterator[tuple[Event | None, Place]]:
        """Events, each with the place behind it; None at the end of an epoch."""
        epoch, first, offset = place.epoch, place.file, place.offset
        while True:
            order = philox(self.seed, _FILES, zlib.crc32(self.name.encode()), epoch).permutation(len(self.files))
            for number in range(first, len(self.files)):
                for event in read_file(self.files[order[number]], self.checks, offset, self.open_source, unique=False):
                    done = event.after is None
                    yield event, Place(epoch, number + done, event.after or 0)
                offset = 0
            epoch, first = epoch + 1, 0
            yield None, Place(epoch)

    def _items_of(self, event: Event) -> tuple[Event, list[Item]]:
        """What a good sample becomes; the event is that of a bad one where it does not fit."""
        sample, tokenizer = event.found, self.checks.tokenizer
        if not isinstance(sample, ShardSample) or tokenizer is None or sample.counts is None:
            return event, []
        cut = list(pieces(sample.record, tokenizer.encode, self.checks.row_tokens or 1 << 62))
        items = []
        for piece in cut:
            counts = sample.counts if len(cut) == 1 else measure(piece, tokenizer, PATCH)
            items.append(Item(sample.shard, sample.key, piece, sample.bodies, counts))
        try:
            return event, [self._extended(item) for item in items] if self.extra else items
        except Refused as fault:
            return event._replace(found=BadSample(sample.shard, sample.key, fault.kind, fault.reason)), []

    def _extended(self, item: Item) -> Item:
        """With the counts that it has in the run. Raises Refused: it cannot be used, or is longer than a row."""
        assert self.extra is not None
        more = self.extra(item.record)
        counts = item.counts._replace(
            tokens=item.counts.tokens + more, dropped_tokens=item.counts.dropped_tokens + more
        )
        if counts.tokens > self.row_tokens:
            raise Refused("too_long", f"{counts.tokens} tokens; a row takes {self.row_tokens}")
        return item._replace(counts=counts)

    def _count(self, now: Place, event: Event, counted: bool) -> None:
        bad = event.found.bad if isinstance(event.found, ShardEnd) else event.found
        if not counted or bad is None:
            return
        if isinstance(bad, BadSample):
            now.kinds[bad.kind] = now.kinds.get(bad.kind, 0) + 1
            now.examples += [asdict(bad)] if len(now.examples) < EXAMPLES else []
        else:
            now.good += 1
        if now.good + now.bad >= _AT_LEAST:
            self._check(now)

    def _check(self, now: Place, at_end: bool = False) -> None:
        """Raises DataError: a share of bad samples above `max_bad`, while reading by three standard deviations."""
        seen = now.good + now.bad
        borne = self.max_bad * seen
        if now.good and now.bad <= borne + (0 if at_end else 3 * math.sqrt(borne)):
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(now.kinds).most_common(8))
        first = next((f": {bad['shard']}: {bad['key']}: {bad['reason']}" for bad in now.examples), "")
        why = f"more than max_bad={self.max_bad:g} allows" if now.good else "no sample is good"
        raise DataError(f"data.source.sources.{self.name}: {why}: {now.bad:,} of {seen:,} are bad ({kinds}){first}")


def account_of(states: Mapping[str, Mapping[str, Any]], max_bad: float) -> dict[str, Any]:
    """Of the states of several streams, as `account.joined` has it of files that were read to their ends."""
    kinds: Counter[str] = sum((Counter(state["kinds"]) for state in states.values()), Counter())
    sets = {
        name: {"good": state["good"], "bad": sum(state["kinds"].values()), "kinds": dict(state["kinds"])}
        | {"epoch": state["epoch"], "file": state["file"], "offset": state["offset"]}
        for name, state in states.items()
    }
    total = {key: sum(row[key] for row in sets.values()) for key in ("good", "bad")}
    return {**total, "max_bad": max_bad, "kinds": dict(kinds), "sets": sets}
