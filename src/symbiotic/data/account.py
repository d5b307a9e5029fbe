"""The account of what was read: good samples and bad ones by set, shard and kind, and how many bad ones are borne."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from symbiotic.data.bad import KINDS, BadSample
from symbiotic.data.checks import ShardSample
from symbiotic.data.errors import DataError, readable_errors
from symbiotic.data.scan import Event, ShardEnd
from symbiotic.files import write_json, write_text

ACCOUNT, BAD_SAMPLES = "data_account.json", "bad_samples.jsonl"


def set_name(shard: str) -> str:
    """`name` of `folder/name-00017.tar`; of a shard that is only numbered, its folder's, or `shards`."""
    path = Path(shard)
    return (path.parent.name or "shards") if path.stem.isdigit() else re.sub(r"-\d+$", "", path.stem)


@dataclass
class ShardCounts:
    """Of one shard. after: offset that reading goes on from, None when it is done. size and unread: bytes, then."""

    good: int = 0
    bad: list[BadSample] = field(default_factory=list)
    after: int | None = 0
    size: int = 0
    unread: int = 0

    @property
    def kinds(self) -> Counter[str]:
        return Counter(bad.kind for bad in self.bad)


class Account:
    """Counts the events of scans, each once, in the process that hands the samples on.

    Args:
        shards: all that are to be read; the order of tables and files.
        max_bad: share of bad samples, and of bytes that cannot be read, that is borne; in [0, 1].
        folder: where `write` puts `data_account.json` and `bad_samples.jsonl`; None: nowhere.
        at_least: samples after which the share is looked at while reading goes on; None: only at the end.

    Raises:
        DataError: no shards, or one of them twice.
    """

    def __init__(
        self, shards: Sequence[str], max_bad: float = 0.01, folder: Path | None = None, at_least: int | None = 500
    ) -> None:
        if not shards:
            raise DataError("no shards to read")
        if twice := [shard for shard, count in Counter(shards).items() if count > 1]:
            raise DataError(f"{twice[0]}: this shard is named twice")
        self.shards = {shard: ShardCounts() for shard in shards}
        self.max_bad, self.folder, self.at_least = max_bad, folder, at_least
        self.good = self.bad = 0

    def add(self, event: Event) -> None:
        """Count an event.

        Raises:
            DataError: far too many bad samples to go on; the account is written.
        """
        shard, found = self.shards[event.shard], event.found
        shard.after = event.after
        if isinstance(found, ShardSample):
            shard.good += 1
            self.good += 1
            return
        if isinstance(found, ShardEnd):
            shard.size, shard.unread = found.size, found.unread
        bad = found.bad if isinstance(found, ShardEnd) else found
        if bad is not None:
            shard.bad.append(bad)
            self.bad += 1
            self._check_early()

    def _check_early(self) -> None:
        """A share that is above the limit by three standard deviations of the count."""
        seen = self.good + self.bad
        if self.at_least is not None and seen >= self.at_least:
            borne = self.max_bad * seen
            if self.bad > borne + 3 * math.sqrt(borne) or not self.good:
                raise self._too_many()

    def finish(self) -> None:
        """Write the account and look at the shares, when everything was read.

        Raises:
            DataError: no good sample, or more bad ones, or more unread bytes, than are borne.
        """
        self.write()
        if not self.good or self.bad_share > self.max_bad or self.unread_share > self.max_bad:
            raise self._too_many()

    @property
    def bad_share(self) -> float:
        """Of the samples, in [0, 1]."""
        return self.bad / max(1, self.good + self.bad)

    @property
    def unread_share(self) -> float:
        """Of the bytes of the shards that are done, in [0, 1]."""
        done = self.shards.values()
        return sum(shard.unread for shard in done) / max(1, sum(shard.size for shard in done))

    @property
    def kinds(self) -> dict[str, int]:
        """Bad samples by kind, in the order of `KINDS`."""
        total: Counter[str] = sum((shard.kinds for shard in self.shards.values()), Counter())
        return {kind: total[kind] for kind in KINDS if total[kind]}

    def summary(self) -> str:
        """How many are bad, by kind, and in which shard most; one line."""
        kinds = sorted(self.kinds.items(), key=lambda item: -item[1])
        told = ", ".join(f"{kind} {count}" for kind, count in kinds[:8])
        more = f" and {len(kinds) - 8} more kinds" if len(kinds) > 8 else ""
        worst, counts = max(self.shards.items(), key=lambda item: len(item[1].bad))
        unread = f" and {self.unread_share:.2%} of the bytes are not read" if self.unread_share else ""
        where = f"; see {self.folder / ACCOUNT}" if self.folder else ""
        return (
            f"{self.bad:,} of {self.good + self.bad:,} samples are bad ({self.bad_share:.2%}){unread}: {told}{more}; "
            f"worst shard {worst} ({len(counts.bad):,} of {counts.good + len(counts.bad):,}){where}"
        )

    def _too_many(self) -> DataError:
        self.write()
        if not self.good + self.bad:
            return DataError(f"no samples in {len(self.shards)} shards")
        why = f"more than max_bad={self.max_bad:g} allows" if self.good else "no sample is good"
        return DataError(f"{why}: {self.summary()}")

    def write(self) -> None:
        """Write both files, each whole; the same bytes for the same samples, however many processes read them.

        Raises:
            DataError: the disk is full, or the folder cannot be written.
        """
        if self.folder is None:
            return
        write_account(self.folder, self.as_json(), [asdict(bad) for shard in self.shards.values() for bad in shard.bad])

    def as_json(self) -> dict[str, Any]:
        shards = {
            name: {
                "good": shard.good,
                "bad": len(shard.bad),
                "kinds": _ordered(shard.kinds),
                "bytes": shard.size,
                "unread_bytes": shard.unread,
                "done": shard.after is None,
            }
            for name, shard in self.shards.items()
        }
        total = {"good": self.good, "bad": self.bad, "max_bad": self.max_bad, "kinds": self.kinds}
        return {**total, "sets": self._sets(), "shards": shards}

    def _sets(self) -> dict[str, Any]:
        sets: dict[str, Any] = {}
        for name, shard in self.shards.items():
            entry = sets.setdefault(set_name(name), {"good": 0, "bad": 0, "kinds": Counter()})
            entry["good"] += shard.good
            entry["bad"] += len(shard.bad)
            entry["kinds"] += shard.kinds
        return {name: {**entry, "kinds": _ordered(entry["kinds"])} for name, entry in sets.items()}

    # ----------------------------------------------------------------------- going on later

    def state(self) -> dict[str, Any]:
        """Plain containers: the counts, and where reading stopped. The two belong together: none is counted twice."""
        return {name: asdict(shard) for name, shard in self.shards.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take a state back.

        Raises:
            DataError: it is of other shards.
        """
        if list(state) != list(self.shards):
            raise DataError("the data account that was stored is of other shards; start the reading anew")
        self.shards = {
            name: ShardCounts(**{**stored, "bad": [BadSample(**bad) for bad in stored["bad"]]})
            for name, stored in state.items()
        }
        self.good = sum(shard.good for shard in self.shards.values())
        self.bad = sum(len(shard.bad) for shard in self.shards.values())

    def positions(self) -> dict[str, int | None]:
        """Shard -> offset to go on from; None: done. For `stream.ShardStream`."""
        return {name: shard.after for name, shard in self.shards.items()}


def write_account(folder: Path, account: Mapping[str, Any], bad: Iterable[Mapping[str, Any]]) -> None:
    """`data_account.json`, and a line a bad sample of `bad_samples.jsonl`.

    Raises:
        DataError: the disk is full, or the folder cannot be written.
    """
    with readable_errors("write the account", folder):
        write_text(folder / BAD_SAMPLES, "".join(f"{json.dumps(entry, ensure_ascii=False)}\n" for entry in bad))
        write_json(folder / ACCOUNT, dict(account))


def joined(accounts: Mapping[str, Account], max_bad: float) -> dict[str, Any]:
    """The account of several sources: as that of one, with a source's own counts under `sets`, and its name before
    those of its files."""
    kinds: Counter[str] = sum((Counter(account.kinds) for account in accounts.values()), Counter())
    total = {key: sum(getattr(account, key) for account in accounts.values()) for key in ("good", "bad")}
    sets = {n: {"good": a.good, "bad": a.bad, "kinds": a.kinds} for n, a in accounts.items()}
    shards = {f"{n}: {shard}": row for n, a in accounts.items() for shard, row in a.as_json()["shards"].items()}
    return {**total, "max_bad": max_bad, "kinds": _ordered(kinds), "sets": sets, "shards": shards}


def _ordered(kinds: Mapping[str, int]) -> dict[str, int]:
    return {kind: kinds[kind] for kind in KINDS if kinds.get(kind)}
